"""Which of several ways to compute the same is fastest on this CPU: measured once, then known.

The answer lies in the cache of compiled kernels, so that it costs a process nothing, and is the
same for all processes that share the cache. Within a process it never changes. Where the cache
cannot keep it, or the system does not tell the CPU, nothing is measured: processes could come to
different answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from rnnt_op.jit.build import current_cache
from rnnt_op.jit.concurrency import Once
from rnnt_op.jit.cpu import instruction_sets, model
from rnnt_op.jit.key import digest_of
from rnnt_op.jit.log import report

Candidates = Mapping[str, Callable[[], object]]

_FORMAT = 1  # of questions and answers; raise it when what is measured changes
_MOST_TURNS = 8
_SECONDS = 0.1  # after which a measurement takes no further turn
_CLEARLY = 0.97  # of the default's time

_answers: Once[str, str] = Once()


def fastest(question: str, default: str, candidates: Callable[[], Candidates]) -> str:
    """The name of the fastest candidate.

    Args:
        question: what is computed, and of what size.
        default: the candidate where none is clearly faster, or nothing can be known.
        candidates: makes what is measured, by name.
    """
    return _answers.get_or_make(question, lambda: _find(question, default, candidates))


def _find(question: str, default: str, candidates: Callable[[], Candidates]) -> str:
    cpu, sets, threads = model(), instruction_sets(), str(torch.get_num_threads())
    if cpu is None or sets is None:
        return default
    key = digest_of(["fastest", str(_FORMAT), question, cpu, sets, torch.__version__, threads])
    cache = current_cache()
    found = cache.get(key)
    if found is None and cache.state().writable:
        start = time.perf_counter()
        found = cache.put_first(key, _measured(default, candidates()).encode())
        milliseconds = 1e3 * (time.perf_counter() - start)
        report("measured %s in %.1f ms: %s", question, milliseconds, found)
    return default if found is None else found.decode()


def _measured(default: str, candidates: Candidates) -> str:
    """In turns, after one to warm up; the least time of each counts.

    Time of this thread's processor: other programs that want it change it little, and of what
    several threads do, this one does its share.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    until = time.perf_counter() + _SECONDS
    for _ in range(_MOST_TURNS):
        for name, run in candidates.items():
            start = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - start)
        if time.perf_counter() > until:
            break
    least = {name: min(each) for name, each in seconds.items()}
    best = min(least, key=lambda name: least[name])
    return best if least[best] < _CLEARLY * least[default] else default
