"""torch.func: what a transform gives is what a loop over single calls gives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import CountCalls, random_joint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, stack_module_state, vmap

import rnnt_op

B, T, U, H, V = 2, 3, 2, 3, 4
OUTER, INNER = 2, 3  # sizes of the dimensions that are mapped
JOINT_SHAPES = ((B, T, H), (B, U + 1, H), (V, H), (V,), (B, U), (B,), (B,))
LOGITS_SHAPES = ((B, T, U + 1, V), (B, U), (B,), (B,))
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@dataclass(frozen=True)
class Mapped:
    """A tensor, and which of two nested maps take slices of it, the outer one first."""

    tensor: Tensor
    outer: int | None
    inner: int | None

    def at(self, i: int, j: int) -> Tensor:
        tensor = self.tensor if self.outer is None else self.tensor.select(self.outer, i)
        return tensor if self.inner is None else tensor.select(self.inner, j)


@st.composite
def mapped(draw: st.DrawFn, shape: tuple[int, ...], make: Callable[..., Tensor]) -> Mapped:
    """Which maps take slices of the tensor, and of which of its dimensions."""
    inner = draw(st.none() | st.integers(0, len(shape)))
    if inner is not None:
        shape = (*shape[:inner], INNER, *shape[inner:])
    outer = draw(st.none() | st.integers(0, len(shape)))
    if outer is not None:
        shape = (*shape[:outer], OUTER, *shape[outer:])
    return Mapped(make(shape), outer, inner)


@st.composite
def problems(draw: st.DrawFn, shapes: tuple[tuple[int, ...], ...]) -> list[Mapped]:
    """Tensors of a loss, of which each map slices one at least; some of them are trained."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def real(shape: tuple[int, ...]) -> Tensor:
        trained = draw(st.booleans())
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(trained)

    def whole(low: int, high: int) -> Callable[[tuple[int, ...]], Tensor]:
        return lambda shape: torch.randint(low, high, shape, generator=generator)

    indices = (whole(1, V), whole(1, T + 1), whole(0, U + 1))
    makers = (*[real] * (len(shapes) - 3), *indices)
    tensors = [draw(mapped(shape, make)) for shape, make in zip(shapes, makers, strict=True)]
    first = tensors[0]
    if all(t.outer is None for t in tensors) or all(t.inner is None for t in tensors):
        tensors[0] = Mapped(real((OUTER, INNER, *shapes[0])), 0, 0)
    elif not any(t.tensor.requires_grad for t in tensors):
        first.tensor.requires_grad_()
    return tensors


def looped(loss: Callable[..., Tensor], tensors: list[Mapped]) -> Tensor:
    rows = [[loss(*(t.at(i, j) for t in tensors)) for j in range(INNER)] for i in range(OUTER)]
    return torch.stack([torch.stack(row) for row in rows])


def twice_mapped(loss: Callable[..., Tensor], tensors: list[Mapped]) -> Callable[..., Tensor]:
    inner, outer = tuple(t.inner for t in tensors), tuple(t.outer for t in tensors)
    return vmap(vmap(loss, in_dims=inner), in_dims=outer)


def joint_loss(reduction: str) -> Callable[..., Tensor]:
    return lambda *tensors: rnnt_op.joint_rnnt_loss(
        *tensors, reduction=reduction, gradient_tolerance=0.0
    )


def logits_loss(reduction: str) -> Callable[..., Tensor]:
    return lambda *tensors: rnnt_op.rnnt_loss(*tensors, blank=0, reduction=reduction)


def check_against_loop(loss: Callable[..., Tensor], tensors: list[Mapped]) -> None:
    expected = looped(loss, tensors)
    function = twice_mapped(loss, tensors)
    values = [t.tensor for t in tensors]
    actual = function(*values)
    torch.testing.assert_close(actual, expected, **EXACT)

    factors = torch.linspace(0.5, 2.0, expected.numel(), dtype=torch.float64).view_as(expected)
    trained = [t for t in values if t.requires_grad]
    if not trained:
        assert not actual.requires_grad
        return
    of_loop = torch.autograd.grad((factors * expected).sum(), trained)
    of_vmap = torch.autograd.grad((factors * actual).sum(), trained)
    torch.testing.assert_close(of_vmap, of_loop, **EXACT)

    # The same through a functional gradient outside of the maps.
    places = [i for i, t in enumerate(values) if t.requires_grad]
    detached = [t.detach() for t in values]
    scalar = lambda *tensors: (factors * function(*tensors)).sum()  # noqa: E731
    of_grad = grad(scalar, argnums=tuple(places))(*detached)
    torch.testing.assert_close(of_grad, of_loop, **EXACT)

    # And through one inside of them, while others of the tensors are trained outside.
    first, *others = places

    def one(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return grad_and_value(lambda *t: loss(*t).sum(), argnums=first)(*tensors)

    inside, value = twice_mapped(one, tensors)(*values)
    summed = looped(lambda *t: loss(*t).sum(), tensors)
    torch.testing.assert_close(value, summed, **EXACT)
    per_call = looped(
        lambda *t: torch.autograd.grad(loss(*t).sum(), t[first], retain_graph=True)[0], tensors
    )
    torch.testing.assert_close(inside, per_call, **EXACT)
    if others:
        leaves = [values[i] for i in others]
        of_value = torch.autograd.grad(value.sum(), leaves)
        torch.testing.assert_close(of_value, torch.autograd.grad(summed.sum(), leaves), **EXACT)


PROPERTY = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@PROPERTY
@given(tensors=problems(JOINT_SHAPES), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_joint_loss_is_a_loop(tensors: list[Mapped], reduction: str) -> None:
    check_against_loop(joint_loss(reduction), tensors)


@PROPERTY
@given(tensors=problems(LOGITS_SHAPES), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_logits_loss_is_a_loop(tensors: list[Mapped], reduction: str) -> None:
    check_against_loop(logits_loss(reduction), tensors)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_trained_encoder_is_mapped_over_a_frozen_head(reduction: str) -> None:
    """A batched tensor says that it requires no gradient, whatever is inside."""
    problem = random_joint()
    head = rnnt_op.JointRNNTLoss(8, 11, reduction=reduction, dtype=torch.float64)
    encoder = torch.randn(2, *problem.encoder.shape, dtype=torch.float64, requires_grad=True)
    rest = (problem.predictor.detach(), *problem.arguments[4:])
    vmap(lambda e: head(e, *rest))(encoder).sum().backward()
    actual = [encoder.grad, head.weight.grad, head.bias.grad]
    leaves = (encoder, head.weight, head.bias)
    expected = torch.autograd.grad(sum(head(e, *rest).sum() for e in encoder), leaves)
    torch.testing.assert_close(actual, list(expected), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ensemble_over_a_trained_encoder(reduction: str) -> None:
    problem = random_joint()
    heads = [rnnt_op.JointRNNTLoss(8, 11, reduction=reduction, dtype=torch.float64) for _ in "123"]
    project = nn.Linear(8, 8, dtype=torch.float64)
    features, rest = problem.encoder.detach(), (problem.predictor.detach(), *problem.arguments[4:])
    parameters, buffers = stack_module_state(heads)

    def one(parameters: dict[str, Tensor], encoder: Tensor) -> Tensor:
        return functional_call(heads[0], (parameters, buffers), (encoder, *rest))

    vmap(one, in_dims=(0, None))(parameters, project(features)).sum().backward()
    actual = [project.weight.grad.clone(), *(p.grad for p in parameters.values())]
    project.zero_grad()
    sum(head(project(features), *rest).sum() for head in heads).backward()
    stacked = [torch.stack([getattr(h, name).grad for h in heads]) for name in parameters]
    torch.testing.assert_close(actual, [project.weight.grad, *stacked], **EXACT)


@pytest.mark.parametrize("labels", [0, 5])
def test_a_map_takes_one_sweep_for_each_call(labels: int) -> None:
    """The gradients come out of the forward sweeps, as they do without a map."""
    problem = random_joint(labels=labels)
    encoders = torch.randn(2, *problem.encoder.shape, dtype=torch.float64, requires_grad=True)
    rest = [a.detach() for a in problem.arguments[1:]]
    with CountCalls() as counter:
        vmap(lambda e: rnnt_op.joint_rnnt_loss(e, *rest))(encoders).sum().backward()
    assert counter.calls == {"joint_loss_with_grads": 2}


def test_levels_hide_nothing() -> None:
    """A tensor may require gradients at a level of which the caller sees nothing."""
    encoder, predictor, *rest = random_joint().arguments
    loss = joint_loss("mean")
    expected = torch.autograd.grad(loss(encoder, predictor, *rest), (encoder, predictor))

    # The transform wraps the predictor, too, which then says that it requires no gradient.
    inner, value = grad_and_value(lambda e, p: loss(e, p, *rest))(encoder, predictor)
    (outer,) = torch.autograd.grad(value, predictor)
    torch.testing.assert_close((inner, outer), expected, **EXACT)

    middle = grad(lambda p: grad_and_value(lambda e, q: loss(e, q, *rest))(encoder, p)[1])
    torch.testing.assert_close(middle(predictor), expected[1], **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batched_gradients(reduction: str) -> None:
    """Many gradients in one backward pass: ``is_grads_batched=True``, ``vectorize=True``."""
    problem = random_joint()
    loss = joint_loss(reduction)(*problem.arguments)
    upstream = torch.randn(4, *loss.shape, dtype=torch.float64)
    actual = torch.autograd.grad(
        loss, problem.differentiable, upstream, retain_graph=True, is_grads_batched=True
    )
    singles = [
        torch.autograd.grad(loss, problem.differentiable, u, retain_graph=True) for u in upstream
    ]
    torch.testing.assert_close(actual, tuple(map(torch.stack, zip(*singles, strict=True))), **EXACT)
    # The last backward pass may overwrite what it saved, but not where it holds many gradients.
    freed = torch.autograd.grad(loss, problem.differentiable, upstream, is_grads_batched=True)
    torch.testing.assert_close(freed, actual, **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_jacobians(reduction: str) -> None:
    problem = random_joint()
    loss = joint_loss(reduction)
    function = lambda encoder: loss(encoder, *problem.arguments[1:])  # noqa: E731
    expected = torch.autograd.functional.jacobian(function, problem.encoder)
    vectorized = torch.autograd.functional.jacobian(function, problem.encoder, vectorize=True)
    torch.testing.assert_close(vectorized, expected, **EXACT)
    torch.testing.assert_close(jacrev(function)(problem.encoder.detach()), expected, **EXACT)


def test_posteriors_and_alignments_are_mapped() -> None:
    problem = random_joint()
    rest = [a.detach() for a in problem.arguments[1:]]
    encoders = torch.randn(2, *problem.encoder.shape, dtype=torch.float64)
    for function in (rnnt_op.posteriors, rnnt_op.align):
        actual = vmap(lambda e, f=function: tuple(f(e, *rest)))(encoders)
        singles = [function(e, *rest) for e in encoders]
        expected = tuple(map(torch.stack, zip(*singles, strict=True)))
        torch.testing.assert_close(actual, expected, **EXACT)


def test_masks_of_mapped_calls() -> None:
    """They follow the randomness that vmap is told."""
    problem = random_joint()
    same = problem.encoder.detach().expand(3, *problem.encoder.shape)

    def loss(encoder: Tensor) -> Tensor:
        return rnnt_op.joint_rnnt_loss(encoder, *problem.arguments[1:], dropout=0.5)

    assert len(set(vmap(loss, randomness="same")(same).tolist())) == 1
    assert len(set(vmap(loss, randomness="different")(same).tolist())) == 3
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(loss)(same)


def test_nothing_to_map() -> None:
    problem = random_joint()
    none = problem.encoder.detach().new_empty(0, *problem.encoder.shape)
    with pytest.raises(ValueError, match="over no elements"):
        vmap(lambda e: rnnt_op.joint_rnnt_loss(e, *problem.arguments[1:]))(none)


@pytest.mark.parametrize(("reduction", "compiler"), [("mean", "inductor"), ("none", "aot_eager")])
def test_compiled_transforms(reduction: str, compiler: str) -> None:
    problem = random_joint()
    loss = joint_loss(reduction)
    rest = [a.detach() for a in problem.arguments[1:]]
    encoders = torch.randn(2, *problem.encoder.shape, dtype=torch.float64)
    function = lambda encoder: loss(encoder, *rest).sum()  # noqa: E731
    cases = [
        (vmap(grad(function)), encoders),
        (grad(lambda e: vmap(function)(e).sum()), encoders),
        (grad(function), encoders[0]),
        (jacrev(function), encoders[0]),
        (vmap(function), encoders),
    ]
    # Inductor is given what aot_eager runs, and takes three times as long.
    for transformed, argument in cases[:2] if compiler == "inductor" else cases:
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(argument), transformed(argument), **EXACT)


def test_compiled_maps_of_trained_tensors() -> None:
    problem = random_joint()
    loss = joint_loss("mean")
    encoders = torch.randn(2, *problem.encoder.shape, dtype=torch.float64, requires_grad=True)
    leaves = (encoders, *problem.differentiable[1:])
    function = lambda e: vmap(lambda x: loss(x, *problem.arguments[1:]))(e).sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(encoders), leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(function(encoders), leaves), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_maps_of_compiled_losses(reduction: str) -> None:
    """The compiled graph holds the op, which then sees the tensors of the map."""
    problem = random_joint()
    loss = joint_loss(reduction)
    encoders = torch.randn(2, *problem.encoder.shape, dtype=torch.float64, requires_grad=True)
    leaves = (encoders, *problem.differentiable[1:])
    single = lambda e: loss(e, *problem.arguments[1:]).sum()  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(single, backend="eager")
    for function in (vmap(compiled), vmap(grad(compiled)), grad(lambda e: vmap(compiled)(e).sum())):
        function(encoders.detach())
    actual = torch.autograd.grad(vmap(compiled)(encoders).sum(), leaves)
    torch.testing.assert_close(
        actual, torch.autograd.grad(vmap(single)(encoders).sum(), leaves), **EXACT
    )


def test_compiled_forward_mode_is_refused() -> None:
    problem = random_joint()
    encoder, *rest = [a.detach() for a in problem.arguments]
    loss = lambda e: joint_loss("mean")(e, *rest)  # noqa: E731

    def dual(e: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(e, e)))[0]

    def dual_around(e: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return torch.compile(loss, fullgraph=True, backend="aot_eager")(
                forward_ad.make_dual(e, e)
            )

    inside = [lambda e: torch.func.jvp(loss, (e,), (e,)), dual]
    compiled = [torch.compile(f, fullgraph=True, backend="aot_eager") for f in inside]
    for function in (*compiled, dual_around):
        torch._dynamo.reset()
        # The words are Dynamo's own where it refuses such tensors, as from torch 2.15 on.
        with pytest.raises(Exception, match=r"forward-mode (derivative|AD)"):
            function(encoder)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_autograd(reduction: str) -> None:
    problem = random_joint()
    loss = joint_loss(reduction)
    expected = torch.autograd.grad(loss(*problem.arguments).sum(), problem.differentiable)
    leaves = [t.detach().requires_grad_() for t in problem.differentiable]

    def step() -> None:
        loss(*leaves, *problem.arguments[4:]).sum().backward()

    torch._dynamo.reset()
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True, fullgraph=True, dynamic=False):
        step()
    torch.testing.assert_close(tuple(t.grad for t in leaves), expected, **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("strict", [False, True])
def test_export(reduction: str, strict: bool) -> None:
    problem = random_joint()
    head = rnnt_op.JointRNNTLoss(8, 11, reduction=reduction, dtype=torch.float64)
    arguments = (problem.encoder.detach(), problem.predictor.detach(), *problem.arguments[4:])
    exported = torch.export.export(head, arguments, strict=strict)
    torch.testing.assert_close(exported.module()(*arguments), head(*arguments), **EXACT)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("rnnt_op") for name in names) == 1

    # The exported module holds the op, and every derivative finds it there.
    encoder, *rest = arguments
    again = lambda e: exported.module()(e, *rest).sum()  # noqa: E731
    eager = lambda e: head(e, *rest).sum()  # noqa: E731
    torch.testing.assert_close(grad(again)(encoder), grad(eager)(encoder), **EXACT)
    encoders = torch.stack([encoder, -encoder])
    torch.testing.assert_close(vmap(grad(again))(encoders), vmap(grad(eager))(encoders), **EXACT)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(again, (encoder,), (encoder,))


def test_frozen_tensors() -> None:
    """Every subset of the tensors is trained, with the others frozen."""
    problem = random_joint()
    tensors = problem.arguments
    full = torch.autograd.grad(joint_loss("mean")(*tensors), problem.differentiable)
    for subset in itertools.product([False, True], repeat=4):
        fresh = [t.detach().requires_grad_(w) for t, w in zip(tensors[:4], subset, strict=True)]
        loss = joint_loss("mean")(*fresh, *tensors[4:])
        assert loss.requires_grad == any(subset)
        if any(subset):
            loss.backward()
        for tensor, wanted, expected in zip(fresh, subset, full, strict=True):
            assert (tensor.grad is not None) == wanted
            if wanted:
                torch.testing.assert_close(tensor.grad, expected, **EXACT)
