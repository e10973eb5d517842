"""The joint loss against float64 autograd through the batched reference, over everything callers
vary."""

from dataclasses import replace

import pytest
import torch
from problems import JointProblem, loss_and_gradients, random_joint, relative_error

import rnnt_op
from rnnt_op import reference
from rnnt_op.activations import ACTIVATIONS
from rnnt_op.backends import backend_for

pytestmark = pytest.mark.every_backend


def check(problem: JointProblem, tolerance: float = 1e-12, **options) -> None:
    """Loss and gradients of a float64 or float32 problem equal the float64 reference's."""
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    options = {k: v for k, v in options.items() if k in ("activation", "reduction")}
    expected, expected_gradients = loss_and_gradients(
        reference.joint_rnnt_loss, problem.to(torch.float64), **options
    )
    assert relative_error([loss], [expected]) <= tolerance
    assert relative_error(gradients, expected_gradients) <= tolerance
    for gradient, tensor in zip(gradients, problem.differentiable, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.dtype == tensor.dtype


@pytest.mark.parametrize("seed", range(40))
def test_random_ragged(seed: int) -> None:
    torch.manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), ()))]

    dtype = pick(torch.float64, torch.float32)
    vocab_size = pick(2, 5, 33)
    problem = random_joint(
        batch=pick(1, 2, 5),
        frames=pick(1, 2, 9, 20),
        labels=pick(0, 1, 4, 12, 25),
        joint_dim=pick(1, 3, 16),
        vocab_size=vocab_size,
        bias=pick(True, False),
        blank=pick(0, vocab_size - 1, -1),
        dtype=dtype,
        scale=pick(0.3, 1.0, 3.0),
    )
    index = pick(torch.int32, torch.int64)
    problem = replace(
        problem,
        targets=problem.targets.to(index),
        encoder_lengths=problem.encoder_lengths.to(pick(torch.int32, torch.int64)),
        target_lengths=problem.target_lengths.to(pick(torch.int32, torch.int64)),
    )
    poisoned = problem.poisoned()
    options = {
        "activation": pick(*ACTIVATIONS),
        "reduction": pick("none", "sum", "mean"),
        "workspace_bytes": pick(None, 1, 10_000, 100_000),
    }
    loss, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, poisoned, gradient_tolerance=pick(None, 0.0), **options
    )
    options.pop("workspace_bytes")
    expected, expected_gradients = loss_and_gradients(
        reference.joint_rnnt_loss, problem.to(torch.float64), **options
    )
    plain, plain_gradients = loss_and_gradients(reference.joint_rnnt_loss, problem, **options)
    hair = {torch.float64: 1e-12, torch.float32: 2e-6}[dtype]
    assert relative_error([loss], [expected]) <= relative_error([plain], [expected]) + hair
    assert (
        relative_error(gradients, expected_gradients)
        <= relative_error(plain_gradients, expected_gradients) + hair
    )


@pytest.mark.parametrize("tensor", ["encoder", "predictor", "weight", "bias"])
@pytest.mark.parametrize("layout", ["permuted", "expanded", "sliced"])
def test_strides(tensor: str, layout: str) -> None:
    problem = random_joint(2, 6, 4)
    value = getattr(problem, tensor).detach()
    if layout == "permuted":
        value = value.permute(*reversed(range(value.dim()))).contiguous()
        value = value.permute(*reversed(range(value.dim())))
    elif layout == "expanded":
        value = value[:1].expand_as(value)
    else:
        value = torch.stack([value, torch.full_like(value, float("nan"))], -1)[..., 0]
    check(replace(problem, **{tensor: value.requires_grad_()}))


def test_index_strides() -> None:
    problem = random_joint(3, 6, 4)
    check(
        replace(
            problem,
            targets=problem.targets.t().contiguous().t(),
            encoder_lengths=torch.stack([problem.encoder_lengths] * 2, 1)[:, 0],
            target_lengths=torch.tensor(3).expand(3),
        )
    )


@pytest.mark.parametrize(
    ("frames", "labels"), [(1, 0), (1, 7), (9, 0), (2, 60), (60, 2), (300, 1), (1, 300)]
)
def test_extreme_shapes(frames: int, labels: int) -> None:
    check(random_joint(2, frames, labels))


def test_vocabulary_of_blank_alone() -> None:
    problem = random_joint(2, 4, 0, vocab_size=1)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert loss == 0
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_hidden_states_without_elements(dtype: torch.dtype) -> None:
    """All that is left is the bias."""
    problem = random_joint(2, 4, 3, joint_dim=0, dtype=dtype)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    bias = problem.bias.detach().double().requires_grad_()
    logits = bias.expand(2, 4, 4, -1)
    expected = reference.rnnt_loss(logits, *problem.arguments[4:], blank=0)
    (d_bias,) = torch.autograd.grad(expected, bias)
    tolerance = {"rtol": 1e-6, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(gradients[3].double(), d_bias, **tolerance)


def test_workspace_changes_nothing_but_rounding() -> None:
    problem = random_joint(6, 15, 9)
    for workspace_bytes in (1, 5_000, 50_000, 10**9):
        check(problem, workspace_bytes=workspace_bytes)


def test_padding_has_zero_gradient() -> None:
    problem = random_joint(2, 6, 4, lengths=[(6, 1), (3, 4)])
    _, (d_encoder, d_predictor, _, _) = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert (d_encoder[1, 3:] == 0).all()
    assert (d_predictor[0, 2:] == 0).all()
    assert (d_encoder[1, :3] != 0).all()


def test_longer_padding_changes_nothing() -> None:
    problem = random_joint(3, 6, 4)
    padded = replace(
        problem,
        encoder=torch.nn.functional.pad(problem.encoder, (0, 0, 0, 5), value=float("nan")),
        predictor=torch.nn.functional.pad(problem.predictor, (0, 0, 0, 3), value=float("nan")),
        targets=torch.nn.functional.pad(problem.targets, (0, 3), value=-7),
    )
    expected = rnnt_op.joint_rnnt_loss(*problem.arguments)
    actual = rnnt_op.joint_rnnt_loss(*padded.arguments)
    assert actual == expected
    for gradient, tensor in zip(
        torch.autograd.grad(actual, problem.differentiable),
        torch.autograd.grad(expected, problem.differentiable),
        strict=True,
    ):
        assert torch.equal(gradient, tensor)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(wanted: tuple[int, ...], reduction: str) -> None:
    problem = random_joint()
    _, expected = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction=reduction)
    for i, tensor in enumerate(problem.differentiable):
        tensor.requires_grad_(i in wanted)
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction=reduction).sum()
    loss.backward()
    for i, tensor in enumerate(problem.differentiable):
        if i in wanted:
            assert torch.equal(tensor.grad, expected[i])
        else:
            assert tensor.grad is None


def test_repeated_runs_are_bitwise_equal() -> None:
    problem = random_joint(5, 40, 17, joint_dim=33, vocab_size=65, dtype=torch.float32)
    first = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, workspace_bytes=300_000)
    for _ in range(3):
        again = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, workspace_bytes=300_000)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


def test_permuting_the_batch_permutes_the_result() -> None:
    problem = random_joint(5, 9, 6)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = JointProblem(
        problem.encoder.detach()[order].requires_grad_(),
        problem.predictor.detach()[order].requires_grad_(),
        problem.weight,
        problem.bias,
        problem.targets[order],
        problem.encoder_lengths[order],
        problem.target_lengths[order],
    )
    losses, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction="none")
    permuted_losses, permuted_gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss, permuted, reduction="none"
    )
    torch.testing.assert_close(permuted_losses, losses[order], rtol=1e-14, atol=0)
    expected = [gradients[0][order], gradients[1][order], *gradients[2:]]
    assert relative_error(permuted_gradients, expected) <= 1e-14


def test_gradient_of_the_sum_is_the_sum_of_gradients() -> None:
    problem = random_joint(4, 9, 6)
    _, total = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, reduction="sum")
    losses = rnnt_op.joint_rnnt_loss(*problem.arguments, reduction="none")
    parts = [
        torch.autograd.grad(loss, problem.differentiable, retain_graph=True) for loss in losses
    ]
    summed = [torch.stack(p).sum(0) for p in zip(*parts, strict=True)]
    assert relative_error(summed, total) <= 1e-14


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_upstream_gradient_scales(reduction: str) -> None:
    problem = random_joint(3)
    options = {"reduction": reduction}
    upstream = torch.rand(3 if reduction == "none" else (), dtype=torch.float64) - 0.5
    actual = torch.autograd.grad(
        rnnt_op.joint_rnnt_loss(*problem.arguments, **options), problem.differentiable, upstream
    )
    expected = torch.autograd.grad(
        reference.joint_rnnt_loss(*problem.arguments, **options), problem.differentiable, upstream
    )
    assert relative_error(actual, expected) <= 1e-12


def test_backward_twice_with_retained_graph() -> None:
    problem = random_joint()
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments)
    first = torch.autograd.grad(loss, problem.differentiable, retain_graph=True)
    second = torch.autograd.grad(loss, problem.differentiable)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_module_equals_function() -> None:
    problem = random_joint(dtype=torch.float32)
    module = rnnt_op.JointRNNTLoss(8, 11)
    loss = module(*problem.arguments[:2], *problem.arguments[4:])
    expected = rnnt_op.joint_rnnt_loss(
        *problem.arguments[:2], module.weight, module.bias, *problem.arguments[4:]
    )
    assert torch.equal(loss, expected)
    logits = module.logits(problem.encoder.unsqueeze(2), problem.predictor.unsqueeze(1))
    from_logits = rnnt_op.rnnt_loss(logits, *problem.arguments[4:], blank=0)
    torch.testing.assert_close(from_logits, loss)
    assert repr(module) == (
        "JointRNNTLoss(joint_dim=8, vocab_size=11, bias=True, blank=0, activation='tanh', "
        "reduction='mean')"
    )
    assert rnnt_op.JointRNNTLoss(8, 11, bias=False).bias is None


@pytest.mark.every_backend
def test_marked_tests_run_on_the_backend_that_they_name(backend: str) -> None:
    """Or all of them would pass on one."""
    served = backend_for(torch.empty(0).device)
    name = getattr(served, "__name__", type(served).__name__)
    expected = {"native": "NativeBackend", "eager": "rnnt_op.backends.eager"}
    assert name == expected.get(backend, "CudaBackend")
