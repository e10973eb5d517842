"""The memory planner against measured peaks, every way to train, each in a fresh process.

Both count inputs, gradients and all between: on Linux, the high-water mark of resident memory less
what the process held before the inputs were made, which a run of a tiny problem precedes. glibc's
malloc returns what is freed at once (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``), so
that holes of its heap are not measured; peaks too small to stand above what the allocator, oneDNN
and threads keep for themselves are left out, except rnnt_op's, which are never large.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from rnnt_op.memory import Workload, held, peak_bytes
from rnnt_op.tools.study.cell import MEASURED, Cell, available_methods, measure
from rnnt_op.tools.study.correctness import require_correct
from rnnt_op.tools.study.measure import progress
from rnnt_op.tools.study.problems import DtypeName, dtype_of, ragged_lengths
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

MIB = 2**20

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch."""

    batch: int
    frames: int
    labels: int
    vocab_size: int
    joint_dim: int
    is_ragged: bool = False
    methods: tuple[str, ...] | None = None  # None: all whose peak has the right size


_OURS = ("rnnt_op",)

SHAPES = (
    Shape(batch=3, frames=400, labels=80, vocab_size=512, joint_dim=256),
    Shape(batch=6, frames=200, labels=50, vocab_size=1024, joint_dim=640, is_ragged=True),
    Shape(batch=6, frames=200, labels=40, vocab_size=256, joint_dim=512),
    # Many samples of few labels: inputs and gradients are most of it.
    Shape(batch=80, frames=600, labels=2, vocab_size=128, joint_dim=640),
    Shape(batch=160, frames=400, labels=3, vocab_size=128, joint_dim=512, is_ragged=True),
    # Of rnnt_op the workspace is most of it; the other ways take long, or more memory.
    Shape(batch=24, frames=500, labels=80, vocab_size=1024, joint_dim=640, methods=_OURS),
    Shape(48, 400, 80, vocab_size=500, joint_dim=512, is_ragged=True, methods=_OURS),
    Shape(batch=8, frames=1000, labels=200, vocab_size=1024, joint_dim=640, methods=_OURS),
)


@dataclass(frozen=True)
class Config:
    """Predicted and measured peaks."""

    dtypes: tuple[DtypeName, ...] = ("float32", "bfloat16")
    least_mib: int = 200
    """Smallest predicted peak that is measured."""
    most_mib: int = 4096
    """Largest."""
    bar: float = 0.1
    """Largest relative difference."""
    time_limit: float = 300.0
    """Seconds of a run."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def cells(config: Config) -> Iterator[Cell]:
    """What is measured: every method that takes the dtype, where its peak has the right size."""
    torch.manual_seed(config.seed)
    for shape in SHAPES:
        lengths = [(shape.frames, shape.labels)] * shape.batch
        if shape.is_ragged:
            lengths = ragged_lengths(shape.batch, shape.frames, shape.labels)
        for dtype, method in itertools.product(config.dtypes, shape.methods or available_methods()):
            cell = Cell(
                method=method,
                lengths=tuple(lengths),
                vocab_size=shape.vocab_size,
                joint_dim=shape.joint_dim,
                dtype=dtype,
                device="cpu",
                memory_limit=2 * config.most_mib * MIB,
                time_limit=config.time_limit,
                repeats=0,
                seed=config.seed,
            )
            predicted = peak_bytes(method, workload_of(cell)) / MIB
            takes_dtype = method != "torchaudio" or dtype != "bfloat16"
            has_size = config.least_mib <= predicted <= config.most_mib
            if takes_dtype and (has_size or shape.methods is not None):
                yield cell


def workload_of(cell: Cell) -> Workload:
    return Workload(cell.lengths, cell.vocab_size, cell.joint_dim, dtype_of(cell.dtype))


def row_of(cell: Cell, bar: float) -> dict[str, Any]:
    method, workload = cell.method, workload_of(cell)
    predicted = peak_bytes(method, workload)
    outcome = measure(cell)[-1]
    if outcome.outcome != MEASURED or outcome.peak_bytes is None:
        raise SystemExit(f"{method}, {cell.dtype}: {outcome.outcome} {outcome.detail or ''}")
    largest = max(held(method, workload), key=lambda tensor: tensor.bytes)
    ratio = outcome.peak_bytes / predicted
    return {
        "method": method,
        "lengths": "uniform" if len(set(cell.lengths)) == 1 else "ragged",
        "B": len(cell.lengths),
        "T": workload.frames,
        "U": workload.labels,
        "V": cell.vocab_size,
        "H": cell.joint_dim,
        "dtype": cell.dtype,
        "nodes": workload.nodes,
        "largest tensor": f"{largest.name} {largest.shape}",
        "predicted MiB": round(predicted / MIB, 1),
        "measured MiB": round(outcome.peak_bytes / MIB, 1),
        "measured / predicted": round(ratio, 3),
        "within bar": abs(ratio - 1) <= bar,
    }


def main(config: Config) -> None:
    for dtype in config.dtypes:
        require_correct(dtype_of(dtype))
    os.environ |= MALLOC  # malloc reads them when a process starts
    rows = [row_of(cell, config.bar) for cell in progress(list(cells(config)), "processes")]
    print(f"Peak of inputs, gradients and all between; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "memory-model", config, rows)
    missed = sum(not row["within bar"] for row in rows)
    if missed:
        raise SystemExit(f"{missed} of {len(rows)} peaks are more than {config.bar:.0%} off")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
