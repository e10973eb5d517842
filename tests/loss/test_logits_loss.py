"""``rnnt_loss``: torchaudio's semantics, and the ranges it does not cover."""

from dataclasses import dataclass, replace

import pytest
import torch
from problems import NAN, random_joint, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op import reference

pytestmark = pytest.mark.every_backend


@dataclass(frozen=True)
class LogitsProblem:
    logits: Tensor
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.logits, self.targets, self.logit_lengths, self.target_lengths


def random_logits(batch=3, frames=7, labels=5, vocab_size=11, dtype=torch.float64, blank=-1):
    joint = random_joint(batch, frames, labels, vocab_size=vocab_size, blank=blank)
    logits = torch.randn(batch, frames, labels + 1, vocab_size, dtype=torch.float64).to(dtype)
    return LogitsProblem(logits.requires_grad_(), *joint.arguments[4:])


def expected_gradient(problem: LogitsProblem, **options) -> Tensor:
    double = replace(problem, logits=problem.logits.detach().double().requires_grad_())
    loss = reference.rnnt_loss(*double.arguments, **options)
    return torch.autograd.grad(loss.sum(), double.logits)[0]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_against_the_reference(dtype: torch.dtype, reduction: str) -> None:
    problem = random_logits(dtype=dtype)
    loss = rnnt_op.rnnt_loss(*problem.arguments, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(loss.sum(), problem.logits)
    assert gradient.dtype == dtype
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 64 * torch.finfo(dtype).eps
    error = relative_error([gradient], [expected_gradient(problem, reduction=reduction)])
    assert error <= rounding


@pytest.mark.parametrize("clamp", [0.05, 0.3, 0.0, -1.0])
def test_clamp_comes_before_the_upstream_gradient(clamp: float) -> None:
    problem = random_logits()
    upstream = torch.tensor([100.0, -3.0, 0.5], dtype=torch.float64)
    losses = rnnt_op.rnnt_loss(*problem.arguments, clamp=clamp, reduction="none")
    (gradient,) = torch.autograd.grad(losses, problem.logits, upstream)
    unit = expected_gradient(problem, reduction="none")
    if clamp > 0:
        assert (unit.abs() > clamp).any()
        unit = unit.clamp(-clamp, clamp)
    torch.testing.assert_close(gradient, unit * upstream[:, None, None, None])


@pytest.mark.parametrize("certain", [False, True], ids=["random", "certain"])
def test_log_probabilities(certain: bool) -> None:
    problem = random_logits()
    log_probs = problem.logits.detach().log_softmax(-1)
    if certain:  # the last frame's blanks: a softmax would give their logits no gradient
        log_probs[:, -1, :, -1] = 0
        log_probs[:, -1, :, :-1] = float("-inf")
        problem.logit_lengths.fill_(log_probs.shape[1])
    problem = replace(problem, logits=log_probs.requires_grad_())
    loss = rnnt_op.rnnt_loss(*problem.arguments, fused_log_softmax=False)
    expected = reference.rnnt_loss(*problem.arguments, fused_log_softmax=False)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(
        gradient, expected_gradient(problem, fused_log_softmax=False), rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("layout", ["permuted", "expanded", "sliced"])
def test_strides(layout: str, dtype: torch.dtype) -> None:
    problem = random_logits(dtype=dtype)
    logits = problem.logits.detach()
    if layout == "permuted":
        logits = logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    elif layout == "expanded":
        logits = logits[:, :1].expand_as(logits)
    else:
        logits = torch.stack([logits, torch.full_like(logits, NAN)], -1)[..., 0]
    before = logits.clone()
    problem = replace(problem, logits=logits.requires_grad_())
    loss = rnnt_op.rnnt_loss(*problem.arguments)
    (gradient,) = torch.autograd.grad(loss, problem.logits)
    assert torch.equal(logits, before)
    expected = expected_gradient(problem)
    if dtype == torch.float64:
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)
    else:
        assert relative_error([gradient], [expected]) <= torch.finfo(dtype).eps


def test_padding_is_never_read_and_has_zero_gradient() -> None:
    problem = random_logits()
    logits = problem.logits.detach().clone()
    padding = torch.ones_like(logits, dtype=torch.bool)
    for b, (t, u) in enumerate(zip(problem.logit_lengths, problem.target_lengths, strict=True)):
        padding[b, :t, : u + 1] = False
    logits[padding] = NAN
    poisoned = replace(problem, logits=logits.requires_grad_())
    (gradient,) = torch.autograd.grad(rnnt_op.rnnt_loss(*poisoned.arguments), logits)
    assert (gradient[padding] == 0).all()
    torch.testing.assert_close(gradient, expected_gradient(problem), rtol=1e-10, atol=1e-14)


def test_small_workspace() -> None:
    problem = random_logits(5, 12, 7)
    loss = rnnt_op.rnnt_loss(*problem.arguments, workspace_bytes=1)
    (gradient,) = torch.autograd.grad(loss, problem.logits)
    torch.testing.assert_close(gradient, expected_gradient(problem), rtol=1e-10, atol=1e-14)


def test_positional_call_of_torchaudio() -> None:
    problem = random_logits(blank=0)
    loss = rnnt_op.rnnt_loss(*problem.arguments, 0, -1.0, "sum", True)
    expected = reference.rnnt_loss(*problem.arguments, blank=0, reduction="sum")
    torch.testing.assert_close(loss, expected)
