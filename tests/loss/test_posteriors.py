"""Posteriors and best paths, against the paths written out."""

import functools
import math
from typing import Any

import pytest
import torch
from lattices import (
    CONSTRAINED,
    LENGTHS,
    MULTI_BLANK,
    REGULAR,
    STAR,
    TDT,
    VARIANTS,
    Step,
    Variant,
    factors,
    joint_logits,
    on_cpu,
    on_every_backend,
    paths,
    placed,
    problem_of,
)
from problems import JointProblem, check_op, network_arguments, random_joint
from test_label_ranges import RANGES
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rnnt_op
from rnnt_op.topologies import RNNT, modified

every_backend = pytest.mark.every_backend
# Losses of every lattice meet ranges in test_label_ranges; these have every kind of arc.
of_paths = on_every_backend(
    "variant, ranges, penalty",
    [
        *((variant, None, 0.4) for variant in VARIANTS),
        *(
            (variant, *restriction)
            for variant in (CONSTRAINED, MULTI_BLANK, STAR, TDT)
            for restriction in (("band", 0.0), ("scattered", 0.4))
        ),
    ],
)


class Paths:
    """All paths of a sample, and their log-probabilities."""

    def __init__(
        self, v: Variant, logits: Tensor, labels: list[int], penalty: float, is_node: Any
    ) -> None:
        log_probs = factors(v, logits).tolist()  # of tensors, each number would take microseconds
        frames = len(logits)
        self.paths = paths(v, frames, labels, is_node)
        self.scores = torch.tensor(
            [
                sum(
                    sum(log_probs[at][state][column] for at, state, column in step.terms)
                    + step.labels * penalty * ((frames - 1) / 2 - step.t)
                    for step in path
                )
                for path in self.paths
            ],
            dtype=torch.float64,
        )

    def occupancy(self, shape: tuple[int, int], emitted: int) -> Tensor:
        """How often a path takes a step that emits so many labels. [T, U+1]"""
        found = [[0.0] * shape[1] for _ in range(shape[0])]
        for path, probability in zip(self.paths, self.scores.softmax(0).tolist(), strict=True):
            for step in path:
                if step.labels == emitted:
                    found[step.t][step.u] += probability
        return torch.tensor(found, dtype=torch.float64, device="cpu")

    def best(self) -> list[Step]:
        return self.paths[int(self.scores.argmax())]


@functools.cache
def written_out(v: Variant, ranges: str | None, penalty: float) -> tuple[JointProblem, list[Paths]]:
    with torch.device("cpu"):
        problem = problem_of(v, LENGTHS)
        logits = joint_logits(problem).detach()

        def of_sample(b: int, frames: int, labels: int) -> Paths:
            def is_node(t: int, u: int) -> bool:
                return ranges is None or RANGES[ranges][b][t][0] <= u < RANGES[ranges][b][t][1]

            own = logits[b, :frames, : labels + 1]
            return Paths(v, own, problem.targets[b, :labels].tolist(), penalty, is_node)

        return problem, [of_sample(b, *lengths) for b, lengths in enumerate(LENGTHS)]


def options_of(v: Variant, ranges: str | None, penalty: float) -> dict[str, Any]:
    given = None if ranges is None else torch.tensor(RANGES[ranges])
    return {
        **v.options,
        "blank": v.blank,
        "delay_penalty": penalty,
        "label_ranges": given,
    }


@of_paths
def test_posteriors(variant: Variant, ranges: str | None, penalty: float) -> None:
    problem, samples = written_out(variant, ranges, penalty)
    found = rnnt_op.posteriors(*placed(problem).arguments, **options_of(variant, ranges, penalty))
    blank, label, log_likelihood, confidence = on_cpu(found)
    for b, ((frames, labels), sample) in enumerate(zip(LENGTHS, samples, strict=True)):
        shape = frames, labels + 1
        expected = torch.zeros(2, *blank.shape[1:], dtype=torch.float64, device="cpu")
        likelihood = -torch.inf
        if sample.paths:
            likelihood = float(sample.scores.logsumexp(0))
            for emitted in (0, 1):
                expected[emitted, :frames, : labels + 1] = sample.occupancy(shape, emitted)
        torch.testing.assert_close(blank[b], expected[0], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(label[b], expected[1, :, :-1], rtol=1e-10, atol=1e-14)
        assert float(log_likelihood[b]) == pytest.approx(likelihood, rel=1e-12)
        expected_confidence = math.exp(likelihood / (labels + 1))
        assert float(confidence[b]) == pytest.approx(expected_confidence, rel=1e-12)


@of_paths
def test_alignment(variant: Variant, ranges: str | None, penalty: float) -> None:
    problem, samples = written_out(variant, ranges, penalty)
    found = rnnt_op.align(*placed(problem).arguments, **options_of(variant, ranges, penalty))
    frames, log_probability = on_cpu(found)
    assert frames.dtype == torch.int64
    for b, ((_, labels), sample) in enumerate(zip(LENGTHS, samples, strict=True)):
        expected = [-1] * frames.shape[1]
        best = -torch.inf
        if sample.paths:
            best = float(sample.scores.max())
            expected[:labels] = [step.t for step in sample.best() if step.labels]
        assert frames[b].tolist() == expected
        assert float(log_probability[b]) == pytest.approx(best, rel=1e-12)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_properties_of_larger_lattices(dtype: torch.dtype) -> None:
    lengths = [(60, 20), (33, 32), (7, 0), (1, 5)]
    problem = random_joint(4, 60, 32, lengths=lengths, dtype=dtype).poisoned()
    losses = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction="none")
    for workspace_bytes in (None, 200_000):
        found = rnnt_op.posteriors(*problem.arguments, workspace_bytes=workspace_bytes)
        aligned = rnnt_op.align(*problem.arguments, workspace_bytes=workspace_bytes)
        assert found.blank.dtype == found.label.dtype == aligned.log_probability.dtype
        assert found.blank.dtype == torch.float32
        torch.testing.assert_close(found.log_likelihood, -losses)
        # Every path reads every frame by one blank, and emits every label once.
        for b, (frames, labels) in enumerate(lengths):
            torch.testing.assert_close(found.blank[b].sum(1), (torch.arange(60) < frames).float())
            torch.testing.assert_close(found.label[b].sum(0), (torch.arange(32) < labels).float())
            emitted = aligned.frames[b, :labels]
            assert ((emitted >= 0) & (emitted < frames)).all()
            assert (emitted.diff() >= 0).all()
            assert (aligned.frames[b, labels:] == -1).all()
        assert (aligned.log_probability <= found.log_likelihood + 1e-3).all()


@every_backend
def test_a_sharp_posterior_is_the_best_path() -> None:
    """Scaled up, the logits leave one path."""
    problem = random_joint(3, 20, 8, scale=6.0)
    found = rnnt_op.posteriors(*problem.arguments)
    aligned = rnnt_op.align(*problem.arguments)
    is_label = aligned.frames >= 0
    at_best = found.label.gather(1, aligned.frames.clamp(min=0).unsqueeze(1)).squeeze(1)
    assert (at_best[is_label] > 0.5).float().mean() > 0.9


@every_backend
@pytest.mark.parametrize("topology", [RNNT, modified()], ids=["regular", "modified"])
def test_permuting_the_batch_permutes_the_result(topology: Any) -> None:
    problem = random_joint(5, 12, 6)
    order = torch.randperm(5)
    moved = [
        tensor if tensor.dim() == 0 or tensor.shape[0] != 5 else tensor[order]
        for tensor in problem.arguments
    ]
    for function in (rnnt_op.posteriors, rnnt_op.align):
        whole = function(*problem.arguments, topology=topology)
        permuted = function(*moved, topology=topology)
        for one, other in zip(whole, permuted, strict=True):
            assert torch.equal(one[order], other)


@every_backend
def test_confidence_is_a_mean_of_conditional_probabilities() -> None:
    """With one frame and one label, the probabilities of 0, 1, 2, … labels add up to one."""
    most = 12
    encoder = torch.randn(1, 1, 4, dtype=torch.float64)
    predictor = torch.randn(1, most + 1, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, dtype=torch.float64)
    label = ((encoder + predictor).tanh() @ weight.t()).softmax(-1)[0, :, 1]
    total = label.prod()  # of more labels than these
    for labels in range(most + 1):
        found = rnnt_op.posteriors(
            encoder,
            predictor[:, : labels + 1],
            weight,
            None,
            torch.ones(1, labels).long(),
            torch.tensor([1]),
            torch.tensor([labels]),
        )
        expected = label[:labels].prod() * (1 - label[labels])
        torch.testing.assert_close(found.confidence[0] ** (labels + 1), expected)
        total = total + found.log_likelihood.exp().sum()
    assert float(total) == pytest.approx(1.0, abs=1e-12)


def test_module() -> None:
    module = rnnt_op.JointRNNTLoss(8, 11, dropout=0.3, dtype=torch.float64)
    problem = random_joint()
    tensors = (problem.encoder, problem.predictor, *problem.arguments[4:])
    own = (problem.encoder, problem.predictor, module.weight, module.bias, *problem.arguments[4:])
    for mine, functional in (
        (module.posteriors, rnnt_op.posteriors),
        (module.align, rnnt_op.align),
    ):
        for one, other in zip(mine(*tensors), functional(*own), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["posteriors", "align"])
def test_derivatives_are_refused(name: str) -> None:
    problem = random_joint()
    found = getattr(rnnt_op, name)(*problem.arguments)
    values = found.label if name == "posteriors" else found.log_probability
    with pytest.raises(RuntimeError, match="posteriors and alignments have no derivative"):
        values.sum().backward()
    with torch.no_grad():
        assert not getattr(rnnt_op, name)(*problem.arguments)[0].requires_grad


@pytest.mark.parametrize("name", ["posteriors", "align"])
def test_compiled(name: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    function = getattr(rnnt_op, name)
    compiled = torch.compile(
        lambda *arguments: function(*arguments), backend=counter, fullgraph=True
    )
    for sizes in ((3, 7, 5), (4, 9, 6), (2, 12, 3)):
        problem = random_joint(*sizes)
        with torch.no_grad():
            for one, other in zip(
                compiled(*problem.arguments), function(*problem.arguments), strict=True
            ):
                assert torch.equal(one, other)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("name", ["posteriors", "align"])
@pytest.mark.parametrize("variant", [REGULAR, TDT], ids=str)
def test_opcheck(name: str, variant: Variant) -> None:
    torch.use_deterministic_algorithms(False)
    problem = problem_of(variant, LENGTHS)
    blank, topology = variant.blank % variant.tokens, variant.topology.text
    arguments = network_arguments(problem.arguments, blank=blank, topology=topology)
    check_op(name, arguments.values())


def test_autocast_and_no_weight() -> None:
    problem = random_joint(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half = rnnt_op.posteriors(*problem.arguments)
    torch.testing.assert_close(
        half.label, rnnt_op.posteriors(*problem.arguments).label, atol=0.1, rtol=0.1
    )
    encoder, predictor = torch.randn(2, 6, 9), torch.randn(2, 4, 9)
    others = (torch.randint(1, 9, (2, 3)), torch.tensor([6, 5]), torch.tensor([3, 2]))
    eye = torch.eye(9)
    for function in (rnnt_op.posteriors, rnnt_op.align):
        one = function(encoder, predictor, None, None, *others, activation="identity")
        other = function(encoder, predictor, eye, None, *others, activation="identity")
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)
