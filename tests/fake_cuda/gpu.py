"""A GPU that is not there: tensors without data, and a driver that checks what it is told."""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from cubin import Kernel, kernels_of
from jit_support import FakeDriver
from rnnt_op.torch_library_registration import fakes, kernels
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rnnt_op.backends.cuda_device import CudaDevice
from rnnt_op.jit import cuda_module, driver
from rnnt_op.jit.concurrency import Once

DEVICE = torch.device("cuda", 0)
STREAM = 0xABC
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)
REGISTERS = 65536  # of a multiprocessor
FREE_SHARED_BYTES = 48 * 1024
_REGISTERS_AT_ONCE = 256  # a warp takes a multiple


class LaunchError(AssertionError):
    """The driver would refuse a launch, or the kernel would read what it was not given."""


@dataclass(eq=False)
class _Function:
    kernel: Kernel
    dynamic_bytes: int  # that a launch may take


class CheckingDriver(FakeDriver):
    """Stands for ``cuda.bindings.driver``, and knows what the cubins that it loads say.

    Args:
        max_shared_bytes: of a block, if a kernel is allowed to have it.
    """

    def __init__(self, max_shared_bytes: int) -> None:
        super().__init__()
        self.arguments: list[bytes] = []  # of the last launch, each parameter's bytes
        self._max_shared_bytes = max_shared_bytes

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, kernels_of(cubin)

    def cuModuleGetFunction(self, module: dict[str, Kernel], name: bytes) -> tuple[Any, ...]:
        kernel = module.get(name.decode())
        if kernel is None:
            return self.CUresult.CUDA_ERROR_NOT_FOUND, None
        function = _Function(kernel, FREE_SHARED_BYTES - kernel.shared_bytes)
        return self.CUresult.CUDA_SUCCESS, function

    def cuFuncGetAttribute(self, attribute: Any, function: _Function) -> tuple[Any, ...]:
        assert attribute == self.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        return self.CUresult.CUDA_SUCCESS, function.kernel.shared_bytes

    def cuFuncSetAttribute(
        self, function: _Function, attribute: Any, value: int
    ) -> tuple[Any, ...]:
        of_shared = self.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        assert attribute == of_shared
        if function.kernel.shared_bytes + value > self._max_shared_bytes:
            return (self.CUresult.CUDA_ERROR_INVALID_VALUE,)
        function.dynamic_bytes = value
        return (self.CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function: _Function, *configuration: int) -> tuple[Any, ...]:
        *shape, shared_bytes, stream, parameters, extra = configuration
        kernel, grid, block = function.kernel, shape[:3], shape[3:]
        threads = block[0] * block[1] * block[2]
        registers = -(-32 * kernel.registers // _REGISTERS_AT_ONCE) * _REGISTERS_AT_ONCE

        def expect(is_right: bool, what: str) -> None:
            if not is_right:
                raise LaunchError(f"{kernel.name}: {what}")

        expect(all(1 <= n <= most for n, most in zip(grid, MAX_GRID, strict=True)), f"grid {grid}")
        expect(all(1 <= n <= most for n, most in zip(block, MAX_BLOCK, strict=True)), f"{block}")
        expect(threads <= kernel.max_threads, f"{threads} threads, bound {kernel.max_threads}")
        expect(registers * -(-threads // 32) <= REGISTERS, f"registers of {threads} threads")
        expect(shared_bytes <= function.dynamic_bytes, f"{shared_bytes} bytes of shared memory")
        expect(stream == STREAM and extra == 0, "another stream")
        expect(self.current == 0x1000, "another context")
        pointers = (ctypes.c_void_p * len(kernel.parameters)).from_address(parameters)
        self.arguments = [
            ctypes.string_at(pointer, size)
            for pointer, (_, size) in zip(pointers, kernel.parameters, strict=True)
        ]
        return (self.CUresult.CUDA_SUCCESS,)


def address(tensor: Tensor) -> int:
    """That of a fake tensor: another one for each storage, aligned as torch's allocator does."""
    storage = tensor.untyped_storage()._cdata * 512
    return storage + tensor.storage_offset() * tensor.element_size()


class _RunsKernels(TorchDispatchMode):
    """Runs the ops themselves instead of their fakes, and compares what both return. Refuses
    operations for which the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "rnnt_op":
            result = op(*args, **kwargs or {})
            leaves = tree_leaves((args, kwargs, result))
            tensors = [t for t in leaves if isinstance(t, Tensor) and t.dim() > 0]
            on_host = [t for t in tensors if t.device != DEVICE]
            if 0 < len(on_host) < len(tensors) and not all(map(self._is_pinned, on_host)):
                raise LaunchError(f"{op} waits for the device")
            return result
        name = op._schema.name.removeprefix("rnnt_op::")
        results = getattr(kernels, name)(*args)
        expected = getattr(fakes, name)(*args)
        assert _layouts(results) == _layouts(expected), name
        return results

    def pin(self, tensor: Tensor) -> Tensor:
        assert tensor.device.type == "cpu"
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        self.pinned.append(copy)
        return copy

    def _is_pinned(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        return any(storage == pinned.untyped_storage()._cdata for pinned in self.pinned)


def _layouts(results: Any) -> list[object]:
    tensors = [results] if isinstance(results, Tensor) else results
    return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]


@dataclass
class HostReads:
    """What the host reads of the device in turn, noted where there are data and given where not."""

    integers: deque[int] = field(default_factory=deque)  # of ``Device.read``
    tables: deque[list[Any]] = field(default_factory=deque)  # of ``Tensor.tolist``


@contextmanager
def fake_gpu(
    reads: HostReads,
    capability: tuple[int, int],
    max_shared_bytes: int,
    check: Callable[[CheckingDriver], None],
) -> Iterator[None]:
    """Within it, a process has one GPU; tensors that are made have no data.

    Any other read of a value by the host is an error.

    Args:
        reads: what the host gets.
        capability: of the GPU.
        max_shared_bytes: of a block.
        check: called after each launch.
    """
    checking, mode = CheckingDriver(max_shared_bytes), _RunsKernels()
    launch = checking.cuLaunchKernel

    def launch_and_check(*arguments: Any) -> tuple[Any, ...]:
        result = launch(*arguments)
        check(checking)
        return result

    def read(self: CudaDevice, value: Tensor) -> Callable[[], int]:
        assert value.device == DEVICE
        assert value.shape == (1,)
        return reads.integers.popleft

    def tolist(self: Tensor) -> Any:
        table = reads.tables.popleft()
        # With all on the device, the verdict on the labels comes with the lengths.
        assert len(table) - len(self) in (0, 1)
        return table[: len(self)]

    checking.cuLaunchKernel = launch_and_check  # type: ignore[method-assign]
    cuda: dict[str, Any] = {
        "device": lambda device: nullcontext(),
        "current_device": lambda: 0,
        "current_stream": lambda index: SimpleNamespace(cuda_stream=STREAM),
        "get_device_capability": lambda device: capability,
        "is_current_stream_capturing": lambda: False,
    }
    fake: dict[str, Any] = {"data_ptr": address, "tolist": tolist}
    with (
        patch.multiple(torch.cuda, **cuda),
        patch.multiple(FakeTensor, create=True, **fake),
        patch.object(Tensor, "pin_memory", lambda tensor: mode.pin(tensor)),
        patch.object(CudaDevice, "read", read),
        patch.object(driver, "_api", checking),
        patch.dict(driver._primary_contexts, clear=True),
        patch.object(cuda_module, "_modules", Once()),
        FakeTensorMode(allow_non_fake_inputs=True),
        mode,
    ):
        yield


def on_gpu(tensor: Tensor) -> Tensor:
    """A tensor without data of the same layout there."""
    gradient = tensor.requires_grad
    shape, stride = tensor.shape, tensor.stride()
    fake = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=DEVICE)
    return fake.requires_grad_(gradient)
