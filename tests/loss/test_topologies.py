"""Every lattice against the sum over its paths, written out from the papers' definitions.

Nothing here reads the tables of ``rnnt_op.topologies``: each lattice is described again, as what
may follow at a node.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from lattices import (
    CONSTRAINED,
    HAT,
    INF,
    MODIFIED,
    REGULAR,
    TDT,
    VARIANTS,
    Variant,
    finite,
    log_probabilities,
    on_cpu,
    placed,
    problem_of,
    tdt_variant,
    truth,
    variants,
)
from problems import (
    NAN,
    check_op,
    joint_arguments,
    logits_arguments,
    loss_and_gradients,
    relative_error,
)
from test_truth import PUBLISHED_LOGITS
from torch import Tensor
from torch.nn import functional as F

import rnnt_op
from rnnt_op import reference
from rnnt_op.topologies import RNNT, Topology, constrained, modified, multi_blank, star, tdt

every_backend = pytest.mark.every_backend


def logits_loss(v: Variant, arguments: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of their sum."""
    options = {"reduction": "none", "zero_infinity": True, **v.options, **options}
    losses = rnnt_op.rnnt_loss(*arguments, blank=v.blank, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), arguments[0])
    return losses.detach().cpu(), gradient.cpu()


# Against the sum over paths.


@every_backend
@variants
def test_paths_of_logits(variant: Variant) -> None:
    right = truth(variant)
    losses, gradient = logits_loss(variant, right.arguments)
    torch.testing.assert_close(losses, finite(right.losses), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, right.d_logits, rtol=1e-10, atol=1e-14)
    losses, _ = logits_loss(variant, right.arguments, zero_infinity=False)
    assert torch.equal(losses.isinf(), ~right.feasible)
    assert (losses[~right.feasible] == INF).all()


@every_backend
@variants
def test_paths_of_a_joint(variant: Variant) -> None:
    right = truth(variant)
    expected = right.joint_gradients(right.d_logits)
    problem = placed(right.problem)
    for options in ({"gradient_tolerance": 0.0}, {"workspace_bytes": 10_000, "reduction": "none"}):
        options = {"zero_infinity": True, "reduction": "sum", **variant.options, **options}
        loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
        assert relative_error([loss.cpu().sum()], [finite(right.losses).sum()]) <= 1e-13
        assert relative_error(on_cpu(gradients), expected) <= 1e-12


@variants
def test_paths_of_the_reference(variant: Variant) -> None:
    """The batched way is an oracle of its own where paths are too many."""
    right = truth(variant)
    logits = right.logits.clone().requires_grad_()
    losses = reference.rnnt_loss(
        logits,
        *right.problem.arguments[4:],
        blank=variant.blank,
        reduction="none",
        **variant.options,
    )
    torch.testing.assert_close(losses.detach(), right.losses, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(losses[right.feasible].sum(), logits)
    torch.testing.assert_close(gradient, right.d_logits, rtol=1e-10, atol=1e-14)


@every_backend
@variants
def test_log_probabilities(variant: Variant) -> None:
    """What the caller normalises is taken as it is; its gradient is −occupancy."""
    right = truth(variant)
    logits, *others = right.arguments
    without_sigma = replace(variant, sigma=0.0)
    log_probs = log_probabilities(without_sigma, logits.detach()).requires_grad_()
    losses, gradient = logits_loss(variant, (log_probs, *others), fused_log_softmax=False)
    torch.testing.assert_close(losses, finite(right.losses), rtol=1e-12, atol=1e-13)
    clean = right.logits.clone().requires_grad_()
    (d_logits,) = torch.autograd.grad(log_probabilities(without_sigma, clean), clean, gradient)
    torch.testing.assert_close(d_logits, right.d_logits, rtol=1e-10, atol=1e-14)


@every_backend
@pytest.mark.parametrize(
    ("variant", "fast_emit", "delay_penalty"),
    [
        *((variant, 0.4, 0.2) for variant in VARIANTS),
        *((variant, 0.7, 0.0) for variant in (REGULAR, TDT)),
        *((variant, 0.0, 0.3) for variant in (REGULAR, TDT)),
    ],
    ids=str,
)
def test_regularisers(variant: Variant, fast_emit: float, delay_penalty: float) -> None:
    lengths = ((3, 2), (4, 2), (5, 0), (2, 3), (1, 1))
    right = truth(variant, lengths, fast_emit, delay_penalty)
    options = {"fast_emit": fast_emit, "delay_penalty": delay_penalty}
    losses, gradient = logits_loss(variant, right.arguments, **options)
    torch.testing.assert_close(losses, finite(right.losses), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, right.d_logits, rtol=1e-10, atol=1e-14)
    if not delay_penalty:
        without, _ = logits_loss(variant, right.arguments)
        assert torch.equal(losses, without)
    _, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss,
        placed(right.problem),
        reduction="sum",
        zero_infinity=True,
        **variant.options,
        **options,
    )
    assert relative_error(on_cpu(gradients), right.joint_gradients(right.d_logits)) <= 1e-12


@every_backend
@variants
def test_clamp_comes_before_the_joint_and_the_upstream_gradient(variant: Variant) -> None:
    clamp = 0.15
    lengths = ((3, 2), (4, 2), (5, 0))
    right = truth(variant, lengths, 0.5, 0.0)
    upstream = torch.tensor([3.0, -100.0, 0.5], dtype=torch.float64, device="cpu")
    unit = right.d_logits.clamp(-clamp, clamp)
    assert not torch.equal(unit, right.d_logits)
    problem = placed(right.problem)
    losses = rnnt_op.joint_rnnt_loss(
        *problem.arguments,
        blank=variant.blank,
        clamp=clamp,
        fast_emit=0.5,
        reduction="none",
        gradient_tolerance=0.0,
        zero_infinity=True,
        **variant.options,
    )
    gradients = torch.autograd.grad(losses, problem.differentiable, upstream.to(losses.device))
    expected = right.joint_gradients(unit * upstream[:, None, None, None])
    assert relative_error(on_cpu(gradients), expected) <= 1e-12
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 3)):
        _, gradients = loss_and_gradients(
            rnnt_op.joint_rnnt_loss,
            placed(right.problem),
            clamp=clamp,
            fast_emit=0.5,
            reduction=reduction,
            zero_infinity=True,
            **variant.options,
        )
        assert relative_error(on_cpu(gradients), right.joint_gradients(scale * unit)) <= 1e-12
    _, gradient = logits_loss(variant, right.arguments, clamp=clamp, fast_emit=0.5)
    torch.testing.assert_close(gradient, unit, rtol=1e-10, atol=1e-14)


# Published values.


@every_backend
@pytest.mark.parametrize(
    ("topology", "delay_penalty", "cost"),
    [
        (RNNT, 0.0, 4.495666773770733),
        (modified(), 0.0, 2.761683127354),
        (constrained(), 0.0, 5.672679385870),
        (RNNT, 0.1, 4.484711952089),
    ],
    ids=["regular", "modified", "constrained", "regular_with_delay_penalty"],
)
def test_published_costs(topology: Topology, delay_penalty: float, cost: float) -> None:
    logits = torch.tensor([PUBLISHED_LOGITS], dtype=torch.float64)
    lengths = torch.tensor([2])
    loss = rnnt_op.rnnt_loss(
        logits,
        torch.tensor([[1, 2]]),
        lengths,
        lengths,
        blank=0,
        topology=topology,
        delay_penalty=delay_penalty,
    )
    assert float(loss) == pytest.approx(cost, abs=1e-11)


@every_backend
def test_published_cost_of_tdt() -> None:
    loss = rnnt_op.rnnt_loss(
        torch.zeros(1, 3, 2, 4 + 3, dtype=torch.float64),
        torch.tensor([[1]]),
        torch.tensor([3]),
        torch.tensor([1]),
        blank=-1,
        topology=tdt((0, 1, 2), sigma=0.05),
    )
    assert float(loss) == pytest.approx(4.155739, abs=1e-6)


# Identities between lattices.


def random_logits(
    frames: int, labels: int, columns: int, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(1, frames, labels + 1, columns, dtype=torch.float64)
    targets = torch.randint(1, 4, (1, labels))
    return logits, targets, torch.tensor([frames]), torch.tensor([labels])


def loss_of(arguments: Sequence[Tensor], topology: Topology, **options: Any) -> Tensor:
    return rnnt_op.rnnt_loss(*arguments, **{"blank": 0, **options}, topology=topology)


@every_backend
@pytest.mark.parametrize(("frames", "labels"), [(9, 4), (3, 8), (1, 0)])
def test_multi_blank_without_its_big_blanks_is_regular(frames: int, labels: int) -> None:
    logits, *others = random_logits(frames, labels, 6)
    logits[..., 4:] = -INF
    expected = loss_of((logits[..., :4], *others), RNNT)
    columns = {"columns": (4, 5)}
    torch.testing.assert_close(
        loss_of((logits, *others), multi_blank((2, 4), **columns)), expected, rtol=1e-13, atol=1e-14
    )
    # Every path has T blanks and U labels.
    torch.testing.assert_close(
        loss_of((logits, *others), multi_blank((2, 4), **columns, sigma=0.1)),
        expected + 0.1 * (frames + labels),
        rtol=1e-13,
        atol=1e-14,
    )


@every_backend
@pytest.mark.parametrize(("frames", "labels"), [(9, 4), (5, 4), (2, 0)])
def test_tdt_that_always_reads_one_frame_is_modified_with_a_closing_blank(
    frames: int, labels: int
) -> None:
    logits, targets, _, label_lengths = random_logits(frames, labels, 6)
    logits[..., 4] = -INF  # the duration of no frame
    before_last = torch.tensor([frames - 1])
    expected = loss_of((logits[..., :4], targets, before_last, label_lengths), modified())
    expected = expected - logits[0, -1, -1, :4].log_softmax(0)[0]
    arguments = targets, torch.tensor([frames]), label_lengths
    torch.testing.assert_close(
        loss_of((logits, *arguments), tdt((0, 1))), expected, rtol=1e-13, atol=1e-14
    )
    torch.testing.assert_close(
        loss_of((logits[..., [0, 1, 2, 3, 5]], *arguments), tdt((1,), sigma=0.1)),
        expected + 0.1 * frames,
        rtol=1e-13,
        atol=1e-14,
    )


@every_backend
def test_constrained_is_modified_and_a_blank_for_each_label() -> None:
    """Where a blank is as likely everywhere, which HAT can say."""
    logits, *others = random_logits(9, 4, 6)
    logits[..., 0] = 0.7
    expected = loss_of((logits, *others), modified(), normalizer="hat")
    expected = expected - 4 * F.logsigmoid(torch.tensor(0.7, dtype=torch.float64))
    loss = loss_of((logits, *others), constrained(), normalizer="hat")
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)


@every_backend
@pytest.mark.parametrize("penalty", [0.0, 0.5, 40.0])
def test_star_skips_frames(penalty: float) -> None:
    """Where no frame but the last can be read otherwise, the rest is skipped; a penalty that is
    high enough leaves the regular lattice."""
    logits, *others = random_logits(6, 2, 6)
    blocked = logits.clone()
    blocked[:, :-1, :, 0] = -INF
    labels = logits.clone()
    torch.testing.assert_close(
        loss_of((blocked, *others), star(penalty)),
        5 * penalty + loss_of((blocked, *others), star()),
        rtol=1e-12,
        atol=1e-12,
    )
    gap = float(loss_of((labels, *others), RNNT) - loss_of((labels, *others), star(penalty)))
    assert gap > 0 or penalty == 40.0
    assert gap < 1e-12 or penalty < 40.0


@every_backend
@pytest.mark.parametrize("normalizer", ["softmax", "hat"])
@pytest.mark.parametrize("labels", [0, 1])
def test_constrained_is_regular_up_to_one_label(labels: int, normalizer: str) -> None:
    arguments = random_logits(6, labels, 6)
    torch.testing.assert_close(
        loss_of(arguments, constrained(), normalizer=normalizer),
        loss_of(arguments, RNNT, normalizer=normalizer),
        rtol=1e-13,
        atol=1e-14,
    )


@every_backend
@pytest.mark.parametrize("topology", [RNNT, modified(), constrained()], ids=["rnnt", "mod", "con"])
def test_hat_is_a_softmax_of_other_logits(topology: Topology) -> None:
    logits, *others = random_logits(7, 4, 6)
    logits.requires_grad_()
    labels = logits[..., 1:]
    blank = logits[..., :1] + labels.logsumexp(-1, keepdim=True)
    loss = loss_of((logits, *others), topology, normalizer="hat")
    expected = loss_of((torch.cat([blank, labels], -1), *others), topology)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits),
        torch.autograd.grad(expected, logits),
        rtol=1e-11,
        atol=1e-15,
    )


# Lengths that no path fits.

BAD, GOOD = 1, [0, 2]


@every_backend
@pytest.mark.parametrize(
    ("variant", "lengths"),
    [
        (MODIFIED, ((5, 2), (2, 3), (4, 4))),
        (CONSTRAINED, ((5, 2), (1, 2), (4, 4))),
        (HAT[1], ((5, 2), (2, 3), (4, 4))),
        (HAT[2], ((5, 2), (2, 3), (4, 4))),
        (tdt_variant((2,), 0), ((4, 1), (3, 1), (6, 2))),
        (tdt_variant((2,), 0), ((4, 0), (5, 0), (6, 0))),
        (tdt_variant((1, 2), 0), ((4, 1), (2, 2), (5, 4))),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("reduction", "zero_infinity"), [("none", False), ("sum", False), ("sum", True)]
)
def test_no_path(variant: Variant, lengths, reduction: str, zero_infinity: bool) -> None:
    right = truth(variant, lengths)
    assert right.feasible.tolist() == [True, False, True]
    options = {"zero_infinity": zero_infinity, "reduction": reduction, **variant.options}
    problem = placed(right.problem)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    expected = right.joint_gradients(right.d_logits)
    gradients = on_cpu(gradients)
    for gradient, truth_of in zip(gradients[:2], expected[:2], strict=True):
        assert relative_error([gradient[GOOD]], [truth_of[GOOD]]) <= 1e-12
    t, u = lengths[BAD]
    if zero_infinity:
        assert relative_error([loss.cpu().sum()], [right.losses[GOOD].sum()]) <= 1e-13
        assert (gradients[0][BAD] == 0).all()
        assert (gradients[1][BAD] == 0).all()
        assert relative_error(gradients[2:], expected[2:]) <= 1e-12
    else:
        assert loss.sum() == INF
        assert gradients[0][BAD, :t].isnan().all()
        assert (gradients[0][BAD, t:] == 0).all()
        assert gradients[1][BAD, : u + 1].isnan().all()
        assert (gradients[1][BAD, u + 1 :] == 0).all()
        assert all(g.isnan().all() for g in gradients[2:])
    if reduction == "none" and not zero_infinity:
        assert loss[BAD] == INF
        assert relative_error([loss.cpu()[GOOD]], [right.losses[GOOD]]) <= 1e-13
        losses, gradient = logits_loss(variant, right.arguments, zero_infinity=False)
        assert losses[BAD] == INF
        assert gradient[BAD, :t, : u + 1].isnan().all()
        torch.testing.assert_close(gradient[GOOD], right.d_logits[GOOD], rtol=1e-10, atol=1e-14)
        # What is masked out is gone.
        losses = rnnt_op.joint_rnnt_loss(*problem.arguments, blank=variant.blank, **options)
        kept = torch.autograd.grad(losses[losses.isfinite()].sum(), problem.differentiable)
        assert relative_error(on_cpu(kept), expected) <= 1e-12


# Batches, reductions, dtypes.


@every_backend
@variants
def test_permuting_the_batch_permutes_the_result(variant: Variant) -> None:
    lengths = ((4, 2), (7, 1), (5, 3), (6, 0))
    order = [2, 0, 3, 1]
    problem = placed(problem_of(variant, lengths))
    permuted = replace(
        problem,
        encoder=problem.encoder.detach()[order].requires_grad_(),
        predictor=problem.predictor.detach()[order].requires_grad_(),
        targets=problem.targets[order],
        encoder_lengths=problem.encoder_lengths[order],
        target_lengths=problem.target_lengths[order],
    )
    options = {"reduction": "none", **variant.options}
    losses, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    permuted_losses, others = loss_and_gradients(rnnt_op.joint_rnnt_loss, permuted, **options)
    torch.testing.assert_close(permuted_losses, losses[order], rtol=1e-13, atol=0)
    expected = [gradients[0][order], gradients[1][order], *gradients[2:]]
    assert relative_error(others, expected) <= 1e-13


@every_backend
@variants
def test_reductions(variant: Variant) -> None:
    problem = placed(problem_of(variant, ((5, 2), (7, 1), (4, 3))))
    losses = rnnt_op.joint_rnnt_loss(
        *problem.arguments, blank=variant.blank, reduction="none", **variant.options
    )
    parts = [
        torch.autograd.grad(loss, problem.differentiable, retain_graph=True) for loss in losses
    ]
    total = [torch.stack(part).sum(0) for part in zip(*parts, strict=True)]
    for reduction, scale in (("sum", 1.0), ("mean", 1 / 3)):
        loss, gradients = loss_and_gradients(
            rnnt_op.joint_rnnt_loss, problem, reduction=reduction, **variant.options
        )
        torch.testing.assert_close(loss, losses.detach().sum() * scale, rtol=1e-13, atol=0)
        assert relative_error(gradients, [scale * g for g in total]) <= 1e-13


@every_backend
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        (variant, dtype)
        for number, variant in enumerate(VARIANTS)
        for place, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
        # Kernels know a lattice by its table and a dtype by its type, so pairs of them will do.
        if variant in (REGULAR, TDT) or number % 3 == place
    ],
    ids=str,
)
def test_dtypes(variant: Variant, dtype: torch.dtype) -> None:
    """No further from float64 than the batched way in the same dtype, plus a hair."""
    problem = placed(problem_of(variant, ((8, 3), (9, 4), (5, 0))).to(dtype))
    clean = problem_of(variant, ((8, 3), (9, 4), (5, 0))).to(dtype)
    options = {"reduction": "sum", **variant.options}
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    assert loss.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients)
    expected, expected_gradients = loss_and_gradients(
        reference.joint_rnnt_loss, clean.to(torch.float64), **options
    )
    plain, plain_gradients = loss_and_gradients(reference.joint_rnnt_loss, clean, **options)
    hair = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert relative_error([loss.cpu()], [expected]) <= relative_error([plain], [expected]) + hair
    assert (
        relative_error(on_cpu(gradients), expected_gradients)
        <= relative_error(plain_gradients, expected_gradients) + hair
    )


@every_backend
@variants
def test_skipped_gradient_stays_within_its_bound(variant: Variant) -> None:
    """With logits that are sums of both states, states' gradients are sums of logits'."""
    tolerance = 0.2
    lengths = [(12, 4), (10, 0), (9, 3)]
    states = replace(problem_of(variant, lengths), bias=None)
    with torch.device("cpu"):
        columns = variant.columns
        states = replace(
            states,
            encoder=torch.randn(3, 12, columns, dtype=torch.float64),
            predictor=torch.randn(3, 5, columns, dtype=torch.float64),
            weight=torch.eye(columns, dtype=torch.float64),
        )
    device = torch.get_default_device()
    encoder, predictor, weight, _, *indices = (
        None if t is None else t.to(device) for t in states.arguments
    )
    encoder.requires_grad_()
    options = {"blank": variant.blank, "reduction": "sum", **variant.options}

    def d_encoder(gradient_tolerance: float) -> Tensor:
        loss = rnnt_op.joint_rnnt_loss(
            encoder,
            predictor,
            weight,
            None,
            *indices,
            activation="identity",
            gradient_tolerance=gradient_tolerance,
            **options,
        )
        return torch.autograd.grad(loss, encoder)[0]

    logits = (encoder.detach().unsqueeze(2) + predictor.unsqueeze(1)).requires_grad_()
    loss = rnnt_op.rnnt_loss(logits, *indices, **options)
    (d_logits,) = torch.autograd.grad(loss, logits)
    exact = d_encoder(0.0)
    torch.testing.assert_close(exact, d_logits.sum(2), rtol=1e-10, atol=1e-14)
    skipped = (d_encoder(tolerance) - exact).abs().sum((1, 2))
    assert (skipped <= tolerance * d_logits.abs().sum((1, 2, 3))).all()
    assert (skipped > 0).any()


@every_backend
@variants
def test_no_labels_at_all(variant: Variant) -> None:
    right = truth(variant, ((4, 0), (6, 0)))
    assert right.problem.targets.shape == (2, 0)
    losses, gradient = logits_loss(variant, right.arguments)
    torch.testing.assert_close(losses, right.losses, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, right.d_logits, rtol=1e-10, atol=1e-14)
    loss, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, placed(right.problem), reduction="sum", **variant.options
    )
    assert relative_error([loss.cpu()], [right.losses.sum()]) <= 1e-13
    assert relative_error(on_cpu(gradients), right.joint_gradients(right.d_logits)) <= 1e-12


# Tracers and modules.


@pytest.mark.parametrize("variant", [TDT, HAT[1]], ids=str)
def test_compiled(variant: Variant) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        rnnt_op.joint_rnnt_loss, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    options = {"fast_emit": 0.1, "delay_penalty": 0.2, "clamp": 0.3, **variant.options}
    for lengths in (((5, 2), (7, 3)), ((6, 4), (9, 3), (8, 2))):
        problem = placed(problem_of(variant, lengths))
        expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
        actual = loss_and_gradients(compiled, problem, **options)
        assert torch.equal(actual[0], expected[0])
        assert all(torch.equal(a, e) for a, e in zip(actual[1], expected[1], strict=True))


def test_made_inside_a_compiled_step() -> None:
    logits, *others = truth(REGULAR, ((5, 2), (7, 3))).arguments

    def step(logits: Tensor) -> Tensor:
        losses = [
            rnnt_op.rnnt_loss(logits, *others, blank=0, topology=topology)
            for topology in (
                constrained(),
                tdt((0, 2), sigma=0.05),
                multi_blank((2,), columns=(4,), sigma=0.1),
            )
        ]
        return torch.stack([*losses, rnnt_op.rnnt_loss(logits, *others, normalizer="hat")])

    others[0] = others[0].clamp(max=2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), step(logits))


def test_compiled_logits_loss() -> None:
    variant = MODIFIED
    torch._dynamo.reset()
    compiled = torch.compile(rnnt_op.rnnt_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    logits, *others = truth(variant, ((5, 2), (7, 3))).arguments
    results = []
    for function in (compiled, rnnt_op.rnnt_loss):
        loss = function(logits, *others, blank=variant.blank, fast_emit=0.1, **variant.options)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def op_arguments(variant: Variant) -> Iterator[tuple[str, tuple[Any, ...]]]:
    right = truth(variant, ((4, 2), (5, 0)))
    d_losses = torch.rand(2, dtype=torch.float64)
    lattice = {
        "blank": variant.blank_column,
        "topology": variant.topology.text,
        "normalizer": variant.normalizer,
        "fast_emit": 0.1,
        "delay_penalty": 0.2,
        "clamp": 0.5,
    }
    joint = joint_arguments(placed(right.problem).arguments, **lattice).values()
    detached = tuple(t.detach() if isinstance(t, Tensor) else t for t in joint)
    logits = logits_arguments(right.arguments, **lattice).values()
    yield "joint_loss", joint
    yield "joint_loss_backward", (d_losses, *detached, [True] * 4)
    yield "joint_loss_with_grads", (d_losses, *joint, [True] * 4)
    without = (logits[0].detach(), *logits[1:])
    _, scores = torch.ops.rnnt_op.logits_loss(*without, True)
    for is_kept, known in ((True, scores), (False, scores.new_empty(0))):
        yield "logits_loss", (*logits, is_kept)
        yield "logits_loss_backward", (d_losses, known, *without)


@pytest.mark.parametrize("variant", [REGULAR, TDT, HAT[0]], ids=str)
def test_opcheck(variant: Variant) -> None:
    for op, arguments in op_arguments(variant):
        check_op(op, arguments, traced=variant in (TDT, HAT[2]))


def test_module_owns_the_rows_of_durations() -> None:
    torch.manual_seed(0)
    options = {"blank": -1, "topology": tdt((0, 1, 2)), "fast_emit": 0.1, "clamp": 0.5}
    module = rnnt_op.JointRNNTLoss(4, 5, **options)
    assert module.vocab_size == 5
    assert module.weight.shape == (8, 4)
    assert module.bias.shape == (8,)
    assert "vocab_size=5" in repr(module)
    other = rnnt_op.JointRNNTLoss(4, 5, **options)
    other.load_state_dict(module.state_dict())
    problem = problem_of(tdt_variant((0, 1, 2), -1), ((5, 2), (4, 3))).to(torch.float32)
    arguments = (*problem.arguments[:2], *problem.arguments[4:])
    expected = rnnt_op.joint_rnnt_loss(
        *problem.arguments[:2], module.weight, module.bias, *problem.arguments[4:], **options
    )
    assert torch.equal(other(*arguments), expected)
    logits = module.logits(problem.encoder.unsqueeze(2), problem.predictor.unsqueeze(1))
    assert logits.shape == (2, 5, 4, 8)
    torch.testing.assert_close(rnnt_op.rnnt_loss(logits, *arguments[2:], **options), expected)
    assert rnnt_op.JointRNNTLoss(4, 5, topology=multi_blank((2, 4))).weight.shape == (5, 4)


# Bad input.


def error_of(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises((TypeError, ValueError)) as error:
        function(*args, **options)
    return f"{type(error.value).__name__}: {error.value}"


def loss_error(columns: int = 6, targets: Sequence[int] = (1, 2), **options: Any) -> str:
    """The error of both functions, which is the same."""
    indices = torch.tensor([targets]), torch.tensor([3]), torch.tensor([len(targets)])
    states = torch.zeros(1, 3, 4), torch.zeros(1, len(targets) + 1, 4), torch.zeros(columns, 4)
    message = error_of(rnnt_op.joint_rnnt_loss, *states, None, *indices, **options)
    logits = torch.zeros(1, 3, len(targets) + 1, columns)
    assert error_of(rnnt_op.rnnt_loss, logits, *indices, **{"blank": 0, **options}) == message
    return message


def test_wrong_topologies() -> None:
    messages = [
        error_of(tdt, ()),
        error_of(tdt, (0,)),
        error_of(tdt, (0, 1, 1)),
        error_of(tdt, (0, -1, 2)),
        error_of(multi_blank, (1, 2)),
        error_of(multi_blank, (2, 4), columns=(3,)),
        error_of(multi_blank, (2, 4), columns=(3, 3)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: durations: expected distinct numbers of frames, none negative, got []
ValueError: durations: expected one that reads a frame, which a blank must, got [0]
ValueError: durations: expected distinct numbers of frames, none negative, got [0, 1, 1]
ValueError: durations: expected distinct numbers of frames, none negative, got [0, -1, 2]
ValueError: durations: expected at least 2 frames each, got [1, 2]
ValueError: columns: expected 2 distinct tokens, one a duration, got [3]
ValueError: columns: expected 2 distinct tokens, one a duration, got [3, 3]""",
    )


def test_wrong_arguments() -> None:
    messages = [
        loss_error(topology="tdt"),
        loss_error(topology=tdt),
        loss_error(topology=tdt((0, 1, 2, 3, 4, 5))),
        loss_error(topology=tdt((0, 1)), blank=4),
        loss_error(topology=tdt((0, 1)), targets=(1, 4)),
        loss_error(topology=multi_blank((2,), columns=(0,))),
        loss_error(topology=multi_blank((2,), columns=(6,))),
        loss_error(topology=multi_blank((2, 4), columns=(-2, 4))),
        loss_error(topology=multi_blank((2, 4)), targets=(1, 4)),
        loss_error(topology=tdt((0, 1)), normalizer="hat"),
        loss_error(topology=multi_blank((2,)), normalizer="hat"),
        loss_error(normalizer="sigmoid"),
        loss_error(fast_emit=-0.1),
        loss_error(fast_emit=INF),
        loss_error(delay_penalty=-0.1),
        loss_error(delay_penalty=NAN),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
TypeError: topology: expected a rnnt_op.topologies.Topology, such as rnnt_op.topologies.modified(), got str
TypeError: topology: expected a rnnt_op.topologies.Topology, such as rnnt_op.topologies.modified(), got function
ValueError: topology: expected a token before its 6 columns of durations, got 6 columns in all
ValueError: blank: expected an index in [-4, 4) for 4 tokens, got 4
ValueError: targets: expected labels in [0, 4), got 4 at sample 0, position 1
ValueError: topology: expected columns that differ from each other and from blank (0), got [0]
ValueError: topology: expected its columns among 6 tokens, got [6]
ValueError: topology: expected columns that differ from each other and from blank (0), got [-2, 4]
ValueError: targets: label 4 at sample 0, position 1 is a further blank
ValueError: normalizer: hat knows one blank beside the labels; expected a topology of these, such as rnnt_op.topologies.modified()
ValueError: normalizer: hat knows one blank beside the labels; expected a topology of these, such as rnnt_op.topologies.modified()
ValueError: normalizer: expected one of softmax, hat, got 'sigmoid'
ValueError: fast_emit: expected a finite number of at least 0, got -0.1
ValueError: fast_emit: expected a finite number of at least 0, got inf
ValueError: delay_penalty: expected a finite number of at least 0, got -0.1
ValueError: delay_penalty: expected a finite number of at least 0, got nan""",
    )


def test_wrong_modules() -> None:
    messages = [
        error_of(rnnt_op.JointRNNTLoss, 4, 5, blank=5, topology=tdt((0, 1))),
        error_of(rnnt_op.JointRNNTLoss, 4, 5, fast_emit=-1.0),
        error_of(rnnt_op.JointRNNTLoss, 4, 5, normalizer="softmin"),
        error_of(rnnt_op.JointRNNTLoss, 4, 5, topology=tdt(), normalizer="hat"),
        error_of(tdt, (0, 1.5)),
        error_of(multi_blank, (2.5,)),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
ValueError: blank: expected an index in [-5, 5) for 5 tokens, got 5
ValueError: fast_emit: expected a finite number of at least 0, got -1.0
ValueError: normalizer: expected one of softmax, hat, got 'softmin'
ValueError: normalizer: hat knows one blank beside the labels; expected a topology of these, such as rnnt_op.topologies.modified()
ValueError: durations: expected distinct numbers of frames, none negative, got [0, 1.5]
ValueError: durations: expected at least 2 frames each, got [2.5]""",
    )
