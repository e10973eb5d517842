"""The joint network's kernels in torch operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.activations import activation_named
from rnnt_op.backends.dropout import dropped
from rnnt_op.backends.records import Dropout, JointStates
from rnnt_op.backends.sources import Precision
from rnnt_op.nodes import Rows

# Of a random word in int64, with all that a round of its generator keeps.
_WORD_BYTES = 20


@dataclass(frozen=True)
class EagerJointKernels:
    """See ``joint.JointKernels``."""

    precision: Precision
    activation: str
    dropout: Dropout | None

    def write_hidden(self, states: JointStates, rows: Rows, hidden: Tensor) -> None:
        value = activation_named(self.activation).value(_sums(states, rows))
        hidden = hidden[: len(rows)]
        if self.dropout is None:
            hidden.copy_(value)
        else:
            # −0 says that an element is dropped, and every other zero is +0.
            hidden.copy_(value.mul_(self.dropout.scale)).add_(0.0)
            is_dropped = dropped(self.dropout, rows, states.packed, hidden.shape[1])
            hidden.masked_fill_(is_dropped, -0.0)

    def add_gradient(
        self, states: JointStates, rows: Rows, d_hidden: Tensor, hidden: Tensor
    ) -> None:
        activation, sums = activation_named(self.activation), states.sums
        d_hidden = d_hidden[: len(rows)].to(self.precision.real)
        hidden = hidden[: len(rows)].to(self.precision.real)
        if self.dropout is not None:
            is_kept = hidden.ne(0).logical_or_(~hidden.signbit())
            # A product, so that the NaN of a sample without a loss stays.
            d_hidden = d_hidden * is_kept * self.dropout.scale
        if activation.follows == "argument":
            known = _sums(states, rows)
        else:
            known = hidden if self.dropout is None else hidden / self.dropout.scale
        d_states = activation.gradient(d_hidden, known)
        if sums.encoder_rows is not None:
            _add_segment_sums_(sums.encoder_rows, d_states, rows.frame, is_sorted=True)
        if sums.predictor_rows is not None:
            _add_segment_sums_(sums.predictor_rows, d_states, rows.state, is_sorted=False)


def working_bytes(joint_dim: int, precision: Precision, has_dropout: bool) -> int:
    """What the kernels take of a row."""
    random = (1 + _WORD_BYTES) * joint_dim if has_dropout else 0
    return 2 * joint_dim * precision.real.itemsize + random


def _sums(states: JointStates, rows: Rows) -> Tensor:
    """What is activated. [R, H]"""
    sums = states.encoder_rows.index_select(0, rows.frame)
    return sums.add_(states.predictor_rows.index_select(0, rows.state))


def _add_segment_sums_(sums: Tensor, values: Tensor, segment: Tensor, *, is_sorted: bool) -> None:
    """sums[segment[r]] += values[r], added in ascending order of r.

    Args:
        sums: [M, H]
        values: [R, H]
        segment: int32. [R]
        is_sorted: whether the segments ascend.
    """
    if sums.numel() == 0:
        return  # on some CPUs, embedding_bag refuses rows without elements
    if is_sorted:
        order = torch.arange(segment.shape[0], dtype=torch.int32, device=segment.device)
    else:
        segment, order = segment.sort(stable=True)
        order = order.int()
    first, last = int(segment[0]), int(segment[-1])
    bounds = torch.arange(first, last + 1, dtype=torch.int32, device=segment.device)
    offsets = torch.searchsorted(segment, bounds, out_int32=True)
    sums[first : last + 1] += F.embedding_bag(order, values, offsets, mode="sum")
