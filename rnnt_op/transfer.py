"""Host to device without waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for the copy, nor for work before it.

    Except in a graph of ``torch.compile``, which has no pinned memory.
    """
    is_traced = torch.compiler.is_compiling()
    if tensor.device.type == "cpu" and device.type == "cuda" and not is_traced:
        # From pageable memory, the driver may wait for the stream first.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
