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
from rnnt_op.backends.gemm import add_product_, linear, padded_rows
from rnnt_op.backends.protocol import JointSums, Logits
from rnnt_op.jit import load_host_module
from rnnt_op.nodes import Rows


class NativeJointChunk:
    """See ``protocol.JointChunk``."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, activation: str, compute_dtype: torch.dtype
    ) -> None:
        self._operand = native_sources.operand_dtype(compute_dtype)
        self._real = native_sources.real_dtype(self._operand)
        self._weight = weight.to(self._operand)
        self._bias = None if bias is None else bias.to(self._operand)
        self._hidden_kernel = load_host_module(native_sources.hidden(self._operand, activation))
        self._gradient_kernel = load_host_module(
            native_sources.joint_gradient(self._operand, activation)
        )
        vocab_size, joint_dim = weight.shape
        # Hidden states, logits, d_hidden; and for the weight's gradient copies of its operands:
        # wider ones of half, and oneDNN's own of what is transposed.
        self.row_bytes = (vocab_size + 2 * joint_dim) * self._operand.itemsize
        self.row_bytes += (vocab_size + joint_dim) * self._real.itemsize
        if self._operand != self._real:
            self.row_bytes += (vocab_size + joint_dim) * self._real.itemsize
        self.state_bytes = 2 * joint_dim * self._real.itemsize

    def allocate(self, chunk_rows: int) -> None:
        self._hidden = self._weight.new_empty((padded_rows(chunk_rows), self._weight.shape[1]))

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        return states[positions].to(self._real)

    def zeros(self, rows: int) -> Tensor:
        return self._weight.new_zeros((rows, self._weight.shape[1]), dtype=self._real)

    def logits(self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows) -> Logits:
        n, joint_dim = len(rows), self._weight.shape[1]
        hidden = self._hidden[: padded_rows(n)]
        hidden[n:].zero_()
        self._hidden_kernel.call(
            "hidden", encoder_rows, predictor_rows, rows.frame, rows.state, hidden, n, joint_dim
        )
        return Logits(linear(hidden, self._weight, self._bias)[:n], None, self._operand)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        n, joint_dim = len(rows), self._weight.shape[1]
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
        self._gradient_kernel.call(
            "joint_gradient",
            linear(d_logits, self._weight.t()),
            hidden,
            rows.frame,
            rows.state,
            sums.encoder_rows,
            sums.predictor_rows,
            n,
            joint_dim,
        )
