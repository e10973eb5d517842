"""Backends: the engine's primitives, once a kind of device; ``protocol`` describes them.

Compiled kernels serve CPUs and NVIDIA's GPUs. Torch operations serve a CPU where kernels do not
compile, and every other device.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rnnt_op.backends.kernels import USUAL, Kernels
from rnnt_op.backends.protocol import Backend
from rnnt_op.jit.errors import JitError


@functools.cache
def _cpu() -> Backend:
    from rnnt_op.backends.native import NativeBackend

    return NativeBackend()


@functools.cache
def _cuda(device: torch.device) -> Backend:
    if torch.version.hip is not None:
        return _other(device)  # torch's name for AMD's GPUs is cuda, too
    from rnnt_op.backends.cuda import CudaBackend
    from rnnt_op.backends.cuda_device import CudaDevice

    return CudaBackend(CudaDevice(device))


def _eager() -> Backend:
    from rnnt_op.backends import eager

    return eager


@functools.cache
def _other(device: torch.device) -> Backend:
    """What serves a device that no kernels are for."""
    if device.type == "mps":
        raise ValueError(
            "rnnt_op: mps computes in no float64, which the recursions take; move the tensors to "
            "the CPU"
        )
    warnings.warn(
        f"rnnt_op: torch operations serve {device}, more slowly than kernels; they have not been "
        "run on such a device so far",
        RuntimeWarning,
        stacklevel=2,
    )
    return _eager()


BACKENDS: dict[str, Callable[[torch.device], Backend]] = {
    "cpu": lambda device: _cpu(),
    "cuda": _cuda,
}
"""What serves a device, by device type; ``_other`` serves those that are not here."""


@contextmanager
def serving(device: torch.device, kernels: Kernels) -> Iterator[Backend]:
    """The primitives that serve tensors on a device, with kernels loaded; the device is current.

    Raises:
        JitError: on a GPU, a kernel does not compile or load.
        RuntimeError: the device is in a state in which the engine cannot run.
        ValueError: nothing serves the device.
    """
    backend = _backend(device)
    with backend.guard(device):
        if device.type == "cpu":
            backend = _loaded(backend, kernels)
        else:
            backend.load(kernels)
        yield backend


def backend_for(device: torch.device) -> Backend:
    """The primitives that would serve tensors on a device; a GPU need not be there."""
    backend = _backend(device)
    served: Backend = _loaded(backend, USUAL) if device.type == "cpu" else backend
    return served


def _backend(device: torch.device) -> Any:
    return BACKENDS.get(device.type, _other)(device)


@functools.lru_cache(maxsize=256)
def _loaded(backend: Any, kernels: Kernels) -> Backend:
    """The backend, or torch operations if its kernels cannot be compiled here."""
    try:
        backend.load(kernels)
    except JitError as error:
        warnings.warn(
            f"rnnt_op: torch operations serve the CPU instead of compiled kernels, more slowly: "
            f"{error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return _eager()
    served: Backend = backend
    return served
