"""Where logits come from, a chunk of node rows at a time, and where their gradient goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rnnt_op.arguments import NetworkArguments
from rnnt_op.backends.protocol import Backend, GivenRows, JointChunk
from rnnt_op.backends.records import Dropout, JointStates, JointSums, Logits, least_gradient
from rnnt_op.nodes import Nodes, RowIndex, Rows, put, taken
from rnnt_op.shards import Shard


class GroupLogits(Protocol):
    """Logits of one group's nodes."""

    def logits(self, rows: Rows, keep: RowIndex | None = None) -> Logits:
        """Logits of some of the group's nodes, valid until the source's next call; kept for
        ``again`` under these numbers, if there is room. [R, V]"""

    def again(self, rows: Rows, numbers: RowIndex) -> Logits:
        """Those that were kept under these numbers, to be destroyed. [R, V]"""

    def split(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some nodes whose logits were kept, and the others."""

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        """Takes, and may destroy, the gradient of the logits that the last call filled."""

    def finish(self) -> None:
        """Completes the group's gradients."""


class LogitSource(Protocol):
    """Logits of node rows, on demand."""

    @property
    def column_count(self) -> int:
        """Columns of the logits, on all ranks."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one node row in a chunk."""

    @property
    def row_work(self) -> int:
        """Products that the logits of one node row take."""

    @property
    def least_gradient(self) -> float:
        """Below it, an element of the logits' gradient is zero."""

    @property
    def packed_bytes(self) -> int:
        """Bytes of one packed encoder or predictor row in a group."""

    @property
    def logits_bytes(self) -> int:
        """Bytes of one node row of kept logits; 0: they are not worth keeping."""

    def allocate(self, chunk_rows: int, kept_rows: int) -> None:
        """Allocates the buffers of a chunk, and of logits that are kept."""

    def group(self, nodes: Nodes) -> GroupLogits:
        """The logits of a group."""


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

    GEMMs have operands of ``compute_dtype``; sums and logits are float32 (float64 for float64).
    Without a weight, and then without a bias, activation and dropout, encoder + predictor are the
    logits.
    """

    def __init__(
        self,
        backend: Backend,
        network: NetworkArguments,
        *,
        shard: Shard | None = None,
        dropout: Dropout | None = None,
        wanted: Wanted = Wanted(),
    ) -> None:
        encoder, predictor = network.encoder, network.predictor
        weight, bias = network.weight, network.bias
        self._encoder, self._predictor, self._wanted = encoder, predictor, wanted
        self._shard = shard
        input_dtype = encoder.dtype if encoder.dtype == predictor.dtype else None
        self._chunk: JointChunk
        self.column_count = network.column_count
        if weight is None:
            self._chunk = backend.additive_chunk(
                self.column_count, input_dtype=input_dtype, like=encoder
            )
            weight = encoder.new_empty(0)
        else:
            self._chunk = backend.joint_chunk(
                weight,
                bias,
                activation=network.activation,
                input_dtype=input_dtype,
                compute_dtype=network.compute_dtype,
                dropout=dropout,
            )
        self.row_bytes, self.packed_bytes = self._chunk.row_bytes, self._chunk.packed_bytes
        is_wanted = any(vars(wanted).values())
        self.logits_bytes = self._chunk.logits_bytes if is_wanted else 0
        self.row_work = weight.numel()
        self._gradient_dtypes = (weight.dtype, weight.dtype if bias is None else bias.dtype)
        sum_dtype = accumulation_dtype(network.compute_dtype)
        self.least_gradient = least_gradient(network.compute_dtype)

        def zeros(shape: torch.Size, dtype: torch.dtype, wanted: bool) -> Tensor:
            return encoder.new_zeros(shape if wanted else (0,), dtype=dtype)

        self._d_encoder = zeros(encoder.shape, encoder.dtype, wanted.encoder)
        self._d_predictor = zeros(predictor.shape, predictor.dtype, wanted.predictor)
        self._d_weight = zeros(weight.shape, sum_dtype, wanted.weight)
        self._d_bias = zeros(weight.shape[:1], sum_dtype, wanted.bias)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d_encoder, d_predictor, d_weight, d_bias in their inputs' dtypes; empty if unwanted."""
        weight_dtype, bias_dtype = self._gradient_dtypes
        return (
            self._d_encoder,
            self._d_predictor,
            self._d_weight.to(weight_dtype),
            self._d_bias.to(bias_dtype),
        )

    def allocate(self, chunk_rows: int, kept_rows: int) -> None:
        self._chunk.allocate(chunk_rows)
        self._room = self._chunk.room(kept_rows)

    def group(self, nodes: Nodes) -> _JointGroup:
        chunk, packed, wanted = self._chunk, nodes.packed, self._wanted
        states = JointStates(
            packed,
            chunk.pack(self._encoder, packed.frame_positions),
            chunk.pack(self._predictor, packed.state_positions),
            JointSums(
                chunk.zeros(len(packed.frame_sample)) if wanted.encoder else None,
                chunk.zeros(len(packed.state_sample)) if wanted.predictor else None,
                self._d_weight if wanted.weight else None,
                self._d_bias if wanted.bias else None,
            ),
        )
        kept = _KeptLogits(self._room, packed.group.nodes) if packed.group.keeps_logits else None
        return _JointGroup(chunk, states, kept, self._d_encoder, self._d_predictor, self._shard)


class _KeptLogits:
    """Those of a group's nodes that are kept, at the nodes' numbers."""

    def __init__(self, room: Tensor, nodes: int) -> None:
        self._room = room  # [≥ N, V]
        self._count = 0
        self._is_kept = room.new_zeros(nodes, dtype=torch.bool)

    def place(self, index: RowIndex) -> Tensor | None:
        """The room from there on, where adjoining rows can be written."""
        return self._room[index.start :] if isinstance(index, slice) else None

    def at(self, index: RowIndex) -> Tensor:
        return taken(self._room, index)

    def add(self, index: RowIndex, values: Tensor) -> None:
        place = self.place(index)
        if place is None or place.data_ptr() != values.data_ptr():
            put(self._room, index, values)
        self._is_kept[index] = True
        self._count += len(values)

    def split(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Those of some nodes that are kept, and the others."""
        if self._count in (0, len(self._is_kept)):
            none = numbers[:0]
            return (none, numbers) if self._count == 0 else (numbers, none)
        is_kept = self._is_kept.index_select(0, numbers)
        return numbers[is_kept], numbers[~is_kept]


class _JointGroup:
    def __init__(
        self,
        chunk: JointChunk,
        states: JointStates,
        kept: _KeptLogits | None,
        d_encoder: Tensor,
        d_predictor: Tensor,
        shard: Shard | None,
    ) -> None:
        self._chunk, self._states, self._kept, self._shard = chunk, states, kept, shard
        self._d_encoder, self._d_predictor = d_encoder, d_predictor

    def logits(self, rows: Rows, keep: RowIndex | None = None) -> Logits:
        if self._kept is None or keep is None:
            return self._chunk.logits(self._states, rows)
        logits = self._chunk.logits(self._states, rows, self._kept.place(keep))
        self._kept.add(keep, logits.values)
        return logits

    def again(self, rows: Rows, numbers: RowIndex) -> Logits:
        assert self._kept is not None
        return self._chunk.again(self._states, rows, self._kept.at(numbers))

    def split(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return (numbers[:0], numbers) if self._kept is None else self._kept.split(numbers)

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        self._chunk.backward(self._states, rows, d_logits)

    def finish(self) -> None:
        packed, sums = self._states.packed, self._states.sums
        self._put(self._d_encoder, packed.frame_positions, sums.encoder_rows)
        self._put(self._d_predictor, packed.state_positions, sums.predictor_rows)

    def _put(self, gradient: Tensor, positions: tuple[Tensor, Tensor], rows: Tensor | None) -> None:
        if rows is not None:
            if self._shard is not None:
                rows = self._shard.summed(rows)
            gradient[positions] = rows.to(gradient.dtype)


class GivenLogits:
    """Logits that the caller already holds: of the nodes of each frame, from the first on.
    [B, T, R, V]"""

    packed_bytes = row_work = logits_bytes = 0

    def __init__(self, backend: Backend, logits: Tensor, *, wanted: bool = False) -> None:
        self.column_count = logits.shape[-1]
        self.least_gradient = least_gradient(logits.dtype)
        self.d_logits = logits.new_zeros(logits.shape if wanted else (0,))
        self._chunk = backend.given_chunk(logits, self.d_logits)
        self.row_bytes = self._chunk.row_bytes

    def allocate(self, chunk_rows: int, kept_rows: int) -> None:
        self._chunk.allocate(chunk_rows)

    def group(self, nodes: Nodes) -> _GivenGroup:
        return _GivenGroup(self._chunk.group(nodes.packed))


@dataclass(frozen=True)
class _GivenGroup:
    given: GivenRows

    def logits(self, rows: Rows, keep: RowIndex | None = None) -> Logits:
        return self.given.logits(rows)

    def again(self, rows: Rows, numbers: RowIndex) -> Logits:
        return self.given.logits(rows)

    def split(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return numbers[:0], numbers

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        self.given.backward(rows, d_logits)

    def finish(self) -> None:
        """Rows of gradients are complete as they come."""
