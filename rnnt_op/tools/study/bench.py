"""Memory and time of every method against batch size and against audio length.

The study of Braun et al. 2022 (arXiv 2211.16270): forward alone and forward + backward, each method
on each problem in a fresh process, none measured whose loss and gradients are not those of the
float64 reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.cell import (
    MEASURED,
    MODES,
    Cell,
    Measured,
    available_methods,
    measure,
)
from rnnt_op.tools.study.correctness import wrong_by
from rnnt_op.tools.study.problems import (
    DtypeName,
    dtype_of,
    lengths_near,
    ragged_lengths,
    recorded_lengths,
)
from rnnt_op.tools.study.report import GB, Row, describe_machine, markdown_table, write_record

WRONG = "wrong result"

Sweep = Literal["batch size", "audio length"]
SWEEPS: tuple[Sweep, ...] = ("batch size", "audio length")


@dataclass(frozen=True)
class Study:
    """What is measured."""

    methods: tuple[str, ...]
    batches: tuple[int, ...] = (1, 2, 4, 8)
    seconds: float = 5.0  # of audio where the batch size varies
    durations: tuple[float, ...] = (5.0, 10.0, 20.0)
    batch: int = 1  # where the audio length varies
    frame_ms: float = 40.0
    labels_per_second: float = 5.0
    ragged: bool = False
    lengths: Path | None = None  # .npy file of [n, 2] lengths (T, U) to draw from
    vocab_size: int = 1024
    joint_dim: int = 256
    dtype: DtypeName = "float32"
    device: str = "cpu"
    memory_limit_gb: float = 8.0  # of inputs, gradients and all between
    time_limit_s: float = 30.0  # of one run
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A problem of a sweep; ``x`` is what varies: B, or seconds of audio."""

    sweep: Sweep
    x: float
    workload: Workload


def points(study: Study) -> list[Point]:
    """The problems of both sweeps, small ones first.

    Of recorded lengths a batch is drawn; where the audio length varies, the utterances are those
    whose T is nearest.
    """
    torch.manual_seed(study.seed)
    sizes: list[tuple[Sweep, float, int, float]] = [
        *(("batch size", batch, batch, study.seconds) for batch in sorted(study.batches)),
        *(("audio length", s, study.batch, s) for s in sorted(study.durations)),
    ]
    model = study.vocab_size, study.joint_dim, dtype_of(study.dtype)
    return [
        Point(sweep, x, Workload(_lengths(study, sweep, b, s), *model)) for sweep, x, b, s in sizes
    ]


def _lengths(study: Study, sweep: Sweep, batch: int, seconds: float) -> Lengths:
    frames = max(1, round(1000 * seconds / study.frame_ms))
    labels = max(1, round(seconds * study.labels_per_second))
    if study.lengths is None:
        if study.ragged:
            return ragged_lengths(batch, frames, labels)
        return ((frames, labels),) * batch
    if sweep == "batch size":
        return recorded_lengths(study.lengths, batch, study.seed)
    return lengths_near(study.lengths, frames, batch)


def wrong_methods(study: Study) -> dict[str, str]:
    """Why each method that must not be measured is wrong."""
    methods, wrong = available_methods(), {}
    for name in study.methods:
        method = methods[name]
        try:
            reason = wrong_by(method.loss, method.gradients, dtype_of(study.dtype), study.device)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason is not None:
            wrong[name] = reason
    return wrong


def run(study: Study, wrong: dict[str, str]) -> Iterator[list[Row]]:
    """Measures each method on each problem; yields a row for each mode of both sweeps.

    Args:
        wrong: methods that are not measured, and why.
    """
    # A problem that is in both sweeps is measured once.
    known: dict[tuple[str, Workload], list[Measured]] = {}
    for point in points(study):
        for name in study.methods:
            key = name, point.workload
            if name in wrong:
                known[key] = [Measured(mode, WRONG, detail=wrong[name]) for mode in MODES]
            elif key not in known:
                known[key] = measure(_cell(study, *key))
            yield [_row(point, name, measured) for measured in known[key]]


def _cell(study: Study, method: str, workload: Workload) -> Cell:
    return Cell(
        method=method,
        workload=workload,
        device=study.device,
        memory_limit=round(study.memory_limit_gb * GB),
        time_limit=study.time_limit_s,
        repeats=study.repeats,
        seed=study.seed,
    )


def _row(point: Point, method: str, measured: Measured) -> Row:
    return {
        "sweep": point.sweep,
        "x": point.x,
        "method": method,
        "mode": measured.mode,
        "B": point.workload.batch,
        "T": point.workload.frames,
        "U": point.workload.labels,
        "nodes": point.workload.nodes,
        "outcome": measured.outcome,
        "peak GB": None if measured.peak_bytes is None else measured.peak_bytes / GB,
        "seconds": measured.seconds,
        "runs": measured.runs,
        "detail": measured.detail,
    }


def tables(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Tables by title: a row a method, a column a problem."""
    titles = {"peak GB": "Peak memory in GB", "seconds": "Time in seconds"}
    return {
        f"{title} against {sweep}, {mode}": _table(
            [row for row in rows if (row["sweep"], row["mode"]) == (sweep, mode)], quantity
        )
        for quantity, title in titles.items()
        for sweep in SWEEPS
        for mode in MODES
    }


def _table(rows: Sequence[Row], quantity: str) -> list[Row]:
    by_method: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = by_method.setdefault(row["method"], {"method": row["method"]})
        column = f"B={row['x']:g}" if row["sweep"] == "batch size" else f"{row['x']:g} s"
        line[column] = row[quantity] if row["outcome"] == MEASURED else row["outcome"]
    return list(by_method.values())


def describe(study: Study) -> str:
    """What was measured and how, in words."""
    if study.lengths is not None:
        lengths = f"lengths drawn from {study.lengths.name}"
    else:
        lengths = (
            f"frames of {study.frame_ms:g} ms, {study.labels_per_second:g} labels a second"
            + (", lengths from the upper half of the range" if study.ragged else "")
        )
    batch_audio = "" if study.lengths is not None else f" of {study.seconds:g} s"
    return (
        f"{describe_machine(study.device)}. {study.dtype}, V={study.vocab_size} "
        f"H={study.joint_dim}, {lengths}; batches{batch_audio} against batch size, "
        f"B={study.batch} against audio length. Peaks are of inputs, gradients and all between, "
        f"limited to {study.memory_limit_gb:.3g} GB; times are medians of the timed "
        f"runs, at most {study.repeats}, none longer than {study.time_limit_s:g} s."
    )


def write(study: Study, rows: Sequence[Row], wrong: dict[str, str], out: Path) -> list[Path]:
    """Writes study.md and study.json in a folder; returns their paths."""
    parts = ["# Methods to train a transducer, measured", describe(study)]
    parts += [f"{name} is not measured: {reason}." for name, reason in wrong.items()]
    for title, table in tables(rows).items():
        parts += [f"## {title}", markdown_table(table)]
    markdown, record = out / "study.md", out / "study.json"
    write_record(record, study, rows, device=study.device)
    markdown.write_text("\n\n".join(parts) + "\n")
    return [markdown, record]
