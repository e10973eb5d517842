"""One module a backend; each holds the primitives that ``eager`` names and describes."""

from __future__ import annotations

from types import ModuleType

import torch


def backend_for(device: torch.device) -> ModuleType:
    """The primitives that serve tensors on ``device``."""
    from rnnt_op.backends import eager

    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"rnnt_op has no backend for device {device}; use cpu or cuda tensors")
    return eager
