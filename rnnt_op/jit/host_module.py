"""Compiled sources in this process, and calls of their kernels."""

from __future__ import annotations

import ctypes
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rnnt_op.jit.build import build, built_before
from rnnt_op.jit.concurrency import Once, side_by_side
from rnnt_op.jit.errors import ArgumentError, JitError, LibraryError
from rnnt_op.jit.host_compiler import HostCompiler
from rnnt_op.jit.log import announced, report
from rnnt_op.jit.signature import Arguments, Signature, signatures
from rnnt_op.jit.source import KernelSource

_C_TYPES = {"Q": ctypes.c_void_p, "q": ctypes.c_int64, "d": ctypes.c_double}


class HostModule:
    """One shared library in this process; made by ``load_host_module``. Survives a fork."""

    def __init__(self, library: ctypes.CDLL, source: KernelSource) -> None:
        self._library = library
        self._signatures = signatures(source)
        self._name = source.filename
        self._kernels: dict[str, tuple[Any, Signature]] = {}

    def call(self, kernel: str, arguments: Arguments = ()) -> None:
        """Calls ``extern "C" void kernel(long long threads, ...)``, without the interpreter's lock.

        Args:
            kernel: name of the function.
            arguments: of each parameter after ``threads``, which is how many torch uses.

        Raises:
            ArgumentError: there is no such kernel, or arguments do not fit it.
        """
        function, signature = self._kernels.get(kernel) or self._find(kernel)
        function(torch.get_num_threads(), *signature.values(arguments))

    def _find(self, kernel: str) -> tuple[Any, Signature]:
        signature = self._signatures.get(kernel)
        function = _function(self._library, kernel)
        if signature is None or function is None:
            raise ArgumentError(f"no kernel {kernel} in {self._name}")
        function.argtypes = [_C_TYPES[code] for code in signature.codes]
        return self._kernels.setdefault(kernel, (function, signature.without_first()))


_modules: Once[KernelSource, HostModule] = Once()


def load_host_modules(sources: Sequence[KernelSource]) -> None:
    """Compiles what is not in the cache, and opens it, side by side.

    Raises:
        JitError: as ``load_host_module``, of one of them.
    """
    missing = [source for source in sources if _modules.get(source) is None]
    if missing:
        with announced(len(missing)):
            side_by_side(load_host_module, missing)


def load_host_module(source: KernelSource) -> HostModule:
    """The source's module: compiled or found in the cache, and opened, once.

    Raises:
        CompileError, CompilerNotFound, SourceNotFound: as ``build``.
        LibraryError: the library cannot be opened.
    """
    return _modules.get_or_make(source, lambda: _load(source))


def _load(source: KernelSource) -> HostModule:
    try:
        compiled = build(source, HostCompiler.from_environment()).compiled
    except JitError:
        before = built_before(source, HostCompiler.architecture)
        if before is None:
            raise
        compiled = before
    start = time.perf_counter()
    library = _open(compiled.binary, source)
    use_parallel = _function(library, "use_parallel")
    if use_parallel is not None:
        use_parallel(ctypes.c_void_p(_gomp_parallel()))
    seconds = time.perf_counter() - start
    report("loaded %s in %.1f ms", source.filename, seconds * 1e3)
    return HostModule(library, source)


def _open(binary: bytes, source: KernelSource) -> ctypes.CDLL:
    try:
        # A mapped file needs no name; some network file systems keep one until it is closed.
        with tempfile.TemporaryDirectory(prefix="rnnt_op-", ignore_cleanup_errors=True) as folder:
            file = Path(folder) / f"{source.name}.so"
            file.write_bytes(binary)
            return ctypes.CDLL(str(file))
    except OSError as error:
        advice = (
            "a C compiler links no C++ library: name the C++ compiler in CXX, such as g++ for gcc"
            if "undefined symbol" in str(error)
            else "if the temporary folder's file system is full or mounted noexec, name a folder "
            "elsewhere in TMPDIR"
        )
        raise LibraryError(f"could not load {source.filename}: {error}; {advice}") from error


@functools.cache
def _gomp_parallel() -> int | None:
    """Address of ``GOMP_parallel`` in the OpenMP runtime of torch; None where it has none.

    Its threads are torch's own, which a second runtime's would compete with for the cores.
    """
    try:  # a library's symbols are looked up in what it depends on, too
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    function = _function(torch_cpu, "GOMP_parallel")
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def _function(library: ctypes.CDLL, name: str) -> Any:
    """A function of a library that returns nothing; None if there is none of that name."""
    try:
        function = library[name]
    except AttributeError:
        return None
    function.restype = None
    return function
