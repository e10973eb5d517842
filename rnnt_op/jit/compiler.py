"""What every compiler of kernels does: the C++ compiler of this machine, and NVRTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rnnt_op.jit.errors import CompileError
from rnnt_op.jit.source import KernelSource


@dataclass(frozen=True)
class Compiled:
    """Machine code for one architecture, and the compiler's report on it."""

    binary: bytes
    log: str

    def to_bytes(self) -> bytes:
        log = self.log.encode()
        return len(log).to_bytes(8, "little") + log + self.binary

    @classmethod
    def from_bytes(cls, data: bytes) -> Compiled:
        end = 8 + int.from_bytes(data[:8], "little")
        return cls(binary=data[end:], log=data[8:end].decode())


class Compiler(Protocol):
    """Makes a binary of a source, for one architecture."""

    @property
    def source_suffix(self) -> str:
        """Of the sources that it compiles."""

    @property
    def binary_suffix(self) -> str:
        """Of the files that its binaries are usually kept in."""

    @property
    def architecture(self) -> str:
        """What the binaries run on, such as ``sm_90a``."""

    def identity(self) -> str:
        """What decides the binary beside source, flags and architecture.

        Raises:
            CompilerNotFound: it is not installed.
            CompileError: it refuses the flags that the user gave.
        """

    def flags(self, source: KernelSource) -> tuple[str, ...]:
        """What the source is compiled with."""

    def compile(self, source: KernelSource) -> Compiled:
        """Compiles a source with its headers, as they were read.

        Raises:
            CompileError: the source does not compile; the message holds the compiler's log.
            CompilerNotFound: the compiler is not installed.
            SourceNotFound: the source or a header of it does not exist.
        """


def macro_flags(source: KernelSource) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in source.macros)


def refusal(source: KernelSource, architecture: str, reason: str, log: str) -> CompileError:
    what = " ".join((source.filename, *macro_flags(source)))
    return CompileError(f"{what} does not compile for {architecture}: {reason}\n{log}")
