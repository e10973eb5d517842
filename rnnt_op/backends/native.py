"""The CPU's backend, in the kernels of ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rnnt_op.backends.compiled import Block, CompiledBackend
from rnnt_op.backends.cpu_device import CpuDevice
from rnnt_op.backends.device import Device, Shape
from rnnt_op.backends.given import GivenInPlace
from rnnt_op.backends.protocol import Reached
from rnnt_op.backends.records import JointStates
from rnnt_op.backends.sources import Sources
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.nodes import Nodes, Rows
from rnnt_op.topology import Topology

# Products of a frame's logits, of all samples, below which a block's rounds cost what they save.
_LEAST_WORK = 4e6
_LONGEST_ARC = 32  # in frames; blocks are as long

_LARGEST_COUNTED_BLOCK = 2**25 - 2**16  # of 32 MiB, with what malloc adds to it

_ANY = Shape((1, 1, 1), (1, 1, 1))


class NativeBackend(CompiledBackend):
    """See ``protocol.Backend``."""

    WORKSPACE_BYTES = 256 * 2**20

    # A chunk's logits and hidden states stay within a CPU's last-level cache, and have rows enough
    # for a GEMM of several threads.
    CACHE_BYTES = 32 * 2**20

    # Small groups hold samples of like length, and enough of them for every thread.
    LATTICE_SHARE = 0.25

    GROUPS_IN_FLIGHT = 1  # nothing to wait for

    def __init__(self) -> None:
        super().__init__(CpuDevice())
        # glibc keeps freed memory up to twice the largest block that was freed before. What it
        # returns to the system, the next call has to fault in again page by page.
        torch.UntypedStorage(_LARGEST_COUNTED_BLOCK)

    def given_chunk(self, logits: Tensor, gradient: Tensor) -> GivenInPlace:
        return GivenInPlace(logits, gradient)

    def reach(
        self, topology: Topology, nodes: Nodes, scores: Tensor, row_work: int, tolerance: float
    ) -> Reached | None:
        work = sum(nodes.packed.group.states) * row_work
        if work < _LEAST_WORK or max(arc.frames for arc in topology.arcs) > _LONGEST_ARC:
            return None
        return _Sweeps(self._device, self._sources, topology, nodes, scores, tolerance)

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
        packed, count = nodes.packed, len(nodes.rows)
        kept = packed.frame_sample.new_empty(count)
        total = packed.frame_sample.new_empty(1)
        self._device.call(
            self._sources.selection(topology),
            "select_nodes",
            _ANY,
            {
                **vars(packed),
                "scores": scores,
                "occupancy": occupancy,
                "weight": weight,
                "tolerance": tolerance,
                "least": least,
                "bin": kept.new_empty(count, dtype=torch.int16),
                "kept": kept,
                "total": total,
                "sample_count": len(packed.group.samples),
            },
        )
        length = self._device.read(total)
        return lambda: kept[: length()]

    def _selection_bytes(self, samples: int) -> int:
        return 0

    def _block(self, topology: Topology, frames: int, states: int) -> Block:
        return Block()

    def _add_joint_gradient(
        self,
        source: KernelSource,
        arguments: dict[str, Argument],
        rows: Rows,
        states: JointStates,
    ) -> None:
        sums = states.sums
        of_rows = {"encoder_sums": sums.encoder_rows, "predictor_sums": sums.predictor_rows}
        self._device.call(source, "joint_gradient", _ANY, {**arguments, **of_rows})


class _Sweeps:
    """See ``protocol.Reached``."""

    def __init__(
        self,
        device: Device,
        sources: Sources,
        topology: Topology,
        nodes: Nodes,
        scores: Tensor,
        tolerance: float,
    ) -> None:
        packed = nodes.packed
        samples, states = len(packed.group.samples), len(packed.state_index)
        self._device = device
        self._source = sources.reach(topology, packed.group.restricted_nodes is not None)
        self._nodes = len(nodes.rows)
        self.lost = scores.new_empty(samples)
        self._arguments: dict[str, Argument] = {
            **vars(packed),
            "scores": scores,
            "numbers": topology.numbers,
            "tolerance": tolerance,
            "progress": scores.new_zeros(samples, 8),
            "inflow": scores.new_zeros(states, max(arc.frames for arc in topology.arcs)),
            "scored_low": torch.zeros_like(packed.frame_index),
            "scored_high": torch.zeros_like(packed.frame_index),
            "lost": self.lost,
            "sample_count": samples,
        }

    def __iter__(self) -> Iterator[Tensor]:
        wanted = self.lost.new_empty(self._nodes, dtype=torch.int64)
        while count := self._take(wanted, None):
            yield wanted[:count]

    def rest(self, occupancy: Tensor) -> Tensor:
        wanted = self.lost.new_empty(self._nodes, dtype=torch.int64)
        return wanted[: self._take(wanted, occupancy)]

    def _take(self, wanted: Tensor, occupancy: Tensor | None) -> int:
        """How many of ``wanted`` it has filled."""
        total = wanted.new_empty(1)
        call = {**self._arguments, "wanted": wanted, "total": total, "occupancy": occupancy}
        self._device.call(self._source, "reach", _ANY, call)
        return int(total)
