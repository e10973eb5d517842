"""The examples of ``docs/integrations.md`` run as they stand."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import peers
import pytest
import test_integrations_espnet as espnet
import test_integrations_nemo as nemo
import test_integrations_speechbrain as speechbrain
import test_integrations_transformers as parakeet
import torch
from integration_support import assert_equal, random_logits, required
from places import ROOT
from torch import Tensor, nn

import rnnt_op
from rnnt_op.integrations import k2, warprnnt_pytorch
from rnnt_op.topologies import tdt

PAGE = ROOT / "docs" / "integrations.md"
EXAMPLES = dict(re.findall(r"<!-- (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


def run(name: str, **names: Any) -> SimpleNamespace:
    exec(compile(EXAMPLES[name], f"{PAGE.name}: {name}", "exec"), names)
    return SimpleNamespace(**names)


def test_every_example_is_named_and_run() -> None:
    assert PAGE.read_text().count("```python") == len(EXAMPLES)
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert EXAMPLES.keys() <= tests


def test_table_of_the_packages_own_tests() -> None:
    results = json.loads(peers.RESULTS.read_text())
    (table,) = re.findall(r"why not passed \|\n\|[- |]*\n((?:\|.*\n)+)", PAGE.read_text())
    assert table.splitlines() == peers.rows(results)
    assert peers.UNEXPLAINED not in table
    for row in results:
        assert row["tests"] == row["passed"] + row["failed"] + row["skipped"]
        assert sum(row["reasons"].values()) == row["failed"] + row["skipped"]


def test_a_report_becomes_a_row() -> None:
    report = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure
        message="ValueError: label 3 equals blank (3)">…</failure></testcase><testcase name="c">
        <skipped message="no GPU"/></testcase></testsuite></testsuites>"""
    suite = replace(peers.SUITES["k2"], reasons=(("equals blank", "refused"),))
    row = {"package": "k2", "version": "1"} | peers.outcomes(report, suite)
    assert peers.rows([row]) == [
        "| k2 | 1 | 3 | 1 | 1 | 1 | refused (1); unexplained: no GPU (1) |"
    ]


def test_torchaudio() -> None:
    problem = random_logits()
    names = ("logits", "targets", "logit_lengths", "target_lengths")
    assert run("torchaudio", **dict(zip(names, problem.arguments, strict=True))).loss.isfinite()


@pytest.mark.slow
def test_transformers() -> None:
    required("transformers")
    prepared = parakeet.random_model("TDT")
    batch = parakeet.batch_for(prepared)
    batch["input_features"] = batch["input_features"].float()
    model = run("transformers", config=prepared.config, batch=batch).model
    assert model.joint.head.weight.grad.isfinite().all()


@pytest.mark.slow
def test_transformers_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    required("transformers")
    for kind in ("rnnt", "tdt"):  # put back afterwards
        module = required(f"transformers.loss.loss_{kind}")
        monkeypatch.setattr(module, f"{kind}_loss", None)
    model = parakeet.random_model("RNNT")
    run("transformers_losses", model=model, batch=parakeet.batch_for(model))
    assert model.joint.head.weight.grad.isfinite().all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft() -> None:
    required("peft")
    model = parakeet.random_model("TDT").float()
    batch = parakeet.batch_for(model)
    batch["input_features"] = batch["input_features"].float()
    run("peft", model=model, batch=batch)
    assert model.joint.head.lora_B["default"].weight.grad.any()


def test_nemo() -> None:
    problem = nemo.problem_for(nemo.RNNT)
    joint = nemo.Joint(nemo.TOKENS, "relu").double()
    model = SimpleNamespace(joint=joint, loss=nemo.RNNTLoss(nemo.BLANK), wer=None)
    run("nemo", model=model)
    loss, *_ = joint(*nemo.states(), *(problem.arguments[i] for i in (2, 1, 3)))
    assert loss.isfinite()


def test_nemo_loss() -> None:
    model = SimpleNamespace()
    run("nemo_loss", model=model, blank=nemo.BLANK)
    problem = nemo.problem_for(tdt())
    assert model.loss(*problem.arguments).isfinite()


def test_nemo_numba() -> None:
    problem = nemo.problem_for(nemo.RNNT)
    names = ("acts", "labels", "act_lens", "label_lens")
    given = dict(zip(names, problem.arguments, strict=True))
    assert run("nemo_numba", blank=nemo.BLANK, **given).loss.isfinite()


def test_k2() -> None:
    frames, labels = torch.tensor([9, 7]), torch.tensor([6, 2])
    zeros = torch.zeros_like(frames)
    joiner = SimpleNamespace(
        encoder_proj=nn.Linear(4, 8), decoder_proj=nn.Linear(4, 8), output_linear=nn.Linear(8, 5)
    )
    losses = run(
        "k2",
        rnnt_op=rnnt_op,
        lm=torch.randn(2, 7, 5),
        am=torch.randn(2, 9, 5),
        symbols=torch.randint(1, 5, (2, 6)),
        blank=0,
        boundary=torch.stack([zeros, zeros, labels, frames], 1),
        joiner=joiner,
        encoder_out=torch.randn(2, 9, 4),
        decoder_out=torch.randn(2, 7, 4),
    )
    assert losses.simple_loss.isfinite()
    assert losses.pruned_loss.isfinite()


def test_k2_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("k2", "fast_rnnt"):
        monkeypatch.setitem(sys.modules, name, None)  # taken away afterwards
    problem = random_logits()
    zeros = torch.zeros_like(problem.frames)
    boundary = torch.stack([zeros, zeros, problem.labels, problem.frames], 1)
    given = {"logits": problem.logits, "symbols": problem.targets, "blank": 0}
    loss = run("k2_parts", k2=k2, boundary=boundary, **given).loss
    assert_equal([loss], [rnnt_op.rnnt_loss(*problem.arguments, blank=0)])


def test_warp() -> None:
    problem = random_logits([(6, 3)])
    names = ("acts", "labels", "act_lens", "label_lens")
    given = dict(zip(names, problem.arguments, strict=True))
    left = run("warp", blank=0, packed=problem.logits.flatten(0, 2), **given)
    assert_equal([left.losses, left.total.unsqueeze(0)], [left.loss, left.loss])


def test_espnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", None)  # taken away afterwards

    def build_model() -> nn.Module:
        from warprnnt_pytorch import RNNTLoss

        assert RNNTLoss is warprnnt_pytorch.RNNTLoss
        return espnet.Model(espnet.Joint(nn.Tanh()), RNNTLoss(blank=0), 0).double()

    model: Any = run("espnet", build_model=build_model).model
    encoder_out, labels = espnet.batch(0)
    assert model._calc_transducer_loss(encoder_out, espnet.FRAMES, labels)[0].isfinite()


def test_speechbrain() -> None:
    def states(length: int) -> Tensor:
        return torch.randn(2, length, 4)

    loss = run(
        "speechbrain",
        joint=speechbrain.Joint(nonlinearity=nn.Tanh),
        output_layer=nn.Linear(4, 5),
        encoder=states(6),
        predictor=states(4),
        targets=torch.randint(1, 5, (2, 3)),
        input_lens=torch.tensor([1.0, 0.5]),
        target_lens=torch.tensor([1.0, 1 / 3]),
    ).loss
    assert loss.isfinite()
