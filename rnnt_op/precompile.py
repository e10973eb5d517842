"""Compiles kernels before they are needed: in an image's build, or on one node of many.

The cache then serves them wherever the compiler has the same version, and those for the CPU on
CPUs of the same model; no GPU is needed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rnnt_op import validation
from rnnt_op.activations import ACTIVATIONS, activation_named
from rnnt_op.backends.kernels import variants
from rnnt_op.backends.sources import CPU, CUDA
from rnnt_op.jit import KernelSource
from rnnt_op.jit.build import build
from rnnt_op.jit.compiler import Compiler
from rnnt_op.jit.concurrency import side_by_side
from rnnt_op.jit.cuda_compiler import CudaCompiler, architecture_named, architecture_of
from rnnt_op.jit.host_compiler import HostCompiler
from rnnt_op.jit.ptxas import usages
from rnnt_op.topology import RNNT, Topology


@dataclass(frozen=True)
class Precompiled:
    """A source compiled for an architecture, and what ptxas reported of its kernels on a GPU."""

    name: str
    macros: tuple[tuple[str, str], ...]
    architecture: str
    cached: bool  # found in the cache, not compiled now
    seconds: float
    registers: int | None  # of a thread, in the kernel that takes most; None on a CPU
    spill_bytes: int | None  # of all its kernels; None on a CPU


def precompile(
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    activations: Iterable[str] | None = None,
    topologies: Iterable[Topology] = (RNNT,),
    architectures: Iterable[str] | None = None,
) -> list[Precompiled]:
    """Compiles the kernels of these dtypes, activations and topologies, or finds them in the cache.

    Args:
        dtypes: of encoder, predictor and weight. None: all that the losses take.
        activations: of the joint, with their numbers where these are not torch's. None: all that
            the losses take.
        topologies: of the lattices; with normaliser HAT ``rnnt_op.topologies.hat`` of them.
        architectures: GPUs such as ``"sm_90a"``, ``"sm_80"`` or ``"8.0"``, and ``"cpu"`` for the
            CPU of this machine. None: those of the visible CUDA devices, or ``"cpu"`` if there are
            none.

    Raises:
        ValueError: a dtype or activation is none that the losses take.
        rnnt_op.jit.JitError: an architecture is not supported, there is no compiler for it, or a
            source does not compile.
    """
    dtypes = validation.FLOAT_DTYPES if dtypes is None else tuple(dtypes)
    activations = ACTIVATIONS if activations is None else tuple(activations)
    known = [_name(dtype) for dtype in validation.FLOAT_DTYPES]
    for dtype in dtypes:
        validation.check_choice("dtypes", _name(dtype), known)
    for activation in activations:
        activation_named(activation, "activations")
    topologies = tuple(topologies)
    names = _visible_architectures() if architectures is None else architectures
    sources = [
        source
        for language in (CUDA, CPU)
        for topology in topologies
        for dtype in dtypes
        for activation in activations
        for kernels in variants(dtype, activation, topology)
        for source in language.needed(kernels)
    ]
    return precompile_sources(sources, [_compiler(name) for name in names])


def precompile_sources(
    sources: Sequence[KernelSource], compilers: Sequence[Compiler]
) -> list[Precompiled]:
    """Compiles each source once with each compiler for it, as many at a time as there are cores.

    Raises:
        rnnt_op.jit.JitError: as ``precompile``.
    """
    jobs = [
        (source, compiler)
        for compiler in dict.fromkeys(compilers)
        for source in dict.fromkeys(sources)
        if source.suffix == compiler.source_suffix
    ]
    return side_by_side(lambda job: _precompile(*job), jobs)


def _precompile(source: KernelSource, compiler: Compiler) -> Precompiled:
    built = build(source, compiler)
    kernels = usages(built.compiled.log)
    return Precompiled(
        name=source.name,
        macros=source.macros,
        architecture=compiler.architecture,
        cached=built.cached,
        seconds=built.seconds,
        registers=max((kernel.registers for kernel in kernels), default=None),
        spill_bytes=sum(kernel.spill_bytes for kernel in kernels) if kernels else None,
    )


def _compiler(architecture: str) -> Compiler:
    if architecture == HostCompiler.architecture:
        return HostCompiler.from_environment()
    return CudaCompiler(architecture_named(architecture))


def _visible_architectures() -> list[str]:
    capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return list(map(architecture_of, capabilities)) or [HostCompiler.architecture]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
