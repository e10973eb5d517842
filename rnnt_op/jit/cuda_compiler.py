"""Source to cubin, by NVRTC: needs neither a GPU nor a driver."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from rnnt_op.jit.compiler import Compiled, macro_flags, refusal
from rnnt_op.jit.errors import UnsupportedArchitecture
from rnnt_op.jit.nvrtc import nvrtc_library
from rnnt_op.jit.source import KernelSource

OLDEST_CAPABILITY = (7, 5)

# wgmma and other warp-group instructions exist only in the architecture-specific sm_90a.
_SUFFIXES = {90: "a"}


@dataclass(frozen=True)
class CudaCompiler:
    """NVRTC, which compiles for any supported GPU, such as ``sm_90a``."""

    architecture: str
    source_suffix = ".cu"
    binary_suffix = ".cubin"

    def identity(self) -> str:
        return f"NVRTC {'.'.join(map(str, compiler_version()))}"

    def flags(self, source: KernelSource) -> tuple[str, ...]:
        return (
            f"--gpu-architecture={self.architecture}",
            "-std=c++17",
            "--ptxas-options=-v",
            *macro_flags(source),
        )

    def compile(self, source: KernelSource) -> Compiled:
        names = [name.encode() for name in source.headers]
        contents = [text.encode() for text in source.headers.values()]
        flags = [flag.encode() for flag in self.flags(source)]
        with nvrtc_library() as nvrtc:
            result, program = nvrtc.nvrtcCreateProgram(
                source.text.encode(), source.filename.encode(), len(names), contents, names
            )
            self._check(nvrtc, result, source, "")
            try:
                (result,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
                log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
                text = log.rstrip(b"\0").decode(errors="replace").strip()
                self._check(nvrtc, result, source, text)
                cubin = _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
            finally:
                nvrtc.nvrtcDestroyProgram(program)
        return Compiled(cubin, text)

    def _check(self, nvrtc: Any, result: Any, source: KernelSource, log: str) -> None:
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, reason = nvrtc.nvrtcGetErrorString(result)
            raise refusal(source, self.architecture, reason.decode(), log)


def compiler_version() -> tuple[int, int]:
    """NVRTC's version.

    Raises:
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    with nvrtc_library() as nvrtc:
        _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def supported_architectures() -> tuple[str, ...]:
    """The architectures that this NVRTC and this package make code for, such as ``sm_90a``.

    Raises:
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    with nvrtc_library() as nvrtc:
        _, numbers = nvrtc.nvrtcGetSupportedArchs()
    oldest = OLDEST_CAPABILITY[0] * 10 + OLDEST_CAPABILITY[1]
    return tuple(_architecture(number) for number in numbers if number >= oldest)


def architecture_of(capability: tuple[int, int]) -> str:
    """The architecture that kernels are compiled for on a GPU of this compute capability.

    Of a minor version that this NVRTC does not know, the highest lower one: its binaries run on
    later GPUs of the same major version.

    Raises:
        UnsupportedArchitecture: the GPU is too old for this package or too new for this NVRTC.
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    supported = supported_architectures()
    for architecture in runnable_architectures(capability):
        if architecture in supported:
            return architecture
    version = ".".join(map(str, compiler_version()))
    raise UnsupportedArchitecture(
        f"no kernels for compute capability {capability[0]}.{capability[1]}: NVRTC {version} and "
        f"rnnt_op support {', '.join(supported)}"
    )


def runnable_architectures(capability: tuple[int, int]) -> list[str]:
    """Those whose binaries run on a GPU of this compute capability, the best first."""
    major, minor = capability
    numbers = [10 * major + m for m in range(minor, -1, -1)]
    # Binaries with instructions of one architecture alone run on no other.
    return [
        _architecture(number)
        for number in numbers
        if number == numbers[0] or number not in _SUFFIXES
    ]


def architecture_named(name: str) -> str:
    """The architecture that ``sm_90a``, ``sm_90``, ``90`` or ``9.0`` stand for.

    Raises:
        UnsupportedArchitecture: the name stands for none that is supported.
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)a?", name)
    if match is None:
        supported = ", ".join(supported_architectures())
        raise UnsupportedArchitecture(f"no architecture {name!r}: expected one of {supported}")
    return architecture_of((int(match[1]), int(match[2])))


def compiler_path() -> str:
    """Where NVRTC was found.

    Raises:
        CompilerNotFound: NVRTC or cuda-python is missing.
    """
    with nvrtc_library():
        from cuda import pathfinder

        return str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)


def _architecture(number: int) -> str:
    return f"sm_{number}{_SUFFIXES.get(number, '')}"


def _read(size_of: Any, read: Any, program: Any) -> bytes:
    _, size = size_of(program)
    # NVRTC writes into the buffer, which therefore must not be bytes: Python shares short ones.
    buffer = bytearray(size)
    read(program, buffer)
    return bytes(buffer)
