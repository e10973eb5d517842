"""The ways to train: the same loss and gradients, whichever way."""

import functools
import sys
from dataclasses import dataclass

import pytest
import torch

import rnnt_op
from rnnt_op.memory import SPLIT_SAMPLES, Workload
from rnnt_op.tools.study.correctness import gradient_bar, relative_error
from rnnt_op.tools.study.methods import METHODS, Method, torchaudio_method
from rnnt_op.tools.study.problems import Problem, random_joint

# Longest neither first nor last, a sample without labels, and more than one part of batch-split.
RAGGED = [(30, 4), (12, 0), (40, 12), (1, 3), (25, 9), (33, 12), (20, 1)]
LENGTHS = {"ragged": RAGGED, "one sample": [(17, 6)], "no labels": [(90, 0), (40, 0)]}


def problem_of(lengths: list[tuple[int, int]], dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    return random_joint(Workload(tuple(lengths), 32, 24, dtype))


@dataclass(frozen=True)
class Case:
    problem: Problem
    loss: torch.Tensor  # float64
    gradients: tuple[torch.Tensor, ...]  # float64
    bar: float  # of the gradients' relative error, that of the benchmarks


@functools.cache
def case_of(name: str, dtype: torch.dtype) -> Case:
    problem = problem_of(LENGTHS[name], dtype)
    reference = rnnt_op.reference.joint_rnnt_loss
    loss, gradients = problem.to(torch.float64).gradients(reference)
    _, plain = problem.gradients(reference)
    return Case(problem, loss, gradients, gradient_bar(dtype, relative_error(plain, gradients)))


def check(method: Method, case: Case) -> None:
    problem, bar = case.problem, case.bar
    dtype = problem.leaves[0].dtype
    if method.samples is not None and dtype == torch.bfloat16:
        # Every part's gradient of the output layer is rounded before they are added up.
        bar *= 1.2
    loss, gradients = method.gradients(problem)
    assert relative_error(gradients, case.gradients) <= bar
    for gradient, leaf in zip(gradients, problem.leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
    loss_bar = 1e-3 if dtype == torch.bfloat16 else bar
    for value in (loss, method.loss(problem)):
        assert not value.requires_grad
        assert relative_error([value], [case.loss]) <= loss_bar


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        *(("ragged", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        *((lengths, torch.float32) for lengths in ("one sample", "no labels")),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_against_float64(method: Method, dtype: torch.dtype, lengths: str) -> None:
    check(method, case_of(lengths, dtype))


@pytest.mark.parametrize("name", ["padding-free", "batch-split", "one at a time", "rnnt_op"])
def test_padding_is_not_read(name: str) -> None:
    # Parts are padded to their own longest alone; here each has one length.
    lengths = [(20, 5)] * SPLIT_SAMPLES + [(12, 8)] * SPLIT_SAMPLES
    clean = problem_of(lengths, torch.float64)
    padded = problem_of(lengths, torch.float64)
    for b, (t, u) in enumerate(lengths):
        padded.leaves[0][b, t:] = torch.nan
        padded.leaves[1][b, u + 1 :] = torch.nan
    loss, gradients = METHODS[name].gradients(padded)
    assert torch.equal(METHODS[name].loss(padded), METHODS[name].loss(clean))
    _, truth = clean.gradients(rnnt_op.reference.joint_rnnt_loss)
    assert loss.isfinite()
    assert relative_error(gradients, truth) <= 1e-9


def test_torchaudio() -> None:
    method = torchaudio_method()
    if method is None:
        pytest.skip("needs torchaudio")
    check(method, case_of("ragged", torch.float32))


def test_no_torchaudio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    assert torchaudio_method() is None
