"""The primitives in compiled kernels, on a device that calls them: the one host side of ``csrc``.

Kernels take arguments by the names of their parameters. A group's index tensors, which most of them
need, have the names that ``FramesAndStates`` and ``Rows`` give them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from rnnt_op.backends.device import Device, Shape
from rnnt_op.backends.joint import AdditiveChunk, OutputLayerChunk, joint_bytes
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.records import (
    Dropout,
    JointBytes,
    JointStates,
    Lattice,
    Logits,
    Part,
)
from rnnt_op.backends.sources import SCORED_ROWS_OF_WARP, Precision
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.nodes import FramesAndStates, Nodes, Rows, aligned
from rnnt_op.topology import Topology
from rnnt_op.transfer import to_device

_WARP = 32
_THREADS = 256
_WARPS = _THREADS // _WARP
_PATH_THREADS = 1024


class Block(NamedTuple):
    """Of threads that walk one sample's lattice in one direction. A CPU has none."""

    threads: int = 1
    shared_bytes: int = 0
    scratch_bytes: int = 0  # instead of them


class CompiledBackend(ABC):
    """See ``protocol.Backend``, of which a device's own class adds ``select_nodes``."""

    def __init__(self, device: Device) -> None:
        self._device, self._sources = device, device.sources
        # Bounded, since a topology's numbers may differ from step to step.
        self._load = functools.lru_cache(lambda kernels: device.load(self._sources.needed(kernels)))

    @abstractmethod
    def _selection_bytes(self, samples: int) -> int:
        """What ``select_nodes`` takes for a group's samples, besides its nodes."""

    @abstractmethod
    def _block(self, topology: Topology, frames: int, states: int) -> Block:
        """Of ``forward_backward``, for samples with no more frames T and states U + 1."""

    @abstractmethod
    def _add_joint_gradient(
        self,
        source: KernelSource,
        arguments: dict[str, Argument],
        rows: Rows,
        states: JointStates,
    ) -> None:
        """Adds the gradient of hidden states to that of encoder and predictor rows."""

    def load(self, kernels: Kernels) -> None:
        self._load(kernels)

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return self._device.guard()

    def lattice_bytes(
        self, topology: Topology, samples: int, frames: int, states: int, nodes: int
    ) -> int:
        # Rows, scores, occupancies; then α and β, or bins and kept nodes.
        node_bytes = 8 + 2 * 8 * len(topology.symbols) + 16
        sample_bytes = 2 * self._block(topology, frames, states).scratch_bytes
        return nodes * node_bytes + samples * sample_bytes + self._selection_bytes(samples)

    def pack(self, packed: FramesAndStates, targets: Tensor, label_ranges: Tensor | None) -> None:
        threads, samples = 128, len(packed.group.samples)
        self._device.call(
            self._sources.node_rows(),
            "pack",
            Shape((samples, 1, 1), (threads, 1, 1), threads * 8),
            {
                **vars(packed),
                "targets": targets,
                "max_labels": targets.shape[1],
                "label_ranges": label_ranges,
                "max_frames": 0 if label_ranges is None else label_ranges.shape[1],
                "sample_count": samples,
            },
        )

    def node_rows(self, packed: FramesAndStates) -> Rows:
        frame = packed.frame_sample.new_empty(packed.group.nodes, dtype=torch.int32)
        rows = Rows(frame, torch.empty_like(frame))
        frame_count = len(packed.frame_sample)
        self._device.call(
            self._sources.node_rows(),
            "node_rows",
            Shape((frame_count, 1, 1), (128, 1, 1)),
            {**vars(packed), **vars(rows), "frame_count": frame_count},
        )
        return rows

    def joint_bytes(
        self,
        column_count: int,
        joint_dim: int,
        *,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        has_dropout: bool = False,
    ) -> JointBytes:
        precision = self._sources.precision("joint", compute_dtype, input_dtype)
        return joint_bytes(self._device, column_count, joint_dim, precision)

    def joint_chunk(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        dropout: Dropout | None = None,
    ) -> OutputLayerChunk:
        precision = self._sources.precision("joint", compute_dtype, input_dtype)
        kernels = _JointKernels(self, precision, activation, dropout)
        return OutputLayerChunk(self._device, kernels, weight, bias, precision)

    def additive_chunk(
        self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
    ) -> AdditiveChunk:
        precision = self._sources.precision("additive", like.dtype, input_dtype)
        kernels = _JointKernels(self, precision, "identity", None)
        return AdditiveChunk(self._device, kernels, joint_dim, precision, like)

    def symbol_scores(
        self,
        topology: Topology,
        logits: Logits,
        columns: Tensor,
        rows: Rows,
        normalize: bool,
        scores: Tensor,
        part: Part | None = None,
    ) -> None:
        count = len(rows)
        self._device.call(
            self._sources.symbol_scores(logits.values.dtype, topology, part is not None),
            "symbol_scores",
            Shape((_blocks(count, _WARPS * SCORED_ROWS_OF_WARP), 1, 1), (_WARP, _WARPS, 1)),
            {
                **vars(rows),
                **_of_logits(logits),
                "tokens": Part.tokens_of(part, topology, logits),
                "columns": columns,
                "scores": scores,
                "others": None if part is None else part.others,
                "row_count": count,
                "normalize": normalize,
            },
        )

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        packed, count = nodes.packed, len(nodes.rows)
        samples, directions = len(packed.group.samples), 2 if occupancies else 1
        block = self._block(topology, max(packed.group.frames), max(packed.group.states))
        pitch = block.scratch_bytes // 8
        log_likelihood = scores.new_empty(samples)
        alpha = scores.new_empty(count) if occupancies else None
        beta = torch.empty_like(alpha) if alpha is not None else None
        restricted = packed.group.restricted_nodes is not None
        source = self._sources.lattice(topology, restricted)
        arguments: dict[str, Argument] = {
            **vars(packed),
            **vars(nodes.rows),
            "scores": scores,
            "numbers": to_device(topology.numbers, scores.device),
            "alpha": alpha,
            "beta": beta,
            "log_likelihood": log_likelihood,
            "scratch": scores.new_empty(samples * directions * pitch) if pitch else None,
            "scratch_pitch": pitch,
            "sample_count": samples,
            "frame_count": len(packed.frame_sample),
            "node_count": count,
        }
        shape = Shape((samples, directions, 1), (block.threads, 1, 1), block.shared_bytes)
        self._device.call(source, "forward_backward", shape, arguments)
        if not occupancies:
            return Lattice(log_likelihood, None)
        del arguments["scratch"]
        occupancy = arguments["occupancy"] = torch.empty_like(scores)
        shape = Shape((_blocks(count, _THREADS), 1, 1), (_THREADS, 1, 1))
        self._device.call(source, "occupancies", shape, arguments)
        return Lattice(log_likelihood, occupancy)

    def best_paths(self, topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
        packed, count = nodes.packed, len(nodes.rows)
        samples = len(packed.group.samples)
        score = scores.new_empty(samples)
        label_frame = torch.full_like(packed.state_index, -1)
        longest_diagonal = min(max(packed.group.frames), max(packed.group.states))
        self._device.call(
            self._sources.best_paths(topology),
            "best_paths",
            Shape((samples, 1, 1), (min(_PATH_THREADS, aligned(longest_diagonal, _WARP)), 1, 1)),
            {
                **vars(packed),
                "scores": scores,
                "numbers": to_device(topology.numbers, scores.device),
                "alpha": scores.new_empty(count),
                "best_arc": scores.new_empty(count, dtype=torch.uint8),
                "path_score": score,
                "label_frame": label_frame,
                "sample_count": samples,
            },
        )
        return score, label_frame

    def logit_gradient_(
        self,
        topology: Topology,
        logits: Logits,
        columns: Tensor,
        rows: Rows,
        kept: Tensor,
        nodes: Nodes,
        scores: Tensor,
        occupancy: Tensor,
        weight: Tensor,
        *,
        normalize: bool,
        clamp: float,
        part: Part | None = None,
    ) -> Tensor:
        values, at, count = logits.values, logits.in_place, len(rows)
        gradient = _in_place_of(values, logits.gradient_dtype) if at is None else at.gradient
        self._device.call(
            self._sources.logit_gradient(values.dtype, gradient.dtype, topology),
            "logit_gradient",
            Shape((_blocks(count, _WARPS), 1, 1), (_WARP, _WARPS, 1)),
            {
                **vars(nodes.packed),
                **vars(rows),
                **_of_logits(logits),
                "gradient": gradient,
                "gradient_pitch": gradient.stride(0),
                "frame_target": None if at is None else at.targets.frame,
                "state_target": None if at is None else at.targets.state,
                "column_count": values.shape[-1],
                "node": kept,
                "weight": weight,
                "columns": columns,
                "scores": scores,
                "occupancy": occupancy,
                "normalizers": None if part is None else part.normalizer,
                "row_count": count,
                "normalize": normalize,
                "clamp": float(clamp),
            },
        )
        return gradient


class _JointKernels:
    """See ``joint.JointKernels``."""

    def __init__(
        self,
        backend: CompiledBackend,
        precision: Precision,
        activation: str,
        dropout: Dropout | None,
    ) -> None:
        self._backend = backend
        of_hidden = precision, activation, dropout is not None
        self._hidden = backend._sources.hidden(*of_hidden)
        self._gradient = backend._sources.joint_gradient(*of_hidden)
        self._of_dropout = {} if dropout is None else dropout.arguments

    def write_hidden(self, states: JointStates, rows: Rows, hidden: Tensor) -> None:
        count, joint_dim = len(rows), hidden.shape[1]
        self._backend._device.call(
            self._hidden,
            "hidden",
            Shape((_blocks(count, _WARPS), 1, 1), (_WARP, _WARPS, 1)),
            {
                **vars(states.packed),
                **vars(rows),
                **self._of_dropout,
                **_rows_of(states),
                "hidden": hidden,
                "hidden_pitch": hidden.stride(0),
                "row_count": count,
                "joint_dim": joint_dim,
            },
        )

    def add_gradient(
        self, states: JointStates, rows: Rows, d_hidden: Tensor, hidden: Tensor
    ) -> None:
        arguments: dict[str, Argument] = {
            **vars(states.packed),
            **vars(rows),
            **self._of_dropout,
            **_rows_of(states),
            "d_hidden": d_hidden,
            "d_hidden_pitch": d_hidden.stride(0),
            "hidden": hidden,
            "hidden_pitch": hidden.stride(0),
            "row_count": len(rows),
            "joint_dim": hidden.shape[1],
        }
        self._backend._add_joint_gradient(self._gradient, arguments, rows, states)


def _in_place_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a narrower dtype that begin where those of ``values`` do."""
    (rows, columns), pitch = values.shape, values.stride(0)
    return values.as_strided((rows, pitch), (pitch, 1)).view(dtype)[:, :columns]


def _rows_of(states: JointStates) -> dict[str, Argument]:
    return {
        "encoder": states.encoder_rows,
        "predictor": states.predictor_rows,
        "packed_pitch": states.encoder_rows.stride(0),
    }


def _of_logits(logits: Logits) -> dict[str, Argument]:
    """Arguments that say where rows of logits lie."""
    values, at = logits.values, logits.in_place
    return {
        "logits": values,
        "pitch": values.stride(0),
        "column_stride": values.stride(-1),
        "frame_place": None if at is None else at.places.frame,
        "state_place": None if at is None else at.places.state,
        "bias": logits.bias,
    }


def _blocks(items: int, items_of_block: int) -> int:
    return -(-items // items_of_block)
