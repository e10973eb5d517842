"""Lattices that people train, one a file: what :func:`rnnt_op.joint_rnnt_loss` takes as topology.

``docs/topologies.md`` has their recursions, papers and names in other toolkits.
"""

from __future__ import annotations

import functools

from rnnt_op.topologies.constrained import constrained
from rnnt_op.topologies.hat import hat
from rnnt_op.topologies.modified import modified
from rnnt_op.topologies.multi_blank import multi_blank
from rnnt_op.topologies.star import star
from rnnt_op.topologies.tdt import tdt
from rnnt_op.topology import RNNT, Topology

__all__ = ["RNNT", "Topology", "constrained", "hat", "modified", "multi_blank", "star", "tdt"]


@functools.lru_cache(maxsize=256)
def resolve(text: str, normalizer: str, fast_emit: float, delay_penalty: float) -> Topology:
    """The lattice of an op's arguments: the topology of that text, normalised and regularised."""
    topology = Topology.decode(text)
    if normalizer == "hat":
        topology = hat(topology)
    return topology.regularized(fast_emit, delay_penalty)
