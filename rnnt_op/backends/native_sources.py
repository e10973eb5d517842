"""Which CPU kernel sources there are, and the macros that each is compiled with.

Cached, since a call begins here; where a topology matters, with a bound, since its numbers may
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
def hidden(operand: torch.dtype, activation: str, dropout: bool = False) -> KernelSource:
    return _source("hidden", *_precision(operand), *_of_hidden(activation, dropout))


@functools.lru_cache
def symbol_scores(operand: torch.dtype, topology: Topology) -> KernelSource:
    return _source("symbol_scores", *_precision(operand), *symbol_macros(topology))


@functools.lru_cache
def lattice(topology: Topology, restricted: bool = False) -> KernelSource:
    return _source("lattice", *arc_macros(topology), ("RESTRICTED", str(int(restricted))))


@functools.lru_cache
def best_paths(topology: Topology) -> KernelSource:
    return _source("best_paths", *arc_macros(topology), ("RESTRICTED", "1"))


@functools.lru_cache
def selection(topology: Topology) -> KernelSource:
    return _source("selection", *symbol_macros(topology), ("BINS", str(BINS)))


@functools.lru_cache
def logit_gradient(operand: torch.dtype, topology: Topology) -> KernelSource:
    return _source("logit_gradient", *_precision(operand), *symbol_macros(topology))


@functools.cache
def joint_gradient(operand: torch.dtype, activation: str, dropout: bool = False) -> KernelSource:
    return _source("joint_gradient", *_precision(operand), *_of_hidden(activation, dropout))


def needed(kernels: Kernels) -> list[KernelSource]:
    """All that an op takes."""
    topology, restricted = kernels.topology, kernels.is_restricted
    sources = [node_rows()]
    if kernels.logits == "given":
        values = real_dtype(kernels.compute_dtype)
    else:
        values = operand_dtype(kernels.compute_dtype)
        if kernels.logits == "additive":
            values = real_dtype(kernels.input_dtype or torch.float32)
        of_hidden = values, kernels.activation, kernels.has_dropout
        sources += [hidden(*of_hidden), joint_gradient(*of_hidden)]
    sources.append(symbol_scores(values, topology))
    if kernels.result == "paths":
        return [*sources, best_paths(topology)]
    if kernels.result == "posteriors":
        return [*sources, lattice(topology.counted(), restricted)]
    sources.append(lattice(topology, restricted))
    if kernels.result == "gradients":
        sources += [selection(topology), logit_gradient(values, topology)]
    return sources


def _source(name: str, *macros: tuple[str, str]) -> KernelSource:
    return KernelSource(name, macros, suffix=".cpp")


def _of_hidden(activation: str, dropout: bool) -> tuple[tuple[str, str], ...]:
    return ("ACTIVATION", activation), ("DROPOUT", str(int(dropout)))


def _precision(operand: torch.dtype) -> tuple[tuple[str, str], ...]:
    return ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real_dtype(operand)])
