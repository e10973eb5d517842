"""Source to cubin through the cache: what loading and precompiling share."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from rnnt_op.jit import environment
from rnnt_op.jit.cache import CubinCache
from rnnt_op.jit.compiler import Compiled, compile_source, compiler_version, flags_of
from rnnt_op.jit.key import cache_key
from rnnt_op.jit.log import report
from rnnt_op.jit.source import KernelSource

_caches: dict[environment.CacheDirectory, CubinCache] = {}


@dataclass(frozen=True)
class Build:
    """A compiled kernel source, and how this call came by it."""

    compiled: Compiled
    cached: bool
    seconds: float


def build(source: KernelSource, architecture: str) -> Build:
    """Finds a source's cubin in the cache, or compiles it and puts it there.

    Raises:
        CompileError: the source does not compile.
        CompilerNotFound: NVRTC is missing; its version is part of the key, so the cache needs it.
        SourceNotFound: the source or a header of it does not exist.
    """
    start = time.perf_counter()
    cached = True

    def compile_now() -> bytes:
        nonlocal cached
        cached = False
        return compile_source(source, architecture).to_bytes()

    flags = flags_of(source, architecture)
    key = cache_key(source, architecture, flags, compiler_version())
    compiled = Compiled.from_bytes(current_cache().get_or_build(key, compile_now))
    seconds = time.perf_counter() - start
    report(
        "%s %s for %s in %.1f ms (%s)",
        "found" if cached else "compiled",
        source.filename,
        architecture,
        seconds * 1e3,
        key[:16],
    )
    directory = environment.dump_directory()
    if directory is not None:
        _dump(directory / f"{source.name}-{architecture}-{key[:16]}", source, flags, compiled)
    return Build(compiled, cached, seconds)


def current_cache() -> CubinCache:
    """The cache in the directory that the environment names now; one object a directory."""
    directory = environment.cache_directory()
    cache = _caches.get(directory)
    if cache is None:
        made = CubinCache(directory.path, private=directory.private)
        cache = _caches.setdefault(directory, made)
    return cache


def _dump(folder: Path, source: KernelSource, flags: tuple[str, ...], compiled: Compiled) -> None:
    texts = {source.filename: source.text, **source.headers}
    texts |= {"flags.txt": "\n".join(flags) + "\n", f"{source.name}.log": compiled.log + "\n"}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{source.name}.cubin").write_bytes(compiled.cubin)
    except OSError as error:
        warnings.warn(f"rnnt_op: no dump in {folder}: {error}", RuntimeWarning, stacklevel=2)
