"""A sample whose loss is not finite leaves the others alone."""

from dataclasses import replace

import pytest
import torch
from problems import JointProblem, loss_and_gradients, random_joint, relative_error

import rnnt_op

pytestmark = pytest.mark.every_backend

INF = float("inf")
BAD, GOOD = 1, [0, 2]


def spoiled(value: float) -> tuple[JointProblem, JointProblem]:
    """A problem whose sample BAD holds one bad encoder state, and the problem of the others."""
    problem = random_joint(3, 7, 5, lengths=[(7, 5), (6, 3), (5, 4)])
    encoder = problem.encoder.detach().clone()
    encoder[BAD, 2, 3] = value
    others = replace(
        problem,
        encoder=problem.encoder.detach()[GOOD].requires_grad_(),
        predictor=problem.predictor.detach()[GOOD].requires_grad_(),
        targets=problem.targets[GOOD],
        encoder_lengths=problem.encoder_lengths[GOOD],
        target_lengths=problem.target_lengths[GOOD],
    )
    return replace(problem, encoder=encoder.requires_grad_()), others


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_others_are_untouched(value: float, reduction: str, zero_infinity: bool) -> None:
    problem, others = spoiled(value)
    options = {"activation": "identity", "reduction": reduction}
    expected, expected_gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, others, **options)
    loss, (d_encoder, d_predictor, *d_shared) = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, zero_infinity=zero_infinity, **options
    )
    assert relative_error([d_encoder[GOOD]], expected_gradients[:1]) <= 1e-14
    assert relative_error([d_predictor[GOOD]], expected_gradients[1:2]) <= 1e-14
    if zero_infinity:
        assert relative_error([loss.sum()], [expected.sum()]) <= 1e-14
        assert (d_encoder[BAD] == 0).all()
        assert (d_predictor[BAD] == 0).all()
        assert relative_error(d_shared, expected_gradients[2:]) <= 1e-14
    else:
        assert not loss.sum().isfinite()
        assert d_encoder[BAD, :6].isnan().all()
        assert d_predictor[BAD, :4].isnan().all()
        assert (d_encoder[BAD, 6:] == 0).all()
        assert all(d.isnan().all() for d in d_shared)
    if reduction == "none" and not zero_infinity:
        assert relative_error([loss[GOOD]], [expected]) <= 1e-14
        assert not loss[BAD].isfinite()


def test_masking_a_bad_sample_out_removes_it() -> None:
    problem, others = spoiled(float("nan"))
    losses = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction="none")
    gradients = torch.autograd.grad(losses[losses.isfinite()].sum(), problem.differentiable)
    _, expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, others, reduction="sum")
    assert relative_error([gradients[0][GOOD]], expected[:1]) <= 1e-14
    assert (gradients[0][BAD] == 0).all()
    assert relative_error(gradients[2:], expected[2:]) <= 1e-14


def test_forbidden_token() -> None:
    """A bias of −∞ removes a token: finite losses where it is not needed, +∞ where it is."""
    problem = random_joint(2, 4, 2, vocab_size=5, lengths=[(4, 2), (4, 2)])
    bias = problem.bias.detach().clone()
    bias[4] = -INF
    problem = replace(problem, bias=bias.requires_grad_(), targets=torch.tensor([[1, 2], [3, 4]]))
    losses, _ = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction="none")
    assert losses[0].isfinite()
    assert losses[1] == INF
    _, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, reduction="sum", zero_infinity=True
    )
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[2][4] == 0).all()
    assert (gradients[0][1] == 0).all()


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_given_logits(zero_infinity: bool) -> None:
    logits = torch.randn(3, 4, 3, 5)
    logits[BAD, 1, 1, 2] = float("nan")
    logits.requires_grad_()
    targets = torch.randint(1, 5, (3, 2))
    lengths = torch.tensor([4, 3, 4]), torch.tensor([2, 2, 1])
    losses = rnnt_op.rnnt_loss(
        logits, targets, *lengths, 0, reduction="none", zero_infinity=zero_infinity
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    clean = logits.detach()[GOOD].requires_grad_()
    expected = rnnt_op.rnnt_loss(
        clean, targets[GOOD], *(n[GOOD] for n in lengths), 0, reduction="none"
    )
    (expected_gradient,) = torch.autograd.grad(expected.sum(), clean)
    assert torch.equal(losses[GOOD], expected)
    torch.testing.assert_close(gradient[GOOD], expected_gradient, rtol=1e-6, atol=1e-9)
    assert (gradient[BAD, 3:] == 0).all()
    if zero_infinity:
        assert losses[BAD] == 0
        assert (gradient[BAD] == 0).all()
    else:
        assert losses[BAD].isnan()
        assert gradient[BAD, :3].isnan().all()
