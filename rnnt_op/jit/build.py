"""Source to binary through the cache: what loading and precompiling share."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rnnt_op.jit import environment
from rnnt_op.jit.cache import KernelCache
from rnnt_op.jit.compiler import Compiled, Compiler
from rnnt_op.jit.cpu import instruction_sets
from rnnt_op.jit.key import cache_key
from rnnt_op.jit.log import report
from rnnt_op.jit.source import KernelSource

_caches: dict[environment.CacheDirectory, KernelCache] = {}


@dataclass(frozen=True)
class Build:
    """A compiled kernel source, and how this call came by it."""

    compiled: Compiled
    cached: bool
    seconds: float


def build(source: KernelSource, compiler: Compiler) -> Build:
    """Finds a source's binary in the cache, or compiles it and puts it there.

    Raises:
        CompileError: the source does not compile.
        CompilerNotFound: the compiler is missing; its identity is part of the key, so the cache
            needs it.
        SourceNotFound: the source or a header of it does not exist.
    """
    start = time.perf_counter()
    cached = True

    def compile_now() -> bytes:
        nonlocal cached
        cached = False
        return compiler.compile(source).to_bytes()

    flags = compiler.flags(source)
    key = cache_key(source, compiler.architecture, flags, compiler.identity())
    payload = current_cache().get_or_build(key, compile_now)
    if not cached:
        bare = _bare_key(source, compiler.architecture)
        if bare is not None:
            current_cache().put(bare, key.encode())
    compiled = Compiled.from_bytes(payload)
    seconds = time.perf_counter() - start
    report(
        "%s %s for %s in %.1f ms (%s)",
        "found" if cached else "compiled",
        source.filename,
        compiler.architecture,
        seconds * 1e3,
        key[:16],
    )
    directory = environment.dump_directory()
    if directory is not None:
        files = {
            **{name: text.encode() for name, text in source.files.items()},
            "flags.txt": ("\n".join(flags) + "\n").encode(),
            f"{source.name}.log": (compiled.log + "\n").encode(),
            f"{source.name}{compiler.binary_suffix}": compiled.binary,
        }
        _dump(directory / f"{source.name}-{compiler.architecture}-{key[:16]}", files)
    return Build(compiled, cached, seconds)


def built_before(source: KernelSource, architecture: str) -> Compiled | None:
    """What any compiler made of a source for this machine, if the cache has it.

    For machines without a compiler, such as those that run an image whose build filled the cache.
    """
    cache, bare = current_cache(), _bare_key(source, architecture)
    key = None if bare is None else cache.get(bare)
    payload = None if key is None else cache.get(key.decode())
    if payload is None:
        return None
    report("found %s for %s, without a compiler", source.filename, architecture)
    return Compiled.from_bytes(payload)


def _bare_key(source: KernelSource, architecture: str) -> str | None:
    """Where the key of a binary is kept for those who cannot ask its compiler; None if the CPU
    cannot be told."""
    executes = instruction_sets() if architecture == "cpu" else ""
    return None if executes is None else cache_key(source, architecture, (), executes)


def current_cache() -> KernelCache:
    """The cache in the directory that the environment names now; one object a directory."""
    directory = environment.cache_directory()
    cache = _caches.get(directory)
    if cache is None:
        made = KernelCache(directory.path, private=directory.private)
        cache = _caches.setdefault(directory, made)
    return cache


def _dump(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
    except OSError as error:
        warnings.warn(f"rnnt_op: no dump in {folder}: {error}", RuntimeWarning, stacklevel=3)
