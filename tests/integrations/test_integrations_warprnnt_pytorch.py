"""warp-transducer's loss under our name, against the reference."""

import sys

import pytest
import torch
from integration_support import assert_equal, random_logits, value_and_gradients

from rnnt_op import reference
from rnnt_op.integrations import warprnnt_pytorch


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_reference(reduction: str) -> None:
    problem = random_logits(blank=1)
    expected = value_and_gradients(
        reference.rnnt_loss(*problem.arguments, blank=1, reduction=reduction), [problem.logits]
    )
    module = warprnnt_pytorch.RNNTLoss(blank=1, reduction=reduction)
    loss = warprnnt_pytorch.rnnt_loss(*problem.arguments, blank=1, reduction=reduction)
    assert_equal(value_and_gradients(module(*problem.arguments), [problem.logits]), expected)
    assert_equal(value_and_gradients(loss, [problem.logits]), expected)


def test_defaults() -> None:
    problem = random_logits()
    loss = warprnnt_pytorch.RNNTLoss()(*problem.arguments)
    assert_equal([loss], [reference.rnnt_loss(*problem.arguments, blank=0, reduction="mean")])


def test_fast_emit_is_in_the_gradient_alone() -> None:
    problem = random_logits()
    loss = warprnnt_pytorch.RNNTLoss(fastemit_lambda=0.3)(*problem.arguments)
    expected = reference.rnnt_loss(*problem.arguments, blank=0, fast_emit=0.3)
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )
    assert_equal([loss], [reference.rnnt_loss(*problem.arguments, blank=0)])


def test_serves_under_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", warprnnt_pytorch)
    from warprnnt_pytorch import RNNTLoss

    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    loss = RNNTLoss(blank=3)(
        logits, torch.zeros(1, 0).int(), torch.tensor([2]).int(), torch.tensor([0]).int()
    )
    assert_equal([loss], [2 * torch.tensor(4.0).log()], tolerance=1e-6)
