"""What k2 and fast_rnnt have beyond the losses: ranges of short samples, HAT, gradients of arcs; and
all of it against the packages where they are."""

from typing import Any

import pytest
import test_integrations_k2 as losses
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients
from torch import Tensor

from rnnt_op import reference
from rnnt_op.integrations import k2

BLANK = losses.BLANK
LENGTHS = ((6, 3), (4, 2), (5, 0))


def all_states(problem: Any) -> Tensor:
    batch, frames, states, _ = problem.logits.shape
    return torch.arange(states).expand(batch, frames, states)


def some_states(problem: Any) -> tuple[Tensor, Tensor]:
    """Ranges of three states, and logits for them."""
    first = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])
    ranges = first.unsqueeze(2) + torch.arange(3)
    columns = ranges.unsqueeze(3).expand(-1, -1, -1, problem.logits.shape[3])
    return ranges, problem.logits.detach().gather(2, columns).requires_grad_()


@pytest.mark.parametrize(
    ("samples", "s_range", "width"),
    [
        ([(1, 7)], 2, 8),
        ([(9, 7), (3, 7), (2, 3)], 2, 4),
        ([(3, 7)], 5, 5),
        ([(3, 6)], 2, 3),
        ([(1, 0), (8, 7)], 2, 2),
    ],
)
def test_ranges_are_widened_to_leave_a_path(
    samples: list[tuple[int, int]], s_range: int, width: int
) -> None:
    problem = random_logits(samples, blank=BLANK)
    frames, labels = problem.logits.shape[1], problem.targets.shape[1]
    lm, am = (torch.randn(len(samples), n, 5, dtype=torch.float64) for n in (labels + 1, frames))
    limits = losses.boundary(problem)
    _, gradients = k2.rnnt_loss_simple(lm, am, problem.targets, BLANK, limits, return_grad=True)
    if width > s_range:
        with pytest.warns(UserWarning, match=f"s_range: {s_range} leaves no path .* to {width}"):
            ranges = k2.get_rnnt_prune_ranges(*gradients, limits, s_range)
    else:
        ranges = k2.get_rnnt_prune_ranges(*gradients, limits, s_range)
    assert ranges.shape[2] == width
    pruned_am, pruned_lm = k2.do_rnnt_pruning(am, lm, ranges)
    loss = k2.rnnt_loss_pruned(
        pruned_am + pruned_lm, problem.targets, ranges, BLANK, limits, reduction="none"
    )
    assert loss.isfinite().all()


def test_ranges_are_not_widened_where_labels_read_frames() -> None:
    px, py = torch.rand(1, 3, 4), torch.rand(1, 4, 4)
    limits = torch.tensor([[0, 0, 3, 4]])
    assert k2.get_rnnt_prune_ranges(px, py, limits, 1).shape == (1, 4, 1)


@pytest.mark.parametrize(
    ("s_range", "expected"),
    [
        # Occupancies of labels and blanks in states 0, 1, ... of a frame are 1, 3/4, 0 in frame 0;
        # 1/4, 1, 0 in frame 1; 0, 1, 1, 1, 0 in frame 2; 0, 0, 0, 1, 1 in frame 3. So frames would
        # begin at 0, 0, 1, 3 of two states, and are moved to where each reaches the next.
        (2, [0, 1, 2, 3, 3]),
        (3, [0, 0, 1, 2, 2]),
        (9, [0, 0, 0, 0, 0]),
    ],
)
def test_deprecated_ranges(s_range: int, expected: list[int]) -> None:
    px, py = losses.path_gradients()
    ranges = k2.get_rnnt_prune_ranges_deprecated(px, py, torch.tensor([[0, 0, 4, 5]]), s_range)
    assert ranges[0, :, 0].tolist() == expected
    assert ranges.shape[2] == min(s_range, 5)


def test_ranges_then_and_now() -> None:
    px, py = torch.zeros(1, 3, 6), torch.zeros(1, 4, 5)
    px[0, 0, 2] = 0.9
    py[0, 1:3, 2] = torch.tensor([0.2, 0.8])
    py[0, 2:, 3] = 1
    limits = torch.tensor([[0, 0, 3, 5]])
    # Frame 2, then: 0.9 + 0.2 are the most. Now: 0.8, as a path does not enter there from below.
    then = k2.get_rnnt_prune_ranges_deprecated(px, py, limits, 2)
    now = k2.get_rnnt_prune_ranges(px, py, limits, 2)
    assert then[0, :, 0].tolist() == [0, 0, 1, 2, 2]
    assert now[0, :, 0].tolist() == [0, 1, 2, 2, 2]
    short = torch.tensor([[0, 0, 3, 1]])
    assert k2.get_rnnt_prune_ranges_deprecated(px, py, short, 2).shape[2] == 2


def hat_log_probs(logits: Tensor, blank: int) -> Tensor:
    """As Variani et al. 2020 (arXiv 2003.07705) have them. [B, T, S+1, C]"""
    p_blank = logits[..., blank].sigmoid()
    others = logits.exp() * (torch.arange(logits.shape[3]) != blank)
    labels = others / others.sum(3, keepdim=True) * (1 - p_blank).unsqueeze(3)
    return torch.where(torch.arange(logits.shape[3]) == blank, p_blank.unsqueeze(3), labels).log()


@losses.types
@pytest.mark.parametrize("blank", [0, BLANK])
def test_hat(rnnt_type: str, blank: int) -> None:
    problem = random_logits(blank=blank)
    limits = losses.boundary(problem)
    expected = reference.rnnt_loss(
        hat_log_probs(problem.logits, blank),
        *problem.arguments[1:],
        blank=blank,
        topology=losses.TYPES[rnnt_type],
        fused_log_softmax=False,
    )
    expected = value_and_gradients(expected, [problem.logits])
    given = problem.logits, problem.targets
    loss = k2.rnnt_loss(*given, blank, limits, rnnt_type, use_hat_loss=True)
    assert_equal(value_and_gradients(loss, [problem.logits]), expected)
    loss = k2.rnnt_loss_pruned(
        *given, all_states(problem), blank, limits, rnnt_type, use_hat_loss=True
    )
    assert_equal(value_and_gradients(loss, [problem.logits]), expected)


def arc_gradients(
    scores: Tensor, problem: Any, rnnt_type: str, ranges: Tensor | None, penalty: float
) -> list[Tensor]:
    """Of the log-likelihood, with respect to the terms that k2 adds up for label and blank arcs."""
    leaf = scores.detach().requires_grad_()
    losses_ = reference.rnnt_loss(
        leaf,
        *problem.arguments[1:],
        blank=BLANK,
        topology=losses.TYPES[rnnt_type],
        delay_penalty=penalty,
        label_ranges=None if ranges is None else k2.label_ranges(ranges),
        fused_log_softmax=False,
        reduction="sum",
    )
    (gradient,) = torch.autograd.grad(losses_, leaf)
    frames, states = problem.logits.shape[1:3]
    of_blank, of_label = torch.zeros(2, 3, frames, states, dtype=torch.float64)
    kept = all_states(problem) if ranges is None else ranges
    of_blank.scatter_(2, kept, -gradient[..., BLANK])
    of_label.scatter_(2, kept, gradient[..., BLANK] - gradient.sum(3))
    if rnnt_type == "constrained":  # a label's arc also has the blank of the state behind it
        of_blank[:, :, 1:] -= of_label[:, :, :-1]
    px = of_label[:, :, :-1].transpose(1, 2)
    if rnnt_type == "regular":
        px = torch.nn.functional.pad(px, (0, 1))
    return [px, of_blank.transpose(1, 2)]


@losses.types
@pytest.mark.parametrize("hat", [False, True], ids=["softmax", "hat"])
@pytest.mark.parametrize("pruned", [False, True], ids=["all", "pruned"])
def test_gradients_of_arcs(rnnt_type: str, pruned: bool, hat: bool) -> None:
    problem = random_logits(LENGTHS, blank=BLANK)
    limits = losses.boundary(problem)
    ranges, logits = some_states(problem) if pruned else (None, problem.logits)
    options: dict[str, Any] = {"rnnt_type": rnnt_type, "delay_penalty": 0.2, "use_hat_loss": hat}
    symbols = torch.where(torch.arange(3) < problem.labels.unsqueeze(1), problem.targets, -1)
    states = () if ranges is None else (ranges,)
    function = k2.rnnt_loss if ranges is None else k2.rnnt_loss_pruned
    given = logits, symbols, *states, BLANK, limits
    loss, actual = function(*given, **options, return_grad=True)
    scores = hat_log_probs(logits, BLANK) if hat else logits.log_softmax(3)
    assert_equal(actual, arc_gradients(scores, problem, rnnt_type, ranges, 0.2))
    assert_equal(
        value_and_gradients(loss, [logits]),
        value_and_gradients(function(*given, **options), [logits]),
        0,
    )


def test_modified_of_earlier_fast_rnnt() -> None:
    problem, lm, am = losses.sums()
    limits = losses.boundary(problem)
    ranges, logits = some_states(problem)
    sums = lm, am, problem.targets, BLANK
    calls = [
        lambda **kind: k2.rnnt_loss(problem.logits, problem.targets, BLANK, limits, **kind),
        lambda **kind: k2.rnnt_loss_pruned(logits, problem.targets, ranges, BLANK, limits, **kind),
        lambda **kind: k2.rnnt_loss_simple(*sums, limits, **kind),
        lambda **kind: k2.rnnt_loss_smoothed(*sums, boundary=limits, **kind),
    ]
    for call in calls:
        assert_equal([call(modified=True)], [call(rnnt_type="modified")], 0)
        assert_equal([call(modified=False)], [call(rnnt_type="regular")], 0)
        with pytest.raises(ValueError, match="modified: expected None beside rnnt_type='modified'"):
            call(modified=True, rnnt_type="modified")


def test_a_label_that_equals_the_blank_is_refused() -> None:
    problem = random_logits(blank=BLANK)
    problem.targets[0, 1] = BLANK
    limits = losses.boundary(problem)
    with pytest.raises(ValueError, match="targets"):
        k2.rnnt_loss(problem.logits, problem.targets, BLANK, limits)
    _, lm, am = losses.sums()
    with pytest.raises(RuntimeError, match="symbols: a label equals the blank"):
        k2.rnnt_loss_smoothed(lm, am, problem.targets, BLANK, boundary=limits)


@pytest.mark.slow
@losses.types
@pytest.mark.parametrize("package", ["k2", "fast_rnnt"])
def test_equals_the_package(package: str, rnnt_type: str) -> None:
    theirs = required(package)
    problem = random_logits(((6, 3), (4, 2), (5, 1)), blank=BLANK)  # fast_rnnt wants labels
    lm, am = (torch.randn(3, n, 5, dtype=torch.float64).requires_grad_() for n in (4, 6))
    limits = losses.boundary(problem)
    ranges, logits = some_states(problem)
    given: dict[str, Any] = {"boundary": limits, "rnnt_type": rnnt_type, "delay_penalty": 0.2}
    sums = lm, am, problem.targets, BLANK
    calls: list[tuple[list[Tensor], Any]] = [
        ([problem.logits], lambda p, **o: p.rnnt_loss(problem.logits, problem.targets, BLANK, **o)),
        ([logits], lambda p, **o: p.rnnt_loss_pruned(logits, problem.targets, ranges, BLANK, **o)),
        ([lm, am], lambda p, **o: p.rnnt_loss_simple(*sums, **o)),
        ([lm, am], lambda p, **o: p.rnnt_loss_smoothed(*sums, **o)),
    ]
    for inputs, call in calls:
        for reduction in ("none", "mean", "sum"):
            expected, actual = (
                value_and_gradients(call(p, **given, reduction=reduction), inputs)
                for p in (theirs, k2)
            )
            assert_equal(actual, expected, 1e-7)  # of their logarithms
    for _, call in calls if package == "fast_rnnt" else calls[2:]:
        expected, actual = (call(p, **given, return_grad=True)[1] for p in (theirs, k2))
        assert_equal(actual, expected, 1e-7)
    for s_range in (2, 3, 4):
        _, gradients = k2.rnnt_loss_simple(*sums, **given, return_grad=True)
        names = ["get_rnnt_prune_ranges"]
        if package == "k2":
            names.append("get_rnnt_prune_ranges_deprecated")
        for name in names:
            expected, actual = (getattr(p, name)(*gradients, limits, s_range) for p in (theirs, k2))
            assert torch.equal(actual, expected)
    if package == "k2":
        problem = random_logits(blank=0)
        given = {"boundary": losses.boundary(problem), "rnnt_type": rnnt_type, "use_hat_loss": True}
        call = problem.logits, problem.targets, all_states(problem), 0
        expected, actual = (
            value_and_gradients(p.rnnt_loss_pruned(*call, **given), [problem.logits])
            for p in (theirs, k2)
        )
        assert_equal(actual, expected, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["k2", "fast_rnnt"])
def test_widened_ranges_are_the_packages(package: str) -> None:
    theirs = required(package)
    problem = random_logits([(9, 7), (3, 7), (2, 3), (1, 1)], blank=BLANK)
    limits = losses.boundary(problem)
    lm, am = (torch.randn(4, n, 5, dtype=torch.float64) for n in (8, 9))
    _, gradients = k2.rnnt_loss_simple(lm, am, problem.targets, BLANK, limits, return_grad=True)
    for s_range in (2, 3, 4, 5, 9):
        expected = theirs.get_rnnt_prune_ranges(*gradients, limits, s_range)
        if s_range < 4:
            with pytest.warns(UserWarning, match="widened to 4"):
                actual = k2.get_rnnt_prune_ranges(*gradients, limits, s_range)
        else:
            actual = k2.get_rnnt_prune_ranges(*gradients, limits, s_range)
        assert torch.equal(actual, expected)
