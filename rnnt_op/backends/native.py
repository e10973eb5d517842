"""The CPU's backend in the kernels of ``csrc/cpu``; ``protocol.Backend`` says what each computes.

Needs a C++ compiler at first use. Work is divided among torch's threads, and no result depends on
who does what.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rnnt_op.backends import native_sources
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.native_joint import NativeAdditiveChunk, NativeJointChunk, joint_bytes
from rnnt_op.backends.protocol import Dropout, JointBytes, Lattice, Logits, Part
from rnnt_op.jit import load_host_module, load_host_modules
from rnnt_op.nodes import FramesAndStates, Nodes, Rows
from rnnt_op.topology import Topology


class NativeBackend:
    """See ``protocol.Backend``."""

    WORKSPACE_BYTES = 256 * 2**20

    # A chunk's logits and hidden states stay within a CPU's last-level cache.
    CACHE_BYTES = 16 * 2**20

    # Small groups hold samples of like length, and enough of them for every thread.
    LATTICE_SHARE = 0.25

    GROUPS_IN_FLIGHT = 1  # nothing to wait for

    def load(self, kernels: Kernels) -> None:
        load_host_modules(native_sources.needed(kernels))

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return nullcontext()

    def lattice_bytes(
        self, topology: Topology, samples: int, frames: int, states: int, nodes: int
    ) -> int:
        # Rows, scores, occupancies; then α and β, or bins and kept nodes.
        return nodes * (8 + 2 * 8 * len(topology.symbols) + 16)

    def node_rows(self, packed: FramesAndStates) -> Rows:
        frame = packed.frame_sample.new_empty(packed.group.nodes, dtype=torch.int32)
        state = torch.empty_like(frame)
        load_host_module(native_sources.node_rows()).call(
            "node_rows",
            packed.frame_sample,
            packed.frame_node,
            packed.low,
            packed.high,
            packed.first_state,
            frame,
            state,
            len(packed.frame_sample),
        )
        return Rows(frame, state)

    def joint_bytes(
        self,
        vocab_size: int,
        joint_dim: int,
        *,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        has_dropout: bool = False,
    ) -> JointBytes:
        return joint_bytes(vocab_size, joint_dim, compute_dtype)

    def joint_chunk(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        dropout: Dropout | None = None,
    ) -> NativeJointChunk:
        return NativeJointChunk(
            weight, bias, activation=activation, compute_dtype=compute_dtype, dropout=dropout
        )

    def additive_chunk(
        self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
    ) -> NativeAdditiveChunk:
        return NativeAdditiveChunk(joint_dim, input_dtype=input_dtype, like=like)

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
        values = logits.values
        load_host_module(native_sources.symbol_scores(values.dtype, topology)).call(
            "symbol_scores",
            values,
            Part.tokens_of(part, topology, logits),
            values.stride(0),
            rows.state,
            columns,
            scores,
            None if part is None else part.log_sum,
            len(rows),
            int(normalize),
        )

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        packed = nodes.packed
        log_likelihood = scores.new_empty(len(packed.group.samples))
        alpha = scores.new_empty(len(nodes.rows)) if occupancies else None
        beta = torch.empty_like(alpha) if alpha is not None else None
        module = load_host_module(
            native_sources.lattice(topology, packed.group.restricted_nodes is not None)
        )
        module.call(
            "forward_backward",
            scores,
            topology.numbers,
            packed.first_frame,
            packed.frames,
            packed.states,
            packed.frame_node,
            packed.low,
            packed.high,
            alpha,
            beta,
            log_likelihood,
            len(log_likelihood),
        )
        if not occupancies:
            return Lattice(log_likelihood, None)
        occupancy = torch.empty_like(scores)
        module.call(
            "occupancies",
            scores,
            topology.numbers,
            alpha,
            beta,
            log_likelihood,
            packed.frame_sample,
            packed.frame_index,
            packed.frames,
            packed.states,
            packed.frame_node,
            packed.low,
            packed.high,
            occupancy,
            len(packed.frame_sample),
        )
        return Lattice(log_likelihood, occupancy)

    def best_paths(self, topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
        packed = nodes.packed
        score = scores.new_empty(len(packed.group.samples))
        label_frame = torch.full_like(packed.state_index, -1)
        load_host_module(native_sources.best_paths(topology)).call(
            "best_paths",
            scores,
            topology.numbers,
            packed.first_frame,
            packed.first_state,
            packed.frames,
            packed.states,
            packed.frame_node,
            packed.low,
            packed.high,
            scores.new_empty(len(nodes.rows), dtype=torch.uint8),
            score,
            label_frame,
            len(score),
        )
        return score, label_frame

    def select_nodes(
        self,
        topology: Topology,
        nodes: Nodes,
        scores: Tensor,
        occupancy: Tensor,
        *,
        live: Tensor,
        poisoned: Tensor,
        tolerance: float,
    ) -> Callable[[], Tensor]:
        packed = nodes.packed
        kept = packed.frame_sample.new_empty(len(nodes.rows))
        total = packed.frame_sample.new_empty(1)
        load_host_module(native_sources.selection(topology)).call(
            "select_nodes",
            scores,
            occupancy,
            packed.first_node,
            live,
            poisoned,
            tolerance,
            kept.new_empty(len(kept), dtype=torch.int16),
            kept,
            total,
            len(packed.group.samples),
        )
        rows = kept[: int(total)]
        return lambda: rows

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
        values = logits.values
        load_host_module(native_sources.logit_gradient(values.dtype, topology)).call(
            "logit_gradient",
            values,
            values.shape[1],
            values.stride(0),
            kept,
            rows.frame,
            rows.state,
            nodes.packed.frame_sample,
            weight,
            columns,
            scores,
            occupancy,
            None if part is None else part.log_sum,
            len(rows),
            int(normalize),
            float(clamp),
        )
        return values
