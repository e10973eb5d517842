"""The joint network over a chunk of node rows, in kernels of ``csrc/cpu`` and GEMMs.

Hidden states, logits and their gradients are GEMM operands of the compute dtype (float32 for
float16, whose GEMMs CPUs do not speed up); all arithmetic between GEMMs and all sums are float32
(float64 for float64).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.backends import native_sources
from rnnt_op.backends.dropout import gradient_arguments, hidden_arguments
from rnnt_op.backends.gemm import add_product_, linear, padded_rows
from rnnt_op.backends.protocol import Dropout, JointBytes, JointSums, Logits
from rnnt_op.jit import load_host_module
from rnnt_op.nodes import FramesAndStates, Rows


def joint_bytes(vocab_size: int, joint_dim: int, compute_dtype: torch.dtype) -> JointBytes:
    """See ``protocol.Backend``."""
    operand = native_sources.operand_dtype(compute_dtype)
    real = native_sources.real_dtype(operand)
    # Hidden states, logits, d_hidden; and for the weight's gradient copies of its operands:
    # wider ones of half, and oneDNN's own of what is transposed.
    row = (vocab_size + 2 * joint_dim) * operand.itemsize
    row += (vocab_size + joint_dim) * real.itemsize
    if operand != real:
        row += (vocab_size + joint_dim) * real.itemsize
    product = vocab_size * joint_dim * real.itemsize
    return JointBytes(row, _state_bytes(joint_dim, real), product)


def _state_bytes(joint_dim: int, real: torch.dtype) -> int:
    return 2 * joint_dim * real.itemsize


class _NativeStates:
    """Encoder and predictor rows, their hidden states, and the gradient's way back."""

    def __init__(
        self,
        joint_dim: int,
        operand: torch.dtype,
        activation: str,
        dropout: Dropout | None,
        like: Tensor,
    ) -> None:
        self._joint_dim, self._operand, self._like = joint_dim, operand, like
        self._real = native_sources.real_dtype(operand)
        self._dropout = dropout
        has_dropout = dropout is not None
        self._hidden_kernel = load_host_module(
            native_sources.hidden(operand, activation, has_dropout)
        )
        self._gradient_kernel = load_host_module(
            native_sources.joint_gradient(operand, activation, has_dropout)
        )
        self.state_bytes = _state_bytes(joint_dim, self._real)

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        return states[positions].to(self._real)

    def zeros(self, rows: int) -> Tensor:
        return self._like.new_zeros((rows, self._joint_dim), dtype=self._real)

    def _buffer(self, rows: int) -> Tensor:
        """Of hidden states."""
        return self._like.new_empty((rows, self._joint_dim), dtype=self._operand)

    def _write_hidden(
        self,
        encoder_rows: Tensor,
        predictor_rows: Tensor,
        rows: Rows,
        packed: FramesAndStates,
        hidden: Tensor,
    ) -> None:
        self._hidden_kernel.call(
            "hidden",
            encoder_rows,
            predictor_rows,
            rows.frame,
            rows.state,
            *hidden_arguments(self._dropout, packed),
            hidden,
            len(rows),
            self._joint_dim,
        )

    def _add_gradient(self, d_hidden: Tensor, hidden: Tensor, rows: Rows, sums: JointSums) -> None:
        self._gradient_kernel.call(
            "joint_gradient",
            d_hidden,
            hidden,
            rows.frame,
            rows.state,
            *gradient_arguments(self._dropout),
            sums.encoder_rows,
            sums.predictor_rows,
            len(rows),
            self._joint_dim,
        )


class NativeJointChunk(_NativeStates):
    """See ``protocol.JointChunk``."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        compute_dtype: torch.dtype,
        dropout: Dropout | None,
    ) -> None:
        vocab_size, joint_dim = weight.shape
        operand = native_sources.operand_dtype(compute_dtype)
        super().__init__(joint_dim, operand, activation, dropout, weight)
        self._weight = weight.to(operand)
        self._bias = None if bias is None else bias.to(operand)
        self.row_bytes = joint_bytes(vocab_size, joint_dim, compute_dtype).row

    def allocate(self, chunk_rows: int) -> None:
        self._hidden = self._buffer(padded_rows(chunk_rows))

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        n = len(rows)
        hidden = self._hidden[: padded_rows(n)]
        hidden[n:].zero_()
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, hidden)
        return Logits(linear(hidden, self._weight, self._bias)[:n], None, self._operand)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        n = len(rows)
        hidden = self._hidden[: padded_rows(n)]
        if len(hidden) > n:
            d_logits = F.pad(d_logits, (0, 0, 0, len(hidden) - n))
        if sums.bias is not None:
            sums.bias.add_(torch.sum(d_logits, 0, dtype=self._real))
        if sums.weight is not None:
            # Not in half: every chunk's part would be rounded before it is added.
            add_product_(sums.weight, d_logits.to(self._real).t(), hidden.to(self._real))
        if sums.encoder_rows is None and sums.predictor_rows is None:
            return
        self._add_gradient(linear(d_logits, self._weight.t()), hidden, rows, sums)


class NativeAdditiveChunk(_NativeStates):
    """See ``protocol.Backend.additive_chunk``."""

    def __init__(self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor) -> None:
        real = native_sources.real_dtype(input_dtype or torch.float32)
        super().__init__(joint_dim, real, "identity", None, like)
        self.row_bytes = joint_dim * real.itemsize

    def allocate(self, chunk_rows: int) -> None:
        self._logits = self._buffer(chunk_rows)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        logits = self._logits[: len(rows)]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, logits)
        return Logits(logits, None, self._real)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        # The identity's derivative does not ask for its value.
        self._add_gradient(d_logits, d_logits, rows, sums)
