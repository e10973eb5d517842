"""The CUDA backend, in the kernels of ``csrc``.

Nothing here waits for the device but the number of selected nodes, and that is read while another
group's scores are computed. All memory comes from torch's caching allocator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnnt_op.backends.compiled import Block, CompiledBackend
from rnnt_op.backends.device import Shape
from rnnt_op.backends.given import GivenCopies
from rnnt_op.backends.lattice_walk import Walk
from rnnt_op.backends.records import BINS, JointStates
from rnnt_op.backends.sources import (
    GRADIENT_LOOKS,
    GRADIENT_THREADS,
    SELECTED_NODES_OF_WARP,
)
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.nodes import FramesAndStates, Nodes, Rows
from rnnt_op.topology import Topology

_WARP = 32
_THREADS = 256
_WARPS = _THREADS // _WARP
_THRESHOLD_THREADS = 128
_SCAN_THREADS = 1024

# Warps of joint_gradient that keep a GPU busy: each has 6 KiB in flight, and 4.3 TB/s, 0.7 µs away,
# take 3 MB. Of a frame or state, so many rows are worth one.
_BUSY_WARPS = 512
_ROWS_OF_WARP = 64


class CudaBackend(CompiledBackend):
    """See ``protocol.Backend``."""

    WORKSPACE_BYTES = 512 * 2**20

    # GEMMs of tens of thousands of rows: launches must not cost more than the work.
    CACHE_BYTES = 256 * 2**20

    # Half for lattices: the more samples in a group, the more blocks its recursion has.
    LATTICE_SHARE = 0.5

    GROUPS_IN_FLIGHT = 2

    SHARED_BYTES = 48 * 2**10  # of a block that asks for no more

    def given_chunk(self, logits: Tensor, gradient: Tensor) -> GivenCopies:
        return GivenCopies(self, logits, gradient)

    def gather(self, logits: Tensor, rows: Rows, packed: FramesAndStates, values: Tensor) -> None:
        self._copy_rows("gather", logits, rows, packed, values)

    def scatter(
        self, d_logits: Tensor, rows: Rows, packed: FramesAndStates, gradient: Tensor
    ) -> None:
        self._copy_rows("scatter", gradient, rows, packed, d_logits)

    def _copy_rows(
        self, kernel: str, given: Tensor, rows: Rows, packed: FramesAndStates, values: Tensor
    ) -> None:
        strides = ("batch_stride", "frame_stride", "state_stride", "column_stride")
        self._device.call(
            self._sources.given_rows(given.dtype),
            kernel,
            Shape((-(-len(rows) // _WARPS), 1, 1), (_WARP, _WARPS, 1)),
            {
                **vars(packed),
                **vars(rows),
                **dict(zip(strides, given.stride(), strict=True)),
                "given": given,
                "values": values,
                "pitch": values.stride(0),
                "column_count": given.shape[-1],
                "row_count": len(rows),
            },
        )

    def reach(
        self, topology: Topology, nodes: Nodes, scores: Tensor, row_work: int, tolerance: float
    ) -> None:
        """The host would wait for the device in each block of frames."""

    def select_nodes(
        self,
        topology: Topology,
        nodes: Nodes,
        scores: Tensor,
        occupancy: Tensor,
        *,
        weight: Tensor,
        tolerance: float,
        least: float,
    ) -> Callable[[], Tensor]:
        n, samples = len(nodes.rows), len(nodes.packed.group.samples)
        frame, frame_sample = nodes.rows.frame, nodes.packed.frame_sample
        source = self._sources.selection(topology)
        counts = frame_sample.new_empty(-(-n // SELECTED_NODES_OF_WARP))
        kept, total = frame_sample.new_empty(n), frame_sample.new_empty(1)
        arguments: dict[str, Argument] = {
            "scores": scores,
            "occupancy": occupancy,
            "frame": frame,
            "frame_sample": frame_sample,
            "weight": weight,
            "tolerance": tolerance,
            "least": least,
            "bin": frame.new_empty(n, dtype=torch.int16),
            "histogram": frame_sample.new_zeros((samples, BINS)),
            "threshold": frame.new_empty(samples),
            "counts": counts,
            "before": counts,
            "total": total,
            "length": len(counts),
            "kept": kept,
            "node_count": n,
        }

        def launch(kernel: str, blocks: int, threads: int, shared_bytes: int = 0) -> None:
            shape = Shape((blocks, 1, 1), (threads, 1, 1), shared_bytes)
            self._device.call(source, kernel, shape, arguments)

        blocks = -(-n // (_WARPS * SELECTED_NODES_OF_WARP))
        launch("gradient_mass", -(-n // _THREADS), _THREADS)
        launch("thresholds", samples, _THRESHOLD_THREADS, 8 * (_THRESHOLD_THREADS + 2))
        launch("count_kept", blocks, _THREADS)
        launch("scan_counts", 1, _SCAN_THREADS, 8 * _SCAN_THREADS)
        launch("write_kept", blocks, _THREADS)
        count = self._device.read(total)
        return lambda: kept[: count()]

    def _selection_bytes(self, samples: int) -> int:
        return samples * 8 * BINS

    def _block(self, topology: Topology, frames: int, states: int) -> Block:
        walk = Walk(topology, frames, states)
        if walk.bytes > self.SHARED_BYTES:
            return Block(walk.threads, scratch_bytes=walk.bytes)
        return Block(walk.threads, shared_bytes=walk.bytes)

    def _add_joint_gradient(
        self,
        source: KernelSource,
        arguments: dict[str, Argument],
        rows: Rows,
        states: JointStates,
    ) -> None:
        hidden, packed, sums = arguments["hidden"], states.packed, states.sums
        assert isinstance(hidden, Tensor)
        width = 16 // hidden.itemsize
        slices = -(-hidden.shape[1] // (_WARP * width))

        def add(row_sums: Tensor, state_sample: Tensor | None, longest: int) -> None:
            """To those of frames, or of states, which have ``longest`` rows at most."""
            least_blocks = max(1, slices * -(-len(rows) // longest))
            warps = min(
                -(-_BUSY_WARPS // least_blocks),
                longest // _ROWS_OF_WARP,
                GRADIENT_THREADS // _WARP,
            )
            warps = max(1, warps)
            shared_bytes = warps * (_WARP * (width * row_sums.itemsize + 4 * GRADIENT_LOOKS) + 4)
            of_sums: dict[str, Argument] = {
                "state_sample": state_sample,
                "sums": row_sums,
                "sums_pitch": row_sums.stride(0),
            }
            shape = Shape((len(row_sums), slices, 1), (_WARP, warps, 1), shared_bytes)
            self._device.call(source, "joint_gradient", shape, arguments | of_sums)

        if sums.encoder_rows is not None:
            add(sums.encoder_rows, None, max(packed.group.states))
        if sums.predictor_rows is not None:
            add(sums.predictor_rows, packed.state_sample, max(packed.group.frames))
