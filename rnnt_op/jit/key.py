"""What tells compiled kernels apart: all that decides what the compiler makes, and no path."""

from __future__ import annotations

import hashlib

from rnnt_op.jit.source import KernelSource

FORMAT = 3  # of keys and cache entries; raise it when either changes


def cache_key(
    source: KernelSource, architecture: str, flags: tuple[str, ...], compiler: str
) -> str:
    """The cache key of a compilation by a compiler of that identity, in hexadecimal."""
    parts = ["format", str(FORMAT), "source", source.text, "architecture", architecture]
    parts += ["compiler", compiler]
    for name, contents in source.headers.items():
        parts += ["header", name, contents]
    for name, value in source.macros:
        parts += ["macro", name, value]
    for flag in flags:
        parts += ["flag", flag]
    return digest_of(parts)


def digest_of(parts: list[str]) -> str:
    """SHA-256 of the parts, each preceded by its length so that no two lists read alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
