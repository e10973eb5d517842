"""The cache: whole entries or none, whatever happens to its files, its directory or its threads."""

import errno
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from jit_support import in_threads

from rnnt_op.jit import concurrency
from rnnt_op.jit.cache import KernelCache
from rnnt_op.jit.concurrency import SingleFlight

KEY, OTHER = "a" * 64, "b" * 64


def fails(*_: object) -> bytes:
    raise AssertionError("the cache built what it holds")


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def warned(function: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in record]


def test_hit_builds_nothing(tmp_path: Path) -> None:
    assert KernelCache(tmp_path / "cache").get_or_build(KEY, lambda: b"payload") == b"payload"
    assert KernelCache(tmp_path / "cache").get_or_build(KEY, fails) == b"payload"
    assert files(tmp_path / "cache") == {f"{KEY}.kernel"}


def test_moved_directory_hits(tmp_path: Path) -> None:
    KernelCache(tmp_path / "old").put(KEY, b"payload")
    (tmp_path / "old").rename(tmp_path / "new")
    assert KernelCache(tmp_path / "new").get_or_build(KEY, fails) == b"payload"


def test_directory_is_private(tmp_path: Path) -> None:
    KernelCache(tmp_path / "a" / "cache").put(KEY, b"payload")
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[:7],
        lambda entry: entry[:-1],
        lambda entry: entry + b"x",
        lambda entry: b"x" + entry[1:],
        lambda entry: entry[:20] + bytes([entry[20] ^ 1]) + entry[21:],
        lambda entry: entry[:-1] + bytes([entry[-1] ^ 1]),
    ],
    ids=["empty", "mark", "truncated", "longer", "format", "digest", "payload"],
)
def test_damaged_entry_is_rebuilt(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    cache.put(KEY, b"payload")
    file = tmp_path / f"{KEY}.kernel"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cache.get(KEY) is None
    assert cache.get_or_build(KEY, lambda: b"payload") == b"payload"
    assert file.read_bytes() == whole
    assert files(tmp_path) == {file.name}


def test_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path)
    cache.put(KEY, b"payload")
    shutil.copy(tmp_path / f"{KEY}.kernel", tmp_path / f"{OTHER}.kernel")
    assert cache.get(OTHER) is None


def test_empty_payload_is_an_entry(tmp_path: Path) -> None:
    KernelCache(tmp_path).put(KEY, b"")
    assert KernelCache(tmp_path).get(KEY) == b""


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_read_only_directory_serves_and_keeps_misses_in_memory(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    KernelCache(tmp_path).put(KEY, b"warm")
    open_file = os.open

    def read_only(path: object, flags: int, *mode: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code))
        return open_file(path, flags, *mode)

    monkeypatch.setattr(os, "open", read_only)
    cache = KernelCache(tmp_path)
    assert not warned(lambda: cache.get_or_build(KEY, fails))
    messages = warned(lambda: [cache.get_or_build(key, lambda: b"new") for key in (OTHER, "c")])
    assert messages == [
        f"rnnt_op: the kernel cache {tmp_path} cannot be written to ({os.strerror(code)}); "
        "kernels compiled now are kept in this process's memory only"
    ]
    assert cache.get_or_build(OTHER, fails) == b"new"
    assert files(tmp_path) == {f"{KEY}.kernel"}


@pytest.mark.parametrize("call", ["write", "replace"])
def test_full_disk_leaves_nothing_behind(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class FullFile:
        def __init__(self, descriptor: int, mode: str) -> None:
            os.close(descriptor)

        def __enter__(self) -> "FullFile":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        write = full

    if call == "write":
        monkeypatch.setattr(os, "fdopen", FullFile)
    else:
        monkeypatch.setattr(os, "replace", full)
    cache = KernelCache(tmp_path)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cache.put(KEY, b"payload")
    assert cache.get(KEY) == b"payload"
    assert not files(tmp_path)


@pytest.mark.parametrize("obstacle", ["cache", "cache/below"])
def test_directory_that_cannot_be_made(obstacle: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    cache = KernelCache(tmp_path / obstacle)
    messages = warned(lambda: [cache.get_or_build(key, lambda: b"new") for key in (KEY, OTHER)])
    assert len(messages) == 1
    assert cache.get_or_build(KEY, fails) == b"new"


@pytest.mark.parametrize(
    ("private", "mode", "owner", "problem"),
    [
        (False, 0o777, None, "is writable by every user"),
        (True, 0o1777, None, "is writable by every user"),
        (False, 0o775, None, None),
        (True, 0o770, None, "is writable by its group"),
        (True, 0o755, None, None),
        (False, 0o755, 65533, None),
        (True, 0o755, 65533, "belongs to user 65533; name another one in RNNT_OP_CACHE_DIR"),
    ],
)
def test_untrusted_directory_is_not_used(
    private: bool,
    mode: int,
    owner: int | None,
    problem: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "cache"
    KernelCache(directory).put(KEY, b"planted")
    directory.chmod(mode)
    if owner is not None:
        status = os.stat_result([*directory.stat()[:4], owner, *directory.stat()[5:10]])
        monkeypatch.setattr(Path, "stat", lambda self, **_: status)
    cache = KernelCache(directory, private=private)
    if problem is None:
        assert cache.get(KEY) == b"planted"
        return
    with pytest.warns(RuntimeWarning, match=problem):
        assert cache.get(KEY) is None
    cache.put(OTHER, b"new")
    assert cache.get(OTHER) == b"new"
    monkeypatch.undo()
    assert files(directory) == {f"{KEY}.kernel"}


def test_leftovers_are_removed_when_their_writers_must_be_dead(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in (".old.tmp", ".young.tmp", "note.tmp"))
    for file in (old, young, foreign):
        file.write_bytes(b"half an entry")
    hours_ago = time.time() - 2 * 3600
    for file in (old, foreign):
        os.utime(file, (hours_ago, hours_ago))
    KernelCache(tmp_path).put(KEY, b"payload")
    assert files(tmp_path) == {young.name, foreign.name, f"{KEY}.kernel"}


def test_state(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "cache")
    state = cache.state()
    assert (state.entries, state.size, state.writable, state.problem) == (0, 0, True, None)
    assert not cache.directory.exists()
    cache.put(KEY, b"payload")
    (cache.directory / ".left.tmp").write_bytes(b"x")
    size = (cache.directory / f"{KEY}.kernel").stat().st_size
    assert (cache.state().entries, cache.state().size) == (1, size)
    cache.directory.chmod(0o777)
    assert cache.state().problem is not None
    assert not cache.state().writable


def test_threads_share_one_build(tmp_path: Path) -> None:
    builds = []

    def build() -> bytes:
        builds.append(threading.get_ident())
        time.sleep(0.1)
        return b"payload"

    cache = KernelCache(tmp_path)
    assert in_threads(16, lambda: cache.get_or_build(KEY, build)) == [b"payload"] * 16
    assert len(builds) == 1


def test_threads_share_an_exception_and_the_next_call_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds = []
    waiting = threading.Semaphore(0)

    class CountedFuture(Future[bytes]):
        def result(self, timeout: float | None = None) -> bytes:
            waiting.release()
            return super().result(timeout)

    def build() -> bytes:
        builds.append(threading.get_ident())
        for _ in range(7):
            assert waiting.acquire(timeout=120)
        raise ValueError("no")

    monkeypatch.setattr(concurrency, "Future", CountedFuture)
    cache = KernelCache(tmp_path)
    results = in_threads(8, lambda: cache.get_or_build(KEY, build))
    assert [str(result) for result in results] == ["no"] * 8
    assert len(builds) == 1
    assert cache.get_or_build(KEY, lambda: b"payload") == b"payload"


def test_threads_with_different_keys_do_not_wait_for_each_other() -> None:
    flight: SingleFlight[str, bytes] = SingleFlight()
    meeting = threading.Barrier(2, timeout=120)
    keys = iter((KEY, OTHER))

    def meet() -> int:
        return flight.run(next(keys), lambda: bytes([meeting.wait()]))

    assert {bytes(result) for result in in_threads(2, meet)} == {b"\0", b"\1"}


def test_only_one_thread_warns(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    cache = KernelCache(tmp_path / "cache")
    keys = iter(str(number) for number in range(16))
    messages = warned(
        lambda: in_threads(16, lambda: cache.get_or_build(next(keys), lambda: b"new"))
    )
    assert len(messages) == 1
