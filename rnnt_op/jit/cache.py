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

    directory: Path | None
    problem: str | None
    writable: bool
    entries: int
    size: int


class _Unusable(Exception):
    """What a cache's directory is or has, so that it must not be used."""


class KernelCache:
    """Payloads by key, in a directory shared by threads and processes.

    Args:
        directory: made with mode 0700 at the first write. A world-writable one is not used, since
            anybody could have put code there. None: there is no place for one.
        private: the directory must moreover belong to this user and be writable by nobody else.
            Where it is false, a directory of another user is used as its owner left it, read-only
            for example.
    """

    def __init__(self, directory: Path | None, *, private: bool = False) -> None:
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
        try:
            entry = _file(self._usable(), key).read_bytes()
        except _Unusable as problem:
            self._warn(str(problem))
            return None
        except OSError:
            return None
        start = len(_MARK) + hashlib.sha256().digest_size
        payload = entry[start:]
        return payload if entry[:start] == _header(key, payload) else None

    def put(self, key: str, payload: bytes) -> None:
        """Keeps a payload: on disk, or in memory with one warning if that fails."""
        try:
            directory = self._usable()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._publish(self._usable(), key, payload)  # somebody else may have made it
        except _Unusable as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot be written to ({error.strerror or error})"
        else:
            return
        self._memory[key] = payload
        self._warn(problem)

    def put_first(self, key: str, payload: bytes) -> bytes | None:
        """Keeps a payload on disk unless another process was first.

        Returns:
            The payload that is kept, for all processes the same; None if none can be.
        """
        try:
            directory = self._usable()
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self._publish(self._usable(), key, payload, replaces=False)
        except (_Unusable, OSError):
            return None
        kept = self.get(key)
        if kept is None:  # damaged: what was there is no entry
            self.put(key, payload)
            kept = self.get(key)
        return kept

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
        problem = None
        try:
            self._usable()
        except _Unusable as error:
            problem = str(error)
        if self.directory is None:
            return CacheState(None, problem, False, 0, 0)
        files = []
        with suppress(OSError):
            files = [file.stat() for file in self.directory.glob(f"*{_SUFFIX}")]
        existing = self.directory
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        writable = problem is None and os.access(existing, os.W_OK | os.X_OK)
        size = sum(file.st_size for file in files)
        return CacheState(self.directory, problem, writable, len(files), size)

    def _usable(self) -> Path:
        """The directory.

        Raises:
            _Unusable: why it must not be used.
        """
        if self.directory is None:
            raise _Unusable(
                "has no place, since this user has no home directory; name one in RNNT_OP_CACHE_DIR"
            )
        try:
            status = self.directory.stat()
        except OSError:
            return (
                self.directory
            )  # nothing is there: a miss for readers, theirs to make for writers
        if not hasattr(os, "getuid"):
            return self.directory  # access control on Windows is not expressed in these bits
        if status.st_mode & stat.S_IWOTH:
            raise _Unusable(
                "is writable by every user, who could have put code there; chmod o-w it"
            )
        if self._private and status.st_uid != os.getuid():
            raise _Unusable(
                f"belongs to user {status.st_uid}; name another one in RNNT_OP_CACHE_DIR"
            )
        if self._private and status.st_mode & stat.S_IWGRP:
            raise _Unusable("is writable by its group, who could have put code there; chmod g-w it")
        return self.directory

    def _publish(self, directory: Path, key: str, payload: bytes, *, replaces: bool = True) -> None:
        """Raises FileExistsError if there is a file already that it is not to replace."""
        if next(self._writes) == 0:
            _remove_leftovers(directory)
        temporary = directory / f".{key[:16]}-{os.urandom(8).hex()}.tmp"
        # The umask applies to 0644, so a shared cache can be warmed for others; the mode of the
        # directory keeps a private one private.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_header(key, payload) + payload)
            if replaces:
                os.replace(temporary, _file(directory, key))
            else:
                os.link(temporary, _file(directory, key))
                os.unlink(temporary)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _warn(self, problem: str) -> None:
        if next(self._warnings) == 0:  # atomic, where a flag could be seen unset by two threads
            name = "" if self.directory is None else f" {self.directory}"
            warnings.warn(
                f"rnnt_op: the kernel cache{name} {problem}; kernels compiled now are kept in this "
                "process's memory only",
                RuntimeWarning,
                stacklevel=2,
            )


def _file(directory: Path, key: str) -> Path:
    return directory / f"{key}{_SUFFIX}"


def _remove_leftovers(directory: Path) -> None:
    """Removes what killed writers left behind."""
    oldest = time.time() - _LEFTOVER_SECONDS
    with suppress(OSError):
        for file in directory.glob(".*.tmp"):
            with suppress(OSError):
                if file.stat().st_mtime < oldest:
                    file.unlink()


def _header(key: str, payload: bytes) -> bytes:
    """The digest covers the key: an entry under another's name is not taken for it."""
    return _MARK + hashlib.sha256(key.encode() + payload).digest()
