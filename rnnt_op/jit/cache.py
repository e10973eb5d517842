"""Compiled kernels on disk, found by the content that they were compiled from.

An entry is one file: a mark, the digest of the key and the payload, the payload. It is written
aside and renamed, so readers in any process observe either nothing or a whole entry; what does not
match its digest counts as nothing, and is replaced. Without a usable directory the cache lives in
this process's memory, and says so once.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rnnt_op.jit.concurrency import SingleFlight

_MARK = b"rnnt_op kernel\n"
_SUFFIX = ".kernel"
_LEFTOVER_SECONDS = 3600  # no writer takes that long, so the file's writer is dead


@dataclass(frozen=True)
class CacheState:
    """What a cache's directory holds; ``problem`` says why it is not used, if it is not."""

    directory: Path
    problem: str | None
    writable: bool
    entries: int
    size: int


class KernelCache:
    """Payloads by key, in a directory shared by threads and processes.

    Args:
        directory: made with mode 0700 at the first write. A world-writable one is not used, since
            anybody could have put code there.
        private: the directory must moreover belong to this user and be writable by nobody else.
            Where it is false, a directory of another user is used as its owner left it, read-only
            for example.
    """

    def __init__(self, directory: Path, *, private: bool = False) -> None:
        self.directory = directory
        self._private = private
        self._flight: SingleFlight[str, bytes] = SingleFlight()
        self._memory: dict[str, bytes] = {}
        self._warnings = itertools.count()
        self._writes = itertools.count()

    def get(self, key: str) -> bytes | None:
        """The payload, or None if there is no valid entry."""
        if key in self._memory:
            return self._memory[key]
        problem = self._problem()
        if problem is not None:
            self._warn(problem)
            return None
        try:
            entry = self._file(key).read_bytes()
        except OSError:
            return None
        start = len(_MARK) + hashlib.sha256().digest_size
        payload = entry[start:]
        return payload if entry[:start] == _header(key, payload) else None

    def put(self, key: str, payload: bytes) -> None:
        """Keeps a payload: on disk, or in memory with one warning if that fails."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            problem = self._problem()
            if problem is None:
                self._publish(key, payload)
        except OSError as error:
            problem = f"cannot be written to ({error.strerror or error})"
        if problem is not None:
            self._memory[key] = payload
            self._warn(problem)

    def get_or_build(self, key: str, build: Callable[[], bytes]) -> bytes:
        """The payload, from ``build`` if there is no valid entry.

        Threads that ask for a key at the same time share one build, and its exception.
        """

        def look_or_build() -> bytes:
            payload = self.get(key)
            if payload is None:
                payload = build()
                self.put(key, payload)
            return payload

        return self._flight.run(key, look_or_build)

    def state(self) -> CacheState:
        """Looks at the directory without making or changing it."""
        problem = self._problem()
        files = []
        with suppress(OSError):
            files = [file.stat() for file in self.directory.glob(f"*{_SUFFIX}")]
        existing = self.directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        writable = problem is None and os.access(existing, os.W_OK | os.X_OK)
        size = sum(file.st_size for file in files)
        return CacheState(self.directory, problem, writable, len(files), size)

    def _file(self, key: str) -> Path:
        return self.directory / f"{key}{_SUFFIX}"

    def _problem(self) -> str | None:
        """Why the directory must not be used, if so."""
        try:
            status = self.directory.stat()
        except OSError:
            return None  # nothing is there: a miss for readers, theirs to make for writers
        if not hasattr(os, "getuid"):
            return None  # access control on Windows is not expressed in these bits
        if status.st_mode & stat.S_IWOTH:
            return "is writable by every user, who could have put code there; chmod o-w it"
        if self._private and status.st_uid != os.getuid():
            return f"belongs to user {status.st_uid}; name another one in RNNT_OP_CACHE_DIR"
        if self._private and status.st_mode & stat.S_IWGRP:
            return "is writable by its group, who could have put code there; chmod g-w it"
        return None

    def _publish(self, key: str, payload: bytes) -> None:
        if next(self._writes) == 0:
            self._remove_leftovers()
        temporary = self.directory / f".{key[:16]}-{os.urandom(8).hex()}.tmp"
        # The umask applies to 0644, so a shared cache can be warmed for others; the mode of the
        # directory keeps a private one private.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_header(key, payload) + payload)
            os.replace(temporary, self._file(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _remove_leftovers(self) -> None:
        """Removes what killed writers left behind."""
        oldest = time.time() - _LEFTOVER_SECONDS
        with suppress(OSError):
            for file in self.directory.glob(".*.tmp"):
                with suppress(OSError):
                    if file.stat().st_mtime < oldest:
                        file.unlink()

    def _warn(self, problem: str) -> None:
        if next(self._warnings) == 0:  # atomic, where a flag could be seen unset by two threads
            warnings.warn(
                f"rnnt_op: the kernel cache {self.directory} {problem}; kernels compiled now are "
                "kept in this process's memory only",
                RuntimeWarning,
                stacklevel=2,
            )


def _header(key: str, payload: bytes) -> bytes:
    """The digest covers the key: an entry under another's name is not taken for it."""
    return _MARK + hashlib.sha256(key.encode() + payload).digest()
