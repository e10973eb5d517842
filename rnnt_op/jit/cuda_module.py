"""Compiled sources on a GPU, and the launch of their kernels."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rnnt_op.jit import driver
from rnnt_op.jit.build import build, built_before
from rnnt_op.jit.compiler import Compiled
from rnnt_op.jit.concurrency import Once, side_by_side
from rnnt_op.jit.cuda_compiler import CudaCompiler, architecture_of, runnable_architectures
from rnnt_op.jit.errors import ArgumentError, CaptureError, JitError
from rnnt_op.jit.log import announced, report
from rnnt_op.jit.ptxas import usages
from rnnt_op.jit.signature import Arguments, Signature, signatures
from rnnt_op.jit.source import KernelSource

# Shared memory of a block, static and dynamic together, that takes no permission.
_FREE_SHARED_BYTES = 48 * 1024


class Module(Protocol):
    """Kernels that can be launched: on a GPU, or in the tests' CPU emulator."""

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Arguments,
        shared_bytes: int = 0,
    ) -> None:
        """Launches an ``extern "C"`` kernel whose parameters are eight bytes each.

        Args:
            kernel: name of the entry point.
            grid: blocks; nothing is launched if one of them is 0.
            block: threads of a block.
            arguments: of each parameter.
            shared_bytes: dynamic shared memory of a block.
        """


class ArgumentBlock(threading.local):
    """A kernel's arguments as the driver takes them: their bits, and a pointer to each.

    Each thread has its own, which its next launch overwrites; the driver copies them before.

    Args:
        codes: of ``struct``, one for each argument.
    """

    def __init__(self, codes: str) -> None:
        count = len(codes)
        self._struct = struct.Struct(f"={codes}")
        self.values = (ctypes.c_uint64 * count)()
        first = ctypes.addressof(self.values)
        self.pointers = (ctypes.c_void_p * count)(*range(first, first + 8 * count, 8))
        self._address = ctypes.addressof(self.pointers)

    def filled(self, numbers: Sequence[int | float]) -> int:
        """Address of the pointers, which lead to these numbers now."""
        self._struct.pack_into(self.values, 0, *numbers)
        return self._address


class _Here(threading.local):
    device: int | None = None
    stream = 0


_here = _Here()
"""Where a thread launches kernels within ``launching``."""


class launching:
    """Makes a device's context current and looks up torch's current stream, once for all kernels
    that the thread launches on the device within it."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._context = driver.current_context(device)

    def __enter__(self) -> None:
        self._outer = _here.device, _here.stream
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._context.__enter__()
        _here.device, _here.stream = self._device, stream

    def __exit__(self, *error: object) -> None:
        _here.device, _here.stream = self._outer
        self._context.__exit__(*error)


@dataclass
class _Kernel:
    handle: Any
    signature: Signature
    arguments: ArgumentBlock
    dynamic_bytes: int  # dynamic shared memory that a launch may take so far


class CudaModule(Module):
    """One cubin loaded on one device; made by ``load_module``."""

    def __init__(self, handle: Any, device: int, source: KernelSource) -> None:
        self._handle = handle
        self._device = device
        self._signatures = signatures(source)
        self._kernels: dict[str, _Kernel] = {}
        self._lock = threading.Lock()

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Arguments,
        shared_bytes: int = 0,
    ) -> None:
        """Launches a kernel on torch's current stream of the device; see ``Module.launch``. Without
        ``launching`` around it, it does that itself.

        Raises:
            ArgumentError: arguments do not fit the kernel, or a tensor lies on another device.
            DriverError: there is no such kernel, or the driver refuses the launch.
        """
        if 0 in grid:
            return
        if _here.device != self._device:
            with launching(self._device):
                self.launch(kernel, grid, block, arguments, shared_bytes)
            return
        entry = self._kernels.get(kernel) or self.find(kernel)
        numbers = entry.signature.values(arguments, self._device)
        if shared_bytes > entry.dynamic_bytes:
            self._allow_shared_bytes(kernel, entry, shared_bytes)
        address = entry.arguments.filled(numbers)
        driver.launch(entry.handle, grid, block, shared_bytes, _here.stream, address, kernel)

    def find(self, kernel: str) -> _Kernel:
        """Looks a kernel up, in the device's context.

        Raises:
            DriverError: there is no such kernel.
        """
        handle = driver.find_function(self._handle, kernel)
        dynamic_bytes = _FREE_SHARED_BYTES - driver.static_shared_bytes(handle)
        signature = self._signatures[kernel]
        entry = _Kernel(handle, signature, ArgumentBlock(signature.codes), dynamic_bytes)
        return self._kernels.setdefault(kernel, entry)

    def _allow_shared_bytes(self, kernel: str, entry: _Kernel, shared_bytes: int) -> None:
        with self._lock:  # else a thread that needs less could take back what another was given
            if shared_bytes > entry.dynamic_bytes:
                driver.allow_dynamic_shared_bytes(entry.handle, shared_bytes, kernel)
                entry.dynamic_bytes = shared_bytes


_modules: Once[tuple[KernelSource, int], CudaModule] = Once()
if hasattr(os, "register_at_fork"):
    # A forked child can use none of its parent's CUDA state.
    os.register_at_fork(after_in_child=_modules.clear)


def load_modules(sources: Sequence[KernelSource], device: torch.device) -> None:
    """Compiles what is not in the cache, and loads it on the device, side by side.

    Raises:
        JitError: as ``load_module``, of one of them.
    """
    missing = [source for source in sources if _modules.get((source, device.index)) is None]
    if missing:
        with announced(len(missing)):
            side_by_side(lambda source: load_module(source, device), missing)


def load_module(source: KernelSource, device: torch.device) -> CudaModule:
    """The source's module on a device: compiled or found in the cache, and loaded, once.

    Raises:
        ArgumentError: the device is not a CUDA device.
        CaptureError: a CUDA graph is being captured and the module is not loaded yet.
        CompileError, CompilerNotFound, SourceNotFound, UnsupportedArchitecture: as ``build``.
        DriverError: there is no driver, or it cannot load the module.
    """
    if device.type != "cuda":
        raise ArgumentError(f"device: expected a CUDA device, got {device}")
    index = device.index
    if index is None:
        index = torch.cuda.current_device()
    module = _modules.get((source, index))
    if module is not None:
        return module
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            f"{source.filename} is not loaded on cuda:{index} yet, and cannot be while a CUDA "
            "graph is captured: run the same computation once before the capture"
        )
    return _modules.get_or_make((source, index), lambda: _load(source, index))


def _load(source: KernelSource, index: int) -> CudaModule:
    compiled, architecture, by = _binary(source, torch.cuda.get_device_capability(index))
    start = time.perf_counter()
    major, minor = driver.version()
    action = (
        f"load {source.filename} for {architecture} on cuda:{index} (compiled by {by}; the driver "
        f"supports CUDA {major}.{minor})"
    )
    with driver.current_context(index):
        module = CudaModule(driver.load(compiled.binary, action), index, source)
        # The driver may put off a kernel's loading until it is looked up, which a capture forbids.
        for usage in usages(compiled.log):
            module.find(usage.kernel)
    seconds = time.perf_counter() - start
    report("loaded %s on cuda:%d in %.1f ms", source.filename, index, seconds * 1e3)
    return module


def _binary(source: KernelSource, capability: tuple[int, int]) -> tuple[Compiled, str, str]:
    """A source's binary for a GPU of this compute capability, its architecture and its compiler."""
    try:
        compiler = CudaCompiler(architecture_of(capability))
        return build(source, compiler).compiled, compiler.architecture, compiler.identity()
    except JitError:
        for architecture in runnable_architectures(capability):
            compiled = built_before(source, architecture)
            if compiled is not None:
                return compiled, architecture, "an NVRTC that is not here"
        raise
