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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from rnnt_op.memory import Workload, held, peak_bytes
from rnnt_op.tools.study.cell import MEASURED, Cell, available_methods, measure
from rnnt_op.tools.study.correctness import require_correct
from rnnt_op.tools.study.measure import FREED_AT_ONCE, progress
from rnnt_op.tools.study.problems import DtypeName, dtype_of, ragged_lengths
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """What is measured in each dtype."""

    workload: Workload  # in any of them
    is_ragged: bool = False  # lengths are drawn, up to those
    only_ours: bool = False  # rnnt_op, whatever its peak


_uniform = partial(Workload.uniform, dtype=torch.float32)

CASES = (
    Case(_uniform(3, 400, 80, vocab_size=512, joint_dim=256)),
    Case(_uniform(6, 200, 50, vocab_size=1024, joint_dim=640), is_ragged=True),
    Case(_uniform(6, 200, 40, vocab_size=256, joint_dim=512)),
    # Many samples of few labels: inputs and gradients are most of it.
    Case(_uniform(80, 600, 2, vocab_size=128, joint_dim=640)),
    Case(_uniform(160, 400, 3, vocab_size=128, joint_dim=512), is_ragged=True),
    # Of rnnt_op the workspace is most of it; the other ways take long, or more memory.
    Case(_uniform(24, 500, 80, vocab_size=1024, joint_dim=640), only_ours=True),
    Case(_uniform(48, 400, 80, vocab_size=500, joint_dim=512), is_ragged=True, only_ours=True),
    Case(_uniform(8, 1000, 200, vocab_size=1024, joint_dim=640), only_ours=True),
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
    for case in CASES:
        sizes = case.workload
        if case.is_ragged:
            sizes = replace(sizes, lengths=ragged_lengths(sizes.batch, sizes.frames, sizes.labels))
        methods = ("rnnt_op",) if case.only_ours else tuple(available_methods())
        for dtype, method in itertools.product(config.dtypes, methods):
            cell = Cell(
                method=method,
                workload=replace(sizes, dtype=dtype_of(dtype)),
                device="cpu",
                memory_limit=2 * config.most_mib * MIB,
                time_limit=config.time_limit,
                repeats=0,
                seed=config.seed,
            )
            predicted = peak_bytes(method, cell.workload) / MIB
            takes_dtype = method != "torchaudio" or dtype != "bfloat16"
            has_size = config.least_mib <= predicted <= config.most_mib
            if takes_dtype and (has_size or case.only_ours):
                yield cell


def row_of(cell: Cell, bar: float) -> dict[str, Any]:
    method, workload = cell.method, cell.workload
    predicted = peak_bytes(method, workload)
    outcome = measure(cell)[-1]
    if outcome.outcome != MEASURED or outcome.peak_bytes is None:
        raise SystemExit(f"{method}, {workload}: {outcome.outcome} {outcome.detail or ''}")
    largest = max(held(method, workload), key=lambda tensor: tensor.bytes)
    ratio = outcome.peak_bytes / predicted
    return {
        "method": method,
        "lengths": "uniform" if len(set(workload.lengths)) == 1 else "ragged",
        "B": workload.batch,
        "T": workload.frames,
        "U": workload.labels,
        "V": workload.vocab_size,
        "H": workload.joint_dim,
        "dtype": str(workload.dtype).removeprefix("torch."),
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
    os.environ |= FREED_AT_ONCE
    rows = [row_of(cell, config.bar) for cell in progress(list(cells(config)), "processes")]
    print(f"Peak of inputs, gradients and all between; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "memory-model", config, rows)
    missed = sum(not row["within bar"] for row in rows)
    if missed:
        raise SystemExit(f"{missed} of {len(rows)} peaks are more than {config.bar:.0%} off")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
