"""The calls of ``docs/migration.md`` give what the other package's call means."""

import re
from typing import Any

import pytest
import torch
from integration_support import assert_equal, random_logits
from places import ROOT
from torch import Tensor

import rnnt_op
from rnnt_op import reference
from rnnt_op.integrations import espnet, k2, nemo, speechbrain, warp_rnnt, warprnnt_pytorch
from rnnt_op.topologies import constrained, modified, multi_blank, tdt

PAGE = ROOT / "docs" / "migration.md"
SECTIONS = dict(
    section.split("\n", 1) for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
)
# Tokens 0, 3 and 8 are blanks of one package or another, 1 and 2 big blanks of ESPnet.
PROBLEM_LENGTHS, TOKENS = ((6, 3), (4, 2), (5, 1)), 9


@pytest.fixture
def names() -> dict[str, Any]:
    """What the blocks call their arguments."""
    problem = random_logits(PROBLEM_LENGTHS, TOKENS)
    logits, frames, labels = problem.logits, problem.frames, problem.labels
    targets = 4 + problem.targets % 4
    zeros = torch.zeros_like(frames)
    ranges = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 2], [1, 2], [2, 3]]).expand(3, -1, -1)
    of_tensors = {
        ("logits", "acts"): logits,
        ("log_probs",): logits.log_softmax(-1),
        ("targets", "labels", "symbols"): targets,
        ("logit_lengths", "act_lens", "frames_lengths", "lengths", "t_len"): frames,
        ("target_lengths", "label_lens", "labels_lengths", "u_len"): labels,
        ("input_lens",): frames / 6,
        ("target_lens",): labels / 3,
        ("boundary",): torch.stack([zeros, zeros, labels, frames], 1),
        ("am",): torch.randn(3, 6, TOKENS, dtype=torch.float64),
        ("lm",): torch.randn(3, 4, TOKENS, dtype=torch.float64),
        ("ranges",): ranges,
        ("pruned_logits",): torch.randn(3, 6, 2, TOKENS, dtype=torch.float64),
        ("token_logits",): logits,
        ("duration_logits",): torch.randn(3, 6, 4, 3, dtype=torch.float64),
    }
    return {
        **{name: tensor for group, tensor in of_tensors.items() for name in group},
        **{"torch": torch, "rnnt_op": rnnt_op, "modified": modified, "constrained": constrained},
        **{"multi_blank": multi_blank, "tdt": tdt, "sigma": 0.05, "fastemit_lambda": 0.1},
        **{"clamp": -1.0, "reduction": "mean", "fused_log_softmax": True, "delay_penalty": 0.2},
        **dict.fromkeys(("blank", "termination_symbol", "blank_index", "blank_token_id"), 0),
        "blank_id": 3,
    }


def results(section: str, names: dict[str, Any], **further: Any) -> list[dict[str, Any]]:
    """What each block of a section leaves behind."""
    left = []
    for code in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        left.append({**names, **further})
        exec(compile(code, f"{PAGE.name}: {section}", "exec"), left[-1])
    return left


def regular(names: dict[str, Any], reduction: str, blank: int = 0) -> Tensor:
    arguments = (names[n] for n in ("logits", "targets", "logit_lengths", "target_lengths"))
    return reference.rnnt_loss(*arguments, blank=blank, reduction=reduction)


def test_every_section_with_code_has_a_test() -> None:
    with_code = [name for name, text in SECTIONS.items() if "```python" in text]
    assert with_code == [
        "torchaudio",
        "warp-transducer (`warprnnt_pytorch`)",
        "warp-rnnt (1ytic)",
        "k2 and fast_rnnt",
        "NeMo",
        "ESPnet",
        "SpeechBrain",
        "Hugging Face transformers",
    ]


def test_torchaudio(names: dict[str, Any]) -> None:
    (left,) = results("torchaudio", names)
    assert_equal([left["loss"]], [regular(names, "mean")])


def test_warp_losses(names: dict[str, Any]) -> None:
    (left,) = results("warp-transducer (`warprnnt_pytorch`)", names)
    arguments = (names[n] for n in ("acts", "labels", "act_lens", "label_lens"))
    assert_equal([left["loss"].unsqueeze(0)], [warprnnt_pytorch.rnnt_loss(*arguments)])
    (left,) = results("warp-rnnt (1ytic)", names)
    assert_equal([left["losses"]], [regular(names, "none")])
    arguments = (names[n] for n in ("log_probs", "labels", "frames_lengths", "labels_lengths"))
    assert_equal([left["losses"]], [warp_rnnt.rnnt_loss(*arguments)])


def test_k2(names: dict[str, Any]) -> None:
    (left,) = results("k2 and fast_rnnt", names)
    symbols, boundary = names["symbols"], names["boundary"]
    expected = [
        k2.rnnt_loss(names["logits"], symbols, 0, boundary, "modified", 0.2),
        k2.rnnt_loss_simple(names["lm"], names["am"], symbols, 0, boundary),
        k2.rnnt_loss_pruned(names["pruned_logits"], symbols, names["ranges"], 0, boundary),
    ]
    assert_equal([left[name] for name in ("loss", "simple_loss", "pruned_loss")], expected)


def test_nemo(names: dict[str, Any]) -> None:
    (left,) = results("NeMo", names)
    arguments = (names[n] for n in ("logits", "targets", "lengths", "target_lengths"))
    assert_equal([left["losses"]], [nemo.RNNTLoss(TOKENS - 1, None)(*arguments)])


def test_espnet(names: dict[str, Any]) -> None:
    plain, multi = results("ESPnet", names, durations=[2, 4])
    arguments = [names[n] for n in ("logits", "targets", "t_len", "u_len")]
    assert_equal([plain["loss"]], [regular(names, "mean", blank=3)])
    criterion = espnet.MultiblankRNNTLoss(3, [2, 4], sigma=0.05)
    assert_equal([multi["loss"]], [criterion(*arguments)])


def test_speechbrain(names: dict[str, Any]) -> None:
    (left,) = results("SpeechBrain", names)
    arguments = (names[n] for n in ("logits", "targets", "input_lens", "target_lens"))
    assert_equal([left["loss"]], [speechbrain.transducer_loss(*arguments, 0, use_torchaudio=True)])


def test_transformers(names: dict[str, Any]) -> None:
    code = SECTIONS["Hugging Face transformers"]
    rnnt, of_tdt = (part for part in re.findall(r"(losses = .*?\nloss = .*?\n)", code, re.DOTALL))
    left = {**names, "durations": [0, 1, 2]}
    exec(rnnt, left)
    assert_equal([left["loss"]], [regular(names, "sum") / 6])
    exec(of_tdt, left)
    logits = torch.cat([names["token_logits"], names["duration_logits"]], -1)
    losses = reference.rnnt_loss(
        logits,
        *(names[n] for n in ("targets", "logit_lengths", "target_lengths")),
        blank=0,
        topology=tdt([0, 1, 2], sigma=0.05),
        reduction="none",
    )
    assert_equal([left["loss"]], [(losses / torch.tensor([3, 2, 1])).mean()])
