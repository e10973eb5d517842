"""Which CPU kernel sources there are, and the macros that each is compiled with.

Cached, since a call begins here.
"""

from __future__ import annotations

import functools

import torch

from rnnt_op.backends.protocol import BINS
from rnnt_op.jit import KernelSource
from rnnt_op.topology import RNNT, Topology

_TYPES = {torch.float64: "double", torch.float32: "float", torch.bfloat16: "bfloat16"}


def operand_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """Of GEMM operands and results: on a CPU, float16 GEMMs are slower than float32 ones."""
    return torch.float32 if compute_dtype == torch.float16 else compute_dtype


def real_dtype(operand: torch.dtype) -> torch.dtype:
    """Of arithmetic and sums."""
    return torch.promote_types(operand, torch.float32)


@functools.cache
def node_rows() -> KernelSource:
    return _source("node_rows")


@functools.cache
def hidden(operand: torch.dtype, activation: str) -> KernelSource:
    return _source("hidden", *_precision(operand), ("ACTIVATION", activation))


@functools.cache
def arc_scores(operand: torch.dtype, arcs: int) -> KernelSource:
    return _source("arc_scores", *_precision(operand), _arcs(arcs))


@functools.cache
def lattice(topology: Topology) -> KernelSource:
    return _source(
        "lattice",
        _arcs(len(topology.arcs)),
        ("ARC_FRAMES", ",".join(str(arc.frames) for arc in topology.arcs)),
        ("ARC_LABELS", ",".join(str(arc.labels) for arc in topology.arcs)),
        ("RING", str(1 + max(arc.frames + arc.labels for arc in topology.arcs))),
    )


@functools.cache
def selection(arcs: int) -> KernelSource:
    return _source("selection", _arcs(arcs), ("BINS", str(BINS)))


@functools.cache
def logit_gradient(operand: torch.dtype, arcs: int) -> KernelSource:
    return _source("logit_gradient", *_precision(operand), _arcs(arcs))


@functools.cache
def joint_gradient(operand: torch.dtype, activation: str) -> KernelSource:
    return _source("joint_gradient", *_precision(operand), ("ACTIVATION", activation))


def kernel_sources(dtype: torch.dtype, activation: str) -> list[KernelSource]:
    """All that a loss with GEMMs in ``dtype`` needs."""
    operand, arcs = operand_dtype(dtype), len(RNNT.arcs)
    return [
        node_rows(),
        hidden(operand, activation),
        arc_scores(operand, arcs),
        lattice(RNNT),
        selection(arcs),
        logit_gradient(operand, arcs),
        joint_gradient(operand, activation),
    ]


def _source(name: str, *macros: tuple[str, str]) -> KernelSource:
    return KernelSource(name, macros, suffix=".cpp")


def _precision(operand: torch.dtype) -> tuple[tuple[str, str], ...]:
    return ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real_dtype(operand)])


def _arcs(arcs: int) -> tuple[str, str]:
    return "ARCS", str(arcs)
