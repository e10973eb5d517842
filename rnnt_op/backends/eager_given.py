"""Copies of given logits' rows in torch operations."""

from __future__ import annotations

from torch import Tensor

from rnnt_op.nodes import FramesAndStates, Rows


class EagerRowCopies:
    """See ``given.RowCopies``."""

    def gather(self, logits: Tensor, rows: Rows, packed: FramesAndStates, values: Tensor) -> None:
        values.copy_(logits[_positions(rows, packed)])

    def scatter(
        self, d_logits: Tensor, rows: Rows, packed: FramesAndStates, gradient: Tensor
    ) -> None:
        gradient[_positions(rows, packed)] = d_logits.to(gradient.dtype)


def _positions(rows: Rows, packed: FramesAndStates) -> tuple[Tensor, ...]:
    of_rows = [of_frame.index_select(0, rows.frame) for of_frame in packed.frame_positions]
    low = packed.low.index_select(0, rows.frame)
    return *of_rows, packed.state_index.index_select(0, rows.state) - low
