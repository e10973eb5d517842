"""What k2's losses are made of: log-probabilities of arcs, and the recursion over any scores."""

from collections.abc import Iterator
from typing import Any

import pytest
import test_integrations_k2 as losses
import torch
from integration_support import assert_equal, random_logits, required, value_and_gradients
from test_integrations_k2_calls import all_states, hat_log_probs, some_states
from torch import Tensor

from rnnt_op.integrations import k2

BLANK = losses.BLANK
MINUS_INFINITY = float("-inf")


def scores_of(
    log_probs: Tensor, problem: Any, rnnt_type: str, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """px and py, one by one; of [B, T, S+1 or R, C]."""
    batch, frames, states, _ = log_probs.shape
    labels = problem.targets.shape[1]
    kept = all_states(problem).expand(batch, frames, states) if ranges is None else ranges
    px = torch.full((batch, labels + 1, frames + 1), MINUS_INFINITY, dtype=torch.float64)
    py = px[:, :, :frames].clone()
    for b in range(batch):
        for t in range(frames):
            for r, s in enumerate(kept[b, t].tolist()):
                py[b, s, t] = log_probs[b, t, r, BLANK]
                if s < labels:
                    px[b, s, t] = log_probs[b, t, r, problem.targets[b, s]]
        if rnnt_type == "regular":
            px[b, :, int(problem.frames[b])] = MINUS_INFINITY
    px = px[:, :labels] if rnnt_type == "regular" else px[:, :labels, :frames]
    return (px + py[:, 1:] if rnnt_type == "constrained" else px), py


def problem_with_blanks() -> Any:
    """One label equals the blank, which losses refuse, and k2's log-probabilities know."""
    problem = random_logits(blank=BLANK)
    problem.targets[0, 1] = BLANK
    return problem


@losses.types
def test_logprobs_of_logits(rnnt_type: str) -> None:
    problem = problem_with_blanks()
    limits = losses.boundary(problem)
    ranges, logits = some_states(problem)
    softmax, hat = logits.log_softmax(3), hat_log_probs(logits, BLANK)
    every = scores_of(problem.logits.log_softmax(3), problem, rnnt_type)
    given = problem.logits, problem.targets, BLANK
    assert_equal(k2.get_rnnt_logprobs_joint(*given, rnnt_type, limits), every)
    assert_equal(k2.get_rnnt_logprobs_joint(*given, limits, rnnt_type), every)
    given = logits, problem.targets, ranges, BLANK, limits, rnnt_type
    assert_equal(
        k2.get_rnnt_logprobs_pruned(*given), scores_of(softmax, problem, rnnt_type, ranges)
    )
    problem = random_logits(blank=BLANK)
    given = logits, problem.targets, ranges, BLANK, limits, rnnt_type
    assert_equal(k2.get_hat_logprobs_pruned(*given), scores_of(hat, problem, rnnt_type, ranges))


@losses.types
def test_logprobs_of_sums(rnnt_type: str) -> None:
    _, lm, am = losses.sums()
    problem = problem_with_blanks()
    limits = losses.boundary(problem)
    given = lm, am, problem.targets, BLANK
    assert_equal(
        k2.get_rnnt_logprobs(*given, rnnt_type, limits),
        scores_of(losses.mixed_log_probs(lm, am, 0, 0), problem, rnnt_type),
    )
    assert_equal(
        k2.get_rnnt_logprobs_smoothed(*given, 0.2, 0.3, limits, rnnt_type),
        scores_of(losses.mixed_log_probs(lm, am, 0.2, 0.3), problem, rnnt_type),
    )


def test_logprobs_know_padding_from_labels() -> None:
    problem = random_logits(blank=BLANK)
    padded = problem.targets.masked_fill(torch.arange(3) >= problem.labels.unsqueeze(1), -1)
    given = problem.logits, padded.int(), BLANK
    px, _ = k2.get_rnnt_logprobs_joint(*given, boundary=losses.boundary(problem))
    expected, _ = scores_of(problem.logits.log_softmax(3), problem, "regular")
    for b, labels in enumerate(problem.labels.tolist()):
        assert_equal([px[b, :labels]], [expected[b, :labels]])
    with pytest.raises(RuntimeError, match="symbols: a label is no token"):
        k2.get_rnnt_logprobs_joint(*given)


def random_scores(label_reads_frame: bool) -> tuple[Tensor, Tensor]:
    """Of arcs that are no probabilities, of 3 labels and 5 frames."""
    frames = 5 if label_reads_frame else 6
    px, py = (torch.randn(4, *size, dtype=torch.float64) * 3 for size in ((3, frames), (4, 5)))
    return px.requires_grad_(), py.requires_grad_()


BOUNDARIES = {
    "whole": None,
    "from 0": torch.tensor([[0, 0, 3, 5], [0, 0, 2, 4], [0, 0, 0, 3], [0, 0, 1, 1]]),
    "anywhere": torch.tensor([[1, 2, 3, 5], [2, 1, 3, 4], [0, 3, 2, 5], [2, 4, 2, 4]]),
}
any_boundary = pytest.mark.parametrize("boundary", BOUNDARIES.values(), ids=BOUNDARIES)
any_arcs = pytest.mark.parametrize("label_reads_frame", [False, True], ids=["regular", "modified"])

Steps = list[tuple[int, int, int]]


def paths(s: int, t: int, s_end: int, t_end: int, label_reads_frame: bool) -> Iterator[Steps]:
    """All of them, as indices of px (0) or py (1)."""
    if (s, t) == (s_end, t_end):
        yield []
    if s < s_end and t + label_reads_frame <= t_end:
        for rest in paths(s + 1, t + label_reads_frame, s_end, t_end, label_reads_frame):
            yield [(0, s, t), *rest]
    if t < t_end:
        for rest in paths(s, t + 1, s_end, t_end, label_reads_frame):
            yield [(1, s, t), *rest]


def sums_of_paths(terms: list[tuple[Tensor, Tensor]], boundary: Tensor | None) -> list[Tensor]:
    """For each sample, the score of each path by term, written out. [paths, N]"""
    px, py = terms[0]
    label_reads_frame = px.shape[2] == py.shape[2]
    whole = torch.tensor([[0, 0, px.shape[1], py.shape[2]]]).expand(px.shape[0], 4)
    return [
        torch.stack(
            [
                torch.stack([sum((term[kind][b, s, t] for kind, s, t in path), px.new_zeros(()))
                             for term in terms])
                for path in paths(*sample, label_reads_frame)
            ]
        )
        for b, sample in enumerate((whole if boundary is None else boundary).tolist())
    ]  # fmt: skip


@any_arcs
@any_boundary
def test_recursion(label_reads_frame: bool, boundary: Tensor | None) -> None:
    px, py = random_scores(label_reads_frame)
    of_paths = sums_of_paths([(px, py)], boundary)
    expected = torch.stack([scores[:, 0].logsumexp(0) for scores in of_paths])
    actual, gradients = k2.mutual_information_recursion(px, py, boundary, return_grad=True)
    assert_equal([actual], [expected])
    assert_equal(gradients, torch.autograd.grad(expected.sum(), [px, py], retain_graph=True))
    weights = torch.randn(4, dtype=torch.float64)
    alone = k2.mutual_information_recursion(px, py, boundary)
    assert isinstance(alone, Tensor)
    assert_equal(
        value_and_gradients(alone * weights, [px, py]),
        value_and_gradients(expected * weights, [px, py]),
    )
    single = k2.mutual_information_recursion(px.float(), py.float(), boundary)
    assert isinstance(single, Tensor)
    assert single.dtype == torch.float32
    assert_equal([single], [expected], 1e-5)


@any_arcs
@any_boundary
def test_joint_recursion(label_reads_frame: bool, boundary: Tensor | None) -> None:
    terms = [random_scores(label_reads_frame) for _ in range(3)]
    leaves = [scores for term in terms for scores in term]
    of_paths = sums_of_paths(terms, boundary)
    totals = torch.stack([scores.sum(1).logsumexp(0) for scores in of_paths])
    means = torch.stack([scores.sum(1).softmax(0) @ scores for scores in of_paths], 1)
    actual = k2.joint_mutual_information_recursion(*zip(*terms, strict=True), boundary)
    assert_equal([actual[1:], actual.sum(0)], [means[1:], totals])
    assert_equal(value_and_gradients(actual.sum(0), leaves), value_and_gradients(totals, leaves))


def test_recursion_without_paths_or_arcs() -> None:
    px, py = (torch.zeros(1, *size, dtype=torch.float64) for size in ((3, 2), (4, 2)))
    assert k2.mutual_information_recursion(px, py).item() == MINUS_INFINITY
    terms = [px, px.index_fill(2, torch.tensor([0]), MINUS_INFINITY)[:, :1]]
    with pytest.raises(ValueError, match="px, py: expected as many terms, got 2 and 1"):
        k2.joint_mutual_information_recursion(terms, [py])
    frame = torch.tensor([[[0.5, MINUS_INFINITY]]], dtype=torch.float64)
    blanks = torch.tensor([[[MINUS_INFINITY], [0.25]]], dtype=torch.float64)
    once = k2.joint_mutual_information_recursion([frame, frame], [blanks, blanks])
    assert_equal([once], [torch.tensor([[0.75], [0.75]], dtype=torch.float64)])


def test_scores_that_do_not_fit_are_refused() -> None:
    px, py = random_scores(False)
    for given, message in [
        ((px[:, :, :4], py), r"px, py: expected shapes .* got \(4, 3, 4\) and \(4, 4, 5\)"),
        ((px, py[:, :3]), r"py: expected shape \(4, 4, 5\), got \(4, 3, 5\)"),
        ((px, py, torch.zeros(4, 2)), r"boundary: expected shape \(4, 4\), got \(4, 2\)"),
        (
            (px, py, torch.tensor([[0, 0, 3, 6]] * 4)),
            r"boundary: .* got \[0, 0, 3, 6\] at sample 0",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            k2.mutual_information_recursion(*given)
    with pytest.raises(TypeError, match=r"py: expected torch.float64, the dtype of px, got"):
        k2.mutual_information_recursion(px, py.float())
    with pytest.raises(TypeError, match="px: expected"):
        k2.mutual_information_recursion(px.long(), py.long())
    problem = random_logits(blank=BLANK)
    with pytest.raises(TypeError, match="rnnt_type, boundary: expected a str, and a Tensor"):
        k2.get_rnnt_logprobs_joint(problem.logits, problem.targets, BLANK, "regular", "regular")


def test_ragged_labels() -> None:
    ragged = k2.RaggedTensor([[3, 1, 2], [], [4]])
    assert ragged.tolist() == [[3, 1, 2], [], [4]]
    padded = ragged.to("cpu").pad(mode="constant", padding_value=-1)
    assert padded.dtype == torch.int32
    assert padded.tolist() == [[3, 1, 2], [-1, -1, -1], [4, -1, -1]]
    assert ragged.to(torch.int64).pad().dtype == torch.int64
    assert k2.RaggedTensor([[0.5], [1]]).pad().dtype == torch.float32
    with pytest.raises(ValueError, match="mode: expected 'constant', got 'replicate'"):
        ragged.pad("replicate")


@pytest.mark.slow
@losses.types
@pytest.mark.parametrize("package", ["k2", "fast_rnnt"])
def test_parts_equal_the_packages(package: str, rnnt_type: str) -> None:
    theirs = required(package)
    problem = random_logits(((6, 3), (4, 2), (5, 1)), blank=BLANK)  # fast_rnnt wants labels
    _, lm, am = losses.sums()
    limits = losses.boundary(problem)
    ranges, logits = some_states(problem)
    options: dict[str, Any] = {"boundary": limits, "rnnt_type": rnnt_type}
    for name, inputs, given in [
        ("get_rnnt_logprobs", [lm, am], ()),
        ("get_rnnt_logprobs_smoothed", [lm, am], ()),
        ("get_rnnt_logprobs_joint", [problem.logits], ()),
        ("get_rnnt_logprobs_pruned", [logits], (ranges,)),
    ]:
        results = []
        for module in (theirs, k2):
            call = getattr(module, name)
            px, py = call(*inputs, problem.targets, *given, BLANK, **options)
            recursion = module.mutual_information_recursion(px, py, limits)
            results.append([px, py, *value_and_gradients(recursion, inputs)])
        assert_equal(results[1], results[0], 1e-7)
    if package == "k2":  # which knows HAT for blank 0 alone
        problem = random_logits(((6, 3), (4, 2), (5, 1)), blank=0)
        given = logits, problem.targets, ranges, 0, limits, rnnt_type
        pairs = [module.get_hat_logprobs_pruned(*given) for module in (theirs, k2)]
        assert_equal(pairs[1], pairs[0], 1e-7)
    if rnnt_type == "constrained":
        return
    for boundary in BOUNDARIES.values():
        pairs = [random_scores(rnnt_type == "modified") for _ in range(2)]
        if rnnt_type == "modified" and boundary is not None:
            boundary = boundary.clone()
            boundary[:, 3] = torch.maximum(boundary[:, 3], boundary[:, 2])
        expected, actual = (
            module.mutual_information_recursion(*pairs[0], boundary, True)
            for module in (theirs, k2)
        )
        assert_equal([actual[0], *actual[1]], [expected[0], *expected[1]], 1e-7)
        terms = tuple(zip(*pairs, strict=True))
        leaves = [scores for pair in pairs for scores in pair]
        expected, actual = (
            value_and_gradients(module.joint_mutual_information_recursion(*terms, boundary), leaves)
            for module in (theirs, k2)
        )
        assert_equal(actual, expected, 1e-7)
