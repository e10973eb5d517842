"""The joint network over a chunk of node rows, in CUDA kernels and GEMMs.

Hidden states and logit gradients are GEMM operands of the compute dtype; logits, hidden gradients
and all sums are float32 (float64 for float64). Rows of all buffers start at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.backends import cuda_sources
from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.backends.dropout import gradient_arguments, hidden_arguments
from rnnt_op.backends.protocol import Dropout, JointBytes, JointSums, Logits
from rnnt_op.nodes import FramesAndStates, Rows, aligned

_WARP = 32
_ROWS_OF_BLOCK = 8


def joint_bytes(
    vocab_size: int, joint_dim: int, input_dtype: torch.dtype | None, compute_dtype: torch.dtype
) -> JointBytes:
    """See ``protocol.Backend``."""
    real, columns = cuda_sources.real_dtype(compute_dtype), aligned(joint_dim)
    row = (aligned(vocab_size) + columns) * real.itemsize + columns * compute_dtype.itemsize
    state = cuda_sources.state_dtype(input_dtype, compute_dtype)
    product = vocab_size * joint_dim * real.itemsize
    return JointBytes(row, columns * (state.itemsize + real.itemsize), product)


class _CudaStates:
    """Encoder and predictor rows, their hidden states, and the gradient's way back."""

    def __init__(
        self,
        device: CudaDevice,
        joint_dim: int,
        state: torch.dtype,
        operand: torch.dtype,
        activation: str,
        dropout: Dropout | None,
        like: Tensor,
    ) -> None:
        self._device, self._joint_dim, self._like = device, joint_dim, like
        self._state, self._operand = state, operand
        self._real = cuda_sources.real_dtype(operand)
        self._dropout = dropout
        has_dropout = dropout is not None
        self._hidden_kernel = device.module(
            cuda_sources.hidden(state, operand, activation, has_dropout)
        )
        self._gradient_kernel = device.module(
            cuda_sources.joint_gradient(operand, activation, has_dropout)
        )
        self.state_bytes = aligned(joint_dim) * (state.itemsize + self._real.itemsize)

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        packed = self._rows(len(positions[0]), self._joint_dim, self._state)
        return packed.copy_(states[positions])

    def zeros(self, rows: int) -> Tensor:
        return self._rows(rows, self._joint_dim, self._real).zero_()

    def _rows(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        return self._like.new_empty((rows, aligned(columns)), dtype=dtype)[:, :columns]

    def _write_hidden(
        self,
        encoder_rows: Tensor,
        predictor_rows: Tensor,
        rows: Rows,
        packed: FramesAndStates,
        hidden: Tensor,
    ) -> None:
        n = len(rows)
        self._hidden_kernel.launch(
            "hidden",
            (-(-n // _ROWS_OF_BLOCK), 1, 1),
            (_WARP, _ROWS_OF_BLOCK, 1),
            (
                encoder_rows,
                predictor_rows,
                encoder_rows.stride(0),
                rows.frame,
                rows.state,
                *hidden_arguments(self._dropout, packed),
                hidden,
                hidden.stride(0),
                n,
                self._joint_dim,
            ),
        )

    def _add_gradient(self, d_hidden: Tensor, hidden: Tensor, rows: Rows, sums: JointSums) -> None:
        if sums.encoder_rows is not None:
            self._add_segment_sums(sums.encoder_rows, d_hidden, hidden, rows.frame, None)
        if sums.predictor_rows is not None:
            state, order = rows.state.sort(stable=True)
            self._add_segment_sums(sums.predictor_rows, d_hidden, hidden, state, order)

    def _add_segment_sums(
        self, sums: Tensor, d_hidden: Tensor, hidden: Tensor, segment: Tensor, order: Tensor | None
    ) -> None:
        """sums[segment[i]] += d_hidden[row] · act'(hidden[row]) where row = order[i]."""
        n, columns = d_hidden.shape
        columns_of_thread = 16 // self._operand.itemsize
        threads = -(-columns // columns_of_thread)
        self._gradient_kernel.launch(
            "joint_gradient",
            (n, 1, 1),
            (min(256, aligned(max(1, threads), _WARP)), 1, 1),
            (
                d_hidden,
                d_hidden.stride(0),
                hidden,
                hidden.stride(0),
                segment,
                order,
                *gradient_arguments(self._dropout),
                sums,
                sums.stride(0),
                columns,
                n,
            ),
        )


class CudaJointChunk(_CudaStates):
    """See ``protocol.JointChunk``."""

    def __init__(
        self,
        device: CudaDevice,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        dropout: Dropout | None,
    ) -> None:
        self._vocab_size, joint_dim = weight.shape
        state = cuda_sources.state_dtype(input_dtype, compute_dtype)
        super().__init__(device, joint_dim, state, compute_dtype, activation, dropout, weight)
        self._weight = self._aligned_copy(weight)
        self._bias = None
        if bias is not None:
            # Rounded like any operand, then padded.
            self._bias = weight.new_zeros(aligned(self._vocab_size), dtype=self._real)
            self._bias[: self._vocab_size] = bias.to(self._operand)
        self.row_bytes = joint_bytes(self._vocab_size, joint_dim, input_dtype, compute_dtype).row

    def _aligned_copy(self, weight: Tensor) -> Tensor:
        weight = weight.to(self._operand)
        if weight.is_contiguous() and aligned(self._joint_dim) == self._joint_dim:
            return weight
        return self._rows(self._vocab_size, self._joint_dim, self._operand).copy_(weight)

    def allocate(self, chunk_rows: int) -> None:
        self._hidden = self._rows(chunk_rows, self._joint_dim, self._operand)
        self._logits = self._rows(chunk_rows, self._vocab_size, self._real)
        self._d_hidden = self._rows(chunk_rows, self._joint_dim, self._real)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        n = len(rows)
        hidden, logits = self._hidden[:n], self._logits[:n]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, hidden)
        self._device.matmul(hidden, self._weight.t(), logits)
        return Logits(logits, self._bias, self._operand)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        n = len(rows)
        hidden, d_hidden = self._hidden[:n], self._d_hidden[:n]
        if sums.bias is not None:
            sums.bias.add_(torch.sum(d_logits, 0, dtype=self._real))
        if sums.weight is not None:
            # No GEMM adds half products to a float32 matrix (addmm wants one dtype).
            d_weight = torch.empty_like(sums.weight)
            self._device.matmul(d_logits.t(), hidden, d_weight)
            sums.weight.add_(d_weight)
        if sums.encoder_rows is None and sums.predictor_rows is None:
            return
        self._device.matmul(d_logits, self._weight, d_hidden)
        self._add_gradient(d_hidden, hidden, rows, sums)


class CudaAdditiveChunk(_CudaStates):
    """See ``protocol.Backend.additive_chunk``."""

    def __init__(
        self,
        device: CudaDevice,
        joint_dim: int,
        *,
        input_dtype: torch.dtype | None,
        like: Tensor,
    ) -> None:
        state = input_dtype or torch.float32
        real = cuda_sources.real_dtype(state)
        super().__init__(device, joint_dim, state, real, "identity", None, like)
        self.row_bytes = aligned(joint_dim) * real.itemsize

    def allocate(self, chunk_rows: int) -> None:
        self._logits = self._rows(chunk_rows, self._joint_dim, self._real)

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        logits = self._logits[: len(rows)]
        self._write_hidden(encoder_rows, predictor_rows, rows, packed, logits)
        return Logits(logits, None, self._real)

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        # The identity's derivative does not ask for its value.
        self._add_gradient(d_logits, d_logits, rows, sums)
