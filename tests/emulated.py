"""The CUDA backend with its kernels run by the emulator, on CPU tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from emulator import EmulatedModule
from torch import Tensor

from rnnt_op import backends
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.jit import Arguments, KernelSource
from rnnt_op.jit.signature import signatures


class _SignedModule(EmulatedModule):
    """Takes arguments as the package's modules do: by name, and by what the source says of each."""

    def __init__(self, source: KernelSource, watched: bool) -> None:
        super().__init__(source, watched=watched)
        self._signatures = signatures(source)

    def launch(
        self, kernel: str, grid: Any, block: Any, arguments: Arguments, shared_bytes: int = 0
    ) -> None:
        signature = self._signatures[kernel]
        signature.values(arguments)
        super().launch(kernel, grid, block, [*signature.named(arguments).values()], shared_bytes)


_module = functools.cache(_SignedModule)


class EmulatedDevice(CudaDevice):
    """A CUDA device's host side, with kernels and GEMMs on the CPU.

    Args:
        watched: see ``EmulatedModule``.
    """

    def __init__(self, watched: bool = False) -> None:
        super().__init__(torch.device("cpu"))
        self._watched = watched

    def guard(self) -> AbstractContextManager[object]:
        return nullcontext()

    def load(self, sources: Sequence[KernelSource]) -> None:
        """Modules are made when they are asked for."""

    def module(self, source: KernelSource) -> EmulatedModule:
        return _module(source, self._watched)

    def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        # A GPU's GEMM rounds no product of half operands.
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)

    def read(self, value: Tensor) -> Callable[[], int]:
        return lambda: int(value)


def emulated_backend() -> CudaBackend:
    return CudaBackend(EmulatedDevice())


def emulate_cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the emulated CUDA backend serve CPU tensors."""
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device: emulated_backend())
