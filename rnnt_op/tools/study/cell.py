"""One method on one problem, measured in a process of its own.

Whatever a method does there, run out of memory, be killed, crash or never end, is an outcome. The
process, ``python -m rnnt_op.tools.study.cell``, takes a pickled ``Cell`` on its standard input; it
prints a line before each run, so that one that takes too long is noticed, and a ``Measured`` as
JSON for each of ``MODES``.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import IO, Any

import torch

from rnnt_op.memory import Workload
from rnnt_op.tools.study.measure import (
    forget_peak,
    held_bytes,
    limit_memory,
    peak_bytes,
    seconds_on,
)
from rnnt_op.tools.study.methods import METHODS, Method, torchaudio_method
from rnnt_op.tools.study.problems import random_joint

MODES = ("forward", "forward + backward")
MEASURED = "measured"
OUT_OF_MEMORY = "out of memory"
FAILED = "failed"

# To start Python, to import torch, to compile kernels at first use and to make inputs.
_START_SECONDS = 180.0
_RUNNING = "running"


def available_methods() -> dict[str, Method]:
    """The methods that can be measured here, by name."""
    torchaudio = torchaudio_method()
    return METHODS if torchaudio is None else {**METHODS, torchaudio.name: torchaudio}


@dataclass(frozen=True)
class Cell:
    """What one process measures."""

    method: str
    workload: Workload
    device: str
    memory_limit: int  # bytes of inputs, gradients and all between
    time_limit: float  # seconds of one run
    repeats: int
    seed: int


@dataclass(frozen=True)
class Measured:
    """What became of a method in a mode."""

    mode: str
    outcome: str
    peak_bytes: int | None = None  # of inputs, gradients and all between
    seconds: float | None = None  # median over the runs
    runs: int | None = None  # timed after one that is not; 0: that one was too slow to be repeated
    detail: str | None = None  # what a method that failed said


def measure(cell: Cell) -> list[Measured]:
    """Measures a method in each mode, in a fresh process."""
    command = [sys.executable, "-m", "rnnt_op.tools.study.cell"]
    with (
        tempfile.TemporaryFile() as errors,
        # Unbuffered: select sees what has not been read.
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0
        ) as process,
    ):
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(cell))
        process.stdin.close()
        try:
            return _follow(process, cell.time_limit, errors)
        finally:
            process.kill()


def _follow(
    process: subprocess.Popen[bytes], time_limit: float, errors: IO[bytes]
) -> list[Measured]:
    results: list[Measured] = []
    has_started = False
    while len(results) < len(MODES):
        line = _next_line(process, time_limit if has_started else _START_SECONDS)
        if line == _RUNNING:
            has_started = True
        elif line:
            results.append(Measured(**json.loads(line)))
        else:
            if line is not None:
                outcome, detail = _end(process, errors)
            elif has_started:
                outcome, detail = f"> {time_limit:g} s", None
            else:
                outcome, detail = FAILED, f"no inputs after {_START_SECONDS:g} s"
            return results + [Measured(m, outcome, detail=detail) for m in MODES[len(results) :]]
    return results


def _next_line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """What the process says next, empty if it has ended, None if it takes longer."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return None
    return process.stdout.readline().decode().strip()


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> tuple[str, str | None]:
    """Outcome of a process that ended by itself."""
    code = process.wait()
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip()
    if code == -signal.SIGKILL or _says_out_of_memory(said):
        return OUT_OF_MEMORY, None
    last = said.splitlines()[-1] if said else ""
    return FAILED, f"{signal.Signals(-code).name} {last}" if code < 0 else last


def _says_out_of_memory(text: str) -> bool:
    # oneDNN names the step that failed, whatever the reason; a problem that passed in a small size
    # fails in a large one for want of memory.
    words = ("can't allocate memory", "bad_alloc", "MemoryError", "out of memory", "a primitive")
    return any(word in text for word in words)


def _outcome_of(error: Exception) -> tuple[str, str | None]:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _says_out_of_memory(str(error)):
        return OUT_OF_MEMORY, None
    return FAILED, f"{type(error).__name__}: {error}".partition("\n")[0]


def _timed(run: Callable[[], object], cell: Cell, tell: Callable[[str], None]) -> tuple[float, int]:
    """Median of the runs, and how many; the first one is a warm-up if there is time for more."""
    seconds: list[float] = []
    while len(seconds) <= cell.repeats:
        if seconds and sum(seconds) + max(seconds) > cell.time_limit:
            break
        tell(_RUNNING)
        seconds.append(seconds_on(cell.device)(run))
    return median(seconds[1:] or seconds), len(seconds) - 1


def _measure_here(cell: Cell, tell: Callable[[str], None]) -> None:
    method: Method = available_methods()[cell.method]
    torch.manual_seed(cell.seed)
    # Kernels, threads, GEMM libraries and autograd take what they need once.
    small = random_joint(
        dataclasses.replace(cell.workload, lengths=((4, 2),) * 2), device=cell.device
    )
    method.loss(small)
    method.gradients(small)
    del small
    limit_memory(cell.device, cell.memory_limit)
    before = held_bytes(cell.device)

    def tell_result(mode: str, outcome: str, **numbers: Any) -> None:
        tell(json.dumps(dataclasses.asdict(Measured(mode, outcome, **numbers))))

    try:
        problem = random_joint(cell.workload, device=cell.device)
    except (MemoryError, RuntimeError) as error:
        outcome, detail = _outcome_of(error)
        for mode in MODES:
            tell_result(mode, outcome, detail=detail)
        return
    runs: tuple[Callable[[], object], ...] = (
        partial(method.loss, problem),
        partial(method.gradients, problem),
    )
    for mode, run in zip(MODES, runs, strict=True):
        forget_peak(cell.device)
        try:
            seconds, count = _timed(run, cell, tell)
        except (MemoryError, RuntimeError) as error:
            outcome, detail = _outcome_of(error)
            tell_result(mode, outcome, detail=detail)
            continue
        peak = peak_bytes(cell.device) - before
        tell_result(mode, MEASURED, peak_bytes=peak, seconds=seconds, runs=count)


def main() -> None:
    _measure_here(pickle.load(sys.stdin.buffer), partial(print, flush=True))


if __name__ == "__main__":
    main()
