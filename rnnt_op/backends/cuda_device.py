"""A CUDA device: kernels of ``csrc`` on torch's current stream, and GEMMs of cuBLAS.

Tests replace this class by one that runs the same kernel sources on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rnnt_op.backends import sources
from rnnt_op.backends.device import Shape
from rnnt_op.backends.sources import Precision
from rnnt_op.jit import (
    Argument,
    KernelSource,
    Module,
    launching,
    load_module,
    load_modules,
)
from rnnt_op.jit.concurrency import remembered
from rnnt_op.nodes import aligned


def has_wide_results(dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether torch multiplies half operands of a dtype into a float32 result on such a GPU.

    Not in bfloat16 before Ampere, nor where ``torch.backends.cuda.matmul`` is told to add float16
    up in float16, or not to split sums. Operands have to be float32 then.
    """
    settings = torch.backends.cuda.matmul
    if dtype == torch.bfloat16:
        return capability >= (8, 0) and bool(
            settings.allow_bf16_reduced_precision_reduction_split_k
        )
    return bool(settings.allow_fp16_reduced_precision_reduction_split_k) and not bool(
        settings.allow_fp16_accumulation
    )


class CudaDevice:
    """See ``device.Device``. Rows start at multiples of 16 bytes."""

    sources = sources.CUDA
    KEEPS_LOGITS = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Makes the device current.

        Raises:
            RuntimeError: while a CUDA graph is captured: the work depends on lengths and on the
                number of selected nodes, so a graph could not be replayed with other values.
        """
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "rnnt_op: the loss cannot be captured in a CUDA graph, since its work depends "
                    "on lengths and posteriors; call it outside the capture (torch.compile does so "
                    "by itself)"
                )
            with launching(self._device.index):
                yield

    def load(self, sources: Sequence[KernelSource]) -> None:
        """Compiles and loads sources, side by side."""
        load_modules(sources, self._device)

    def module(self, source: KernelSource) -> Module:
        """Compiles and loads a source on first use."""
        return load_module(source, self._device)

    def call(
        self, source: KernelSource, kernel: str, shape: Shape, arguments: dict[str, Argument]
    ) -> None:
        self.module(source).launch(kernel, shape.grid, shape.block, arguments, shape.shared_bytes)

    def pitch(self, columns: int) -> int:
        return aligned(columns)

    def rows(self, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        if matrix.is_contiguous() and aligned(columns) == columns:
            return matrix
        return self.empty_rows(rows, columns, matrix.dtype, matrix).copy_(matrix)

    def empty_rows(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        return like.new_empty((rows, aligned(columns)), dtype=dtype)[:, :columns]

    def rounded(self, rows: int, precision: Precision) -> int:
        return rows

    def products(
        self, rows: int, columns: int, precision: Precision, like: Tensor
    ) -> Tensor | None:
        return self.empty_rows(rows, columns, precision.real, like)

    def bias(self, bias: Tensor, precision: Precision) -> Tensor:
        # Kernels read whole vectors.
        padded = bias.new_zeros(aligned(len(bias)), dtype=precision.real)
        padded[: len(bias)] = bias.to(precision.operand)
        return padded

    def linear(self, x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        assert out is not None
        self.matmul(x, weight.t(), out)
        return out

    def add_product_(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        # No GEMM adds half products to a float32 matrix (addmm wants one dtype).
        product = torch.empty_like(sums)
        self.matmul(a, b, product)
        sums.add_(product)

    def add_column_sums_(self, sums: Tensor, matrix: Tensor) -> None:
        sums.add_(torch.sum(matrix, 0, dtype=sums.dtype))

    def copies_bytes(self, columns: int, precision: Precision) -> int:
        return 0

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a · b; half operands may have a float32 result."""
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        elif has_wide_results(a.dtype, self._capability):
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    @remembered
    def _capability(self) -> tuple[int, int]:
        return torch.cuda.get_device_capability(self._device)

    def read(self, value: Tensor) -> Callable[[], int]:
        """Starts to copy an integer to the host; a call of the result waits for it."""
        host = torch.empty(1, dtype=value.dtype, device="cpu", pin_memory=True)
        host.copy_(value, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> int:
            copied.synchronize()
            return int(host)

        return wait
