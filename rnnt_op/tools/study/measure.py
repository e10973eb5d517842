"""Time in rounds, and memory as the operating system or torch's CUDA allocator counts it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.backends.protocol import Reached
from rnnt_op.tools.study.problems import Problem

T = TypeVar("T")

FREED_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
    "MALLOC_TRIM_THRESHOLD_": str(128 * 1024),
}
"""Environment in which a process of glibc gives freed memory back at once, so that peaks are of
what is in use, not of holes in its heap, which vary between runs. It is read at the start."""


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False)


@dataclass
class Counts:
    """Nodes that have passed so far."""

    scored: int = 0
    kept: int = 0  # by the backward pass
    lost_shares: list[Tensor] = field(default_factory=list)  # of each group, ``Reached.lost``

    @property
    def lost(self) -> float:
        """What nodes that are not scored have of a sample's probability at most, as a share of
        it."""
        return max((float(lost.max()) for lost in self.lost_shares), default=0.0)

    @property
    def kept_fraction(self) -> float:
        return self.kept / self.scored if self.scored else 0.0


@contextmanager
def counted_nodes(device: torch.device) -> Iterator[Counts]:
    """Counts the nodes of every loss that is computed meanwhile, without waiting for a GPU.

    Args:
        device: of the loss's tensors, with its index: each GPU has a backend of its own.
    """
    backend = backend_for(device)
    symbol_scores, select_nodes = backend.symbol_scores, backend.select_nodes
    reach = backend.reach
    counts = Counts()

    def counting_scores(
        topology: Any, logits: Any, columns: Any, rows: Any, *arguments: Any
    ) -> None:
        symbol_scores(topology, logits, columns, rows, *arguments)
        counts.scored += len(rows)

    def counting_reach(*arguments: Any, **options: Any) -> Reached | None:
        reached = reach(*arguments, **options)
        if reached is not None:
            counts.lost_shares.append(reached.lost)
        return reached

    def counting_kept(*arguments: Any, **options: Any) -> Callable[[], Tensor]:
        selection = select_nodes(*arguments, **options)

        def counted() -> Tensor:
            rows = selection()
            counts.kept += len(rows)
            return rows

        return counted

    with (
        patch.object(backend, "symbol_scores", counting_scores),
        patch.object(backend, "select_nodes", counting_kept),
        patch.object(backend, "reach", counting_reach),
    ):
        yield counts


def kept_fraction(problem: Problem, run: Callable[[], object]) -> float:
    """Share of nodes that the backward pass of ``run`` keeps."""
    with counted_nodes(problem.leaves[0].device) as counts:
        run()
    return counts.kept / problem.nodes


def resident_bytes(field: Literal["VmRSS", "VmHWM", "VmData"]) -> int:
    """What this process holds now, its high-water mark, or what it has allocated (Linux)."""
    # ru_maxrss would not do: it is handed down from the parent process.
    return _kibibytes(Path("/proc/self/status"), field)


def _kibibytes(file: Path, field: str) -> int:
    with suppress(FileNotFoundError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    message = f"no {field} there: memory of a CPU is measured on Linux only"
    raise OSError(errno.ENOSYS, message, str(file))


def is_gpu(device: str) -> bool:
    return torch.device(device).type == "cuda"


def held_bytes(device: str) -> int:
    """What torch's tensors take on a GPU, what the whole process takes on a CPU."""
    return torch.cuda.memory_allocated() if is_gpu(device) else resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most that ``held_bytes`` has been since ``forget_peak``."""
    return torch.cuda.max_memory_allocated() if is_gpu(device) else resident_bytes("VmHWM")


def forget_peak(device: str) -> None:
    """Starts the high-water mark anew; on a CPU where the system allows it."""
    if is_gpu(device):
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def available_bytes(device: str) -> int:
    """What can still be allocated without swapping."""
    if is_gpu(device):
        return int(torch.cuda.mem_get_info()[0])
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def limit_memory(device: str, limit: int) -> None:
    """Lets this process allocate ``limit`` bytes beyond what it has now, and no more."""
    if is_gpu(device):
        total = torch.cuda.get_device_properties().total_memory
        fraction = (torch.cuda.memory_reserved() + limit) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    else:
        import resource  # there is none on Windows

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (resident_bytes("VmData") + limit, hard))


def seconds_on(device: str) -> Callable[[Callable[[], object]], float]:
    """What measures the seconds of a function from an idle start."""
    return seconds_by_events if is_gpu(device) else wall_clock_seconds


def seconds_by_events(function: Callable[[], object]) -> float:
    """Time on the GPU from an idle start, what the host takes to issue the work included."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3


def wall_clock_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def processor_seconds(function: Callable[[], object]) -> float:
    """Of the calling thread, which other programs change little."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seconds_of: Callable[[Callable[[], object]], float] = wall_clock_seconds,
    after_round: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one warm-up round.

    All functions take turns within a round, so a ratio within a round is free of the machine's
    slower drifts.

    Args:
        repeats: rounds that are timed.
        seconds_of: what measures a function.
        after_round: is given what is known after each round, to keep it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    turns = [(round_, name) for round_ in range(repeats + 1) for name in functions]
    for round_, name in progress(turns, "rounds"):
        elapsed = seconds_of(functions[name])
        if round_ > 0:
            seconds[name].append(elapsed)
            if len(seconds[turns[-1][1]]) == round_:
                after_round(seconds)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))
