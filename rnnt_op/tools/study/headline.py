"""The headline: batch 1024 of 40 s audio, loss and all gradients, in how much memory and time.

B=1024, T=1000, U=200, V=1024, H=640, where plain torch's logits alone would take 421 GB in
bfloat16. Memory is, on a GPU, the most that torch's tensors take in total, inputs and gradients
included; on a CPU, the high-water mark of the whole process, interpreter and torch included.

    python -m rnnt_op.tools.study.headline '{"device": "cuda"}' DIR

needs no package beyond torch: the fields of ``Headline`` as JSON, and where results go.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from torch import Tensor, manual_seed

import rnnt_op
from rnnt_op.tools.study.correctness import relative_error, require_correct
from rnnt_op.tools.study.estimate import Question
from rnnt_op.tools.study.measure import (
    Counts,
    counted_nodes,
    held_bytes,
    peak_bytes,
    seconds_on,
)
from rnnt_op.tools.study.problems import chosen_samples, random_joint
from rnnt_op.tools.study.report import GB, Row, describe_machine, markdown_table, write_results


@dataclass(frozen=True)
class Headline(Question):
    """The same, measured."""

    limit_gb: float = 6.0
    device: str = "cpu"
    score_std: float = 1.0  # standard deviation of the random logits
    repeats: int = 0  # runs that are timed after the first; 0: that one is
    seed: int = 0

    @property
    def bar(self) -> str:
        """Name of the limit in a row."""
        return f"≤ {self.limit_gb:g} GB"


@dataclass(frozen=True)
class Progress:
    """A batch on its way, to be looked at from another thread."""

    nodes: int
    counts: Counts
    device: str
    start: float

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def held_gb(self) -> float:
        return held_bytes(self.device) / GB

    @property
    def peak_gb(self) -> float:
        return peak_bytes(self.device) / GB


Watch = Callable[[Progress], AbstractContextManager[object]]


def measure(headline: Headline, watch: Watch = nullcontext) -> Row:
    """Memory, time and correctness of one batch.

    Args:
        watch: makes a context in which the first run's progress is shown.
    """
    device, workload = headline.device, headline.workload()
    dtype = workload.dtype
    manual_seed(headline.seed)
    require_correct(dtype, device)  # takes what compilers, threads and libraries need once, too
    before = held_bytes(device)
    problem = random_joint(workload, score_std=headline.score_std, device=device)
    loss_of = partial(rnnt_op.joint_rnnt_loss, workspace_bytes=headline.workspace_bytes)
    ends = sorted({0, headline.batch - 1})
    few = chosen_samples(problem, ends).gradients(loss_of)

    results = []
    with (
        counted_nodes(problem.leaves[0].device) as counts,
        watch(Progress(problem.nodes, counts, device, time.perf_counter())),
    ):
        first = seconds_on(device)(lambda: results.append(problem.gradients(loss_of)))
    peak = peak_bytes(device)
    loss, gradients = results.pop()

    inputs = sum(tensor.nbytes for tensor in (*problem.leaves, problem.targets))
    outputs = sum(gradient.nbytes for gradient in gradients)
    finite = all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients))
    distances = _distances(gradients, few[1], ends, headline.batch)
    bar = 2e-2 if dtype.itemsize == 2 else 1e-4
    del gradients
    repeated = [
        seconds_on(device)(lambda: problem.gradients(loss_of)) for _ in range(headline.repeats)
    ]
    seconds = repeated or [first]
    typical = median(seconds)
    return {
        "dtype": headline.dtype,
        "peak GB": peak / GB,
        headline.bar: peak <= headline.limit_gb * GB,
        "inputs GB": inputs / GB,
        "gradients GB": outputs / GB,
        "before inputs GB": before / GB,
        "other GB": (peak - inputs - outputs - before) / GB,
        "logits of plain torch GB": workload.nodes * workload.vocab_size * dtype.itemsize / GB,
        "seconds": typical,
        "slowest s": max(seconds),
        "frames / s": int(problem.frames.sum()) / typical,
        "labels / s": int(problem.labels.sum()) / typical,
        "nodes / s": problem.nodes / typical,
        "nodes kept %": 100 * counts.kept / problem.nodes,
        "loss": float(loss),
        "finite": finite,
        "first and last as alone": all(x <= bar for x in distances.values()),
        **distances,
    }


def _distances(
    gradients: Sequence[Tensor], alone: Sequence[Tensor], ends: Sequence[int], batch: int
) -> dict[str, float]:
    """Relative distances of some samples' gradients from those of a batch of their own.

    GEMMs of other sizes may add in another order, and gradients in half are rounded.
    """
    # Both are gradients of a mean over their batch.
    scale = batch / len(ends)
    return {
        f"{name} gradient, distance": relative_error([ours[ends].double() * scale], [own])
        for name, ours, own in zip(("encoder", "predictor"), gradients[:2], alone[:2], strict=True)
    }


def failures(row: Row) -> list[str]:
    """What is not as it must be."""
    return [name for name, value in row.items() if value is False]


def verdict(headline: Headline, row: Row) -> str:
    """One line: the batch, its peak, and whether all is as it must be."""
    failed = failures(row)
    return (
        f"{headline.workload()}, loss and gradients: peak {row['peak GB']:.2f} GB {headline.bar}: "
        + (f"not met ({', '.join(failed)})" if failed else "met")
    )


def main(arguments: Sequence[str]) -> int:
    """Measures, prints a Markdown table, and writes ``headline-DTYPE-DEVICE.json`` to a folder."""
    options, *out = arguments or ["{}"]
    headline = Headline(**json.loads(options))
    row = measure(headline)
    print(f"{describe_machine(headline.device)}\n\n{markdown_table([row])}\n")
    print(verdict(headline, row))
    for folder in out:
        write_results(
            Path(folder), f"headline-{headline.dtype}", headline, [row], device=headline.device
        )
    return 1 if failures(row) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
