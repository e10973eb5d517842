"""What the loss is measured beside on a GPU computes the same loss and gradients."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from rnnt_op import reference
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.problems import Problem, random_joint

RAGGED = ((30, 4), (12, 0), (40, 12), (1, 3), (25, 9))


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import rivals

    return rivals


def problem_of(dtype: torch.dtype, lengths: tuple[tuple[int, int], ...] = RAGGED) -> Problem:
    return random_joint(Workload(lengths, 30, 24, dtype))


@pytest.mark.parametrize("tile_rows", [1, 7, 100, 200_000])
@pytest.mark.parametrize(
    "lengths", [RAGGED, ((17, 6),), ((9, 0), (4, 0))], ids=["ragged", "one", "no labels"]
)
def test_flash_rnnt(rivals: Any, lengths: tuple[tuple[int, int], ...], tile_rows: int) -> None:
    problem = problem_of(torch.float64, lengths)
    loss, gradients = rivals.flash_gradients(problem, tile_rows)
    expected, truth = problem.gradients(reference.joint_rnnt_loss)
    assert relative_error([loss], [expected]) <= 1e-12
    assert relative_error(gradients, truth) <= 1e-11


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_flash_rnnt_in_less_precision(rivals: Any, dtype: torch.dtype, bar: float) -> None:
    problem = problem_of(dtype)
    _, gradients = rivals.flash_gradients(problem, 100)
    assert [gradient.dtype for gradient in gradients] == [dtype] * 4
    _, truth = problem.to(torch.float64).gradients(reference.joint_rnnt_loss)
    assert relative_error(gradients, truth) <= bar


def test_flash_rnnt_keeps_no_logits(rivals: Any) -> None:
    """Of a node two scores stay until the backward pass, whatever the vocabulary."""
    problem = problem_of(torch.float32)
    leaves = tuple(leaf.detach().requires_grad_() for leaf in problem.leaves)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Problem(leaves, problem.targets, problem.frames, problem.labels).loss(
            partial(rivals.flash_rnnt_loss, tile_rows=100)
        )
    largest = max(tensor.numel() for tensor in kept)
    padded = 5 * 40 * 13 * 2  # the two planes
    assert largest <= padded < problem.nodes * 30


@pytest.mark.parametrize("rows", [1, 5, 13, 60, 10_000])
def test_tiles(rivals: Any, rows: int) -> None:
    found = list(rivals.tiles(RAGGED, rows))
    nodes = [
        (sample, frame)
        for pieces in found
        for sample, frames, states in pieces
        for frame in range(frames.start, frames.stop)
        if states == RAGGED[sample][1] + 1
    ]
    assert nodes == [(b, t) for b, (frames, _) in enumerate(RAGGED) for t in range(frames)]
    for pieces in found:
        size = sum((frames.stop - frames.start) * states for _, frames, states in pieces)
        assert size <= rows or len(pieces) == 1


@pytest.mark.parametrize("vocab_size", [500, 512])
@pytest.mark.parametrize("limit", [1e9, 0.0])
def test_gemm(rivals: Any, vocab_size: int, limit: float) -> None:
    problem = random_joint(Workload(((9, 4),), vocab_size, 16, torch.bfloat16))
    run, how = rivals.gemm(problem, torch.bfloat16, limit)
    run()
    assert ("padded to 504" in how) is (vocab_size == 500)
    assert ("one call" in how) is (limit > 0)


def test_torchaudio(rivals: Any) -> None:
    problem = problem_of(torch.float32)
    try:
        rivals.torchaudio_loss("cpu")
    except RuntimeError as reason:
        pytest.skip(str(reason))
    _, truth = problem.to(torch.float64).gradients(reference.joint_rnnt_loss)
    for limit in (1e9, 1e6):
        _, gradients = rivals.torchaudio_gradients(limit, problem)
        assert relative_error(gradients, truth) <= 1e-4


# A way that is wrong is said to be, and the others are measured all the same.


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch, rivals: Any) -> Any:
    import speed_cuda

    return speed_cuda


def measured(speed: Any, out: Path, says: str, **options: Any) -> dict[str, Any]:
    """The rows of a toy by their names, after a measurement that ends with ``says``."""
    config = speed.Config(("i",), repeats=1, training_steps=0, device="cpu", out=out, **options)
    with pytest.raises(SystemExit, match=says):
        speed.main(config)
    [case] = json.loads((out / "speed-toy-cpu.json").read_text())["results"]
    assert {row["what"] for row in case["rows"] if row["median ms"]} == set(case["seconds"])
    return {row["what"]: row for row in case["rows"]}


def test_wrong_rivals_are_not_timed(
    speed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = speed.flash_gradients

    def wrong(problem: Problem) -> Any:
        loss, gradients = right(problem)
        return loss, tuple(1.1 * gradient for gradient in gradients)

    def too_large(problem: Problem) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(speed, "flash_gradients", wrong)
    monkeypatch.setattr(speed, "batched_gradients", too_large)
    rows = measured(speed, tmp_path, "Flash RNN-T is wrong")
    assert (
        "differs on a small problem: relative error of the gradients 1.0e-01"
        in (rows["Flash RNN-T"]["note"])
    )
    assert rows["plain torch"]["note"] == "failed: OutOfMemoryError: no memory"
    timed = {name for name, row in rows.items() if row["median ms"] is not None}
    assert timed == {"one GEMM", "rnnt_op, random"}


def test_others_are_timed_where_the_loss_is_wrong(
    speed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wrong in a large batch alone."""
    right = speed.ours

    def wrong(problem: Problem, workspace_bytes: int | None = None) -> Any:
        loss, gradients = right(problem, workspace_bytes)
        return loss, tuple(g * (2 if len(problem.leaves[2]) == 48 else 1) for g in gradients)

    monkeypatch.setattr(speed, "ours", wrong)
    rows = measured(speed, tmp_path, "rnnt_op, random is wrong", rivals=("flash", "batched"))
    assert rows["rnnt_op, random"]["note"].startswith("differs by 1.0e+00")
    timed = {name for name, row in rows.items() if row["median ms"] is not None}
    assert timed == {"one GEMM", "Flash RNN-T", "plain torch"}
