"""The gate before every measurement: loss and gradients are right, or nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rnnt_op
from rnnt_op.study.problems import ragged_lengths, random_joint


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


def require_correct(dtype: torch.dtype, device: str = "cpu") -> None:
    """Stops the benchmark unless a small ragged problem's loss and gradients are right."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lengths = ragged_lengths(3, 40, 12)
        problem = random_joint(lengths, vocab_size=32, joint_dim=24, dtype=dtype, device=device)
    loss, gradients = problem.gradients(rnnt_op.joint_rnnt_loss)
    reference = rnnt_op.reference.joint_rnnt_loss
    true_loss, truth = problem.to(torch.float64).gradients(reference)
    _, plain = problem.gradients(reference)
    bar = gradient_bar(dtype, relative_error(plain, truth))
    error = relative_error(gradients, truth)
    loss_error = relative_error([loss], [true_loss])
    if not (error <= bar and loss_error <= max(bar, 1e-3 if dtype == torch.bfloat16 else 0.0)):
        raise SystemExit(
            f"wrong result in {dtype} on {device}, nothing measured: relative error of the "
            f"gradients {error:.1e} (bar {bar:.1e}), of the loss {loss_error:.1e}"
        )
