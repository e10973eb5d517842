"""Which kernel sources there are, and the macros that each is compiled with.

Cached, since a launch begins here.
"""

from __future__ import annotations

import functools

import torch

from rnnt_op.backends.protocol import BINS
from rnnt_op.jit import KernelSource
from rnnt_op.topology import RNNT, Topology

_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SCORED_ROWS_OF_WARP = 8
SELECTED_NODES_OF_WARP = 256


def real_dtype(operand: torch.dtype) -> torch.dtype:
    """Half operands go with float32 logits and sums."""
    return torch.promote_types(operand, torch.float32)


@functools.cache
def node_rows() -> KernelSource:
    return KernelSource("node_rows")


@functools.cache
def hidden(state: torch.dtype, operand: torch.dtype, activation: str) -> KernelSource:
    return KernelSource(
        "hidden", (("STATE", _TYPES[state]), *_precision(operand), ("ACTIVATION", activation))
    )


@functools.cache
def arc_scores(real: torch.dtype, arcs: int) -> KernelSource:
    rows = ("ROWS_OF_WARP", str(SCORED_ROWS_OF_WARP))
    return KernelSource("arc_scores", (("REAL", _TYPES[real]), _arcs(arcs), rows))


@functools.cache
def lattice(topology: Topology) -> KernelSource:
    return KernelSource(
        "lattice",
        (
            _arcs(len(topology.arcs)),
            ("ARC_FRAMES", ",".join(str(arc.frames) for arc in topology.arcs)),
            ("ARC_LABELS", ",".join(str(arc.labels) for arc in topology.arcs)),
            ("RING", str(lattice_ring(topology))),
        ),
    )


def lattice_ring(topology: Topology) -> int:
    """Anti-diagonals that the recursion needs at once."""
    return 1 + max(arc.frames + arc.labels for arc in topology.arcs)


@functools.cache
def selection(arcs: int) -> KernelSource:
    nodes = ("NODES_OF_WARP", str(SELECTED_NODES_OF_WARP))
    return KernelSource("selection", (_arcs(arcs), ("BINS", str(BINS)), nodes))


@functools.cache
def logit_gradient(operand: torch.dtype, real: torch.dtype, arcs: int) -> KernelSource:
    return KernelSource(
        "logit_gradient", (("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real]), _arcs(arcs))
    )


@functools.cache
def joint_gradient(operand: torch.dtype, activation: str) -> KernelSource:
    return KernelSource("joint_gradient", (*_precision(operand), ("ACTIVATION", activation)))


def kernel_sources(dtype: torch.dtype, activation: str) -> list[KernelSource]:
    """All that a loss with GEMMs in ``dtype`` needs, under autocast too."""
    real, arcs = real_dtype(dtype), len(RNNT.arcs)
    return [
        node_rows(),
        *(hidden(state, dtype, activation) for state in dict.fromkeys((dtype, real))),
        arc_scores(real, arcs),
        lattice(RNNT),
        selection(arcs),
        logit_gradient(dtype, real, arcs),
        joint_gradient(dtype, activation),
    ]


def _precision(operand: torch.dtype) -> tuple[tuple[str, str], ...]:
    return ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real_dtype(operand)])


def _arcs(arcs: int) -> tuple[str, str]:
    return "ARCS", str(arcs)
