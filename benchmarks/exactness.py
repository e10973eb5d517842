"""Relative L2 error of the gradients against float64 autograd through the batched reference.

The reference gets the same inputs, cast to float64 exactly, so the error is the method's and the
dtype's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

import rnnt_op
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.correctness import gradient_bar, relative_error
from rnnt_op.tools.study.problems import (
    DtypeName,
    Problem,
    dtype_of,
    ragged_lengths,
    random_joint,
    random_logits,
)
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

DTYPES: tuple[DtypeName, ...] = ("float64", "float32", "bfloat16")
JOINT_GRADIENTS = ("d_encoder", "d_predictor", "d_weight", "d_bias")


@dataclass(frozen=True)
class Config:
    """Gradient error of the joint path and the logits path."""

    frames: tuple[int, ...] = (100, 1000)
    """T of each shape."""
    labels: tuple[int, ...] = (20, 200)
    """U of each shape, paired with ``frames``."""
    batch: int = 2
    """Float64 problems are ragged, the others have full length."""
    vocab_size: int = 64
    joint_dim: int = 64
    score_std: float = 1.0
    """Standard deviation of the joint's logits."""
    bfloat16_draws: int = 24
    """Random problems of whose bfloat16 errors the median counts: one draw's is mostly chance."""
    device: str = "cpu"
    seed: int = 0
    out: Path = Path("benchmarks/results")


def draw(config: Config, path: str, shape: tuple[int, int], name: DtypeName) -> Problem:
    lengths: Lengths = (shape,) * config.batch
    if name == "float64":
        lengths = ragged_lengths(config.batch, *shape)
    workload = Workload(lengths, config.vocab_size, config.joint_dim, dtype_of(name))
    if path == "logits":
        return random_logits(workload, device=config.device)
    return random_joint(workload, score_std=config.score_std, device=config.device)


def measure(
    config: Config, path: str, shape: tuple[int, int], name: DtypeName
) -> list[dict[str, Any]]:
    """A row for each gradient tolerance, and one for plain torch in the same dtype."""
    losses: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "joint": (rnnt_op.joint_rnnt_loss, rnnt_op.reference.joint_rnnt_loss),
        "logits": (rnnt_op.rnnt_loss, rnnt_op.reference.rnnt_loss),
    }
    ours, plain = losses[path]
    methods = {"rnnt_op": ours}
    if path == "joint":  # the logits path computes every node's gradient: it has no tolerance
        methods["rnnt_op, tolerance 0"] = partial(ours, gradient_tolerance=0.0)
    if name != "float64":  # there it is the truth itself
        methods["plain torch"] = plain

    drawn: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(config.bfloat16_draws if name == "bfloat16" else 1):
        problem = draw(config, path, shape, name)
        truth = problem.to(torch.float64).gradients(plain)
        for method, function in methods.items():
            drawn[method].append(errors(path, problem.gradients(function), truth))
    pooled = {method: typical(each) for method, each in drawn.items()}

    rows = []
    for method, error in pooled.items():
        bars = {
            key: gradient_bar(dtype_of(name), pooled.get("plain torch", error)[key])
            for key in error
            if key != "loss"
        }
        passed = None if method == "plain torch" else all(error[k] <= bars[k] for k in bars)
        case = {"T": shape[0], "U": shape[1], "dtype": name, "method": method}
        rows.append({**case, **error, "passed": passed})
    return rows


def typical(draws: list[dict[str, float]]) -> dict[str, float]:
    """The median: now and then a draw's errors, anybody's, are twice as large as most."""
    return {key: median(each[key] for each in draws) for key in draws[0]}


def errors(
    path: str,
    actual: tuple[Tensor, tuple[Tensor, ...]],
    truth: tuple[Tensor, tuple[Tensor, ...]],
) -> dict[str, float]:
    """Relative error of the loss and of each gradient, by name."""
    names = JOINT_GRADIENTS if path == "joint" else ("d_logits",)
    loss_error = {"loss": relative_error([actual[0]], [truth[0]])}
    each = {
        name: relative_error([a], [e])
        for name, a, e in zip(names, actual[1], truth[1], strict=True)
    }
    together = {"d_all": relative_error(actual[1], truth[1])} if path == "joint" else {}
    return loss_error | each | together


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    shapes = list(zip(config.frames, config.labels, strict=True))
    cases = [
        (path, shape, name) for path in ("joint", "logits") for shape in shapes for name in DTYPES
    ]
    rows: dict[str, list[dict[str, Any]]] = {"joint": [], "logits": []}
    for path, shape, name in tqdm(cases, desc="cases", leave=False):
        rows[path] += measure(config, path, shape, name)
    print(f"Relative L2 error against float64 autograd; {describe_machine()}")
    for path in rows:
        print(f"\n{path} path\n\n{markdown_table(rows[path])}")
    print(
        "\nBars for each gradient: 1e-9 in float64, 2e-5 in float32; in bfloat16, plain torch's "
        "error plus a hair."
    )
    write_results(config.out, "exactness", config, rows, device=config.device)
    if any(row["passed"] is False for path in rows for row in rows[path]):
        raise SystemExit("at least one gradient's error is above its bar")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
