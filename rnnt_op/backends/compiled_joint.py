"""The joint network over a chunk of node rows, in compiled kernels and GEMMs.

Hidden states and logit gradients are GEMM operands; all sums are float32 (float64 for float64).
``sources.Precision`` says what the rest is on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.backends.device import Device, Shape
from rnnt_op.backends.records import Dropout, JointBytes, JointSums, Logits
from rnnt_op.backends.sources import Precision
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.nodes import FramesAndStates, Rows

AddGradient: TypeAlias = Callable[[KernelSource, dict[str, Argument], Rows, JointSums], None]
"""Calls a device's kernel ``joint_gradient`` with what depends on rows and sums besides."""

_WARP = 32
_ROWS_OF_BLOCK = 8


def joint_bytes(
    device: Device, vocab_size: int, joint_dim: int, precision: Precision
) -> JointBytes:
    """See ``protocol.Backend``."""
    hidden, logits = device.pitch(joint_dim), device.pitch(vocab_size)
    row = (logits + hidden) * precision.product.itemsize + hidden * precision.operand.itemsize
    row += device.copies_bytes(vocab_size + joint_dim, precision)
    product = vocab_size * joint_dim * precision.real.itemsize
    return JointBytes(row, _state_bytes(device, joint_dim, precision), product)


def _state_bytes(device: Device, joint_dim: int, precision: Precision) -> int:
    return device.pitch(joint_dim) * (precision.state.itemsize + precision.real.itemsize)


class _States:
    """Encoder and predictor rows, their hidden states, and the gradient's way back."""

    def __init__(
        self,
        device: Device,
        add_gradient: AddGradient,
        joint_dim: int,
        precision: Precision,
        activation: str,
        dropout: Dropout | None,
        like: Tensor,
    ) -> None:
        self._device, self._add, self._joint_dim = device, add_gradient, joint_dim
        self._precision, self._dropout, self._like = precision, dropout, like
        of_hidden = precision, activation, dropout is not None
        self._hidden_source = device.sources.hidden(*of_hidden)
        self._gradient_source = device.sources.joint_gradient(*of_hidden)
        self.state_bytes = _state_bytes(device, joint_dim, precision)

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        return self._device.rows(states[positions].to(self._precision.state))

    def zeros(self, rows: int) -> Tensor:
        return self._empty_rows(rows, self._joint_dim, self._precision.real).zero_()

    def _empty_rows(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self._device.empty_rows(rows, columns, dtype, self._like)

    def _write_hidden(
        self,
        encoder_rows: Tensor,
        predictor_rows: Tensor,
        rows: Rows,
        packed: FramesAndStates,
        hidden: Tensor,
    ) -> None:
        arguments: dict[str, Argument] = {
            **vars(packed),
            **vars(rows),
            **({} if self._dropout is None else self._dropout.arguments),
            "encoder": encoder_rows,
            "predictor": predictor_rows,
            "state_pitch": encoder_rows.stride(0),
            "hidden": hidden,
            "hidden_pitch": hidden.stride(0),
            "row_count": len(rows),
            "joint_dim": self._joint_dim,
        }
        blocks = -(-len(rows) // _ROWS_OF_BLOCK)
        shape = Shape((blocks, 1, 1), (_WARP, _ROWS_OF_BLOCK, 1))
        self._device.call(self._hidden_source, "hidden", shape, arguments)

    def _add_gradient(self, d_hidden: Tensor, hidden: Tensor, rows: Rows, sums: JointSums) -> None:
        arguments: dict[str, Argument] = {
            **({} if self._dropout is None else self._dropout.arguments),
            "d_hidden": d_hidden,
            "d_hidden_pitch": d_hidden.stride(0),
            "hidden": hidden,
            "hidden_pitch": hidden.stride(0),
            "row_count": len(rows),
            "joint_dim": self._joint_dim,
        }
        self._add(self._gradient_source, arguments, rows, sums)


class CompiledJointChunk(_States):
    """See ``protocol.JointChunk``."""

    def __init__(
        self,
        device: Device,
        add_gradient: AddGradient,
        weight: Tensor,
        bias: Tensor | None,
        precision: Precision,
        activation: str,
        dropout: Dropout | None,
    ) -> None:
        columns, joint_dim = weight.shape
        super().__init__(device, add_gradient, joint_dim, precision, activation, dropout, weight)
        self._weight = device.rows(weight.to(precision.operand))
        rounded = None if bias is None else device.bias(bias, precision)
        self._bias_of_gemm = rounded if device.ADDS_BIAS else None
        self._bias_of_kernels = None if device.ADDS_BIAS else rounded
        self.row_bytes = joint_bytes(device, columns, joint_dim, precision).row

    def allocate(self, chunk_rows: int) -> None:
        device, product = self._device, self._precision.product
        self._hidden = self._empty_rows(
            device.rounded(chunk_rows), self._joint_dim, self._precision.operand
        )
        self._logits = device.products(chunk_rows, len(self._weight), product, self._like)
        self._d_hidden = device.products(chunk_rows, self._joint_dim, product, self._like)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        hidden = self._hidden_of(rows)
        hidden[len(rows) :].zero_()
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, hidden)
        out = _first(self._logits, len(rows))
        values = self._device.linear(hidden, self._weight, self._bias_of_gemm, out)
        return Logits(values[: len(rows)], self._bias_of_kernels, self._precision.operand)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        device, hidden = self._device, self._hidden_of(rows)
        if len(hidden) > len(rows):
            d_logits = F.pad(d_logits, (0, 0, 0, len(hidden) - len(rows)))
        if sums.bias is not None:
            sums.bias.add_(torch.sum(d_logits, 0, dtype=self._precision.real))
        if sums.weight is not None:
            device.add_product_(sums.weight, d_logits.t(), hidden)
        if sums.encoder_rows is None and sums.predictor_rows is None:
            return
        out = _first(self._d_hidden, len(rows))
        d_hidden = device.linear(d_logits, self._weight.t(), None, out)
        self._add_gradient(d_hidden, hidden, rows, sums)

    def _hidden_of(self, rows: Rows) -> Tensor:
        return self._hidden[: self._device.rounded(len(rows))]


class CompiledAdditiveChunk(_States):
    """See ``protocol.Backend.additive_chunk``."""

    def __init__(
        self,
        device: Device,
        add_gradient: AddGradient,
        joint_dim: int,
        precision: Precision,
        like: Tensor,
    ) -> None:
        super().__init__(device, add_gradient, joint_dim, precision, "identity", None, like)
        self.row_bytes = device.pitch(joint_dim) * precision.real.itemsize

    def allocate(self, chunk_rows: int) -> None:
        self._logits = self._empty_rows(chunk_rows, self._joint_dim, self._precision.real)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        logits = self._logits[: len(rows)]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, logits)
        return Logits(logits, None, self._precision.real)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        # The identity's derivative does not ask for its value.
        self._add_gradient(d_logits, d_logits, rows, sums)


def _first(buffer: Tensor | None, rows: int) -> Tensor | None:
    return None if buffer is None else buffer[:rows]
