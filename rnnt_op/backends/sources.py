"""Which kernel sources there are, and the macros that each is compiled with.

``csrc/*.cu`` and ``csrc/cpu/*.cpp`` have the same kernels in two languages, with the same macros
besides a few of launches. Cached, since a call begins here; where a topology matters, with a bound,
since its numbers may differ from step to step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from rnnt_op.activations import activation_named
from rnnt_op.backends.kernels import Kernels, LogitsFrom
from rnnt_op.backends.lattice_walk import TURN, max_threads
from rnnt_op.backends.records import BINS, least_gradient
from rnnt_op.backends.topology_macros import Macros, arc_macros, symbol_macros
from rnnt_op.jit import KernelSource
from rnnt_op.jit.cpu import multiplies_bfloat16
from rnnt_op.topology import NO_LABEL, Topology

_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

SCORED_ROWS_OF_WARP = 8
SELECTED_NODES_OF_WARP = 256
GRADIENT_THREADS, GRADIENT_LOOKS = 512, 16


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half types go with float32 sums."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Precision:
    """Element types of logits and of what they are made of."""

    packed: torch.dtype  # of packed encoder and predictor rows
    operand: torch.dtype  # of GEMMs: hidden states, weights, gradients of logits
    logits: torch.dtype
    real: torch.dtype  # of GEMMs' results, of arithmetic between them, and of sums


_PrecisionOf: TypeAlias = Callable[[LogitsFrom, torch.dtype, torch.dtype | None], Precision]


@dataclass(eq=False)
class Sources:
    """The kernels in one language."""

    suffix: Literal[".cu", ".cpp"]
    precision: _PrecisionOf
    """Of logits, GEMM operands of some dtype, and encoder and predictor states of a dtype, None if
    they have two."""

    @functools.lru_cache
    def node_rows(self) -> KernelSource:
        return self._source("node_rows", ("NO_LABEL", str(NO_LABEL)))

    @functools.lru_cache
    def hidden(self, precision: Precision, activation: str, dropout: bool = False) -> KernelSource:
        return self._source("hidden", *_of_hidden(precision, activation, dropout))

    @functools.lru_cache
    def joint_gradient(
        self, precision: Precision, activation: str, dropout: bool = False
    ) -> KernelSource:
        launch = ("THREADS", str(GRADIENT_THREADS)), ("LOOKS", str(GRADIENT_LOOKS))
        macros = _of_hidden(precision, activation, dropout)
        return self._source("joint_gradient", *macros, gpu=launch)

    @functools.lru_cache
    def given_rows(self, given: torch.dtype) -> KernelSource:
        return self._source("given_rows", *_types(given))

    @functools.lru_cache
    def symbol_scores(
        self, logits: torch.dtype, topology: Topology, part: bool = False
    ) -> KernelSource:
        launch = ("ROWS_OF_WARP", str(SCORED_ROWS_OF_WARP)), ("PART", str(int(part)))
        types = ("LOGIT", _TYPES[logits]), ("REAL", _TYPES[real_dtype(logits)])
        return self._source("symbol_scores", *types, *symbol_macros(topology), gpu=launch)

    @functools.lru_cache
    def lattice(self, topology: Topology, restricted: bool = False) -> KernelSource:
        macros = *arc_macros(topology), ("RESTRICTED", str(int(restricted)))
        launch = ("THREADS", str(max_threads(topology))), ("TURN", str(TURN))
        return self._source("lattice", *macros, gpu=launch)

    @functools.lru_cache
    def reach(self, topology: Topology, restricted: bool = False) -> KernelSource:
        tables = dict((*symbol_macros(topology), *arc_macros(topology)))
        return self._source("reach", *tables.items(), ("RESTRICTED", str(int(restricted))))

    @functools.lru_cache
    def best_paths(self, topology: Topology) -> KernelSource:
        return self._source("best_paths", *arc_macros(topology), ("RESTRICTED", "1"))

    @functools.lru_cache
    def selection(self, topology: Topology) -> KernelSource:
        nodes = ("NODES_OF_WARP", str(SELECTED_NODES_OF_WARP))
        macros = *symbol_macros(topology), ("BINS", str(BINS))
        return self._source("selection", *macros, gpu=(nodes,))

    @functools.lru_cache
    def logit_gradient(
        self, logits: torch.dtype, gradient: torch.dtype, topology: Topology
    ) -> KernelSource:
        least = least_gradient(gradient)
        types = *_types(gradient), ("LOGIT", _TYPES[logits]), ("LEAST", least.hex())
        return self._source("logit_gradient", *types, *symbol_macros(topology))

    def needed(self, kernels: Kernels) -> list[KernelSource]:
        """All that an op takes."""
        topology, restricted = kernels.topology, kernels.is_restricted
        precision = self.precision(kernels.logits, kernels.compute_dtype, kernels.input_dtype)
        sources = [self.node_rows()]
        if kernels.logits != "given":
            of_hidden = precision, kernels.activation, kernels.has_dropout
            sources += [self.hidden(*of_hidden), self.joint_gradient(*of_hidden)]
        elif self.suffix == ".cu":
            sources.append(self.given_rows(kernels.compute_dtype))
        sources.append(self.symbol_scores(precision.logits, topology, kernels.has_part))
        if kernels.result == "paths":
            return [*sources, self.best_paths(topology)]
        if kernels.result == "posteriors":
            return [*sources, self.lattice(topology.counted(), restricted)]
        sources.append(self.lattice(topology, restricted))
        is_whole = kernels.logits == "joint" and not kernels.has_part
        if self.suffix == ".cpp" and is_whole and topology.is_substochastic:
            sources.append(self.reach(topology, restricted))
        if kernels.result == "gradients":
            of_logits = precision.logits, precision.operand
            sources += [self.selection(topology), self.logit_gradient(*of_logits, topology)]
        return sources

    def _source(self, name: str, *macros: tuple[str, str], gpu: Macros = ()) -> KernelSource:
        return KernelSource(
            name, (*macros, *(gpu if self.suffix == ".cu" else ())), suffix=self.suffix
        )


def _types(operand: torch.dtype) -> Macros:
    return ("OPERAND", _TYPES[operand]), ("REAL", _TYPES[real_dtype(operand)])


def _of_hidden(precision: Precision, activation: str, dropout: bool) -> Macros:
    numbers = ",".join(map(repr, activation_named(activation).numbers))
    return (
        ("PACKED", _TYPES[precision.packed]),
        *_types(precision.operand),
        ("ACTIVATION", activation.partition("(")[0]),
        *([("NUMBERS", numbers)] if numbers else []),
        ("DROPOUT", str(int(dropout))),
    )


def _cuda_precision(
    logits: LogitsFrom, compute_dtype: torch.dtype, input_dtype: torch.dtype | None
) -> Precision:
    """States of the operands' dtype stay in it: their sum needs no wider copies."""
    if logits == "additive":
        packed = input_dtype or torch.float32
        real = real_dtype(packed)
        return Precision(packed, real, real, real)
    real = real_dtype(compute_dtype)
    packed = compute_dtype if input_dtype == compute_dtype else real
    return Precision(packed, compute_dtype, real, real)


def _cpu_precision(
    logits: LogitsFrom, compute_dtype: torch.dtype, input_dtype: torch.dtype | None
) -> Precision:
    """GEMMs are never in float16, and in bfloat16 only where the CPU has instructions for it: else
    they are slower than those of float32. Given logits are read as they are."""
    if logits == "joint":
        is_fast = compute_dtype == torch.bfloat16 and multiplies_bfloat16()
        operand = compute_dtype if is_fast else real_dtype(compute_dtype)
        real = real_dtype(operand)
        return Precision(real, operand, real, real)
    if logits == "given":
        real = real_dtype(compute_dtype)
        return Precision(real, compute_dtype, compute_dtype, real)
    return Precision(*[real_dtype(input_dtype or torch.float32)] * 4)


CUDA = Sources(".cu", _cuda_precision)
CPU = Sources(".cpp", _cpu_precision)
