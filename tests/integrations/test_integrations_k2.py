"""k2's losses under our name, against the reference on dense tensors, and worked by hand."""

from typing import Any

import pytest
import torch
from integration_support import assert_equal, random_logits, value_and_gradients
from torch import Tensor

from rnnt_op import reference
from rnnt_op.integrations import k2
from rnnt_op.topologies import RNNT, Topology, constrained, modified

BLANK = 2
TYPES: dict[str, Topology] = {
    "regular": RNNT,
    "modified": modified(),
    "constrained": constrained(),
}
types = pytest.mark.parametrize("rnnt_type", TYPES)


def boundary(problem: Any) -> Tensor:
    zeros = torch.zeros_like(problem.frames)
    return torch.stack([zeros, zeros, problem.labels, problem.frames], 1)


def sums() -> tuple[Any, Tensor, Tensor]:
    """A problem whose logits are lm + am."""
    problem = random_logits(blank=BLANK)
    lm, am = (torch.randn(3, n, 5, dtype=torch.float64).requires_grad_() for n in (4, 6))
    return problem, lm, am


def mixed_log_probs(lm: Tensor, am: Tensor, lm_scale: float, am_scale: float) -> Tensor:
    """Of every symbol at every node, as the paper's three models have them. [B, T, S+1, C]"""
    joint = (am.unsqueeze(2) + lm.unsqueeze(1)).log_softmax(3)
    lm_only = lm.log_softmax(2).unsqueeze(1)
    unigram = lm.softmax(2).mean((0, 1))
    am_only = (am + unigram.log()).log_softmax(2).unsqueeze(2)
    return (1 - lm_scale - am_scale) * joint + lm_scale * lm_only + am_scale * am_only


@types
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_rnnt_loss(rnnt_type: str, reduction: str) -> None:
    problem = random_logits(blank=BLANK)
    loss = k2.rnnt_loss(
        problem.logits, problem.targets, BLANK, boundary(problem), rnnt_type, 0.2, reduction
    )
    expected = reference.rnnt_loss(
        *problem.arguments,
        blank=BLANK,
        topology=TYPES[rnnt_type],
        delay_penalty=0.2,
        reduction=reduction,
    )
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


@types
def test_simple(rnnt_type: str) -> None:
    problem, lm, am = sums()
    loss = k2.rnnt_loss_simple(lm, am, problem.targets, BLANK, boundary(problem), rnnt_type, 0.2)
    expected = reference.rnnt_loss(
        am.unsqueeze(2) + lm.unsqueeze(1),
        *problem.arguments[1:],
        blank=BLANK,
        topology=TYPES[rnnt_type],
        delay_penalty=0.2,
    )
    assert_equal(value_and_gradients(loss, [lm, am]), value_and_gradients(expected, [lm, am]))


@types
@pytest.mark.parametrize(("lm_scale", "am_scale"), [(0.1, 0.2), (0.25, 0.0), (0.0, 0.0)])
def test_smoothed(rnnt_type: str, lm_scale: float, am_scale: float) -> None:
    problem, lm, am = sums()
    loss = k2.rnnt_loss_smoothed(
        lm, am, problem.targets, BLANK, lm_scale, am_scale, boundary(problem), rnnt_type, 0.2
    )
    expected = reference.rnnt_loss(
        mixed_log_probs(lm, am, lm_scale, am_scale),
        *problem.arguments[1:],
        blank=BLANK,
        topology=TYPES[rnnt_type],
        delay_penalty=0.2,
        fused_log_softmax=False,
    )
    assert_equal(value_and_gradients(loss, [lm, am]), value_and_gradients(expected, [lm, am]))


@types
@pytest.mark.parametrize("smoothed", [False, True], ids=["simple", "smoothed"])
def test_gradients_of_arcs(rnnt_type: str, smoothed: bool) -> None:
    problem, lm, am = sums()
    function = k2.rnnt_loss_smoothed if smoothed else k2.rnnt_loss_simple
    _, (px, py) = function(
        lm, am, problem.targets, BLANK, boundary=boundary(problem), rnnt_type=rnnt_type,
        reduction="none", return_grad=True,
    )  # fmt: skip
    scales = (0.1, 0.1) if smoothed else (0.0, 0.0)
    scores = mixed_log_probs(lm, am, *scales).detach().requires_grad_()
    losses = reference.rnnt_loss(
        scores,
        *problem.arguments[1:],
        blank=BLANK,
        topology=TYPES[rnnt_type],
        fused_log_softmax=False,
        reduction="none",
    )
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    of_blank = -gradient[..., BLANK]
    of_labels = -gradient.sum(3) - of_blank
    if rnnt_type == "constrained":  # a label's arc also has the blank of the state behind it
        of_blank[:, :, 1:] -= of_labels[:, :, :-1]
    frames = 7 if rnnt_type == "regular" else 6
    assert px.shape == (3, 3, frames)
    assert_equal(
        [px[:, :, :6], py], [of_labels[:, :, :-1].transpose(1, 2), of_blank.transpose(1, 2)]
    )
    assert not px[:, :, 6:].any()


@types
def test_without_boundary_padding_counts(rnnt_type: str) -> None:
    problem = random_logits([(6, 3), (6, 3)], blank=BLANK)
    given = problem.logits, problem.targets, BLANK
    with_boundary = k2.rnnt_loss(*given, boundary(problem), rnnt_type)
    assert_equal([k2.rnnt_loss(*given, rnnt_type=rnnt_type)], [with_boundary], 0)


# Two paths over 5 frames and 4 labels: the state that each leaves a frame from, and its probability.
PATHS = {(1, 1, 3, 4, 4): 0.75, (0, 1, 3, 4, 4): 0.25}


def path_gradients() -> tuple[Tensor, Tensor]:
    px, py = torch.zeros(1, 4, 6), torch.zeros(1, 5, 5)
    for path, probability in PATHS.items():
        u = 0
        for t, left in enumerate(path):
            px[0, u:left, t] += probability
            py[0, left, t] += probability
            u = left
    return px, py


@pytest.mark.parametrize(
    ("s_range", "expected"),
    [
        # Frame 0: both leave states 0 to 2. Frame 1: both leave 0 to 2, but one enters 1 to 3 from
        # below. Frame 2: both enter at 1 and leave at 3. Frame 3: both enter at 3 and leave at 4.
        # The last one ends with state 4.
        (3, [0, 0, 1, 2, 2]),
        (5, [0, 0, 0, 0, 0]),
        (9, [0, 0, 0, 0, 0]),
    ],
)
def test_ranges_of_two_paths(s_range: int, expected: list[int]) -> None:
    px, py = path_gradients()
    ranges = k2.get_rnnt_prune_ranges(px, py, torch.tensor([[0, 0, 4, 5]]), s_range)
    width = min(s_range, 5)
    first = torch.tensor([expected])
    assert ranges.shape == (1, 5, width)
    assert torch.equal(ranges, first.unsqueeze(2) + torch.arange(width))


@types
@pytest.mark.parametrize("s_range", [2, 3])
def test_ranges_leave_paths(rnnt_type: str, s_range: int) -> None:
    problem = random_logits([(9, 6), (8, 5), (7, 1), (1, 0)], blank=BLANK)
    lm, am = (torch.randn(4, n, 5, dtype=torch.float64) * 5 for n in (7, 9))
    limits = boundary(problem)
    _, gradients = k2.rnnt_loss_simple(
        lm, am, problem.targets, BLANK, limits, rnnt_type, return_grad=True
    )
    ranges = k2.get_rnnt_prune_ranges(*gradients, limits, s_range)
    step = s_range - 1 if rnnt_type == "regular" else 1
    for b, (frames, labels) in enumerate(zip(problem.frames, problem.labels, strict=True)):
        first = ranges[b, : int(frames), 0]
        assert first[0] == 0
        assert first[-1] == max(0, int(labels) + 1 - s_range)
        assert ((first.diff() >= 0) & (first.diff() <= step)).all()

    pruned_am, pruned_lm = k2.do_rnnt_pruning(am, lm, ranges)
    logits = (pruned_am + pruned_lm).requires_grad_()
    losses = k2.rnnt_loss_pruned(
        logits, problem.targets, ranges, BLANK, limits, rnnt_type, reduction="none"
    )
    assert losses.isfinite().all()
    assert pruned_lm.shape == pruned_am.shape == (4, 9, s_range, 5)
    for b, t, r in ((0, 3, 1), (1, 7, 0)):
        assert torch.equal(pruned_lm[b, t, r], lm[b, ranges[b, t, r]])
        assert torch.equal(pruned_am[b, t, r], am[b, t])

    dense = (am.unsqueeze(2) + lm.unsqueeze(1)).requires_grad_()
    expected = reference.rnnt_loss(
        dense,
        *problem.arguments[1:],
        blank=BLANK,
        topology=TYPES[rnnt_type],
        reduction="none",
    )
    assert (losses >= expected).all()  # fewer paths
    restricted = reference.rnnt_loss(
        logits,
        *problem.arguments[1:],
        blank=BLANK,
        topology=TYPES[rnnt_type],
        label_ranges=k2.label_ranges(ranges),
        reduction="none",
    )
    assert_equal(value_and_gradients(losses, [logits]), value_and_gradients(restricted, [logits]))


def test_what_does_not_map_is_refused() -> None:
    problem = random_logits(blank=BLANK)
    given = problem.logits, problem.targets, BLANK
    with pytest.raises(ValueError, match="rnnt_type: expected one of regular, modified, "):
        k2.rnnt_loss(*given, rnnt_type="star")
    with pytest.raises(ValueError, match=r"boundary: expected shape \(3, 4\), got \(3, 2\)"):
        k2.rnnt_loss(*given, boundary(problem)[:, 2:])
    with pytest.raises(RuntimeError, match="boundary: expected samples that begin at 0"):
        k2.rnnt_loss(*given, boundary(problem) + torch.tensor([0, 1, 0, 0]))
    px, py = path_gradients()
    with pytest.raises(ValueError, match="s_range: expected at least 2, got 1"):
        k2.get_rnnt_prune_ranges(px, py, torch.tensor([[0, 0, 4, 5]]), 1)
