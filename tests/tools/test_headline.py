"""The headline at a toy size."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rnnt_op
from rnnt_op.memory import Workload
from rnnt_op.tools import cli
from rnnt_op.tools.study import headline
from rnnt_op.tools.study.headline import Headline, Progress, measure, verdict
from rnnt_op.tools.study.measure import counted_nodes
from rnnt_op.tools.study.problems import chosen_samples, random_joint

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's /proc"
)

TOY = Headline(batch=3, frames=20, labels=6, vocab_size=30, joint_dim=16)
RAGGED = Workload(((5, 2), (3, 0), (4, 4)), 7, 8, torch.float64)


def test_toy_headline() -> None:
    seen = []

    @contextmanager
    def watch(progress: Progress) -> Iterator[None]:
        assert progress.counts.scored == progress.counts.kept == 0
        yield
        seen.append(progress)

    row = measure(replace(TOY, repeats=1), watch)
    (progress,) = seen
    nodes = 3 * 20 * 7
    assert progress.nodes == progress.counts.scored == nodes
    assert 0 < progress.counts.kept < nodes
    assert row["nodes kept %"] == 100 * progress.counts.kept / nodes
    assert row["logits of plain torch GB"] == nodes * 30 * 2 / 1e9
    leaves = 3 * 20 * 16 + 3 * 7 * 16 + 30 * 16 + 30
    assert row["gradients GB"] == leaves * 2 / 1e9
    assert row["inputs GB"] == (leaves * 2 + 3 * 6 * 8) / 1e9
    # The interpreter and torch alone take more than 50 MB.
    assert 0.05 < row["before inputs GB"] <= row["peak GB"] < 6
    assert row["≤ 6 GB"] is row["finite"] is row["first and last as alone"] is True
    assert row["encoder gradient, distance"] < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_toy_headline_on_a_gpu() -> None:
    """Memory is that of torch's tensors alone, and nodes are counted there, too."""
    row = measure(replace(TOY, device="cuda"))
    assert 0 < row["nodes kept %"] < 100
    assert row["inputs GB"] + row["gradients GB"] < row["peak GB"] < 1
    assert headline.failures(row) == []


def test_verdict_and_status(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "peak_bytes", lambda device: 3_658_104_832)
    size = "--batch 3 --frames 20 --labels 6 --vocab 30 --joint-dim 16 --device cpu"
    command = ["headline", *size.split()]
    file = tmp_path / "headline.json"
    assert cli.main([*command, "--json", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "B=3 T=20 U=6 V=30 H=16 bfloat16, loss and gradients: peak 3.66 GB ≤ 6 GB: met"
    )
    record = json.loads(file.read_text())
    assert record["parameters"]["frames"] == 20
    assert record["results"][0]["peak GB"] == 3.658104832
    assert cli.main([*command, "--limit", "3.6"]) == 1
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith("peak 3.66 GB ≤ 3.6 GB: not met (≤ 3.6 GB)")
    )


def test_a_result_that_differs_from_that_of_its_samples_is_not_met(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    joint_rnnt_loss = rnnt_op.joint_rnnt_loss

    def wrong_in_large_batches(encoder: torch.Tensor, *arguments: object, **options: object):
        if len(encoder) == TOY.batch and encoder.dtype == torch.bfloat16 and encoder.shape[1] == 20:
            encoder = encoder.roll(1, dims=1)
        return joint_rnnt_loss(encoder, *arguments, **options)

    monkeypatch.setattr(rnnt_op, "joint_rnnt_loss", wrong_in_large_batches)
    row = measure(TOY)
    assert row["first and last as alone"] is False
    assert verdict(TOY, row).endswith("≤ 6 GB: not met (first and last as alone)")


def test_without_extras(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = {"batch": 1, "frames": 9, "labels": 2, "vocab_size": 9, "joint_dim": 8}
    assert headline.main([json.dumps(options), str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("B=1 T=9 U=2 V=9 H=8 bfloat16")
    (file,) = tmp_path.iterdir()
    assert file.name == "headline-bfloat16-cpu.json"


def test_counted_nodes() -> None:
    """At tolerance zero every node with gradient is kept, and all have some here."""
    problem = random_joint(RAGGED)
    with counted_nodes(torch.device("cpu")) as counts:
        problem.gradients(rnnt_op.joint_rnnt_loss, gradient_tolerance=0.0, workspace_bytes=2000)
    assert counts.scored == counts.kept == 5 * 3 + 3 * 1 + 4 * 5
    with counted_nodes(torch.device("cpu")) as counts:
        problem.loss(rnnt_op.joint_rnnt_loss)
    assert (counts.scored, counts.kept) == (38, 0)


def test_chosen_samples() -> None:
    problem = random_joint(RAGGED)
    losses = problem.loss(rnnt_op.joint_rnnt_loss, reduction="none")
    chosen = chosen_samples(problem, [0, 2])
    assert torch.equal(chosen.loss(rnnt_op.joint_rnnt_loss, reduction="none"), losses[[0, 2]])
