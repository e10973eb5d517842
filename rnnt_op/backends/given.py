"""Logits that the caller holds: read where they lie, or copied a chunk of node rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rnnt_op.backends.records import InPlace, Logits, Places
from rnnt_op.nodes import FramesAndStates, Rows, aligned


class GivenInPlace:
    """See ``protocol.GivenChunk``. Nothing is copied: kernels read rows of any dtype and strides,
    and write their gradient at its place."""

    row_bytes = 2 * torch.int32.itemsize  # what selects a row

    def __init__(self, logits: Tensor, gradient: Tensor) -> None:
        self._logits, self._gradient = logits, gradient

    def allocate(self, chunk_rows: int) -> None:
        """There are no buffers."""

    def group(self, packed: FramesAndStates) -> _RowsInPlace:
        places = Places.of(self._logits, packed)
        # Without a gradient nobody asks for its place.
        wanted = self._gradient if self._gradient.dim() == self._logits.dim() else self._logits
        in_place = InPlace(places, self._gradient, Places.of(wanted, packed))
        return _RowsInPlace(Logits(self._logits, None, self._logits.dtype, in_place))


@dataclass(frozen=True)
class _RowsInPlace:
    all_logits: Logits

    def logits(self, rows: Rows) -> Logits:
        return self.all_logits

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        """It is in its place."""


class RowCopies(Protocol):
    """How a backend copies rows."""

    def gather(self, logits: Tensor, rows: Rows, packed: FramesAndStates, values: Tensor) -> None:
        """Fills values [R, V] with rows of given logits."""

    def scatter(
        self, d_logits: Tensor, rows: Rows, packed: FramesAndStates, gradient: Tensor
    ) -> None:
        """Puts rows [R, V] at their place in the gradient of given logits."""


class GivenCopies:
    """See ``protocol.GivenChunk``. A chunk is copied, as wide as sums."""

    def __init__(
        self, copies: RowCopies, logits: Tensor, gradient: Tensor, temporary_bytes: int = 0
    ) -> None:
        self._copies, self._given, self._gradient = copies, logits, gradient
        self._dtype = torch.promote_types(logits.dtype, torch.float32)
        self._pitch = aligned(logits.shape[-1])
        self.row_bytes = self._pitch * self._dtype.itemsize + temporary_bytes

    def allocate(self, chunk_rows: int) -> None:
        self._buffer = self._given.new_empty((chunk_rows, self._pitch), dtype=self._dtype)

    def group(self, packed: FramesAndStates) -> _CopiedRows:
        return _CopiedRows(self._copies, self._given, self._gradient, self._buffer, packed)


@dataclass(frozen=True)
class _CopiedRows:
    copies: RowCopies
    given: Tensor
    gradient: Tensor
    buffer: Tensor
    packed: FramesAndStates

    def logits(self, rows: Rows) -> Logits:
        values = self.buffer[: len(rows), : self.given.shape[-1]]
        self.copies.gather(self.given, rows, self.packed, values)
        return Logits(values, None, self.given.dtype)

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        self.copies.scatter(d_logits, rows, self.packed, self.gradient)
