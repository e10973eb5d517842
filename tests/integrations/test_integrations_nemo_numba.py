"""NeMo's Numba losses under our name, against the reference, and against NeMo where it is."""

import inspect
import random
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

from rnnt_op import reference
from rnnt_op.integrations import nemo, nemo_numba
from rnnt_op.topologies import RNNT, Topology, multi_blank, tdt

THEIRS = "nemo.collections.asr.parts.numba.rnnt_loss.rnnt_pytorch"
TOKENS, BLANK, DURATIONS = 6, 5, [0, 1, 2]
LOSSES: dict[str, tuple[dict[str, Any], Topology]] = {
    "RNNTLossNumba": ({}, RNNT),
    "MultiblankRNNTLossNumba": (
        {"big_blank_durations": [2, 4], "sigma": 0.05},
        multi_blank([2, 4], sigma=0.05),
    ),
    "TDTLossNumba": ({"durations": DURATIONS, "sigma": 0.05}, tdt(DURATIONS, sigma=0.05)),
}
names = pytest.mark.parametrize("name", LOSSES)


def problem_for(topology: Topology) -> LogitsProblem:
    problem = random_logits(vocab_size=TOKENS, blank=BLANK, extra_columns=topology.extra_columns)
    problem.targets.clamp_(max=2)  # below all big blanks
    return problem


def loss_of(name: str, **options: Any) -> Any:
    return getattr(nemo_numba, name)(BLANK, **LOSSES[name][0], **options)


@names
@pytest.mark.parametrize("reduction", [None, "none", "sum", "mean"])
def test_equals_reference(name: str, reduction: str | None) -> None:
    topology = LOSSES[name][1]
    problem = problem_for(topology)
    options = {} if reduction is None else {"reduction": reduction}
    loss = loss_of(name, **options)(*problem.arguments)
    assert loss.shape == ((3,) if reduction == "none" else (1,))
    expected = reference.rnnt_loss(
        *problem.arguments, blank=BLANK, topology=topology, reduction=reduction or "mean"
    )
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected.reshape(loss.shape), [problem.logits]),
    )


@pytest.mark.parametrize("name", ["RNNTLossNumba", "MultiblankRNNTLossNumba"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_fast_emit_is_in_the_loss_if_asked_for(name: str, reduction: str) -> None:
    topology = LOSSES[name][1]
    problem = problem_for(topology)
    expected = reference.rnnt_loss(
        *problem.arguments, blank=BLANK, topology=topology, fast_emit=0.25, reduction=reduction
    )
    value, gradient = value_and_gradients(expected, [problem.logits])
    for cost, scale in ((False, 1), (True, 1.25)):
        loss = loss_of(name, fastemit_lambda=0.25, reduction=reduction, fastemit_cost=cost)
        actual = value_and_gradients(loss(*problem.arguments), [problem.logits])
        assert_equal(actual, [scale * value.reshape(actual[0].shape), gradient])


def test_clamp_cuts_each_sample_before_the_mean() -> None:
    problem = problem_for(RNNT)
    losses = reference.rnnt_loss(*problem.arguments, blank=BLANK, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), problem.logits)
    loss = loss_of("RNNTLossNumba", clamp=0.05)(*problem.arguments)
    (actual,) = torch.autograd.grad(loss, problem.logits)
    assert gradient.abs().max() > 0.05
    assert_equal([actual], [gradient.clamp(-0.05, 0.05) / 3])
    assert_equal([loss_of("RNNTLossNumba", clamp=-1)(*problem.arguments)], [losses.mean()[None]])


def test_omega_draws_once_for_a_batch() -> None:
    problem = problem_for(tdt(DURATIONS))
    rest = problem.arguments[1:]
    tokens = reference.rnnt_loss(problem.logits[..., :TOKENS], *rest, blank=BLANK)
    durations = reference.rnnt_loss(
        *problem.arguments, blank=BLANK, topology=tdt(DURATIONS, sigma=0.05)
    )
    loss = loss_of("TDTLossNumba", omega=0.4)
    random.seed(1)
    draws = [random.random() < 0.4 for _ in range(8)]
    assert set(draws) == {False, True}
    random.seed(1)
    for regular in draws:
        actual = value_and_gradients(loss(*problem.arguments), [problem.logits])
        expected = (tokens if regular else durations).unsqueeze(0)
        assert_equal(
            actual,
            [
                expected.detach(),
                *torch.autograd.grad(expected, problem.logits, retain_graph=True),
            ],
        )


def test_what_does_not_map_is_refused() -> None:
    for options in ({"fastemit_lambda": 0.1}, {"clamp": 1.0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: expected none with TDT, where NeMo"):
            loss_of("TDTLossNumba", **options)
    with pytest.raises(ValueError, match="durations: expected distinct numbers of frames"):
        nemo_numba.TDTLossNumba(BLANK)
    with pytest.raises(ValueError, match="reduction: expected one of none, sum, mean, got"):
        loss_of("RNNTLossNumba", reduction="mean_batch")


def test_cost_of_nemos_other_name() -> None:
    problem = problem_for(RNNT)
    kwargs = {"fastemit_lambda": 0.25}
    losses = [
        nemo.RNNTLoss(BLANK, "mean_batch", "warprnnt_numba", kwargs, fastemit_cost=cost)
        for cost in (False, True)
    ]
    plain, cost = (
        value_and_gradients(loss(*problem.arguments), [problem.logits]) for loss in losses
    )
    assert_equal(cost, [1.25 * plain[0], plain[1]])


@pytest.mark.slow
@names
def test_signatures_are_nemos(name: str) -> None:
    theirs = inspect.signature(getattr(required(THEIRS), name)).parameters.values()
    ours = inspect.signature(getattr(nemo_numba, name)).parameters.values()
    positional = [p for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs]


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("fast_emit", [0.0, 0.25])
def test_equals_nemo(reduction: str, fast_emit: float) -> None:
    theirs = required(THEIRS).RNNTLossNumba  # the others need a GPU
    problem = problem_for(RNNT).to(torch.float32)
    options = {"blank": BLANK, "reduction": reduction, "fastemit_lambda": fast_emit}
    expected = value_and_gradients(theirs(**options)(*problem.arguments), [problem.logits])
    ours = nemo_numba.RNNTLossNumba(**options, fastemit_cost=True)
    assert_equal(value_and_gradients(ours(*problem.arguments), [problem.logits]), expected, 1e-5)
