"""torchaudio's loss under our name, against torchaudio and against the reference."""

import pytest
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients

from rnnt_op import reference
from rnnt_op.integrations.torchaudio import RNNTLoss, rnnt_loss

OPTIONS = [
    {},
    {"blank": 0},
    {"blank": 2, "reduction": "none"},
    {"reduction": "sum", "clamp": 0.05},
    {"fused_log_softmax": False},
    {"fused_log_softmax": False, "reduction": "none", "blank": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_torchaudio(options: dict) -> None:
    theirs = required("torchaudio")
    problem = random_logits(blank=options.get("blank", -1)).to(torch.float32, torch.int32)
    if not options.get("fused_log_softmax", True):
        logits = problem.logits.detach().log_softmax(-1).requires_grad_()
        problem = type(problem)(logits, *problem.arguments[1:])
    pairs = [
        (RNNTLoss(**options), theirs.transforms.RNNTLoss(**options)),
        (
            lambda *arguments: rnnt_loss(*arguments, **options),
            lambda *arguments: theirs.functional.rnnt_loss(*arguments, **options),
        ),
    ]
    for ours, torchaudios in pairs:
        actual, expected = (
            value_and_gradients(loss(*problem.arguments), [problem.logits])
            for loss in (ours, torchaudios)
        )
        assert_equal(actual, expected, tolerance=2e-5)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "clamp" not in o], ids=str)
def test_equals_reference(options: dict) -> None:
    problem = random_logits(blank=options.get("blank", -1))
    actual, expected = (
        value_and_gradients(loss, [problem.logits])
        for loss in (
            RNNTLoss(**options)(*problem.arguments),
            reference.rnnt_loss(*problem.arguments, **options),
        )
    )
    assert_equal(actual, expected)


def test_clamp_cuts_each_sample_before_the_upstream_gradient() -> None:
    problem = random_logits()
    losses = reference.rnnt_loss(*problem.arguments, blank=0, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), problem.logits)
    loss = RNNTLoss(blank=0, clamp=0.05)(*problem.arguments)
    (actual,) = torch.autograd.grad(loss, problem.logits)
    assert gradient.abs().max() > 0.05
    assert_equal([actual], [gradient.clamp(-0.05, 0.05) / len(losses)])
