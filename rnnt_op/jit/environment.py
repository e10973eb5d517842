"""The environment variables of run-time compilation, read when they are used."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from rnnt_op.jit.errors import JitError


@dataclass(frozen=True)
class Variable:
    name: str
    meaning: str
    default: str

    @property
    def value(self) -> str | None:
        """What it is set to now; None if unset or empty."""
        return os.environ.get(self.name) or None

    @property
    def words(self) -> tuple[str, ...]:
        """Its words as a shell splits them; none if unset.

        Raises:
            JitError: a quotation is not closed.
        """
        try:
            return tuple(shlex.split(self.value or ""))
        except ValueError as error:
            raise JitError(f"{self.name} is {self.value!r}: {error}") from error


@dataclass(frozen=True)
class CacheDirectory:
    """Where compiled kernels are kept, and whether it must belong to this user alone."""

    path: Path | None  # None: this user has no home to keep them in
    private: bool


CACHE_DIR = Variable(
    "RNNT_OP_CACHE_DIR",
    "directory of compiled kernels; may be shared and read-only, must not be world-writable",
    "$XDG_CACHE_HOME/rnnt_op, else ~/.cache/rnnt_op",
)
JIT_VERBOSE = Variable(
    "RNNT_OP_JIT_VERBOSE",
    "1 logs a line for each kernel compiled, found in the cache or loaded, with its time",
    "0",
)
JIT_DUMP = Variable(
    "RNNT_OP_JIT_DUMP",
    "directory that receives each used kernel's source, headers, flags, binary and compiler log",
    "none",
)
CXX = Variable(
    "CXX",
    "C++17 compiler of the CPU kernels; may have arguments",
    "the first of c++, g++, clang++ on PATH",
)
CXXFLAGS = Variable(
    "CXXFLAGS",
    "flags of that compiler, after the package's own; `-ffast-math` and its kin change nothing",
    "none",
)
CPU_GEMM = Variable(
    "RNNT_OP_CPU_GEMM",
    "`onednn` or `blas`: the library of float32 and bfloat16 products on a CPU",
    "the faster one, measured once for each CPU, output layer and product, and kept in the cache",
)
VARIABLES = (CACHE_DIR, JIT_VERBOSE, JIT_DUMP, CXX, CXXFLAGS, CPU_GEMM)


def cache_directory() -> CacheDirectory:
    """The cache directory.

    A directory that the user names may belong to somebody whom the user trusts; the default one
    must be the user's own.
    """
    if CACHE_DIR.value is not None:
        return CacheDirectory(_path(CACHE_DIR.value), private=False)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    parent = Path(base) if os.path.isabs(base) else _path("~/.cache")
    return CacheDirectory(None if parent is None else parent / "rnnt_op", private=True)


def is_verbose() -> bool:
    return JIT_VERBOSE.value not in (None, "0")


def dump_directory() -> Path | None:
    return None if JIT_DUMP.value is None else _path(JIT_DUMP.value)


def _path(name: str) -> Path | None:
    """The path, None if it begins in the home of a user who has none, as in many containers."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return None
