"""The backends that tests run on, by name, with what each needs."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from rnnt_op import backends
from rnnt_op.backends.protocol import Backend

NEEDS_CXX = pytest.mark.skipif(
    not any(map(shutil.which, os.environ.get("CXX", "c++ g++ clang++").split())),
    reason="needs a C++ compiler",
)
NEEDS_GXX = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NATIVE = pytest.param("native", id="native", marks=NEEDS_CXX)
EAGER = pytest.param("eager", id="eager")
EMULATOR = pytest.param("emulator", id="emulator", marks=NEEDS_GXX)
CUDA = pytest.param("cuda", id="cuda", marks=NEEDS_CUDA)


def cpu_backend(name: str) -> Backend:
    """The backend called "native", "eager" or "emulator"."""
    if name == "native":
        from rnnt_op.backends.native import NativeBackend

        return NativeBackend()
    if name == "eager":
        from rnnt_op.backends import eager

        return eager
    assert name == "emulator", name
    from emulated import emulated_backend

    return emulated_backend()


def serve_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Has the backend of that name serve CPU tensors."""
    backend = cpu_backend(name)
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device: backend)
