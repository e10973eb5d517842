"""Tensors whose neighbouring memory must not be touched."""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal

import torch
from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def guarded(
    tensor: Tensor, side: Literal["start", "end"] = "end", *, alignment: int = 16
) -> Tensor:
    """A contiguous copy of a CPU tensor between two pages that may not be touched.

    A kernel that steps beyond it fails with an ``EmulatorError``; other code dies. The memory is
    freed with the tensor.

    Args:
        tensor: what to copy.
        side: where the data touch the page: "end" finds accesses behind the tensor, "start" those
            before it.
        alignment: of the data's address in bytes. At side "end", up to ``alignment`` − 1 bytes
            behind the data can be accessed; they hold 0xFF.
    """
    data = tensor.detach().contiguous()
    size = data.numel() * data.element_size()
    if size == 0:
        return torch.empty_like(data)  # without memory
    page = mmap.PAGESIZE
    usable = -(-size // page) * page
    mapping = mmap.mmap(-1, usable + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    start = page if side == "start" else page + usable - -(-size // alignment) * alignment
    ctypes.memset(base + page, 0xFF, usable)
    for address in (base, base + page + usable):
        if _libc.mprotect(address, page, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start)  # keeps mapping
    return copy.view(data.dtype).view(data.shape).copy_(data)
