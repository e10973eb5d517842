"""Time of the loss on a CPU, beside plain torch and the GEMM that no exact method can do without.

The yardstick is the forward GEMM alone, hidden states of every node times the output layer's
weight: by ``torch.mm`` in the same dtype, and as rnnt_op computes it, by another library or, where
the CPU has no instructions for a half type, in float32. All candidates take turns within a round,
and ratios are taken within a round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

import rnnt_op
from rnnt_op.backends.gemm import linear
from rnnt_op.backends.sources import CPU
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.correctness import relative_error, require_correct
from rnnt_op.tools.study.measure import interleaved_seconds, kept_fraction, median_ratio
from rnnt_op.tools.study.problems import (
    DtypeName,
    Problem,
    dtype_of,
    random_joint,
    recorded_lengths,
)
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

MM, GEMM, FORWARD, BOTH, PLAIN = (
    "(a) forward GEMM alone, torch.mm",
    "(b) forward GEMM alone, as in rnnt_op",
    "(c) rnnt_op forward",
    "(d) rnnt_op forward + backward",
    "(e) plain torch forward + backward",
)
ON_ONE_THREAD = ", 1 thread"

# Hidden states beyond this many rows are the same ones again: the GEMM does not know.
_MAX_GEMM_ROWS = 2**17


@dataclass(frozen=True)
class Config:
    """Time of forward and backward."""

    dtype: DtypeName = "float32"
    batch: int = 4
    frames: int = 400
    labels: int = 80
    lengths: Path | None = None
    """A .npy file of [n, 2] lengths (T, U) to draw ``batch`` samples from, instead of one shape."""
    vocab_size: int = 1024
    joint_dim: int = 640
    score_std: float = 1.0
    """Standard deviation of the logits: how peaked the random posterior is."""
    gradient_tolerance: float | None = None
    """None: the default of the dtype."""
    repeats: int = 5
    gemm_rows: tuple[int, ...] = (1024, 4096)
    """Chunk sizes the forward GEMM is tried with, besides one big GEMM; the fastest counts."""
    reference_limit_mib: int = 6 * 1024
    """Plain torch is left out where it needs more."""
    profile: bool = False
    """Print the profiler's table of rnnt_op forward + backward by op instead of measuring."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def gemm(
    problem: Problem,
    chunk_rows: int,
    product: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> Callable[[], None]:
    """The forward GEMM over all nodes, ``chunk_rows`` at a time.

    Args:
        product: x · weightᵀ for x [R, H] and weight [V, H].
        dtype: of the operands.
    """
    weight = problem.leaves[2].to(dtype)
    hidden = torch.randn(min(problem.nodes, _MAX_GEMM_ROWS), weight.shape[1]).to(weight.dtype)

    def run() -> None:
        done = 0
        while done < problem.nodes:
            start = done % len(hidden)
            rows = min(chunk_rows, len(hidden) - start, problem.nodes - done)
            product(hidden[start : start + rows], weight)
            done += rows

    return run


def mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def on_one_thread(function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function()
        finally:
            torch.set_num_threads(threads)

    return run


def batched_mib(problem: Problem) -> float:
    """What plain torch holds at its peak."""
    return rnnt_op.memory.batched_bytes(problem.workload) / 2**20


def candidates(config: Config, problem: Problem) -> dict[str, Callable[[], object]]:
    def forward() -> object:
        with torch.no_grad():
            return problem.loss(rnnt_op.joint_rnnt_loss)

    def forward_backward() -> object:
        return problem.gradients(
            rnnt_op.joint_rnnt_loss, gradient_tolerance=config.gradient_tolerance
        )

    def plain() -> object:
        return problem.gradients(rnnt_op.reference.joint_rnnt_loss)

    # One big GEMM where its operand and result fit.
    sizes = {min(rows, problem.nodes) for rows in (*config.gemm_rows, _MAX_GEMM_ROWS)}
    dtype = problem.leaves[2].dtype
    operand = CPU.precision("joint", dtype, dtype).operand
    functions: dict[str, Callable[[], object]] = {
        f"{name}, {rows} rows": gemm(problem, rows, product, its_dtype)
        for name, product, its_dtype in ((MM, mm, dtype), (GEMM, linear, operand))
        for rows in sorted(sizes)
    }
    functions |= {FORWARD: forward, BOTH: forward_backward}
    if torch.get_num_threads() > 1:
        alone = gemm(problem, min(config.gemm_rows), linear, operand)
        functions[GEMM + ON_ONE_THREAD] = on_one_thread(alone)
        functions[BOTH + ON_ONE_THREAD] = on_one_thread(forward_backward)
    if batched_mib(problem) <= config.reference_limit_mib:
        functions[PLAIN] = plain
    return functions


def profile(config: Config, problem: Problem) -> None:
    """Prints where rnnt_op forward + backward spends its time."""
    function = candidates(config, problem)[BOTH]
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    averages = sorted(profiler.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in averages)
    rows = [
        {
            "op": op.key,
            "calls": op.count,
            "self CPU ms": op.self_cpu_time_total / 1e3,
            "share %": 100 * op.self_cpu_time_total / total,
        }
        for op in averages[:20]
    ]
    print(markdown_table(rows))


def report(config: Config, problem: Problem) -> dict[str, Any]:
    """Prints the table."""
    functions = candidates(config, problem)
    kept = kept_fraction(problem, functions[BOTH])
    if PLAIN in functions:
        losses = [
            problem.loss(f) for f in (rnnt_op.joint_rnnt_loss, rnnt_op.reference.joint_rnnt_loss)
        ]
        if relative_error(losses[:1], losses[1:]) > 1e-3:
            raise SystemExit(f"losses differ, nothing measured: {losses}")
    seconds = interleaved_seconds(functions, repeats=config.repeats)

    def fastest(prefix: str) -> str:
        names = [name for name in seconds if name.startswith(prefix) and name.endswith("rows")]
        return min(names, key=lambda name: median(seconds[name]))

    def ratio(numerator: str, denominator: str) -> float | None:
        if numerator not in seconds:
            return None
        return median_ratio(seconds[numerator], seconds[denominator])

    mm, gemm = fastest(MM), fastest(GEMM)
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "median s": median(each),
            "fastest s": min(each),
            "slowest s": max(each),
            "× (a)": median_ratio(each, seconds[mm]),
        }
        for name, each in seconds.items()
    ]
    flops = 2 * problem.nodes * problem.leaves[2].numel()
    summary = {
        "nodes": problem.nodes,
        "nodes kept": kept,
        "(a) GFLOP/s": 1e-9 * flops / median(seconds[mm]),
        "d / a": ratio(BOTH, mm),
        "d / b": ratio(BOTH, gemm),
        "e / d": ratio(PLAIN, BOTH),
        "d, 1 thread / all": ratio(BOTH + ON_ONE_THREAD, BOTH),
        "b, 1 thread / all": ratio(GEMM + ON_ONE_THREAD, gemm),
        "batched_bytes MiB": round(batched_mib(problem)),
    }
    print(
        f"{problem.workload}, random posterior of score std {config.score_std:g}; "
        f"{describe_machine()}\n"
    )
    print(markdown_table(rows))
    print(f"\n{markdown_table([summary])}")
    if PLAIN not in functions:
        print(f"\nPlain torch left out: it needs more than {config.reference_limit_mib} MiB.")
    return {"summary": summary, "seconds": seconds}


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    require_correct(dtype_of(config.dtype))
    lengths: Lengths = ((config.frames, config.labels),) * config.batch
    if config.lengths is not None:
        lengths = recorded_lengths(config.lengths, config.batch, config.seed)
    workload = Workload(lengths, config.vocab_size, config.joint_dim, dtype_of(config.dtype))
    problem = random_joint(workload, score_std=config.score_std)
    if config.profile:
        profile(config, problem)
        return
    results = report(config, problem)
    ragged = "" if config.lengths is None else "-ragged"
    write_results(config.out, f"speed-{config.dtype}{ragged}", config, results)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
