"""The plan that a backend's sizes make of a batch."""

from __future__ import annotations

from collections.abc import Sequence

from rnnt_op.backends.protocol import Backend
from rnnt_op.plan import Plan, make_plan
from rnnt_op.topology import Topology


def plan_batch(
    backend: Backend,
    lattice: Topology,
    frames: Sequence[int],
    labels: Sequence[int],
    *,
    restricted_nodes: Sequence[int] | None = None,
    row_bytes: int,
    packed_bytes: int,
    logits_bytes: int,
    workspace_bytes: int | None,
) -> Plan:
    """Groups and chunks of a batch; the device need not exist.

    Args:
        backend: that of the batch's device.
        lattice: the topology that the recursions have.
        frames, labels, restricted_nodes, row_bytes, packed_bytes, logits_bytes: as in
            ``make_plan``.
        workspace_bytes: temporary memory, None for the backend's default.
    """
    return make_plan(
        frames,
        labels,
        restricted_nodes=restricted_nodes,
        row_bytes=row_bytes,
        lattice_bytes=lambda *sizes: backend.lattice_bytes(lattice, *sizes),
        packed_bytes=packed_bytes,
        logits_bytes=logits_bytes,
        cache_bytes=backend.CACHE_BYTES,
        workspace_bytes=backend.WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        lattice_share=backend.LATTICE_SHARE,
        groups_in_flight=backend.GROUPS_IN_FLIGHT,
    )
