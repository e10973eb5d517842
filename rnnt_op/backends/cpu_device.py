"""The CPU as a device: kernels of ``csrc/cpu``, and GEMMs of oneDNN or torch's BLAS.

Needs a C++ compiler at first use. Work is divided among torch's threads, and no result depends on
who does what.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rnnt_op.backends import gemm, sources
from rnnt_op.backends.device import Shape
from rnnt_op.backends.records import Logits
from rnnt_op.backends.sources import Precision
from rnnt_op.jit import Argument, KernelSource, load_host_module, load_host_modules


class CpuDevice:
    """See ``device.Device``."""

    sources = sources.CPU
    SHARED_BYTES = sys.maxsize
    ADDS_BIAS = True

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, sources: Sequence[KernelSource]) -> None:
        load_host_modules(sources)

    def call(
        self, source: KernelSource, kernel: str, shape: Shape, arguments: dict[str, Argument]
    ) -> None:
        load_host_module(source).call(kernel, **arguments)

    def read(self, value: Tensor) -> Callable[[], int]:
        number = int(value)
        return lambda: number

    def pitch(self, columns: int) -> int:
        return columns

    def rows(self, matrix: Tensor) -> Tensor:
        return matrix.contiguous()

    def empty_rows(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def rounded(self, rows: int) -> int:
        return gemm.padded_rows(rows)

    def products(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor | None:
        return None  # oneDNN makes its own

    def bias(self, bias: Tensor, precision: Precision) -> Tensor:
        return bias.to(precision.operand)

    def gradient_dtype(self, logits: Logits) -> torch.dtype:
        return logits.values.dtype

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return gemm.linear(x, weight, bias)

    def add_product_(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        # Not in half: every chunk's part would be rounded before it is added.
        gemm.add_product_(sums, a.to(sums.dtype), b.to(sums.dtype))

    def copies_bytes(self, columns: int, precision: Precision) -> int:
        # Wider ones of half, and oneDNN's own of what is transposed.
        copies = 1 if precision.operand == precision.real else 2
        return copies * columns * precision.real.itemsize
