"""Backends: the engine's primitives, once a kind of device; ``protocol`` describes them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from rnnt_op.backends.protocol import Backend


@functools.cache
def _cpu() -> Backend:
    """The native backend; torch operations where its kernels cannot be compiled here."""
    from rnnt_op.backends import eager, native_sources
    from rnnt_op.backends.native import NativeBackend
    from rnnt_op.jit import JitError, load_host_module

    try:
        load_host_module(native_sources.node_rows())
    except JitError as error:
        warnings.warn(
            f"rnnt_op: torch operations serve the CPU instead of compiled kernels, more slowly: "
            f"{error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return eager
    return NativeBackend()


def _cuda(device: torch.device) -> Backend:
    from rnnt_op.backends.cuda import cuda_backend

    return cuda_backend(device)


BACKENDS: dict[str, Callable[[torch.device], Backend]] = {
    "cpu": lambda device: _cpu(),
    "cuda": _cuda,
}
"""What serves a device, by device type."""


def backend_for(device: torch.device) -> Backend:
    """The primitives that serve tensors on ``device``."""
    if device.type not in BACKENDS:
        raise ValueError(f"rnnt_op has no backend for device {device}; use cpu or cuda tensors")
    return BACKENDS[device.type](device)
