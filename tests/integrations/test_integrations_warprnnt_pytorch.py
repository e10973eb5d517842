"""warp-transducer's loss under our name, against the reference."""

import sys

import pytest
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients

from rnnt_op import reference
from rnnt_op.integrations import warprnnt_pytorch


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_reference(reduction: str) -> None:
    problem = random_logits(blank=1)
    expected = reference.rnnt_loss(*problem.arguments, blank=1, reduction=reduction)
    expected = expected if reduction == "none" else expected.unsqueeze(0)
    expected = value_and_gradients(expected, [problem.logits])
    module = warprnnt_pytorch.RNNTLoss(blank=1, reduction=reduction)
    loss = warprnnt_pytorch.rnnt_loss(*problem.arguments, blank=1, reduction=reduction)
    assert_equal(value_and_gradients(module(*problem.arguments), [problem.logits]), expected)
    assert_equal(value_and_gradients(loss, [problem.logits]), expected)


def test_defaults() -> None:
    problem = random_logits()
    loss = warprnnt_pytorch.RNNTLoss()(*problem.arguments)
    expected = reference.rnnt_loss(*problem.arguments, blank=0, reduction="mean")
    assert_equal([loss], [expected.unsqueeze(0)])


def test_arguments_of_the_first_versions() -> None:
    problem = random_logits(blank=1)
    for size_average, reduction in ((True, "mean"), (False, "sum")):
        loss = warprnnt_pytorch.RNNTLoss(size_average=size_average, blank_label=1)
        expected = reference.rnnt_loss(*problem.arguments, blank=1, reduction=reduction)
        assert_equal([loss(*problem.arguments)], [expected.unsqueeze(0)])
    with pytest.raises(ValueError, match="blank: expected an index, got True; name what the first"):
        warprnnt_pytorch.RNNTLoss(True, 1)
    with pytest.raises(ValueError, match="size_average: expected None beside reduction='none'"):
        warprnnt_pytorch.RNNTLoss(reduction="none", size_average=True)
    with pytest.raises(ValueError, match="blank_label: expected None beside blank=2"):
        warprnnt_pytorch.RNNTLoss(2, blank_label=1)


def test_fast_emit_is_in_the_gradient_alone() -> None:
    problem = random_logits()
    loss = warprnnt_pytorch.RNNTLoss(fastemit_lambda=0.3)(*problem.arguments)
    expected = reference.rnnt_loss(*problem.arguments, blank=0, fast_emit=0.3)
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected.unsqueeze(0), [problem.logits]),
    )
    assert_equal([loss], [reference.rnnt_loss(*problem.arguments, blank=0).unsqueeze(0)])


def test_serves_under_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "warprnnt_pytorch", warprnnt_pytorch)
    from warprnnt_pytorch import RNNTLoss

    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    loss = RNNTLoss(blank=3)(
        logits, torch.zeros(1, 0).int(), torch.tensor([2]).int(), torch.tensor([0]).int()
    )
    assert_equal([loss], [2 * torch.tensor([4.0]).log()], tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_warp_transducer(reduction: str) -> None:
    theirs = required("warprnnt_pytorch")
    problem = random_logits().to(torch.float32, torch.int32)
    actual, expected = (
        value_and_gradients(
            package.RNNTLoss(blank=0, reduction=reduction)(*problem.arguments), [problem.logits]
        )
        for package in (warprnnt_pytorch, theirs)
    )
    assert_equal(actual, expected, 2e-5)
