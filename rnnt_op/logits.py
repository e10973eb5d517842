"""Where logits come from, a chunk of node rows at a time, and where their gradient goes.

A source serves one group after another (``enter`` … ``leave``). Within a group it fills a chunk of
logits for any rows the engine asks for, and takes the gradient of the chunk it filled last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.nodes import Nodes, Rows


class LogitSource(Protocol):
    """Logits of node rows, on demand."""

    row_bytes: int  # of one node row in a chunk
    state_bytes: int  # of one packed encoder or predictor row in a group

    def allocate(self, chunk_rows: int) -> None:
        """Allocates the buffers of a chunk."""

    def enter(self, nodes: Nodes) -> None:
        """Makes the group of ``nodes`` current."""

    def logits(self, rows: Rows) -> Tensor:
        """Logits of some of the group's nodes, valid until the next call. [R, V]"""

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        """Takes, and may destroy, the gradient of the logits that the last call filled."""

    def leave(self, poison: Tensor) -> None:
        """Completes the group's gradients.

        Args:
            poison: NaN for samples whose loss has no gradient, 0 for the others. [S]
        """


@dataclass(frozen=True)
class Wanted:
    """Which gradients a joint's caller asks for."""

    encoder: bool = False
    predictor: bool = False
    weight: bool = False
    bias: bool = False


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Half inputs never accumulate in half."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


class JointLogits:
    """logits[b, t, u] = weight · act(encoder[b, t] + predictor[b, u]) + bias.

    Sums, activations, logits and the weight's gradient are float32 (float64 for float64); the GEMMs
    of logits and hidden gradients have operands, and in torch operations results, of
    ``compute_dtype``.
    """

    def __init__(
        self,
        encoder: Tensor,
        predictor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        compute_dtype: torch.dtype,
        wanted: Wanted = Wanted(),
    ) -> None:
        self._backend = backend_for(encoder.device)
        self._encoder, self._predictor = encoder, predictor
        self._activation, self._wanted = activation, wanted
        self._dtype = accumulation_dtype(compute_dtype)
        self._gemm_dtype = self._backend.gemm_dtype(compute_dtype, encoder.device)
        self._weight_dtype = weight.dtype
        self._bias_dtype = None if bias is None else bias.dtype
        self._weight = weight.to(self._gemm_dtype)
        self._bias = None if bias is None else bias.to(self._gemm_dtype)

        self._d_encoder = self._zeros(encoder.shape, encoder.dtype, wanted.encoder)
        self._d_predictor = self._zeros(predictor.shape, predictor.dtype, wanted.predictor)
        self._d_weight = self._zeros(weight.shape, self._dtype, wanted.weight)
        self._d_bias = self._zeros(weight.shape[:1], self._dtype, wanted.bias)
        self._poison = self._zeros(torch.Size(()), self._dtype, True)  # of all groups so far

        vocab_size, joint_dim = weight.shape
        self.row_bytes = (vocab_size + 2 * joint_dim) * self._dtype.itemsize
        if self._gemm_dtype != self._dtype:
            self.row_bytes += (vocab_size + 2 * joint_dim) * self._gemm_dtype.itemsize
        self.state_bytes = 2 * joint_dim * self._dtype.itemsize

    def _zeros(self, shape: torch.Size, dtype: torch.dtype, wanted: bool) -> Tensor:
        return torch.zeros(shape if wanted else (0,), dtype=dtype, device=self._encoder.device)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d_encoder, d_predictor, d_weight, d_bias in their inputs' dtypes; empty if unwanted."""
        bias_dtype = self._weight_dtype if self._bias_dtype is None else self._bias_dtype
        return (
            self._d_encoder,
            self._d_predictor,
            self._d_weight.add_(self._poison).to(self._weight_dtype),
            self._d_bias.add_(self._poison).to(bias_dtype),
        )

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

    def enter(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self._encoder_rows = self._encoder[_frame_positions(nodes)].to(self._dtype)
        self._predictor_rows = self._predictor[_state_positions(nodes)].to(self._dtype)
        if self._wanted.encoder:
            self._d_encoder_rows = torch.zeros_like(self._encoder_rows)
        if self._wanted.predictor:
            self._d_predictor_rows = torch.zeros_like(self._predictor_rows)

    def logits(self, rows: Rows) -> Tensor:
        n = len(rows)
        hidden = self._backend.hidden_(
            self._hidden[:n],
            self._d_hidden[:n],
            self._encoder_rows,
            self._predictor_rows,
            rows,
            self._activation,
        )
        gemm_hidden, product = self._gemm_hidden[:n], self._gemm_logits[:n]
        logits = self._logits[:n]
        _assign(gemm_hidden, hidden)
        if self._bias is None:
            torch.mm(gemm_hidden, self._weight.t(), out=product)
        else:
            # Inside the GEMM, before its result is rounded.
            torch.addmm(self._bias, gemm_hidden, self._weight.t(), out=product)
        _assign(logits, product)
        return logits

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        n = len(rows)
        wanted = self._wanted
        if wanted.bias:
            self._d_bias += d_logits.sum(0)
        if wanted.weight:
            # Not in half: every chunk's part would be rounded before it is added.
            self._d_weight.addmm_(d_logits.t(), self._hidden[:n])
        if not (wanted.encoder or wanted.predictor):
            return
        gemm_d_logits = self._gemm_logits[:n]
        gemm_d_hidden, d_hidden = self._gemm_d_hidden[:n], self._d_hidden[:n]
        _assign(gemm_d_logits, d_logits)
        torch.mm(gemm_d_logits, self._weight, out=gemm_d_hidden)
        _assign(d_hidden, gemm_d_hidden)
        self._backend.activation_gradient_(d_hidden, self._hidden[:n], self._activation)
        if wanted.encoder:
            self._backend.add_segment_sums_(
                self._d_encoder_rows, d_hidden, rows.frame, is_sorted=True
            )
        if wanted.predictor:
            self._backend.add_segment_sums_(
                self._d_predictor_rows, d_hidden, rows.state, is_sorted=False
            )

    def leave(self, poison: Tensor) -> None:
        nodes, wanted = self._nodes, self._wanted
        poison = poison.to(self._dtype)
        if wanted.encoder:
            rows = self._d_encoder_rows.add_(poison[nodes.frame_sample].unsqueeze(1))
            self._d_encoder[_frame_positions(nodes)] = rows.to(self._d_encoder.dtype)
        if wanted.predictor:
            rows = self._d_predictor_rows.add_(poison[nodes.state_sample].unsqueeze(1))
            self._d_predictor[_state_positions(nodes)] = rows.to(self._d_predictor.dtype)
        self._poison += poison.sum()


class GivenLogits:
    """Logits that the caller already holds. [B, T, U + 1, V]

    Chunks are computed in float32 (float64 for float64).
    """

    state_bytes = 0

    def __init__(self, logits: Tensor, *, wanted: bool = False) -> None:
        self._backend = backend_for(logits.device)
        self._logits = logits
        self.d_logits = torch.zeros(
            logits.shape if wanted else (0,), dtype=logits.dtype, device=logits.device
        )
        self._dtype = accumulation_dtype(logits.dtype)
        self.row_bytes = logits.shape[-1] * (self._dtype.itemsize + 2 * logits.dtype.itemsize)

    def allocate(self, chunk_rows: int) -> None:
        """Nothing: indexing allocates its result."""

    def enter(self, nodes: Nodes) -> None:
        self._nodes = nodes

    def logits(self, rows: Rows) -> Tensor:
        return self._logits[self._positions(rows)].to(self._dtype)

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        self.d_logits[self._positions(rows)] = d_logits.to(self.d_logits.dtype)

    def leave(self, poison: Tensor) -> None:
        poisoned = poison.index_select(0, self._nodes.sample).isnan().nonzero().squeeze(1)
        self.d_logits[self._positions(self._nodes.rows.select(poisoned))] = float("nan")

    def _positions(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        batch, t = _frame_positions(self._nodes)
        frame = rows.frame.long()
        return batch[frame], t[frame], self._nodes.state_index.index_select(0, rows.state)


def _assign(destination: Tensor, source: Tensor) -> None:
    """Copies with a change of dtype; where there is none both are the same buffer already."""
    if destination.dtype != source.dtype:
        destination.copy_(source)


def _frame_positions(nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Batch position and t of each packed encoder row. [F], [F]"""
    return nodes.samples[nodes.frame_sample], nodes.frame_index


def _state_positions(nodes: Nodes) -> tuple[Tensor, Tensor]:
    """Batch position and u of each packed predictor row. [P], [P]"""
    return nodes.samples[nodes.state_sample], nodes.state_index
