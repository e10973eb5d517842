"""Compiles kernels before they are needed: in an image's build, or on one node of many.

The cache then serves them wherever the compiler has the same version; no GPU is needed here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from rnnt_op import validation
from rnnt_op.backends.cuda_sources import kernel_sources
from rnnt_op.jit import JitError, KernelSource
from rnnt_op.jit.build import build
from rnnt_op.jit.compiler import architecture_named, architecture_of
from rnnt_op.jit.ptxas import usages


@dataclass(frozen=True)
class Precompiled:
    """A source compiled for an architecture, and what ptxas reported of its kernels."""

    name: str
    macros: tuple[tuple[str, str], ...]
    architecture: str
    cached: bool  # found in the cache, not compiled now
    seconds: float
    registers: int  # of a thread, in the kernel that takes most
    spill_bytes: int  # of all its kernels


def precompile(
    *,
    dtypes: Iterable[torch.dtype] | None = None,
    activations: Iterable[str] | None = None,
    architectures: Iterable[str] | None = None,
) -> list[Precompiled]:
    """Compiles the CUDA kernels of these dtypes and activations, or finds them in the cache.

    Args:
        dtypes: of encoder, predictor and weight. None: all that the losses take.
        activations: of the joint. None: all that the losses take.
        architectures: such as ``"sm_90a"``, ``"sm_80"`` or ``"8.0"``. None: those of the visible
            CUDA devices.

    Raises:
        ValueError: a dtype or activation is none that the losses take.
        rnnt_op.jit.JitError: no architecture is named and no device visible, an architecture is
            not supported, there is no compiler, or a source does not compile.
    """
    dtypes = validation.FLOAT_DTYPES if dtypes is None else tuple(dtypes)
    activations = validation.ACTIVATIONS if activations is None else tuple(activations)
    known = [_name(dtype) for dtype in validation.FLOAT_DTYPES]
    for dtype in dtypes:
        validation.check_choice("dtypes", _name(dtype), known)
    for activation in activations:
        validation.check_choice("activations", activation, validation.ACTIVATIONS)
    if architectures is None:
        targets = _visible_architectures()
    else:
        targets = [architecture_named(name) for name in architectures]

    sources = [s for dtype in dtypes for name in activations for s in kernel_sources(dtype, name)]
    return precompile_sources(sources, targets)


def precompile_sources(
    sources: Sequence[KernelSource], architectures: Sequence[str]
) -> list[Precompiled]:
    """Compiles each source once for each architecture, as many at a time as there are cores.

    Raises:
        rnnt_op.jit.JitError: as ``precompile``.
    """
    jobs = [(s, a) for a in dict.fromkeys(architectures) for s in dict.fromkeys(sources)]
    # NVRTC releases the interpreter's lock, so threads are enough: two compile in the time of one.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(lambda job: _precompile(*job), jobs))


def _precompile(source: KernelSource, architecture: str) -> Precompiled:
    built = build(source, architecture)
    kernels = usages(built.compiled.log)
    return Precompiled(
        name=source.name,
        macros=source.macros,
        architecture=architecture,
        cached=built.cached,
        seconds=built.seconds,
        registers=max((kernel.registers for kernel in kernels), default=0),
        spill_bytes=sum(kernel.spill_bytes for kernel in kernels),
    )


def _visible_architectures() -> list[str]:
    count = torch.cuda.device_count()
    if count == 0:
        raise JitError(
            "no CUDA device is visible: name the architectures to compile for, such as sm_90a"
        )
    return [architecture_of(torch.cuda.get_device_capability(index)) for index in range(count)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
