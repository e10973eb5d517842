"""Threads that want the same work, and forks in the middle of it."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class SingleFlight(Generic[K, V]):
    """Runs a function once for all threads that ask for the same key at the same time.

    Nothing is remembered: a call that begins after the others ended runs the function again. A
    forked child begins with nothing in flight, whatever the parent's threads were doing.
    """

    def __init__(self) -> None:
        self._reset()
        _flights.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[K, Future[V]] = {}

    def run(self, key: K, function: Callable[[], V]) -> V:
        """Returns, or raises, what ``function`` does in the one thread that runs it."""
        with self._lock:
            future = self._flying.get(key)
            leads = future is None
            if future is None:
                future = self._flying[key] = Future()
        if not leads:
            return future.result()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
            raise
        finally:
            with self._lock:
                self._flying.pop(key, None)
        return future.result()


class Once(Generic[K, V]):
    """Values by key, each made by one thread for all, and remembered. A failure is not."""

    def __init__(self) -> None:
        self._values: dict[K, V] = {}
        self._flight: SingleFlight[K, V] = SingleFlight()

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def get_or_make(self, key: K, make: Callable[[], V]) -> V:
        def look_or_make() -> V:
            if key not in self._values:  # else it was made between our look and our turn
                self._values[key] = make()
            return self._values[key]

        value = self._values.get(key)
        return self._flight.run(key, look_or_make) if value is None else value

    def clear(self) -> None:
        self._values.clear()


class remembered(Generic[V]):
    """A property computed once for an object.

    ``functools.cached_property`` before Python 3.12 holds a lock of all objects meanwhile. A child
    forked then would wait for it for ever. Here two threads may both compute; the first one's value
    is everybody's.
    """

    def __init__(self, function: Callable[[Any], V]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> V:
        if instance is None:
            return self  # type: ignore[return-value]
        value: V = instance.__dict__.setdefault(self._name, self._function(instance))
        return value


def side_by_side(function: Callable[[K], V], jobs: Sequence[K]) -> list[V]:
    """Results of a function, as many at a time as there are cores; or the first job's error.

    Threads are enough for compilers: NVRTC releases the interpreter's lock, a C++ compiler is a
    process.
    """
    if len(jobs) == 1:
        return [function(jobs[0])]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(function, jobs))


class ForkGate:
    """Keeps ``os.fork`` waiting while a thread is inside.

    For libraries whose locks cannot be reset in a child: a child forked while one of them is held
    would wait for it for ever.
    """

    def __init__(self) -> None:
        self._threads: list[int] = []  # inside, once for each time that they entered
        self._forking = 0
        self._changed = threading.Condition()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._close,
                after_in_parent=self._open,
                after_in_child=self._open_in_child,
            )

    @contextmanager
    def inside(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            # A thread that waits to fork goes first, or busy ones could keep it waiting for ever.
            self._changed.wait_for(lambda: not self._forking or me in self._threads)
            self._threads.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._threads.remove(me)
                self._changed.notify_all()

    def _close(self) -> None:
        me = threading.get_ident()
        self._changed.acquire()
        self._forking += 1
        self._changed.wait_for(lambda: all(thread == me for thread in self._threads))

    def _open(self) -> None:
        self._forking -= 1
        self._changed.notify_all()
        self._changed.release()

    def _open_in_child(self) -> None:
        self._forking = 0
        self._changed = threading.Condition()


def _reset_flights() -> None:
    for flight in _flights:
        flight._reset()


_flights: weakref.WeakSet[SingleFlight[Any, Any]] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_flights)
