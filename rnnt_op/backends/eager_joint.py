"""The joint network over a chunk of node rows, in torch operations.

The buffers of a chunk are reused from chunk to chunk, small enough to stay in cache. Half inputs
are summed in float32; where GEMMs have half operands, their results are half too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.backends.dropout import dropped
from rnnt_op.backends.records import Dropout, JointBytes, JointSums, Logits
from rnnt_op.nodes import FramesAndStates, Rows

# Of a random word in int64, with all that a round of its generator keeps.
_WORD_BYTES = 20


def joint_bytes(
    vocab_size: int,
    joint_dim: int,
    *,
    input_dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
    has_dropout: bool = False,
) -> JointBytes:
    """See ``protocol.Backend``."""
    dtype, gemm_dtype = _dtypes(compute_dtype)
    row = (vocab_size + 2 * joint_dim) * dtype.itemsize
    if gemm_dtype != dtype:
        row += (vocab_size + 2 * joint_dim) * gemm_dtype.itemsize
    if has_dropout:
        row += (1 + _WORD_BYTES) * joint_dim
    return JointBytes(row, _state_bytes(joint_dim, dtype), product=0)


def _dtypes(compute_dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """Of sums, and of the GEMMs' operands."""
    # On a CPU, float16 GEMMs are slower than float32 ones and less exact.
    is_float16 = compute_dtype == torch.float16
    gemm_dtype = torch.float32 if is_float16 else compute_dtype
    return torch.promote_types(compute_dtype, torch.float32), gemm_dtype


def _state_bytes(joint_dim: int, dtype: torch.dtype) -> int:
    return 2 * joint_dim * dtype.itemsize


class _EagerStates:
    """Encoder and predictor rows, their hidden states, and the gradient's way back."""

    def __init__(
        self,
        joint_dim: int,
        dtype: torch.dtype,
        activation: str,
        dropout: Dropout | None,
        like: Tensor,
    ) -> None:
        self._joint_dim, self._dtype, self._like = joint_dim, dtype, like
        self._activation, self._dropout = activation, dropout
        self.state_bytes = _state_bytes(joint_dim, dtype)

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        return states[positions].to(self._dtype)

    def zeros(self, rows: int) -> Tensor:
        return self._like.new_zeros((rows, self._joint_dim), dtype=self._dtype)

    def _write_hidden(
        self,
        encoder_rows: Tensor,
        predictor_rows: Tensor,
        rows: Rows,
        packed: FramesAndStates,
        hidden: Tensor,
        scratch: Tensor,
    ) -> None:
        torch.index_select(encoder_rows, 0, rows.frame, out=hidden)
        torch.index_select(predictor_rows, 0, rows.state, out=scratch)
        activate_(hidden.add_(scratch), self._activation)
        if self._dropout is not None:
            self._dropped = dropped(self._dropout, rows, packed, self._joint_dim)
            hidden.masked_fill_(self._dropped, 0.0).mul_(self._dropout.scale)

    def _add_gradient(self, d_hidden: Tensor, hidden: Tensor, rows: Rows, sums: JointSums) -> None:
        """Destroys both."""
        if self._dropout is not None:
            hidden.div_(self._dropout.scale)
            # A product, so that the NaN of a sample without a loss stays.
            d_hidden.mul_(~self._dropped).mul_(self._dropout.scale)
        activation_gradient_(d_hidden, hidden, self._activation)
        if sums.encoder_rows is not None:
            _add_segment_sums_(sums.encoder_rows, d_hidden, rows.frame, is_sorted=True)
        if sums.predictor_rows is not None:
            _add_segment_sums_(sums.predictor_rows, d_hidden, rows.state, is_sorted=False)


class EagerJointChunk(_EagerStates):
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
        dtype, self._gemm_dtype = _dtypes(compute_dtype)
        super().__init__(joint_dim, dtype, activation, dropout, weight)
        self._weight = weight.to(self._gemm_dtype)
        self._bias = None if bias is None else bias.to(self._gemm_dtype)
        self.row_bytes = joint_bytes(
            vocab_size,
            joint_dim,
            input_dtype=None,
            compute_dtype=compute_dtype,
            has_dropout=dropout is not None,
        ).row

    def allocate(self, chunk_rows: int) -> None:
        vocab_size, joint_dim = self._weight.shape

        def buffer(columns: int, dtype: torch.dtype) -> Tensor:
            return self._weight.new_empty((chunk_rows, columns), dtype=dtype)

        self._hidden = buffer(joint_dim, self._dtype)
        self._d_hidden = buffer(joint_dim, self._dtype)
        self._logits = buffer(vocab_size, self._dtype)
        self._gemm_hidden, self._gemm_d_hidden, self._gemm_logits = (
            self._hidden,
            self._d_hidden,
            self._logits,
        )
        if self._gemm_dtype != self._dtype:
            self._gemm_hidden = buffer(joint_dim, self._gemm_dtype)
            self._gemm_d_hidden = buffer(joint_dim, self._gemm_dtype)
            self._gemm_logits = buffer(vocab_size, self._gemm_dtype)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        n = len(rows)
        hidden, scratch = self._hidden[:n], self._d_hidden[:n]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, hidden, scratch)
        gemm_hidden, product = self._gemm_hidden[:n], self._gemm_logits[:n]
        logits = self._logits[:n]
        _assign(gemm_hidden, hidden)
        if self._bias is None:
            torch.mm(gemm_hidden, self._weight.t(), out=product)
        else:
            # Inside the GEMM, before its result is rounded.
            torch.addmm(self._bias, gemm_hidden, self._weight.t(), out=product)
        _assign(logits, product)
        return Logits(logits, None, self._dtype)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        n = len(rows)
        if sums.bias is not None:
            sums.bias.add_(d_logits.sum(0))
        if sums.weight is not None:
            # Not in half: every chunk's part would be rounded before it is added.
            sums.weight.addmm_(d_logits.t(), self._hidden[:n])
        if sums.encoder_rows is None and sums.predictor_rows is None:
            return
        gemm_d_logits = self._gemm_logits[:n]
        gemm_d_hidden, d_hidden = self._gemm_d_hidden[:n], self._d_hidden[:n]
        _assign(gemm_d_logits, d_logits)
        torch.mm(gemm_d_logits, self._weight, out=gemm_d_hidden)
        _assign(d_hidden, gemm_d_hidden)
        self._add_gradient(d_hidden, self._hidden[:n], rows, sums)


class EagerAdditiveChunk(_EagerStates):
    """See ``protocol.Backend.additive_chunk``."""

    def __init__(self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor) -> None:
        dtype = torch.promote_types(input_dtype or torch.float32, torch.float32)
        super().__init__(joint_dim, dtype, "identity", None, like)
        self.row_bytes = 2 * joint_dim * dtype.itemsize

    def allocate(self, chunk_rows: int) -> None:
        self._logits = self._like.new_empty((chunk_rows, self._joint_dim), dtype=self._dtype)
        self._scratch = torch.empty_like(self._logits)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        logits, scratch = self._logits[: len(rows)], self._scratch[: len(rows)]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, logits, scratch)
        return Logits(logits, None, self._dtype)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        # The identity's derivative does not ask for its value.
        self._add_gradient(d_logits, d_logits, rows, sums)


def activate_(pre_activation: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return pre_activation.tanh_()
    if activation == "relu":
        return pre_activation.relu_()
    if activation == "sigmoid":
        return pre_activation.sigmoid_()
    assert activation == "identity", activation
    return pre_activation


def activation_gradient_(d_hidden: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """Gradient of the pre-activation, from the activation's value alone, in place. [R, H]"""
    aten = torch.ops.aten
    if activation == "tanh":
        aten.tanh_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
    elif activation == "relu":
        # A product, so that the NaN of a sample without a loss stays.
        d_hidden.mul_(hidden > 0)
    elif activation == "sigmoid":
        aten.sigmoid_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
    else:
        assert activation == "identity", activation
    return d_hidden


def _assign(destination: Tensor, source: Tensor) -> None:
    """Copies with a change of dtype; where there is none both are the same buffer already."""
    if destination.dtype != source.dtype:
        destination.copy_(source)


def _add_segment_sums_(sums: Tensor, values: Tensor, segment: Tensor, *, is_sorted: bool) -> None:
    """sums[segment[r]] += values[r], added in ascending order of r.

    Args:
        sums: [M, H]
        values: [R, H]
        segment: int32. [R]
        is_sorted: whether the segments ascend.
    """
    if is_sorted:
        order = torch.arange(segment.shape[0], dtype=torch.int32, device=segment.device)
    else:
        segment, order = segment.sort(stable=True)
        order = order.int()
    first, last = int(segment[0]), int(segment[-1])
    bounds = torch.arange(first, last + 1, dtype=torch.int32, device=segment.device)
    offsets = torch.searchsorted(segment, bounds, out_int32=True)
    sums[first : last + 1] += F.embedding_bag(order, values, offsets, mode="sum")
