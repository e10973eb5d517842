"""The headline on a CPU: batch 1024 of 40 s audio, loss and all gradients, in how much memory.

B=1024, T=1000, U=200, V=1024, H=640, where plain torch's logits alone would take 421 GB in
bfloat16. Memory is the high-water mark of the whole process (Linux): interpreter, torch, inputs and
gradients included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.study.correctness import relative_error
from rnnt_op.study.measure import resident_bytes
from rnnt_op.study.problems import DtypeName, Problem, dtype_of, first_samples, random_joint
from rnnt_op.study.report import describe_machine, markdown_table, write_results

GB = 1e9


@dataclass(frozen=True)
class Config:
    """Memory and time of one big batch."""

    batch: int = 1024
    frames: int = 1000
    labels: int = 200
    vocab_size: int = 1024
    joint_dim: int = 640
    dtype: DtypeName = "bfloat16"
    score_std: float = 1.0
    """Standard deviation of the random logits."""
    samples_checked: int = 2
    """Whose losses and gradients are compared with those of a batch of their own."""
    bar_gb: float = 4.5
    """Most that the process may hold, in units of 10^9 bytes."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


class Counts:
    """Nodes that have passed so far."""

    scored = kept = 0


@contextmanager
def progress_of(nodes: int) -> Iterator[Counts]:
    """Shows a bar of the nodes that are scored, and how many of them the backward pass keeps."""
    backend = backend_for(torch.device("cpu"))
    symbol_scores, select_nodes = backend.symbol_scores, backend.select_nodes
    counts = Counts()
    with tqdm(total=nodes, unit="node", unit_scale=True, mininterval=1) as bar:

        def counting_scores(topology: Any, logits: Any, *arguments: Any) -> None:
            symbol_scores(topology, logits, *arguments)
            counts.scored += len(logits.values)
            bar.update(len(logits.values))

        def counting_kept(*arguments: Any, **options: Any) -> Any:
            rows = select_nodes(*arguments, **options)()
            counts.kept += len(rows)
            bar.set_postfix_str(f"{100 * counts.kept / counts.scored:.1f} % kept")
            return lambda: rows

        with (
            patch.object(backend, "symbol_scores", counting_scores),
            patch.object(backend, "select_nodes", counting_kept),
        ):
            yield counts


def distances(
    problem: Problem, loss: Tensor, gradients: tuple[Tensor, ...], count: int
) -> dict[str, float]:
    """Relative distances of the first samples' gradients from those of a batch of their own."""
    few = first_samples(problem, count)
    _, alone = few.gradients(rnnt_op.joint_rnnt_loss)
    # Both are gradients of a mean over their batch.
    scale = len(problem.frames) / count
    names = ("encoder", "predictor")
    return {
        f"{name} gradient, as alone": relative_error([ours[:count].double() * scale], [own])
        for name, ours, own in zip(names, gradients[:2], alone[:2], strict=True)
    }


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    dtype = dtype_of(config.dtype)
    # What compilers, threads and GEMM libraries take once.
    small = random_joint([(20, 5)] * 2, vocab_size=64, joint_dim=32, dtype=dtype)
    small.gradients(rnnt_op.joint_rnnt_loss)
    imported = resident_bytes("VmRSS")

    problem = random_joint(
        [(config.frames, config.labels)] * config.batch,
        vocab_size=config.vocab_size,
        joint_dim=config.joint_dim,
        dtype=dtype,
        score_std=config.score_std,
    )
    with progress_of(problem.nodes) as counts:
        start = time.perf_counter()
        loss, gradients = problem.gradients(rnnt_op.joint_rnnt_loss)
        seconds = time.perf_counter() - start
    peak = resident_bytes("VmHWM")

    inputs = sum(tensor.nbytes for tensor in (*problem.leaves, problem.targets))
    outputs = sum(gradient.nbytes for gradient in gradients)
    logits = problem.nodes * config.vocab_size * dtype.itemsize
    finite = all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients))
    row = {
        "dtype": config.dtype,
        "peak GB": peak / GB,
        f"≤ {config.bar_gb:g} GB": peak <= config.bar_gb * GB,
        "inputs GB": inputs / GB,
        "gradients GB": outputs / GB,
        "interpreter and torch GB": imported / GB,
        "other GB": (peak - inputs - outputs - imported) / GB,
        "logits of plain torch GB": logits / GB,
        "seconds": seconds,
        "nodes / s": problem.nodes / seconds,
        "nodes kept %": 100 * counts.kept / problem.nodes,
        "loss": float(loss),
        "finite": finite,
        **distances(problem, loss, gradients, min(config.samples_checked, config.batch)),
    }
    print(
        f"B={config.batch} T={config.frames} U={config.labels} V={config.vocab_size} "
        f"H={config.joint_dim}, random posterior of score std {config.score_std:g}; "
        f"{describe_machine()}\n"
    )
    print(markdown_table([row]))
    write_results(config.out, f"headline-{config.dtype}", config, [row])
    if not (row[f"≤ {config.bar_gb:g} GB"] and finite):
        raise SystemExit("not met")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
