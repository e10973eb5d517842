"""Derivatives: what is supported is right, and what is not is refused in words."""

import ctypes
import mmap

import pytest
import torch
from expecttest import assert_expected_inline
from problems import CountCalls, JointProblem, joint_arguments, random_joint
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import rnnt_op

pytestmark = pytest.mark.every_backend

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


def loss_of(problem: JointProblem, reduction: str):
    """The summed loss as a function of the encoder alone."""

    def loss(encoder):
        arguments = (encoder, *problem.arguments[1:])
        return rnnt_op.joint_rnnt_loss(*arguments, reduction=reduction).sum()

    return loss


@REDUCTIONS
def test_gradcheck(reduction: str) -> None:
    problem = random_joint(2, 3, 2, joint_dim=2, vocab_size=3)

    def function(*tensors):
        return rnnt_op.joint_rnnt_loss(
            *tensors, *problem.arguments[4:], reduction=reduction, gradient_tolerance=0.0
        )

    assert torch.autograd.gradcheck(function, problem.differentiable)


def test_the_last_backward_scales_gradients_in_their_place() -> None:
    """Else a batch's gradients would exist twice."""
    problem = random_joint()
    addresses = []

    def record(tensor):
        addresses.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = rnnt_op.joint_rnnt_loss(*problem.arguments)
    kept = torch.autograd.grad(2 * loss, problem.differentiable, retain_graph=True)
    assert not {g.data_ptr() for g in kept} & set(addresses)
    last = torch.autograd.grad(3 * loss, problem.differentiable)
    assert {g.data_ptr() for g in last} <= set(addresses)
    torch.testing.assert_close(last, tuple(1.5 * g for g in kept), rtol=1e-14, atol=0)


def read_only(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory where a write ends the process, as of a file mapped for reading."""
    memory = mmap.mmap(-1, max(tensor.nbytes, 1))
    memory.write(tensor.numpy().tobytes())
    ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), len(memory), 1
    )
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)


@pytest.mark.parametrize(
    "unpack",
    [
        pytest.param(read_only, id="read-only"),
        pytest.param(lambda t: t.repeat_interleave(2, -1)[..., ::2], id="strided"),
        pytest.param(lambda t: nn.Parameter(t.clone()), id="subclass"),
    ],
)
def test_what_hooks_unpack_is_not_written(unpack) -> None:
    problem = random_joint()
    expected = torch.autograd.grad(
        3 * rnnt_op.joint_rnnt_loss(*problem.arguments), problem.differentiable
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), unpack):
        loss = rnnt_op.joint_rnnt_loss(*problem.arguments)
    actual = torch.autograd.grad(3 * loss, problem.differentiable)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_the_caller_took_stay(dtype: torch.dtype) -> None:
    problem = random_joint(dtype=dtype)
    op = torch.ops.rnnt_op.joint_loss_with_grads
    arguments = joint_arguments(problem.arguments).values()
    loss, *gradients = op(torch.ones(3), *arguments, [True] * 4)
    gradients = [g.detach() for g in gradients]
    before = [g.clone() for g in gradients]
    scaled = torch.autograd.grad(2 * loss, problem.differentiable)
    torch.testing.assert_close(gradients, before, rtol=0, atol=0)
    torch.testing.assert_close(scaled, tuple(2 * g for g in before), rtol=0, atol=0)


@REDUCTIONS
def test_double_backward_is_refused(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)(problem.encoder)
    (gradient,) = torch.autograd.grad(loss, problem.encoder, create_graph=True)
    with pytest.raises(RuntimeError) as error:
        gradient.square().sum().backward()
    assert_expected_inline(
        str(error.value),
        """\
rnnt_op: the transducer loss has no second derivative. For gradients of its gradients \
(create_graph=True, gradient penalties, torch.func.hessian) use rnnt_op.reference.""",
    )


def test_double_backward_of_logits_is_refused() -> None:
    problem = random_joint()
    logits = torch.randn(3, 7, 6, 11, requires_grad=True)
    loss = rnnt_op.rnnt_loss(logits, *problem.arguments[4:], blank=0)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@REDUCTIONS
def test_second_derivatives_are_refused_where_the_graph_is_freed(reduction: str) -> None:
    """As of a loss that is scaled by what is trained, too."""
    problem = random_joint()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = scale * loss_of(problem, reduction)(problem.encoder)
    (first,) = torch.autograd.grad(loss, problem.encoder, create_graph=True, retain_graph=False)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), (scale, problem.encoder))


@REDUCTIONS
def test_create_graph_alone_is_fine(reduction: str) -> None:
    """A gradient penalty elsewhere in the model makes create_graph=True pass through here."""
    problem = random_joint()
    loss = loss_of(problem, reduction)
    (expected,) = torch.autograd.grad(loss(problem.encoder), problem.encoder)
    (gradient,) = torch.autograd.grad(loss(problem.encoder), problem.encoder, create_graph=True)
    assert torch.equal(gradient, expected)


@REDUCTIONS
def test_forward_mode_is_refused(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    encoder = problem.encoder.detach()
    with pytest.raises(RuntimeError) as error:
        torch.func.jvp(loss, (encoder,), (torch.ones_like(encoder),))
    assert_expected_inline(
        str(error.value),
        """\
rnnt_op: the transducer loss has no forward-mode derivative (torch.func.jvp, \
torch.autograd.forward_ad). Use reverse mode (backward, torch.func.grad, torch.func.vjp) or \
rnnt_op.reference.""",
    )
    for requires_grad in (False, True):
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode"):
            loss(forward_ad.make_dual(encoder.requires_grad_(requires_grad), encoder))


@REDUCTIONS
def test_functional_gradients_are_right(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    (expected,) = torch.autograd.grad(loss(problem.encoder), problem.encoder)
    encoder = problem.encoder.detach()
    assert torch.equal(torch.func.grad(loss)(encoder), expected)
    value, pullback = torch.func.vjp(loss, encoder)
    torch.testing.assert_close(pullback(torch.full_like(value, 3.0))[0], 3 * expected)
    assert torch.equal(torch.func.jacrev(loss)(encoder), expected)


@REDUCTIONS
def test_vmap_is_right(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    encoders = torch.randn(3, *problem.encoder.shape, dtype=torch.float64)
    expected = torch.stack([loss(e) for e in encoders])
    torch.testing.assert_close(torch.func.vmap(loss)(encoders), expected, rtol=1e-14, atol=0)
    expected = torch.stack([torch.func.grad(loss)(e) for e in encoders])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(loss))(encoders), expected, rtol=1e-12, atol=1e-15
    )


@REDUCTIONS
def test_nested_functional_derivatives_are_refused(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    encoder = problem.encoder.detach()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda e: torch.func.grad(loss)(e).square().sum())(encoder)
    with pytest.raises(RuntimeError, match="no forward-mode"):
        torch.func.hessian(loss)(encoder)


@REDUCTIONS
def test_no_grad_and_inference_mode(reduction: str) -> None:
    problem = random_joint()
    expected = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction=reduction)
    assert expected.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction=reduction)
        assert not loss.requires_grad
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-14, atol=0)


@REDUCTIONS
def test_checkpointing(reduction: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    (expected,) = torch.autograd.grad(loss(problem.encoder), problem.encoder)
    (gradient,) = torch.autograd.grad(
        checkpoint(loss, problem.encoder, use_reentrant=False), problem.encoder
    )
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    ("reduction", "op"), [("mean", "joint_loss_with_grads"), ("none", "joint_loss")]
)
def test_selective_checkpointing_saves_the_op(reduction: str, op: str) -> None:
    problem = random_joint()
    loss = loss_of(problem, reduction)
    (expected,) = torch.autograd.grad(loss(problem.encoder), problem.encoder)

    def policy(_, func, *args, **kwargs):
        must_save = func is getattr(torch.ops.rnnt_op, op).default
        return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE

    with CountCalls() as counter:
        value = checkpoint(
            loss,
            problem.encoder * 1.0,
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        (gradient,) = torch.autograd.grad(value, problem.encoder)
    assert torch.equal(gradient, expected)
    assert counter.calls[op] == 1
