"""Backends: the engine's primitives, once a kind of device; ``protocol`` describes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rnnt_op.backends.protocol import Backend


def _cpu(device: torch.device) -> Backend:
    from rnnt_op.backends import eager

    return eager


def _cuda(device: torch.device) -> Backend:
    from rnnt_op.backends.cuda import cuda_backend

    return cuda_backend(device)


BACKENDS: dict[str, Callable[[torch.device], Backend]] = {"cpu": _cpu, "cuda": _cuda}
"""What serves a device, by device type."""


def backend_for(device: torch.device) -> Backend:
    """The primitives that serve tensors on ``device``."""
    if device.type not in BACKENDS:
        raise ValueError(f"rnnt_op has no backend for device {device}; use cpu or cuda tensors")
    return BACKENDS[device.type](device)
