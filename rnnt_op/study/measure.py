"""Time in rounds and memory as the operating system counts it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar
from unittest.mock import patch

from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.study.problems import Problem

T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False)


def kept_fraction(problem: Problem, run: Callable[[], object]) -> float:
    """Share of nodes that the backward pass of ``run`` keeps."""
    backend = backend_for(problem.leaves[0].device)
    select_nodes, kept = backend.select_nodes, 0

    def counting(*args: Any, **options: Any) -> Callable[[], Tensor]:
        nonlocal kept
        rows = select_nodes(*args, **options)()
        kept += len(rows)
        return lambda: rows

    with patch.object(backend, "select_nodes", counting):
        run()
    return kept / problem.nodes


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """What this process holds now, or its high-water mark (Linux)."""
    # ru_maxrss would not do: it is handed down from the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def wall_clock_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seconds_of: Callable[[Callable[[], object]], float] = wall_clock_seconds,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one warm-up round.

    All functions take turns within a round, so a ratio within a round is free of the machine's
    slower drifts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    turns = [(round_, name) for round_ in range(repeats + 1) for name in functions]
    for round_, name in progress(turns, "rounds"):
        elapsed = seconds_of(functions[name])
        if round_ > 0:
            seconds[name].append(elapsed)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))
