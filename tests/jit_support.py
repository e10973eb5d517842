"""Kernels, processes and a driver for the tests of ``rnnt_op.jit``."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rnnt_op.jit import CompilerNotFound, KernelSource, build, cuda_compiler, environment
from rnnt_op.jit.host_compiler import HostCompiler

SCALE = """#include "factor.cuh"
extern "C" __global__ void scale(double* values, long long count) {
  const long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < count) values[i] *= factor();
}
"""
FACTOR = """#pragma once
#include "constants.cuh"
__device__ inline double factor() { return FACTOR_VALUE * half; }
"""
CONSTANTS = "#pragma once\n__device__ constexpr double half = 0.5;\n"


def write_kernel(root: Path, factor: str = "2.0") -> KernelSource:
    """A source with a header that has a header, in ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "scale.cu").write_text(SCALE)
    (root / "factor.cuh").write_text(FACTOR)
    (root / "constants.cuh").write_text(CONSTANTS)
    return KernelSource("scale", (("FACTOR_VALUE", factor),), root=root)


HOST_SCALE = """#include "factor.h"
extern "C" void scale(long long threads, double* values, long long count) {
  for (long long i = 0; i < count; ++i) values[i] *= factor;
}
"""
HOST_FACTOR = "#pragma once\nstatic const double factor = 0.5;\n"


def write_host_kernel(root: Path) -> KernelSource:
    """A source for the CPU with a header, in ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "scale.cpp").write_text(HOST_SCALE)
    (root / "factor.h").write_text(HOST_FACTOR)
    return KernelSource("scale", root=root, suffix=".cpp")


def run_script(code: str, *arguments: object, seconds: float = 300) -> str:
    """What a fresh interpreter prints; this folder is importable there.

    Raises:
        AssertionError: it failed, or took that long: then its threads' tracebacks are the text.
    """
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-c", preamble + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # of which faulthandler dumps tracebacks
        output, errors = process.communicate()
        errors = f"not ended after {seconds} s\n{errors}"
    assert process.returncode == 0, errors
    return output


def in_threads(count: int, function: Callable[[], object]) -> list[object]:
    """Results, or exceptions, of a function that many threads call at the same time."""
    barrier = threading.Barrier(count)
    results: list[object] = []

    def work() -> None:
        barrier.wait()
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def nvrtc() -> None:
    try:
        cuda_compiler.compiler_version()
    except CompilerNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def cxx(monkeypatch: pytest.MonkeyPatch) -> str:
    """Path of the C++ compiler found on PATH, without flags from outside."""
    monkeypatch.delenv(environment.CXX.name, raising=False)
    monkeypatch.delenv(environment.CXXFLAGS.name, raising=False)
    try:
        return HostCompiler.from_environment().path
    except CompilerNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache directory of the test, which does not exist yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv(environment.CACHE_DIR.name, str(directory))
    monkeypatch.delenv(environment.JIT_VERBOSE.name, raising=False)
    monkeypatch.delenv(environment.JIT_DUMP.name, raising=False)
    yield directory
    build._caches.clear()


class FakeDriver:
    """Stands for ``cuda.bindings.driver``: records calls, and answers as one GPU's driver would."""

    def __init__(self, parameters: int = 3, static_bytes: int = 0) -> None:
        from cuda.bindings import driver

        self.CUresult = driver.CUresult
        self.CUfunction_attribute = driver.CUfunction_attribute
        self.calls: list[tuple[Any, ...]] = []
        self.current = 0
        self.launched: list[int] = []  # the values of the last launch
        self.fails: dict[str, Any] = {}
        self._parameters = parameters
        self._static_bytes = static_bytes

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]

    def _answer(self, name: str, *arguments: Any, value: Any = None) -> tuple[Any, ...]:
        self.calls.append((name, *arguments))
        code = self.fails.get(name, self.CUresult.CUDA_SUCCESS)
        return (code,) if value is None else (code, value)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:
        return self._answer("version", value=13010)

    def cuGetErrorName(self, code: Any) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, code.name.encode()

    def cuGetErrorString(self, code: Any) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, b"the driver's words"

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        self.current = context
        return self._answer("set_context", context)

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return self.CUresult.CUDA_SUCCESS, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return self._answer("retain", device, value=0x1000 + device)

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        return self._answer("load", cubin, self.current, value=object())

    def cuModuleGetFunction(self, module: Any, name: bytes) -> tuple[Any, ...]:
        return self._answer("function", name, value=name.decode())

    def cuFuncGetAttribute(self, attribute: Any, function: Any) -> tuple[Any, ...]:
        assert attribute == self.CUfunction_attribute.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
        return self.CUresult.CUDA_SUCCESS, self._static_bytes

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any, ...]:
        return self._answer("set_attribute", function, attribute, value)

    def cuLaunchKernel(self, function: Any, *configuration: int) -> tuple[Any, ...]:
        *shape, shared_bytes, stream, parameters, extra = configuration
        assert extra == 0
        pointers = (ctypes.c_void_p * self._parameters).from_address(parameters)
        self.launched = [ctypes.c_int64.from_address(pointer).value for pointer in pointers]
        return self._answer("launch", function, tuple(shape), shared_bytes, stream, self.current)
