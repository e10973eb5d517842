"""What the CUDA backend asks of a device beyond torch's own operations.

Tests replace this class by one that runs the same kernel sources on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rnnt_op.jit import KernelSource, Module, load_module


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

    def module(self, source: KernelSource) -> Module:
        """Compiles and loads a source on first use."""
        return load_module(source, self._device)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a · b; half operands may have a float32 result."""
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)

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
