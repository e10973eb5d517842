"""The CPU's backend, in the kernels of ``csrc/cpu``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnnt_op.backends.compiled import CompiledBackend
from rnnt_op.backends.cpu_device import CpuDevice
from rnnt_op.backends.device import Shape
from rnnt_op.backends.records import JointSums
from rnnt_op.jit import Argument, KernelSource
from rnnt_op.nodes import Nodes, Rows
from rnnt_op.topology import Topology

_ANY = Shape((1, 1, 1), (1, 1, 1))


class NativeBackend(CompiledBackend):
    """See ``protocol.Backend``."""

    WORKSPACE_BYTES = 256 * 2**20

    # A chunk's logits and hidden states stay within a CPU's last-level cache.
    CACHE_BYTES = 16 * 2**20

    # Small groups hold samples of like length, and enough of them for every thread.
    LATTICE_SHARE = 0.25

    GROUPS_IN_FLIGHT = 1  # nothing to wait for

    def __init__(self) -> None:
        super().__init__(CpuDevice())

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
                "live": live,
                "poisoned": poisoned,
                "tolerance": tolerance,
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

    def _add_joint_gradient(
        self, source: KernelSource, arguments: dict[str, Argument], rows: Rows, sums: JointSums
    ) -> None:
        of_rows = {"encoder_sums": sums.encoder_rows, "predictor_sums": sums.predictor_rows}
        self._device.call(source, "joint_gradient", _ANY, {**arguments, **vars(rows), **of_rows})
