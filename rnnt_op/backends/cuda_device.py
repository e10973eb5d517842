"""What the CUDA backend asks of a device beyond torch's own operations.

Tests replace this class by one that runs the same kernel sources on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from rnnt_op.jit import KernelSource, Module, load_module, load_modules


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
    """Kernels, GEMMs with float32 results, and values for the host, on one CUDA device."""

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
            yield

    def load(self, sources: Sequence[KernelSource]) -> None:
        """Compiles and loads sources, side by side."""
        load_modules(sources, self._device)

    def module(self, source: KernelSource) -> Module:
        """Compiles and loads a source on first use."""
        return load_module(source, self._device)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a · b; half operands may have a float32 result."""
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        elif has_wide_results(a.dtype, self._capability):
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    @functools.cached_property
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
