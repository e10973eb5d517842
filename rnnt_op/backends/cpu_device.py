"""The CPU as a device: kernels of ``csrc/cpu``, and GEMMs of oneDNN or torch's BLAS.

Needs a C++ compiler at first use. Work is divided among torch's threads, and no result depends on
who does what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from rnnt_op.backends import sources
from rnnt_op.backends.device import Shape
from rnnt_op.backends.gemm import CpuMatrices
from rnnt_op.jit import Argument, KernelSource, load_host_module, load_host_modules


class CpuDevice(CpuMatrices):
    """See ``device.Device``."""

    sources = sources.CPU

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, sources: Sequence[KernelSource]) -> None:
        load_host_modules(sources)

    def call(
        self, source: KernelSource, kernel: str, shape: Shape, arguments: dict[str, Argument]
    ) -> None:
        load_host_module(source).call(kernel, arguments)

    def read(self, value: Tensor) -> Callable[[], int]:
        number = int(value)
        return lambda: number
