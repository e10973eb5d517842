"""Losses of which only the nodes are scored that paths reach, against those of all nodes.

``test_native_reach`` has the bound; here are the engine and what users see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import NAN, JointProblem, loss_and_gradients, random_labels, relative_error
from tested_backends import NEEDS_CXX
from torch import Tensor

import rnnt_op
from rnnt_op import plan, reference, scoring
from rnnt_op.backends import backend_for, native
from rnnt_op.tools.study.measure import Counts, counted_nodes

pytestmark = NEEDS_CXX

VOCAB_SIZE = JOINT_DIM = 128
LENGTHS = [(120, 24), (97, 20), (40, 12), (1, 0), (20, 9)]
NODES = sum(t * (u + 1) for t, u in LENGTHS)


@pytest.fixture(autouse=True)
def no_work_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_LEAST_WORK", 0)


def learnt(dtype: torch.dtype = torch.float64, sure: float = 16.0) -> JointProblem:
    """States of a model that knows where labels are: encoder states vote for the label of their
    frame, predictor states for the next label, and it takes both to outvote the blank."""
    frames, labels = max(t for t, _ in LENGTHS), max(u for _, u in LENGTHS)
    targets = torch.randint(1, VOCAB_SIZE - 4, (len(LENGTHS), labels))
    encoder = 0.1 * torch.randn(len(LENGTHS), frames, JOINT_DIM, dtype=torch.float64)
    predictor = 0.1 * torch.randn(len(LENGTHS), labels + 1, JOINT_DIM, dtype=torch.float64)
    for b, (t, u) in enumerate(LENGTHS):
        times = torch.randperm(t)[:u].sort().values
        encoder[b, times, targets[b, : len(times)]] += sure
        predictor[b, torch.arange(u), targets[b, :u]] += sure
    bias = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
    bias[0] = 1.5 * sure
    # Where the last three are durations, paths take the second. As tokens none of them matters.
    bias[[-3, -1]] = -sure
    weight = torch.eye(VOCAB_SIZE, JOINT_DIM, dtype=torch.float64)
    lengths = torch.tensor(LENGTHS)
    return JointProblem(encoder, predictor, weight, bias, targets, lengths[:, 0], lengths[:, 1]).to(
        dtype
    )


def counted(problem: JointProblem, **options: Any) -> tuple[Tensor, tuple[Tensor, ...], Counts]:
    """Losses, gradients, and how many nodes were scored."""
    options = {"activation": "identity", "reduction": "none", **options}
    with counted_nodes(torch.device("cpu")) as counts:
        losses, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    return losses, gradients, counts


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"topology": rnnt_op.topologies.modified()}),
        (torch.float32, {"topology": rnnt_op.topologies.multi_blank((2, 3))}),
        (torch.float32, {"topology": rnnt_op.topologies.multi_blank((2, 3), sigma=0.05)}),
        (torch.float32, {"topology": rnnt_op.topologies.constrained()}),
        (torch.float32, {"topology": rnnt_op.topologies.tdt((0, 1, 2))}),
        (torch.float32, {"fast_emit": 0.01}),
        (torch.float32, {"clamp": 0.1}),
    ],
    ids=[
        *("float64", "float32", "bfloat16", "modified", "multi-blank", "sigma", "constrained"),
        *("tdt", "fastemit", "clamp"),
    ],
)
def test_within_the_tolerance(dtype: torch.dtype, options: dict[str, Any]) -> None:
    problem = learnt(dtype)
    losses, gradients, counts = counted(problem, **options)
    expected, expected_gradients, all_counts = counted(problem, gradient_tolerance=0.0, **options)
    assert all_counts.scored == 2 * NODES  # the op of losses, and the one of gradients
    assert counts.scored < 0.9 * all_counts.scored
    has_path = expected.isfinite()
    assert has_path.sum() >= 3
    assert torch.equal(losses.isfinite(), has_path)
    eps = torch.finfo(losses.dtype).eps
    torch.testing.assert_close(losses[has_path], expected[has_path], rtol=4 * eps, atol=0)
    for gradient, other in zip(gradients[:2], expected_gradients[:2], strict=True):
        error = relative_error([gradient[has_path]], [other[has_path]])
        assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_error_follows_the_tolerance(tolerance: float) -> None:
    problem = learnt(sure=9.0)
    _, gradients, counts = counted(problem, gradient_tolerance=tolerance)
    _, expected, _ = counted(problem, gradient_tolerance=0.0)
    assert counts.scored < 2 * NODES
    assert 0 < relative_error(gradients, expected) <= 5 * tolerance


def test_gradients_too_small_for_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nodes that are left are scored after the lattice, and there is another lattice."""
    rest = native._Sweeps.rest

    def rest_of_no_gradient(self: Any, occupancy: Tensor) -> Tensor:
        return rest(self, torch.zeros_like(occupancy))

    monkeypatch.setattr(native._Sweeps, "rest", rest_of_no_gradient)
    problem = learnt()
    losses, gradients, counts = counted(problem)
    expected, expected_gradients, _ = counted(problem, gradient_tolerance=0.0)
    assert NODES < counts.scored < 2 * NODES  # all but by the op of losses
    assert relative_error([losses, *gradients], [expected, *expected_gradients]) <= 1e-14


@pytest.mark.parametrize("most_kept_bytes", [0, plan.MOST_KEPT_BYTES])
def test_a_sure_group_is_not_divided(monkeypatch: pytest.MonkeyPatch, most_kept_bytes: int) -> None:
    monkeypatch.setattr(plan, "MOST_KEPT_BYTES", most_kept_bytes)
    monkeypatch.setattr(plan, "_LEAST_PARTS", 1)
    groups = recorded_groups(monkeypatch)
    rnnt_op.joint_rnnt_loss(*learnt(torch.float32).arguments, activation="identity")
    (group,) = groups
    assert group.keeps_logits == (most_kept_bytes > 0)
    assert bool(group.parts) == (most_kept_bytes == 0)


def test_an_unsure_sample_divides_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of the other part are still not scored where no path leads."""
    monkeypatch.setattr(plan, "MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(plan, "_LEAST_PARTS", 1.9)  # more than half of the nodes are one sample's
    monkeypatch.setattr(backend_for(torch.device("cpu")), "CACHE_BYTES", 0)  # small chunks
    problem = learnt()
    with torch.no_grad():
        problem.predictor[1] = 0
        problem.encoder[1] = 0.1 * torch.randn(problem.encoder[1].shape)
        problem.encoder[1, :, 0] -= 24.0  # the blank's bias
    groups = recorded_groups(monkeypatch)
    _, gradients, counts = counted(problem, reduction="sum")
    assert [group.samples for group in groups] == [(3, 4, 2, 1, 0), (3, 4, 2, 1), (0,)]
    assert counts.lost_shares[-1] > 0
    _, expected, _ = counted(problem, reduction="sum", gradient_tolerance=0.0)
    assert relative_error(gradients, expected) <= 1e-13


def recorded_groups(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that the engine begins with."""
    groups: list[Any] = []
    pack_nodes = scoring.pack_nodes

    def recorded(group: Any, *arguments: Any) -> Any:
        groups.append(group)
        return pack_nodes(group, *arguments)

    monkeypatch.setattr(scoring, "pack_nodes", recorded)
    return groups


def test_against_the_reference() -> None:
    problem = learnt()
    losses, gradients, counts = counted(problem)
    expected, expected_gradients = loss_and_gradients(
        reference.joint_rnnt_loss, problem, activation="identity", reduction="none"
    )
    assert counts.scored < 2 * NODES
    assert relative_error([losses, *gradients], [expected, *expected_gradients]) <= 1e-11


@pytest.mark.parametrize(
    "options",
    [
        {"topology": rnnt_op.topologies.star(1.0)},
        {"delay_penalty": 0.01},
        {"gradient_tolerance": 0.0},
    ],
    ids=["star", "delay", "tolerance"],
)
def test_where_no_bound_is_known_everything_is_scored(options: dict[str, Any]) -> None:
    problem = learnt(torch.float32)
    _, _, counts = counted(problem, **options)
    assert counts.scored == 2 * NODES


def test_little_work_is_done_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    _, _, counts = counted(learnt(torch.float32))
    assert counts.scored == 2 * NODES


def test_posteriors_and_paths_take_every_node() -> None:
    problem = learnt(torch.float32)
    for function in (rnnt_op.posteriors, rnnt_op.align):
        with counted_nodes(torch.device("cpu")) as counts:
            function(*problem.arguments, activation="identity")
        assert counts.scored == NODES


def test_what_is_not_learnt_is_scored_whole() -> None:
    problem = learnt(torch.float32, sure=0.0)
    _, _, counts = counted(problem)
    assert counts.scored == 2 * NODES


@pytest.mark.parametrize("zero_infinity", [False, True])
def test_a_bad_utterance_stays_alone(zero_infinity: bool) -> None:
    problem = learnt(torch.float32)
    expected, expected_gradients, _ = counted(problem)
    poisoned = problem.to(torch.float32)
    with torch.no_grad():
        poisoned.encoder[0, 50] = NAN
    losses, gradients, counts = counted(poisoned, zero_infinity=zero_infinity)
    assert counts.scored < 2 * NODES
    assert losses[0] == 0 if zero_infinity else losses[0].isnan()
    assert torch.equal(losses[1:], expected[1:])
    for gradient, other in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert torch.equal(gradient[1:], other[1:])
    frames = gradients[0][0, : LENGTHS[0][0]]
    assert (frames == 0).all() if zero_infinity else frames.isnan().all()


def test_padding_is_not_read() -> None:
    problem = learnt(torch.float32)
    losses, gradients, counts = counted(problem)
    poisoned_losses, poisoned_gradients, _ = counted(problem.poisoned())
    assert counts.scored < 2 * NODES
    assert torch.equal(losses, poisoned_losses)
    for gradient, other in zip(gradients, poisoned_gradients, strict=True):
        assert torch.equal(gradient, other)


def test_groups_threads_and_repeats_do_not_matter() -> None:
    problem = learnt()
    losses, gradients, counts = counted(problem)
    alone, of_alone, counts_alone = counted(problem, workspace_bytes=1)
    assert counts_alone.scored == counts.scored
    assert relative_error([alone, *of_alone], [losses, *gradients]) <= 1e-14
    again, of_again, _ = counted(problem)
    assert torch.equal(losses, again)
    assert all(map(torch.equal, gradients, of_again))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threaded, of_threaded, counts_threaded = counted(problem)
    finally:
        torch.set_num_threads(before)
    assert counts_threaded.scored == counts.scored
    # A BLAS may cut its sums among the threads.
    assert relative_error([threaded, *of_threaded], [losses, *gradients]) <= 1e-14


def test_dropout() -> None:
    problem = learnt()
    found = []
    for tolerance in (None, 0.0):
        torch.manual_seed(7)
        found.append(counted(problem, dropout=0.1, gradient_tolerance=tolerance))
    (losses, gradients, counts), (expected, expected_gradients, _) = found
    assert counts.scored < 2 * NODES
    assert relative_error([losses, *gradients], [expected, *expected_gradients]) <= 1e-12


@pytest.mark.parametrize("width", [6, 12])
def test_label_ranges(width: int) -> None:
    """Bands around the diagonal: what is scored lies in them, too."""
    problem = learnt()
    frames, labels = problem.encoder_lengths, problem.target_lengths
    t = torch.arange(problem.encoder.shape[1])
    middle = t * (labels + 1).unsqueeze(1) // frames.unsqueeze(1)
    ranges = torch.stack((middle - width, middle + width + 1), 2).clamp(min=0)
    ranges = torch.minimum(ranges, (labels + 1)[:, None, None])
    ranges[3] = torch.tensor([0, 1])
    losses, gradients, counts = counted(problem, label_ranges=ranges)
    expected, expected_gradients, all_counts = counted(
        problem, label_ranges=ranges, gradient_tolerance=0.0
    )
    assert counts.scored < all_counts.scored < 2 * NODES
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    finite = losses.isfinite()
    for gradient, other in zip(gradients[:2], expected_gradients[:2], strict=True):
        assert relative_error([gradient[finite]], [other[finite]]) <= 1e-12


def test_bands_that_vanish() -> None:
    problem = learnt()
    ranges = torch.zeros(len(LENGTHS), problem.encoder.shape[1], 2, dtype=torch.int64)
    ranges[..., 1] = (problem.target_lengths + 1).unsqueeze(1)
    ranges[0, 60:64] = 0
    losses, _, _ = counted(problem, label_ranges=ranges)
    expected, _, _ = counted(problem, label_ranges=ranges, gradient_tolerance=0.0)
    assert losses[0] == torch.inf
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(12))
def test_random_ragged(seed: int) -> None:
    """With T = 1, U = 0 and a blank that is not 0."""
    torch.manual_seed(seed)
    lengths = [(int(torch.randint(1, 90, ())), int(torch.randint(0, 24, ()))) for _ in range(4)]
    frames, labels = max(t for t, _ in lengths), max(u for _, u in lengths)
    scale = (0.3, 1.0, 4.0)[seed % 3]

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()

    problem = JointProblem(
        leaf(4, frames, 5),
        leaf(4, labels + 1, 5),
        leaf(7, 5),
        leaf(7),
        random_labels((4, labels), 7, 6),
        torch.tensor([t for t, _ in lengths]),
        torch.tensor([u for _, u in lengths]),
        blank=6,
    )
    losses, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction="none")
    expected = loss_and_gradients(reference.joint_rnnt_loss, problem, reduction="none")
    assert relative_error([losses, *gradients], [expected[0], *expected[1]]) <= 1e-11


def test_counts_say_what_is_lost() -> None:
    _, _, counts = counted(learnt(torch.float32))
    assert 0 < counts.lost <= torch.finfo(torch.float32).eps
    _, _, counts = counted(learnt(torch.float32), gradient_tolerance=0.0)
    assert counts.lost == 0
