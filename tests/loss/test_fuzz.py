"""``benchmarks/fuzz.py`` on every backend, and that it finds what is wrong; what it has found so far."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from places import ROOT
from problems import random_joint, relative_error

import rnnt_op
from rnnt_op.backends import gemm


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    pytest.importorskip("tyro")
    import fuzz

    return fuzz


NUMBERS = range(60)
"""As many as find each fault of ``test_faults_are_found``; the script draws more."""


def failures(fuzz: Any, numbers: range = NUMBERS) -> list[str]:
    with torch.device("cpu"):
        cases = [fuzz.draw(number) for number in numbers]
    device = str(torch.get_default_device())
    with torch.device("cpu"):
        for case in cases:
            case.backend = "native"  # whatever serves now
        found = [fuzz.failure_of(case, device) for case in cases]
    return [f"{n}: {wrong}" for n, wrong in zip(numbers, found, strict=True) if wrong]


@pytest.mark.every_backend
def test_random_problems(fuzz: Any, backend: str) -> None:
    """A third of them where each lattice, dtype and activation is compiled for an emulated GPU."""
    torch.use_deterministic_algorithms(False)
    assert failures(fuzz, NUMBERS[:20] if backend == "emulator" else NUMBERS) == []


def test_faults_are_found(fuzz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones: of a bias, of a regulariser, of what is skipped, and of a padded row."""
    rounded, sweep = gemm.CpuMatrices.bias, rnnt_op.engine.sweep

    def shifted(*arguments: Any) -> torch.Tensor:
        return rounded(*arguments) * (1 + 1e-3)

    def looser(*arguments: Any, **options: Any) -> Any:
        options["gradient_tolerance"] = 0.05
        return sweep(*arguments, **options)

    def unclamped(*arguments: Any, **options: Any) -> Any:
        return sweep(*arguments, **{**options, "clamp": -1.0})

    for module, name, fault in (
        (gemm.CpuMatrices, "bias", shifted),
        (rnnt_op.engine, "sweep", looser),
        (rnnt_op.engine, "sweep", unclamped),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fault)
            assert failures(fuzz)


# What it has found.


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strided_tensors(dtype: torch.dtype) -> None:
    """A float32 bias with gaps was read without them, and gave a wrong loss in silence."""
    problem = random_joint(dtype=dtype)
    gaps = [
        torch.stack([t.detach(), torch.full_like(t, 7.0)], -1)[..., 0].requires_grad_()
        for t in problem.arguments[:4]
    ]
    ints = [torch.stack([t, torch.full_like(t, 99)], -1)[..., 0] for t in problem.arguments[4:]]
    assert not any(t.is_contiguous() for t in (*gaps, *ints))
    loss = rnnt_op.joint_rnnt_loss(*gaps, *ints)
    expected = rnnt_op.joint_rnnt_loss(*problem.arguments)
    near = 64 * torch.finfo(dtype).eps  # GEMMs of other strides may add up in another order
    assert relative_error([loss.detach()], [expected.detach()]) <= near
    gradients = torch.autograd.grad(loss, gaps)
    of_dense = torch.autograd.grad(expected, problem.arguments[:4])
    assert relative_error(gradients, of_dense) <= near


@pytest.mark.parametrize("fast_emit", [0.0, 0.2])
def test_the_reference_knows_impossible_tokens(fast_emit: float) -> None:
    """Its gradient was NaN with FastEmit where a logit is −∞, of padding even."""
    problem = random_joint()
    assert problem.bias is not None
    labels = problem.targets.clamp(min=2)
    arguments = [
        *problem.arguments[:3],
        problem.bias.detach().clone(),
        labels,
        *problem.arguments[5:],
    ]
    arguments[3][1] = -torch.inf
    gradients = []
    for loss in (rnnt_op.reference.joint_rnnt_loss, rnnt_op.joint_rnnt_loss):
        value = loss(*arguments, fast_emit=fast_emit)
        gradients.append(torch.autograd.grad(value, problem.differentiable[:3]))
    assert relative_error(*gradients) <= 1e-12


def test_the_reference_takes_half_log_probabilities() -> None:
    logits = torch.randn(2, 4, 3, 5).log_softmax(-1).half()
    labels = torch.ones(2, 2).long(), torch.tensor([4, 3]), torch.tensor([2, 1])
    options = {"blank": 0, "fused_log_softmax": False}
    actual = rnnt_op.reference.rnnt_loss(logits, *labels, **options)
    torch.testing.assert_close(actual, rnnt_op.rnnt_loss(logits, *labels, **options))
