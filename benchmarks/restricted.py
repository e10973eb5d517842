"""Time and memory of lattices restricted to a band, and of the two-pass pruned recipe, relative to
the whole lattice.

All take turns within a round on the same states, lengths and targets, and ratios are taken within a
round. Forward and backward; memory is what the engine plans for scores, lattice and selection of
the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results
from rnnt_op.topologies import RNNT

MIB = 2**20
WHOLE = "whole lattice"


@dataclass(frozen=True)
class Config:
    """Time and memory of restricted lattices."""

    states: tuple[int, ...] = (40, 20, 10, 5)
    """Widths of the bands, in states a frame."""
    dtype: DtypeName = "float32"
    batch: int = 4
    frames: int = 300
    labels: int = 80
    vocab_size: int = 1024
    joint_dim: int = 640
    repeats: int = 5
    seed: int = 0
    out: Path = Path("benchmarks/results")


# Gradients are compared at this size.
SMALL: dict[str, Any] = {"batch": 2, "frames": 20, "labels": 6, "vocab_size": 32, "joint_dim": 24}


def problem_of(config: Config) -> Problem:
    torch.manual_seed(config.seed)
    lengths = ((config.frames, config.labels),) * config.batch
    dtype = dtype_of(config.dtype)
    return random_joint(Workload(lengths, config.vocab_size, config.joint_dim, dtype))


def diagonal_ranges(problem: Problem, states: int) -> Tensor:
    """A band about the straight line from the first node to the last. [B, T, 2]"""
    frames = problem.leaves[0].shape[1]
    last = (problem.labels + 1 - states).clamp(min=0).unsqueeze(1)
    t = torch.arange(frames)
    first = (last * t / (problem.frames.unsqueeze(1) - 1)).round().long().clamp(max=last)
    return torch.stack([first, first + states], 2)


def pruned_loss(problem: Problem, additive: tuple[Tensor, Tensor], states: int) -> Tensor:
    """The two passes of pruned RNN-T: an additive joint network trained alongside gives the ranges
    of the other."""
    simple = (*additive, None, None, problem.targets, problem.frames, problem.labels)
    with torch.no_grad():
        found = rnnt_op.posteriors(*simple, activation="identity")
    ranges = rnnt_op.pruned_ranges(found, problem.frames, problem.labels, states)
    loss = problem.loss(rnnt_op.joint_rnnt_loss, label_ranges=ranges)
    return loss + rnnt_op.joint_rnnt_loss(*simple, activation="identity")


def require_correct(config: Config) -> None:
    problem = problem_of(replace(config, **SMALL))
    ranges = diagonal_ranges(problem, 3)
    _, gradients = problem.gradients(rnnt_op.joint_rnnt_loss, label_ranges=ranges)
    _, truth = problem.to(torch.float64).gradients(
        rnnt_op.reference.joint_rnnt_loss, label_ranges=ranges
    )
    bar = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype_of(config.dtype), 2e-2)
    error = relative_error(gradients, truth)
    if not error <= bar:
        raise SystemExit(f"wrong gradients, nothing measured: relative error {error:.1e}")


def main(config: Config) -> None:
    require_correct(config)
    problem = problem_of(config)
    encoder, predictor, *_ = problem.leaves

    def additive_state(like: Tensor) -> Tensor:
        return torch.randn(*like.shape[:2], config.vocab_size, dtype=like.dtype, requires_grad=True)

    additive = additive_state(encoder), additive_state(predictor)

    def band(states: int) -> Callable[[], Any]:
        ranges = diagonal_ranges(problem, states)
        return lambda: problem.gradients(rnnt_op.joint_rnnt_loss, label_ranges=ranges)

    def pruned(states: int) -> Callable[[], Any]:
        leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
        own = Problem(leaves, problem.targets, problem.frames, problem.labels)
        return lambda: torch.autograd.grad(pruned_loss(own, additive, states), (*leaves, *additive))

    functions: dict[str, Callable[[], Any]] = {
        WHOLE: lambda: problem.gradients(rnnt_op.joint_rnnt_loss)
    }
    widths = {WHOLE: config.labels + 1}
    for states in config.states:
        functions[f"band of {states} states"] = band(states)
        widths[f"band of {states} states"] = states
    narrowest = f"pruned recipe, {min(config.states)} states"
    functions[narrowest], widths[narrowest] = pruned(min(config.states)), min(config.states)

    seconds = interleaved_seconds(functions, repeats=config.repeats)
    backend = backend_for(torch.device("cpu"))
    rows = []
    for name, states in widths.items():
        nodes = config.batch * config.frames * states
        lattice = backend.lattice_bytes(RNNT, config.batch, config.frames, config.labels + 1, nodes)
        rows.append(
            {
                "lattice": name,
                "nodes": nodes,
                "median s": median(seconds[name]),
                "× whole": median_ratio(seconds[name], seconds[WHOLE]),
                "lattice MiB": lattice / MIB,
            }
        )
    print(f"{problem.workload}, forward and backward; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "restricted", config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
