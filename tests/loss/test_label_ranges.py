"""Restricted lattices: nodes outside the ranges never exist."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from lattices import (
    LENGTHS,
    VARIANTS,
    Ranges,
    Variant,
    finite,
    on_cpu,
    on_every_backend,
    placed,
    truth,
    variants,
)
from problems import (
    NAN,
    JointProblem,
    check_op,
    joint_arguments,
    logits_arguments,
    loss_and_gradients,
    random_joint,
    relative_error,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rnnt_op
from rnnt_op import reference
from rnnt_op.topologies import Topology, constrained, modified

every_backend = pytest.mark.every_backend

WILD = (7, -3)  # beyond a sample's frames, where nobody may look


def band(lengths: Sequence[tuple[int, int]], states: int) -> Ranges:
    """A band of some states about the diagonal, beyond U, too."""
    longest = max(t for t, _ in lengths)

    def first(t: int, frames: int, labels: int) -> int:
        return round(max(0, labels + 1 - states) * t / max(1, frames - 1))

    return tuple(
        tuple(
            (first(t, frames, labels), first(t, frames, labels) + states) if t < frames else WILD
            for t in range(longest)
        )
        for frames, labels in lengths
    )


def scattered(lengths: Sequence[tuple[int, int]], seed: int = 0) -> Ranges:
    """Any ranges: empty ones, ones that do not meet."""
    draw = random.Random(seed)
    longest = max(t for t, _ in lengths)

    def drawn(t: int, frames: int, labels: int) -> tuple[int, int]:
        if t >= frames:
            return WILD
        first = draw.randint(0, 1 + labels // 2) if t else 0
        return first, first + draw.randint(0 if draw.random() < 0.1 else 2, labels + 2)

    return tuple(
        tuple(drawn(t, frames, labels) for t in range(longest)) for frames, labels in lengths
    )


RANGES = {
    "band": band(LENGTHS, 2),
    "scattered": scattered(LENGTHS),
}
kinds = pytest.mark.parametrize("kind", RANGES)
# tests/kernels/test_restricted.py has the kernels of the others.
variants_and_kinds = on_every_backend("variant, kind", list(itertools.product(VARIANTS, RANGES)))


def of_band(logits: Tensor, label_ranges: Tensor, states: int) -> Tensor:
    """The logits that ``rnnt_loss`` takes with ranges, NaN where there is none. [B, T, R, V]"""
    u = label_ranges[:, :, :1].clamp(min=0) + torch.arange(states, device="cpu")
    is_node = (u < label_ranges[:, :, 1:]) & (u < logits.shape[2])
    rows = u.clamp(max=logits.shape[2] - 1).unsqueeze(3).expand(-1, -1, -1, logits.shape[3])
    return logits.gather(2, rows).where(is_node.unsqueeze(3), NAN)


@variants_and_kinds
def test_paths_of_logits(variant: Variant, kind: str) -> None:
    right = truth(variant, ranges=RANGES[kind])
    ranges = right.label_ranges
    assert ranges is not None
    assert right.feasible.sum() > 3
    states = int((ranges[:, :, 1] - ranges[:, :, 0]).max())
    _, *others = right.arguments
    device = torch.get_default_device()
    full, *_ = (tensor.detach().cpu() for tensor in right.arguments)
    logits = of_band(full, ranges, states).to(device).requires_grad_()
    losses = rnnt_op.rnnt_loss(
        logits,
        *others,
        blank=variant.blank,
        reduction="none",
        zero_infinity=True,
        label_ranges=ranges.to(device),
        **variant.options,
    )
    torch.testing.assert_close(losses.detach().cpu(), finite(right.losses), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    expected = of_band(right.d_logits, ranges, states).nan_to_num(0.0)
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-10, atol=1e-14)


@variants_and_kinds
def test_paths_of_a_joint(variant: Variant, kind: str) -> None:
    right = truth(variant, ranges=RANGES[kind])
    assert right.label_ranges is not None
    expected = right.joint_gradients(right.d_logits)
    problem = placed(right.problem)
    for options in ({"gradient_tolerance": 0.0}, {"workspace_bytes": 10_000, "reduction": "none"}):
        loss, gradients = loss_and_gradients(
            rnnt_op.joint_rnnt_loss,
            problem,
            label_ranges=right.label_ranges.to(problem.encoder.device),
            **{"zero_infinity": True, "reduction": "sum", **variant.options, **options},
        )
        assert relative_error([loss.cpu().sum()], [finite(right.losses).sum()]) <= 1e-13
        assert relative_error(on_cpu(gradients), expected) <= 1e-12


@variants
@kinds
def test_paths_of_the_reference(variant: Variant, kind: str) -> None:
    right = truth(variant, ranges=RANGES[kind])
    losses = reference.joint_rnnt_loss(
        *right.problem.arguments,
        blank=variant.blank,
        reduction="none",
        label_ranges=right.label_ranges,
        **variant.options,
    )
    torch.testing.assert_close(losses.detach(), right.losses, rtol=1e-12, atol=1e-13)
    gradients = torch.autograd.grad(losses[right.feasible].sum(), right.problem.differentiable)
    assert relative_error(gradients, right.joint_gradients(right.d_logits)) <= 1e-12


def problem_and_ranges(states: int = 3) -> tuple[JointProblem, Tensor]:
    lengths = [(40, 20), (31, 25), (12, 0), (1, 1), (25, 12)]
    problem = random_joint(5, 40, 25, lengths=lengths)
    return problem, torch.tensor(band(lengths, states), device=problem.encoder.device)


@every_backend
def test_ranges_of_every_state_change_nothing() -> None:
    problem, ranges = problem_and_ranges()
    ranges[:, :, 0], ranges[:, :, 1] = 0, 99
    expected, expected_gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, label_ranges=ranges)
    assert relative_error([loss], [expected]) <= 1e-14
    assert relative_error(gradients, expected_gradients) <= 1e-13


@every_backend
@pytest.mark.parametrize("workspace_bytes", [1, 100_000, None])
def test_larger_bands_against_the_reference(workspace_bytes: int | None) -> None:
    problem, ranges = problem_and_ranges()
    expected, expected_gradients = loss_and_gradients(
        reference.joint_rnnt_loss, problem, label_ranges=ranges
    )
    loss, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss,
        problem.poisoned(),
        label_ranges=ranges.int(),
        workspace_bytes=workspace_bytes,
    )
    assert relative_error([loss], [expected]) <= 1e-13
    assert relative_error(gradients, expected_gradients) <= 1e-12


@every_backend
def test_a_band_breaks_no_other_sample() -> None:
    """A sample whose ranges leave no path is infinite, and the others' rows stay exact."""
    problem, ranges = problem_and_ranges()
    cut = ranges.clone()
    cut[1, 15] = 0  # no node on this frame
    losses = {}
    gradients = {}
    for name, given in (("whole", ranges), ("cut", cut)):
        losses[name] = rnnt_op.joint_rnnt_loss(
            *problem.arguments, label_ranges=given, reduction="none"
        )
        gradients[name] = torch.autograd.grad(losses[name].sum(), problem.differentiable[:2])
    assert losses["cut"].isinf().tolist() == [False, True, False, False, False]
    others = [0, 2, 3, 4]
    assert torch.equal(losses["cut"][others], losses["whole"][others])
    for cut_gradient, whole in zip(gradients["cut"], gradients["whole"], strict=True):
        assert torch.equal(cut_gradient[others], whole[others])
    loss, d_problem = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, label_ranges=cut, zero_infinity=True
    )
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in d_problem)
    assert all((g[1] == 0).all() for g in d_problem[:2])


@every_backend
@pytest.mark.parametrize("batch", [1, 2])
def test_no_node_at_all(batch: int) -> None:
    problem = random_joint(batch, 5, 3)
    ranges = torch.zeros(batch, 5, 2, dtype=torch.int64)
    losses = rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=ranges, reduction="none")
    assert (losses == torch.inf).all()
    loss, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, label_ranges=ranges, zero_infinity=True
    )
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)
    found = rnnt_op.posteriors(*problem.arguments, label_ranges=ranges)
    assert (found.blank == 0).all()
    assert (found.confidence == 0).all()
    aligned = rnnt_op.align(*problem.arguments, label_ranges=ranges)
    assert (aligned.frames == -1).all()
    assert (aligned.log_probability == -torch.inf).all()


def test_ranges_on_another_device_than_lengths() -> None:
    """They are brought together; here both are on the CPU, tests/kernels/test_gpu.py has the rest."""
    problem, ranges = problem_and_ranges()
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=ranges[:, ::1].int())
    strided = torch.stack([ranges, ranges], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(loss, rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=strided))


def test_compiled() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def step(ranges: Tensor, *arguments: Tensor) -> Tensor:
        return rnnt_op.joint_rnnt_loss(*arguments, label_ranges=ranges)

    for states in (2, 3, 4):
        problem, ranges = problem_and_ranges(states)
        expected, expected_gradients = loss_and_gradients(
            rnnt_op.joint_rnnt_loss, problem, label_ranges=ranges
        )
        loss = step(ranges, *problem.arguments)
        gradients = torch.autograd.grad(loss, problem.differentiable)
        assert torch.equal(loss, expected)
        assert all(map(torch.equal, gradients, expected_gradients))
    assert counter.frame_count == 1


def test_opcheck() -> None:
    torch.use_deterministic_algorithms(False)
    problem, ranges = problem_and_ranges()
    joint = joint_arguments(problem.arguments, label_ranges=ranges).values()
    check_op("joint_loss", joint)
    weights = torch.ones(5, dtype=torch.float64)
    check_op("joint_loss_with_grads", (weights, *joint, [True] * 4))
    logits = torch.randn(5, 40, 3, 11, dtype=torch.float64, requires_grad=True)
    given = logits_arguments((logits, *problem.arguments[4:]), label_ranges=ranges)
    check_op("logits_loss", (*given.values(), True))


def test_wrong_ranges() -> None:
    problem = random_joint(2, 4, 3, lengths=[(4, 3), (3, 2)])
    good = torch.tensor([[[0, 4]] * 4] * 2)

    def error_of(ranges: Any, logits: Tensor | None = None) -> str:
        arguments, loss = problem.arguments, rnnt_op.joint_rnnt_loss
        if logits is not None:
            arguments, loss = (logits, *arguments[4:], 0), rnnt_op.rnnt_loss
        with pytest.raises((TypeError, ValueError)) as error:
            loss(*arguments, label_ranges=ranges)
        return f"{type(error.value).__name__}: {error.value}"

    def changed(b: int, t: int, first: int, end: int) -> Tensor:
        ranges = good.clone()
        ranges[b, t] = torch.tensor([first, end])
        return ranges

    narrow = torch.zeros(2, 4, 2, 11)
    messages = [
        error_of([[0, 1]]),
        error_of(good.float()),
        error_of(good[0]),
        error_of(good[:1]),
        error_of(good[:, :3]),
        error_of(good[:, :, :1]),
        error_of(good.to("meta")),
        error_of(changed(1, 2, 2, 1)),
        error_of(changed(0, 3, -1, 2)),
        error_of(good, narrow),
        error_of(good, narrow[0]),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
TypeError: label_ranges: expected a tensor, got list
TypeError: label_ranges: expected dtype int32, int64, got torch.float32
ValueError: label_ranges: expected shape (B, T, 2), got (4, 2)
ValueError: label_ranges: expected size 2 in dimension 0, the batch size, got (1, 4, 2)
ValueError: label_ranges: expected size 4 in dimension 1, the frames of encoder, got (2, 3, 2)
ValueError: label_ranges: expected size 2 in dimension 2, first and end, got (2, 4, 1)
ValueError: label_ranges: expected device cpu, the device of the inputs (or the CPU), got meta
ValueError: label_ranges: expected 0 <= first <= end, got (2, 1) at sample 1, frame 2
ValueError: label_ranges: expected 0 <= first <= end, got (-1, 2) at sample 0, frame 3
ValueError: label_ranges: expected 0 <= first <= end, at most 2 apart, the size of logits, got (0, 4) at sample 0, frame 0
ValueError: logits: expected shape (B, T, R, V), got (4, 2, 11)""",
    )
    rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=changed(1, 3, 5, -2))


# The functions that make ranges.


def random_posteriors(
    lengths: Sequence[tuple[int, int]], scale: float = 3.0
) -> tuple[JointProblem, rnnt_op.Posteriors]:
    problem = random_joint(
        len(lengths),
        max(t for t, _ in lengths),
        max(u for _, u in lengths),
        lengths=lengths,
        scale=scale,
    )
    with torch.no_grad():
        return problem, rnnt_op.posteriors(*problem.arguments)


@pytest.mark.parametrize("states", [2, 3, 5, 40])
def test_pruned_ranges_hold_a_path(states: int) -> None:
    lengths = [(30, 20), (22, 21), (9, 0), (1, 1), (30, 3), (12, 11)]
    problem, found = random_posteriors(lengths)
    ranges = rnnt_op.pruned_ranges(found, *problem.arguments[5:], states)
    first, end = ranges.unbind(2)
    width = min(states, 22)
    assert (end - first == width).all()
    for b, (t, u) in enumerate(lengths):
        assert first[b, 0] == 0
        assert first[b, t - 1] == max(0, u + 1 - width)
        steps = first[b, 1:t] - first[b, : t - 1]
        assert ((steps >= 0) & (steps < max(width, 2))).all()
    losses = rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=ranges, reduction="none")
    whole = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction="none")
    assert losses.isfinite().all()
    # A restricted lattice has some of the paths.
    assert (losses >= whole - 1e-12).all()
    if states == 40:
        torch.testing.assert_close(losses, whole)


@pytest.mark.parametrize("topology", [modified(), constrained()], ids=["modified", "constrained"])
@pytest.mark.parametrize("states", [2, 3, 40])
def test_pruned_ranges_hold_a_path_where_labels_read_a_frame(
    topology: Topology, states: int
) -> None:
    lengths = [(8, 6), (6, 6), (8, 1), (7, 0)] * 25
    problem, found = random_posteriors(lengths)
    ranges = rnnt_op.pruned_ranges(found, *problem.arguments[5:], states, topology=topology)
    losses = rnnt_op.joint_rnnt_loss(
        *problem.arguments, label_ranges=ranges, topology=topology, reduction="none"
    )
    assert losses.isfinite().all()


def test_pruned_ranges_too_narrow_for_an_utterance() -> None:
    problem, found = random_posteriors([(3, 9)])
    for states, is_finite in ((3, False), (4, True)):
        ranges = rnnt_op.pruned_ranges(found, *problem.arguments[5:], states)
        loss = rnnt_op.joint_rnnt_loss(*problem.arguments, label_ranges=ranges)
        assert bool(loss.isfinite()) == is_finite
    with pytest.raises(ValueError, match="states: expected at least 2, got 1"):
        rnnt_op.pruned_ranges(found, *problem.arguments[5:], 1)


def test_pruned_ranges_keep_what_the_posterior_holds() -> None:
    """Where paths keep together, a band of a few states loses next to nothing."""
    frames, labels = 40, 12
    t, u = torch.arange(frames).unsqueeze(1), torch.arange(labels + 1)
    behind = (t * labels / (frames - 1) - u).double()  # labels that are due
    targets = torch.randint(1, 7, (1, labels))
    logits = torch.randn(1, frames, labels + 1, 7, dtype=torch.float64)
    logits[..., 0] -= 6 * behind
    logits[0, :, u[:-1], targets[0]] += 6 * behind[:, :-1]
    log_probs = logits.log_softmax(-1).requires_grad_()
    lengths = torch.tensor([frames]), torch.tensor([labels])
    loss = rnnt_op.rnnt_loss(log_probs, targets, *lengths, 0, fused_log_softmax=False)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    # The gradient of log-probabilities is −occupancy.
    of_labels = -gradient[0, :, u[:-1], targets[0]].unsqueeze(0)
    found = rnnt_op.Posteriors(-gradient[..., 0], of_labels, -loss.detach(), loss.detach())
    ranges = rnnt_op.pruned_ranges(found, *lengths, 4)
    pruned = rnnt_op.rnnt_loss(
        of_band(logits, ranges, 4).nan_to_num(0.0), targets, *lengths, 0, label_ranges=ranges
    )
    assert 0 <= float(pruned - loss.detach()) < 1e-3


def test_alignment_ranges() -> None:
    frames = torch.tensor([[1, 3, 3, 9], [0, 2, -5, 99]])
    ranges = rnnt_op.alignment_ranges(
        frames, torch.tensor([6, 4]), torch.tensor([3, 2]), max_frames=6, early=1, late=0
    )
    # Labels 0, 1, 2 of the first sample may be emitted on frames 0-1, 2-3, 2-3.
    assert ranges[0].tolist() == [[0, 2], [0, 2], [1, 4], [1, 4], [3, 4], [3, 4]]
    assert ranges[1, :4].tolist() == [[0, 2], [1, 3], [1, 3], [2, 3]]
    with pytest.raises(ValueError, match="early, late: expected at least 0 frames each, got -1, 2"):
        rnnt_op.alignment_ranges(
            frames, torch.tensor([6]), torch.tensor([3]), max_frames=6, early=-1, late=2
        )


@pytest.mark.parametrize(("early", "late"), [(0, 0), (1, 0), (0, 2), (2, 1)])
def test_alignment_ranges_allow_a_label_near_its_frame_alone(early: int, late: int) -> None:
    problem = random_joint(3, 14, 5, lengths=[(14, 5), (9, 4), (6, 0)])
    aligned = rnnt_op.align(*problem.arguments)
    ranges = rnnt_op.alignment_ranges(
        aligned.frames, *problem.arguments[5:], max_frames=14, early=early, late=late
    )
    found = rnnt_op.posteriors(*problem.arguments, label_ranges=ranges)
    t = torch.arange(14).view(1, -1, 1)
    own = aligned.frames.unsqueeze(1)
    allowed = (
        (own >= 0)
        & (t >= own - early)
        & (t <= own + late)
        & (t < problem.encoder_lengths.view(-1, 1, 1))
    )
    assert torch.equal(found.label > 0, allowed)
    if early == late == 0:
        torch.testing.assert_close(found.log_likelihood, aligned.log_probability)


@pytest.mark.parametrize("function", ["pruned", "alignment"])
def test_ranges_are_made_inside_a_compiled_step(function: str) -> None:
    problem, _ = random_posteriors([(12, 5), (9, 4)], scale=1.0)

    def step(*arguments: Tensor) -> Tensor:
        with torch.no_grad():
            if function == "pruned":
                found = rnnt_op.posteriors(*arguments)
                ranges = rnnt_op.pruned_ranges(found, *arguments[5:], 3)
            else:
                aligned = rnnt_op.align(*arguments)
                ranges = rnnt_op.alignment_ranges(
                    aligned.frames,
                    *arguments[5:],
                    max_frames=arguments[0].shape[1],
                    early=2,
                    late=2,
                )
        return rnnt_op.joint_rnnt_loss(*arguments, label_ranges=ranges)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*problem.arguments), step(*problem.arguments))
