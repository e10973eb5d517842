"""The joint network over a chunk of node rows: two kernels, and GEMMs between them.

Hidden states and logit gradients are GEMM operands; all sums are float32 (float64 for float64).
``sources.Precision`` says what the rest is on a device. Kernels add the bias where they read
logits.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.backends.device import Matrices
from rnnt_op.backends.records import JointBytes, JointStates, Logits
from rnnt_op.backends.sources import Precision
from rnnt_op.nodes import Rows


class JointKernels(Protocol):
    """What a backend computes between the GEMMs."""

    def write_hidden(self, states: JointStates, rows: Rows, hidden: Tensor) -> None:
        """act(encoder + predictor) of each row, with dropout, into the first rows of ``hidden``."""

    def add_gradient(
        self, states: JointStates, rows: Rows, d_hidden: Tensor, hidden: Tensor
    ) -> None:
        """Adds d_hidden · act' to the sums of each row's frame and state; act' follows from what
        ``write_hidden`` was given and wrote."""


def joint_bytes(
    device: Matrices, column_count: int, joint_dim: int, precision: Precision
) -> JointBytes:
    """See ``protocol.Backend``."""
    hidden, logits = device.pitch(joint_dim), device.pitch(column_count)
    row = (logits + hidden) * precision.real.itemsize + hidden * precision.operand.itemsize
    row += device.copies_bytes(column_count + joint_dim, precision)
    product = column_count * joint_dim * precision.real.itemsize
    # Products of half operands take no longer than moving their results.
    keeps_logits = device.KEEPS_LOGITS and precision.operand == precision.real
    kept = logits * precision.logits.itemsize if keeps_logits else 0
    return JointBytes(row, kept, _packed_bytes(device, joint_dim, precision), product)


def _packed_bytes(device: Matrices, joint_dim: int, precision: Precision) -> int:
    return device.pitch(joint_dim) * (precision.packed.itemsize + precision.real.itemsize)


class _States:
    """Encoder and predictor rows."""

    def __init__(
        self,
        device: Matrices,
        kernels: JointKernels,
        joint_dim: int,
        precision: Precision,
        like: Tensor,
    ) -> None:
        self._device, self._kernels, self._joint_dim = device, kernels, joint_dim
        self._precision, self._like = precision, like
        self.packed_bytes = _packed_bytes(device, joint_dim, precision)

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        return self._device.rows(states[positions].to(self._precision.packed))

    def zeros(self, rows: int) -> Tensor:
        return self._empty_rows(rows, self._joint_dim, self._precision.real).zero_()

    def _empty_rows(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self._device.empty_rows(rows, columns, dtype, self._like)


class OutputLayerChunk(_States):
    """See ``protocol.JointChunk``."""

    def __init__(
        self,
        device: Matrices,
        kernels: JointKernels,
        weight: Tensor,
        bias: Tensor | None,
        precision: Precision,
    ) -> None:
        columns, joint_dim = weight.shape
        super().__init__(device, kernels, joint_dim, precision, weight)
        self._weight = device.rows(weight.to(precision.operand))
        self._bias = None if bias is None else device.bias(bias, precision)
        sizes = joint_bytes(device, columns, joint_dim, precision)
        self.row_bytes, self.logits_bytes = sizes.row, sizes.logits

    def allocate(self, chunk_rows: int) -> None:
        device, precision, like = self._device, self._precision, self._like
        columns, rows = len(self._weight), device.rounded(chunk_rows, precision)
        self._hidden = self._empty_rows(rows, self._joint_dim, precision.operand)
        self._logits = device.products(rows, columns, precision, like)
        self._d_hidden = device.products(rows, self._joint_dim, precision, like)

    def room(self, rows: int) -> Tensor:
        rows = self._device.rounded(rows, self._precision)
        return self._empty_rows(rows, len(self._weight), self._precision.logits)

    def logits(self, states: JointStates, rows: Rows, out: Tensor | None = None) -> Logits:
        hidden = self._write_hidden(states, rows)
        if out is None or len(out) < len(hidden):
            out = self._logits
        values = self._device.linear(hidden, self._weight, _first(out, len(hidden)))
        return self._with_bias(values[: len(rows)])

    def again(self, states: JointStates, rows: Rows, values: Tensor) -> Logits:
        self._write_hidden(states, rows)
        return self._with_bias(values)

    def _with_bias(self, values: Tensor) -> Logits:
        return Logits(values, self._bias, self._precision.operand)

    def _write_hidden(self, states: JointStates, rows: Rows) -> Tensor:
        hidden = self._hidden_of(rows)
        if len(hidden) > len(rows):
            hidden[len(rows) :].zero_()
        self._kernels.write_hidden(states, rows, hidden)
        return hidden

    def backward(self, states: JointStates, rows: Rows, d_logits: Tensor) -> None:
        device, hidden, sums = self._device, self._hidden_of(rows), states.sums
        d_logits = d_logits.to(self._precision.operand)
        if len(hidden) > len(rows):
            d_logits = F.pad(d_logits, (0, 0, 0, len(hidden) - len(rows)))
        if sums.bias is not None:
            device.add_column_sums_(sums.bias, d_logits)
        if sums.weight is not None:
            device.add_product_(sums.weight, d_logits.t(), hidden)
        if sums.encoder_rows is None and sums.predictor_rows is None:
            return
        d_hidden = device.linear(d_logits, self._weight.t(), _first(self._d_hidden, len(hidden)))
        self._kernels.add_gradient(states, rows, d_hidden, hidden)

    def _hidden_of(self, rows: Rows) -> Tensor:
        return self._hidden[: self._device.rounded(len(rows), self._precision)]


class AdditiveChunk(_States):
    """See ``protocol.Backend.additive_chunk``."""

    def __init__(
        self,
        device: Matrices,
        kernels: JointKernels,
        joint_dim: int,
        precision: Precision,
        like: Tensor,
    ) -> None:
        super().__init__(device, kernels, joint_dim, precision, like)
        self.row_bytes = device.pitch(joint_dim) * precision.real.itemsize
        self.logits_bytes = 0  # a sum takes no longer than reading one

    def allocate(self, chunk_rows: int) -> None:
        self._logits = self.room(chunk_rows)

    def room(self, rows: int) -> Tensor:
        return self._empty_rows(rows, self._joint_dim, self._precision.real)

    def logits(self, states: JointStates, rows: Rows, out: Tensor | None = None) -> Logits:
        logits = self._logits[: len(rows)]
        self._kernels.write_hidden(states, rows, logits)
        return Logits(logits, None, self._precision.real)

    def again(self, states: JointStates, rows: Rows, values: Tensor) -> Logits:
        return Logits(values, None, self._precision.real)

    def backward(self, states: JointStates, rows: Rows, d_logits: Tensor) -> None:
        # The identity's derivative does not ask for its value.
        self._kernels.add_gradient(states, rows, d_logits, d_logits)


def _first(buffer: Tensor | None, rows: int) -> Tensor | None:
    return None if buffer is None else buffer[:rows]
