"""The gate before every measurement: loss and gradients are right, or nothing is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import rnnt_op
from rnnt_op.memory import Workload
from rnnt_op.tools.study.problems import Problem, ragged_lengths, random_joint


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 distance of a list of tensors, in float64."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    difference = sum(float((a - e).square().sum()) for a, e in pairs)
    norm = sum(float(e.square().sum()) for _, e in pairs)
    return float((difference / norm) ** 0.5)


def gradient_bar(dtype: torch.dtype, plain_error: float) -> float:
    """Largest relative gradient error that passes.

    Half gradients round by themselves; what counts is to be no worse than plain torch in the same
    dtype.
    """
    bars = {torch.float64: 1e-9, torch.float32: 2e-5}
    return bars[dtype] if dtype in bars else 1.1 * plain_error + 1e-4


def wrong_by(
    loss_of: Callable[[Problem], Tensor],
    gradients_of: Callable[[Problem], tuple[Tensor, tuple[Tensor, ...]]],
    dtype: torch.dtype,
    device: str = "cpu",
    bar_of: Callable[[torch.dtype, float], float] = gradient_bar,
) -> str | None:
    """By how much a small ragged problem's loss and gradients are wrong; None: they are right.

    Args:
        loss_of: the mean loss of a problem.
        gradients_of: that and its gradients in encoder, predictor, weight and bias.
        bar_of: largest relative gradient error that passes, from dtype and plain torch's error.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        workload = Workload(ragged_lengths(3, 40, 12), 32, 24, dtype)
        problem = random_joint(workload, device=device)
    loss, gradients = gradients_of(problem)
    reference = rnnt_op.reference.joint_rnnt_loss
    true_loss, truth = problem.to(torch.float64).gradients(reference)
    _, plain = problem.gradients(reference)
    bar = bar_of(dtype, relative_error(plain, truth))
    error = relative_error(gradients, truth)
    loss_errors = [relative_error([x], [true_loss]) for x in (loss_of(problem), loss)]
    loss_bar = max(bar, 1e-3 if dtype == torch.bfloat16 else 0.0)
    if error <= bar and all(each <= loss_bar for each in loss_errors):
        return None
    return (
        f"relative error of the gradients {error:.1e} (bar {bar:.1e}), of the loss "
        f"{max(loss_errors):.1e}"
    )


def op_wrong_by(dtype: torch.dtype, device: str = "cpu") -> str | None:
    """By how much rnnt_op is wrong in this dtype on this device; None: it is right."""
    loss = rnnt_op.joint_rnnt_loss
    return wrong_by(lambda p: p.loss(loss), lambda p: p.gradients(loss), dtype, device)


def require_correct(dtype: torch.dtype, device: str = "cpu") -> None:
    """Stops the benchmark unless rnnt_op is right in this dtype on this device."""
    wrong = op_wrong_by(dtype, device)
    if wrong is not None:
        raise SystemExit(f"wrong result in {dtype} on {device}, nothing measured: {wrong}")
