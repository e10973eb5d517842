"""Rounding: long lattices, half dtypes, almost certain posteriors, and autocast."""

import functools

import pytest
import torch
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op import reference
from rnnt_op.backends import sources

pytestmark = pytest.mark.every_backend

Result = tuple[Tensor, tuple[Tensor, ...]]


def autocast_to(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype, enabled=dtype is not None)


@functools.cache
def problem_and_references(
    seed: int, dtype: torch.dtype, autocast: torch.dtype | None, device: str, **options: object
) -> tuple[JointProblem, Result, Result]:
    """With the float64 results, and plain torch's; the same for every backend of a device."""
    torch.manual_seed(seed)
    problem = random_joint(3, 30, 12, joint_dim=64, vocab_size=50, dtype=dtype, scale=0.5)
    truth = loss_and_gradients(reference.joint_rnnt_loss, problem.to(torch.float64), **options)
    with autocast_to(autocast):
        plain = loss_and_gradients(reference.joint_rnnt_loss, problem, **options)
    return problem, truth, plain


def mean_errors(
    dtype: torch.dtype, autocast: torch.dtype | None = None, **options: object
) -> tuple[float, float, float, float]:
    """Mean relative errors of our loss and gradients, then of plain torch's.

    Over many problems: whether one of them rounds up or down is chance.
    """
    errors = []
    for seed in range(40):
        device = torch.get_default_device().type
        problem, truth, plain = problem_and_references(seed, dtype, autocast, device, **options)
        with autocast_to(autocast):
            ours = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
        errors.append(
            [
                relative_error(*pair)
                for loss, gradients in (ours, plain)
                for pair in (([loss], [truth[0]]), (gradients, truth[1]))
            ]
        )
    ours_loss, ours_gradients, plain_loss, plain_gradients = torch.tensor(errors).mean(0).tolist()
    return ours_loss, ours_gradients, plain_loss, plain_gradients


@pytest.mark.slow
def test_long_lattice_joint() -> None:
    problem = random_joint(
        1, 1000, 200, joint_dim=32, vocab_size=64, dtype=torch.float32, scale=0.5
    )
    _, exact = loss_and_gradients(reference.joint_rnnt_loss, problem.to(torch.float64))
    for gradient_tolerance in (None, 0.0):
        _, gradients = loss_and_gradients(
            rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=gradient_tolerance
        )
        assert relative_error(gradients, exact) <= 2e-5
        for gradient, truth in zip(gradients, exact, strict=True):
            assert relative_error([gradient], [truth]) <= 2e-5


@pytest.mark.slow
def test_long_lattice_logits() -> None:
    logits = torch.randn(1, 1000, 201, 16, requires_grad=True)
    lengths = torch.tensor([1000]), torch.tensor([200])
    targets = torch.randint(1, 16, (1, 200))
    (gradient,) = torch.autograd.grad(rnnt_op.rnnt_loss(logits, targets, *lengths, 0), logits)
    double = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.rnnt_loss(double, targets, *lengths, 0), double)
    assert relative_error([gradient], [exact]) <= 2e-5


def test_long_lattice_is_exact_in_float64() -> None:
    problem = random_joint(2, 300, 60)
    _, exact = loss_and_gradients(reference.joint_rnnt_loss, problem)
    _, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert relative_error(gradients, exact) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_worse_than_plain_torch(dtype: torch.dtype) -> None:
    ours_loss, ours, plain_loss, plain = mean_errors(dtype)
    # A float32 loss is half a unit off from rounding alone, whoever computes it.
    assert ours_loss <= 1.1 * plain_loss + torch.finfo(torch.float32).eps / 2
    assert ours <= 1.1 * plain


@pytest.mark.parametrize("confidence", [5.0, 10.0, 20.0])
def test_almost_certain_posterior(confidence: float) -> None:
    """Where a token has probability 1 − 1e-6, its gradient is 1e-6, not the rounding of 1 − p."""
    frames, vocab_size = 50, 8
    logits = torch.randn(1, frames, 1, vocab_size) * 0.5
    logits[..., 0] += confidence
    logits.requires_grad_()
    arguments = torch.zeros(1, 0).long(), torch.tensor([frames]), torch.tensor([0]), 0
    loss = rnnt_op.rnnt_loss(logits, *arguments)
    (gradient,) = torch.autograd.grad(loss, logits)
    double = logits.detach().double().requires_grad_()
    exact = reference.rnnt_loss(double, *arguments)
    (exact_gradient,) = torch.autograd.grad(exact, double)
    assert relative_error([loss.detach()], [exact.detach()]) <= 1e-6
    assert relative_error([gradient], [exact_gradient]) <= 1e-6


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_no_worse_than_plain_torch(
    reduction: str, in_float32: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU without instructions for bfloat16 computes in float32."""
    on_cpu = backend in ("native", "eager")
    if in_float32 and not on_cpu:
        pytest.skip("a CPU's choice")
    monkeypatch.setattr(sources, "multiplies_bfloat16", lambda: not in_float32)
    ours_loss, ours, plain_loss, plain = mean_errors(
        torch.float32, torch.bfloat16, reduction=reduction
    )
    assert ours_loss <= 1.1 * plain_loss
    assert ours <= 1.1 * plain
    assert (ours < 1e-4) == in_float32  # else the GEMMs did run in bfloat16


def test_bfloat16_gemms_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any CPU, as on one that has instructions for it."""
    monkeypatch.setattr(sources, "multiplies_bfloat16", lambda: True)
    ours_loss, ours, plain_loss, plain = mean_errors(torch.bfloat16)
    assert ours_loss <= 1.1 * plain_loss + torch.finfo(torch.float32).eps / 2
    assert ours <= 1.1 * plain


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_keeps_loss_and_gradients_in_float32(reduction: str) -> None:
    problem = random_joint(dtype=torch.float32)
    with autocast_to(torch.bfloat16):
        loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction=reduction)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients)


def test_upstream_factor_is_not_rounded_to_half() -> None:
    problem = random_joint(3, 30, 12, joint_dim=64, vocab_size=50, dtype=torch.bfloat16)
    _, unit = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments) / 3
    third = torch.autograd.grad(loss, problem.differentiable)
    for t, u in zip(third, unit, strict=True):
        ratio = (t.double() * u.double()).sum() / u.double().square().sum()
        assert abs(3 * ratio - 1) < 2.0**-10


def test_autocast_takes_mixed_dtypes() -> None:
    problem = random_joint(dtype=torch.float32)
    encoder = problem.encoder.detach().bfloat16().requires_grad_()
    with autocast_to(torch.bfloat16):
        loss = rnnt_op.joint_rnnt_loss(encoder, *problem.arguments[1:])
    d_encoder, d_weight = torch.autograd.grad(loss, (encoder, problem.weight))
    assert (d_encoder.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_leaves_float64_alone() -> None:
    problem = random_joint()
    expected = rnnt_op.joint_rnnt_loss(*problem.arguments)
    with autocast_to(torch.bfloat16):
        assert torch.equal(rnnt_op.joint_rnnt_loss(*problem.arguments), expected)


def test_float16_gradients_survive_a_gradient_scaler() -> None:
    """Unit-scale gradients below float16's smallest number arrive when the scaler multiplies."""
    problem = random_joint(8, 40, 10, joint_dim=8, dtype=torch.float16, scale=1e-5)
    _, exact = loss_and_gradients(reference.joint_rnnt_loss, problem.to(torch.float64))
    assert relative_error([exact[0].half()], [exact[0]]) > 0.01
    scale = 2.0**16
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments) * scale
    (d_encoder, *_) = torch.autograd.grad(loss, problem.differentiable)
    assert relative_error([d_encoder], [exact[0] * scale]) <= 5e-3


def test_huge_logits_stay_finite() -> None:
    logits = (torch.randn(2, 6, 4, 5) * 1e4).requires_grad_()
    arguments = torch.randint(1, 5, (2, 3)), torch.tensor([6, 4]), torch.tensor([3, 2]), 0
    loss = rnnt_op.rnnt_loss(logits, *arguments)
    (gradient,) = torch.autograd.grad(loss, logits)
    double = logits.detach().double().requires_grad_()
    exact = reference.rnnt_loss(double, *arguments)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert gradient.isfinite().all()
