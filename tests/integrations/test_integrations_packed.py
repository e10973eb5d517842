"""warp-rnnt's and optimized_transducer's losses under our name, against the reference."""

from typing import Any

import pytest
import torch
from integration_support import (
    LogitsProblem,
    assert_equal,
    random_logits,
    required,
    value_and_gradients,
)
from torch import Tensor

from rnnt_op import reference
from rnnt_op.integrations import optimized_transducer, warp_rnnt
from rnnt_op.topologies import modified

BLANK = 1
LENGTHS = ((6, 3), (4, 2), (5, 0), (2, 1))
reductions = pytest.mark.parametrize("reduction", [None, "none", "sum", "mean"])


def reduced(losses: Tensor, reduction: str | None) -> Tensor:
    return {"sum": losses.sum(), "mean": losses.mean()}.get(reduction or "none", losses)


def packed(problem: LogitsProblem, tensor: Tensor) -> Tensor:
    """The nodes of each sample, one behind the other."""
    lengths = zip(problem.frames.tolist(), problem.labels.tolist(), strict=True)
    rows = [tensor[b, :t, : u + 1].flatten(0, 1) for b, (t, u) in enumerate(lengths)]
    return torch.cat(rows).detach().requires_grad_()


def packed_labels(problem: LogitsProblem) -> Tensor:
    return torch.cat([row[:u] for row, u in zip(problem.targets, problem.labels, strict=True)])


def warp_losses(problem: LogitsProblem, log_probs: Tensor, fast_emit: float = 0.0) -> Tensor:
    return reference.rnnt_loss(
        log_probs,
        *problem.arguments[1:],
        blank=BLANK,
        fused_log_softmax=False,
        fast_emit=fast_emit,
        reduction="none",
    )


@reductions
@pytest.mark.parametrize("average_frames", [False, True])
@pytest.mark.parametrize("compact", [False, True], ids=["padded", "compact"])
def test_warp_rnnt(compact: bool, average_frames: bool, reduction: str | None) -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    # Not normalised, so that a softmax would show.
    log_probs = (problem.logits.detach().log_softmax(3) - 0.1).requires_grad_()
    losses = warp_losses(problem, log_probs, fast_emit=0.2)
    if average_frames:
        losses = losses / problem.frames
    value, gradient = value_and_gradients(reduced(losses, reduction), [log_probs])
    given = packed(problem, log_probs) if compact else log_probs
    labels = packed_labels(problem) if compact else problem.targets
    loss = warp_rnnt.rnnt_loss(
        given,
        labels.int(),
        problem.frames.int(),
        problem.labels.int(),
        average_frames,
        reduction,
        BLANK,
        fastemit_lambda=0.2,
        compact=compact,
    )
    expected = packed(problem, gradient) if compact else gradient
    assert_equal(value_and_gradients(loss, [given]), [value, expected.detach()])


def test_warp_rnnts_defaults() -> None:
    problem = random_logits(LENGTHS, blank=0)
    log_probs = problem.logits.log_softmax(3)
    losses = reference.rnnt_loss(*problem.arguments, blank=0, reduction="none")
    for gather in (False, True):
        loss = warp_rnnt.rnnt_loss(log_probs, *problem.arguments[1:], gather=gather)
        assert_equal([loss], [losses])


def test_packed_tensors_of_another_size_are_refused() -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    rows, labels = packed(problem, problem.logits), packed_labels(problem)
    lengths = problem.frames, problem.labels
    rest: dict[str, Any] = {"blank": BLANK, "compact": True}
    with pytest.raises(ValueError, match=r"log_probs: expected shape \(45, V\), .* \(44, 5\)"):
        warp_rnnt.rnnt_loss(rows[1:], labels, *lengths, **rest)
    with pytest.raises(ValueError, match=r"labels: expected shape \(6,\), .* \(5,\)"):
        warp_rnnt.rnnt_loss(rows, labels[1:], *lengths, **rest)
    with pytest.raises(ValueError, match=r"logits: expected shape \(45, V\), .* \(4, 6, 4, 5\)"):
        optimized_transducer.transducer_loss(
            problem.logits, *problem.arguments[1:], BLANK, from_log_softmax=False
        )
    with pytest.raises(ValueError, match="reduction: expected one of mean, sum, got 'none'"):
        optimized_transducer.transducer_loss(
            rows, *problem.arguments[1:], BLANK, from_log_softmax=False, reduction="none"
        )


def one_symbol_losses(problem: LogitsProblem, log_probs: Tensor) -> Tensor:
    """The modified lattice over all frames but the last, and a blank behind all labels there."""
    last = problem.frames - 1
    samples = torch.arange(len(last))
    before = reference.rnnt_loss(
        log_probs,
        problem.targets,
        last,
        problem.labels,
        blank=BLANK,
        topology=modified(),
        fused_log_softmax=False,
        reduction="none",
    )
    return before - log_probs[samples, last, problem.labels, BLANK]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("from_log_softmax", [False, True])
@pytest.mark.parametrize("one_symbol", [False, True], ids=["regular", "one symbol"])
def test_optimized_transducer(one_symbol: bool, from_log_softmax: bool, reduction: str) -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    given = problem.logits.detach()
    given = (given.log_softmax(3) - 0.1 if from_log_softmax else given).requires_grad_()
    log_probs = given if from_log_softmax else given.log_softmax(3)
    losses = (one_symbol_losses if one_symbol else warp_losses)(problem, log_probs)
    value, gradient = value_and_gradients(reduced(losses, reduction), [given])
    rows = packed(problem, given)
    module = optimized_transducer.TransducerLoss(BLANK, reduction)
    options: dict[str, Any] = {"from_log_softmax": from_log_softmax}
    if one_symbol:
        options["one_sym_per_frame"] = True
    for blank in (BLANK, BLANK - 5):
        loss = optimized_transducer.transducer_loss(
            rows, *problem.arguments[1:], blank, **options, reduction=reduction
        )
        assert_equal(value_and_gradients(loss, [rows]), [value, packed(problem, gradient).detach()])
    assert_equal([module(rows, *problem.arguments[1:], **options)], [value])


def test_one_symbol_of_one_frame() -> None:
    rows = torch.randn(1, 5, dtype=torch.float64).requires_grad_()
    none = torch.zeros(1, 0, dtype=torch.int64)
    loss = optimized_transducer.transducer_loss(
        rows, none, torch.tensor([1]), torch.tensor([0]), BLANK, False, True
    )
    assert_equal(
        value_and_gradients(loss, [rows]),
        value_and_gradients(-rows.log_softmax(1)[0, BLANK], [rows]),
    )


def test_more_labels_than_frames_have_no_path() -> None:
    rows = torch.randn(6, 5, dtype=torch.float64)
    given = rows, torch.tensor([[2, 3]]), torch.tensor([2]), torch.tensor([2]), BLANK, False
    assert optimized_transducer.transducer_loss(*given, True).isposinf()
    assert optimized_transducer.transducer_loss(*given).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("from_log_softmax", [False, True])
@pytest.mark.parametrize("one_symbol", [False, True], ids=["regular", "one symbol"])
def test_equals_optimized_transducer(
    one_symbol: bool, from_log_softmax: bool, reduction: str
) -> None:
    theirs = required("optimized_transducer")
    problem = random_logits(LENGTHS, blank=BLANK).to(torch.float32, torch.int32)
    logits = problem.logits.log_softmax(3) if from_log_softmax else problem.logits
    results = []
    for function in (optimized_transducer.transducer_loss, theirs.transducer_loss):
        rows = packed(problem, logits)
        given = rows * 1, *problem.arguments[1:]  # theirs overwrites it
        loss = function(*given, BLANK, from_log_softmax, one_symbol, reduction)
        results.append(value_and_gradients(loss, [rows]))
    assert_equal(*results, tolerance=2e-5)
