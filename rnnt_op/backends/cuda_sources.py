"""Which kernel sources there are, and the macros that each is compiled with.

Cached, since a launch begins here; where a topology matters, with a bound, since its numbers may
differ from step to step.
"""

from __future__ import annotations

import functools

import torch

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.protocol import BINS
from rnnt_op.backends.topology_macros import arc_macros, symbol_macros
from rnnt_op.jit import KernelSource
from rnnt_op.topology import Topology

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
def hidden(
    state: torch.dtype, operand: torch.dtype, activation: str, dropout: bool = False
) -> KernelSource:
    types = ("STATE", _TYPES[state]), *_precision(operand)
    return KernelSource("hidden", (*types, *_of_hidden(activation, dropout)))


@functools.lru_cache
def symbol_scores(real: torch.dtype, topology: Topology, part: bool = False) -> KernelSource:
    macros = ("ROWS_OF_WARP", str(SCORED_ROWS_OF_WARP)), ("PART", str(int(part)))
    return KernelSource(
        "symbol_scores", (("REAL", _TYPES[real]), *symbol_macros(topology), *macros)
    )


@functools.lru_cache
def lattice(topology: Topology, restricted: bool = False) -> KernelSource:
    threads = ("THREADS", str(lattice_threads(topology)))
    macros = ("RESTRICTED", str(int(restricted))), threads
    return KernelSource("lattice", (*arc_macros(topology), *macros))


def lattice_threads(topology: Topology) -> int:
    """Of a block at most: scores and probabilities of all arcs of a node stand in registers."""
    arcs = len(topology.arcs)
    return 1024 if arcs <= 2 else 512 if arcs <= 7 else 256


@functools.lru_cache
def best_paths(topology: Topology) -> KernelSource:
    return KernelSource("best_paths", arc_macros(topology))


@functools.lru_cache
def selection(topology: Topology) -> KernelSource:
    nodes = ("NODES_OF_WARP", str(SELECTED_NODES_OF_WARP))
    return KernelSource("selection", (*symbol_macros(topology), ("BINS", str(BINS)), nodes))


@functools.lru_cache
def logit_gradient(operand: torch.dtype, real: torch.dtype, topology: Topology) -> KernelSource:
    types = ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real])
    return KernelSource("logit_gradient", (*types, *symbol_macros(topology)))


@functools.cache
def joint_gradient(operand: torch.dtype, activation: str, dropout: bool = False) -> KernelSource:
    macros = *_precision(operand), *_of_hidden(activation, dropout)
    return KernelSource("joint_gradient", macros)


def needed(kernels: Kernels) -> list[KernelSource]:
    """All that an op takes."""
    topology, restricted = kernels.topology, kernels.is_restricted
    operand = kernels.compute_dtype
    real = real_dtype(operand)
    sources = [node_rows()]
    if kernels.logits != "given":
        state = state_dtype(kernels.input_dtype, operand)
        if kernels.logits == "additive":
            state = kernels.input_dtype or torch.float32
            operand = real = real_dtype(state)
        sources += [
            hidden(state, operand, kernels.activation, kernels.has_dropout),
            joint_gradient(operand, kernels.activation, kernels.has_dropout),
        ]
    sources.append(symbol_scores(real, topology, kernels.has_part))
    if kernels.result == "paths":
        return [*sources, best_paths(topology)]
    if kernels.result == "posteriors":
        return [*sources, lattice(topology.counted(), restricted)]
    sources.append(lattice(topology, restricted))
    if kernels.result == "gradients":
        sources += [selection(topology), logit_gradient(operand, real, topology)]
    return sources


def state_dtype(input_dtype: torch.dtype | None, compute_dtype: torch.dtype) -> torch.dtype:
    """Of packed encoder and predictor rows, whose sum then needs no wider copies of them."""
    return compute_dtype if input_dtype == compute_dtype else real_dtype(compute_dtype)


def _of_hidden(activation: str, dropout: bool) -> tuple[tuple[str, str], ...]:
    return ("ACTIVATION", activation), ("DROPOUT", str(int(dropout)))


def _precision(operand: torch.dtype) -> tuple[tuple[str, str], ...]:
    return ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real_dtype(operand)])
