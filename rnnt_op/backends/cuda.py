"""The CUDA backend: the kernels of ``csrc``, launched on torch's current stream.

Nothing here waits for the device but the number of selected nodes, and that is read while another
group's scores are computed. All memory comes from torch's caching allocator.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rnnt_op.backends import cuda_sources
from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.backends.cuda_joint import CudaAdditiveChunk, CudaJointChunk, joint_bytes
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.protocol import BINS, Dropout, JointBytes, Lattice, Logits, Part
from rnnt_op.backends.topology_macros import ring
from rnnt_op.jit import Argument
from rnnt_op.nodes import FramesAndStates, Nodes, Rows, aligned
from rnnt_op.topology import Topology
from rnnt_op.transfer import to_device

_WARP = 32
_THREADS = 256
_WARPS = _THREADS // _WARP
_SHARED_BYTES = 48 * 1024  # of a block, without asking for more

_PATH_THREADS = 1024
_THRESHOLD_THREADS = 128
_SCAN_THREADS = 1024


class CudaBackend:
    """See ``protocol.Backend``."""

    WORKSPACE_BYTES = 512 * 2**20

    # GEMMs of tens of thousands of rows: launches must not cost more than the work.
    CACHE_BYTES = 256 * 2**20

    # Half for lattices: the more samples in a group, the more blocks its recursion has.
    LATTICE_SHARE = 0.5

    GROUPS_IN_FLIGHT = 2

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        # Bounded, since a topology's numbers may differ from step to step.
        self._load = functools.lru_cache(lambda kernels: device.load(cuda_sources.needed(kernels)))

    def load(self, kernels: Kernels) -> None:
        self._load(kernels)

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        return self._device.guard()

    def lattice_bytes(
        self, topology: Topology, samples: int, frames: int, states: int, nodes: int
    ) -> int:
        symbols = len(topology.symbols)
        # Rows, scores, occupancies; then α and β, or bins, kept nodes and a warp's counts.
        node_bytes = 8 + 2 * 8 * symbols + max(16, 2 + 8 + 1)
        sample_bytes = 8 * BINS + self._scratch_pitch(topology, states) * 2 * 8
        return nodes * node_bytes + samples * sample_bytes

    def node_rows(self, packed: FramesAndStates) -> Rows:
        frame = packed.frame_sample.new_empty(packed.group.nodes, dtype=torch.int32)
        state = torch.empty_like(frame)
        self._device.module(cuda_sources.node_rows()).launch(
            "node_rows",
            (len(packed.frame_sample), 1, 1),
            (128, 1, 1),
            (
                packed.frame_sample,
                packed.frame_node,
                packed.low,
                packed.high,
                packed.first_state,
                frame,
                state,
            ),
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
        return joint_bytes(vocab_size, joint_dim, input_dtype, compute_dtype)

    def joint_chunk(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        dropout: Dropout | None = None,
    ) -> CudaJointChunk:
        return CudaJointChunk(
            self._device,
            weight,
            bias,
            activation=activation,
            input_dtype=input_dtype,
            compute_dtype=compute_dtype,
            dropout=dropout,
        )

    def additive_chunk(
        self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
    ) -> CudaAdditiveChunk:
        return CudaAdditiveChunk(self._device, joint_dim, input_dtype=input_dtype, like=like)

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
        values, n = logits.values, len(rows)
        self._device.module(
            cuda_sources.symbol_scores(values.dtype, topology, part is not None)
        ).launch(
            "symbol_scores",
            (_blocks(n, _WARPS * cuda_sources.SCORED_ROWS_OF_WARP), 1, 1),
            (_WARP, _WARPS, 1),
            (
                values,
                values.stride(0),
                logits.bias,
                Part.tokens_of(part, topology, logits),
                rows.state,
                columns,
                scores,
                None if part is None else part.log_sum,
                n,
                int(normalize),
            ),
        )

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        packed = nodes.packed
        samples, states = len(packed.group.samples), max(packed.group.states)
        directions = 2 if occupancies else 1
        log_likelihood = scores.new_empty(samples)
        alpha = scores.new_empty(len(nodes.rows)) if occupancies else None
        beta = torch.empty_like(alpha) if alpha is not None else None
        numbers = to_device(topology.numbers, scores.device)
        pitch = self._scratch_pitch(topology, states)
        shared_bytes = 0 if pitch else ring(topology) * states * 16
        restricted = packed.group.restricted_nodes is not None
        module = self._device.module(cuda_sources.lattice(topology, restricted))
        module.launch(
            "forward_backward",
            (samples, directions, 1),
            (min(cuda_sources.lattice_threads(topology), aligned(states, _WARP)), 1, 1),
            (
                scores,
                numbers,
                packed.first_frame,
                packed.frames,
                packed.states,
                packed.frame_node,
                packed.low,
                packed.high,
                alpha,
                beta,
                log_likelihood,
                scores.new_empty(samples * directions * pitch) if pitch else None,
                pitch,
            ),
            shared_bytes,
        )
        if not occupancies:
            return Lattice(log_likelihood, None)
        occupancy = torch.empty_like(scores)
        module.launch(
            "occupancies",
            (_blocks(len(nodes.rows), _THREADS), 1, 1),
            (_THREADS, 1, 1),
            (
                scores,
                numbers,
                alpha,
                beta,
                log_likelihood,
                nodes.rows.frame,
                packed.frame_sample,
                packed.frame_index,
                packed.frames,
                packed.states,
                packed.frame_node,
                packed.low,
                packed.high,
                occupancy,
                len(nodes.rows),
            ),
        )
        return Lattice(log_likelihood, occupancy)

    @staticmethod
    def _scratch_pitch(topology: Topology, states: int) -> int:
        """Numbers of a ring of anti-diagonals that does not fit in shared memory, else 0."""
        numbers = ring(topology) * states * 2
        return numbers if numbers * 8 > _SHARED_BYTES else 0

    def best_paths(self, topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
        packed = nodes.packed
        samples = len(packed.group.samples)
        score = scores.new_empty(samples)
        label_frame = torch.full_like(packed.state_index, -1)
        longest_diagonal = min(max(packed.group.frames), max(packed.group.states))
        self._device.module(cuda_sources.best_paths(topology)).launch(
            "best_paths",
            (samples, 1, 1),
            (min(_PATH_THREADS, aligned(longest_diagonal, _WARP)), 1, 1),
            (
                scores,
                to_device(topology.numbers, scores.device),
                packed.first_frame,
                packed.first_state,
                packed.frames,
                packed.states,
                packed.frame_node,
                packed.low,
                packed.high,
                scores.new_empty(len(nodes.rows)),
                scores.new_empty(len(nodes.rows), dtype=torch.uint8),
                score,
                label_frame,
            ),
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
        n, samples = len(nodes.rows), len(nodes.packed.group.samples)
        frame, frame_sample = nodes.rows.frame, nodes.packed.frame_sample
        module = self._device.module(cuda_sources.selection(topology))

        def launch(
            kernel: str, blocks: int, threads: int, *arguments: Argument, shared: int = 0
        ) -> None:
            module.launch(kernel, (blocks, 1, 1), (threads, 1, 1), arguments, shared)

        bins = frame.new_empty(n, dtype=torch.int16)
        histogram = frame_sample.new_zeros((samples, BINS))
        launch(
            "gradient_mass",
            _blocks(n, _THREADS),
            _THREADS,
            scores,
            occupancy,
            frame,
            frame_sample,
            bins,
            histogram,
            n,
        )
        threshold = frame.new_empty(samples)
        launch(
            "thresholds",
            samples,
            _THRESHOLD_THREADS,
            histogram,
            live,
            poisoned,
            tolerance,
            threshold,
            shared=8 * (_THRESHOLD_THREADS + 2),
        )
        counts = frame_sample.new_empty(_blocks(n, cuda_sources.SELECTED_NODES_OF_WARP))
        total = frame_sample.new_empty(1)
        blocks = _blocks(n, _WARPS * cuda_sources.SELECTED_NODES_OF_WARP)
        launch("count_kept", blocks, _THREADS, bins, frame, frame_sample, threshold, counts, n)
        launch(
            "scan_counts", 1, _SCAN_THREADS, counts, total, len(counts), shared=8 * _SCAN_THREADS
        )
        kept = frame_sample.new_empty(n)
        launch(
            "write_kept", blocks, _THREADS, bins, frame, frame_sample, threshold, counts, kept, n
        )
        count = self._device.read(total)
        return lambda: kept[: count()]

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
        n, vocab_size = values.shape
        operand = logits.gradient_dtype
        source = cuda_sources.logit_gradient(operand, values.dtype, topology)
        self._device.module(source).launch(
            "logit_gradient",
            (_blocks(n, _WARPS), 1, 1),
            (_WARP, _WARPS, 1),
            (
                values,
                values.stride(0),
                logits.bias,
                vocab_size,
                kept,
                rows.frame,
                rows.state,
                nodes.packed.frame_sample,
                weight,
                columns,
                scores,
                occupancy,
                None if part is None else part.log_sum,
                n,
                int(normalize),
                float(clamp),
            ),
        )
        pitch = values.stride(0)
        return values.as_strided((n, pitch), (pitch, 1)).view(operand)[:, :vocab_size]


def _blocks(items: int, items_of_block: int) -> int:
    return -(-items // items_of_block)
