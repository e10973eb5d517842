"""Against published values and against the sum over every path, written out."""

import math
import mmap

import pytest
import torch
from problems import enumerated_loss, random_joint

import rnnt_op
from rnnt_op import reference
from rnnt_op.activations import ACTIVATIONS, activate

pytestmark = pytest.mark.every_backend

# Logits and costs of the tests that transducer implementations share.
PUBLISHED_LOGITS = [
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
    [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
]


@pytest.mark.parametrize("function", [rnnt_op.rnnt_loss, reference.rnnt_loss])
@pytest.mark.parametrize(("blank", "cost"), [(0, 4.495666773770733), (-1, 5.095666773771)])
def test_published_values(function, blank: int, cost: float) -> None:
    logits = torch.tensor([PUBLISHED_LOGITS], dtype=torch.float64)
    lengths = torch.tensor([2])
    loss = function(logits, torch.tensor([[1, 2]]), lengths, lengths, blank=blank)
    assert float(loss) == pytest.approx(cost, abs=1e-12)


@pytest.mark.parametrize("function", [rnnt_op.rnnt_loss, reference.rnnt_loss])
def test_uniform_logits_count_paths(function) -> None:
    frames, labels, vocab_size = 6, 4, 7
    logits = torch.zeros(1, frames, labels + 1, vocab_size, dtype=torch.float64)
    loss = function(logits, torch.ones(1, labels).long(), torch.tensor([6]), torch.tensor([4]), 0)
    paths = math.comb(frames - 1 + labels, labels)
    assert float(loss) == pytest.approx((frames + labels) * math.log(vocab_size) - math.log(paths))


@pytest.mark.parametrize(("frames", "labels"), [(1, 0), (1, 1), (1, 4), (2, 3), (4, 2), (5, 0)])
@pytest.mark.parametrize("blank", [0, 2, -1])
def test_enumerated_paths_of_logits(frames: int, labels: int, blank: int) -> None:
    vocab_size = 5
    logits = torch.randn(1, frames, labels + 1, vocab_size, dtype=torch.float64).requires_grad_()
    problem = random_joint(1, frames, labels, vocab_size=vocab_size, blank=blank)
    expected = enumerated_loss(
        logits[0].log_softmax(-1), problem.targets[0].tolist(), blank % vocab_size
    )
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    for function in (rnnt_op.rnnt_loss, reference.rnnt_loss):
        loss = function(
            logits, problem.targets, torch.tensor([frames]), torch.tensor([labels]), blank=blank
        )
        (gradient,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "leaky_relu(-0.5)", "hardtanh(-0.25, 2)"])
def test_enumerated_paths_of_a_joint(activation: str) -> None:
    problem = random_joint(1, 4, 3, lengths=[(4, 3)])
    hidden = activate(problem.encoder.unsqueeze(2) + problem.predictor.unsqueeze(1), activation)
    logits = hidden @ problem.weight.t() + problem.bias
    expected = enumerated_loss(logits[0].log_softmax(-1), problem.targets[0].tolist(), 0)
    expected_gradients = torch.autograd.grad(expected, problem.differentiable)
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments, activation=activation)
    gradients = torch.autograd.grad(loss, problem.differentiable)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-11, atol=1e-14)


def uniform_cost(frames: int, labels: int, vocab_size: int) -> float:
    """(T + U) log V − log (number of paths)."""
    paths = (
        math.lgamma(frames + labels) - math.lgamma(frames) - math.lgamma(labels + 1)
    )  # log of (T − 1 + U over U)
    return (frames + labels) * math.log(vocab_size) - paths


@pytest.mark.slow
@pytest.mark.every_backend("emulator", "eager")
def test_joint_past_two_to_the_31_elements() -> None:
    """Zero weights make every posterior uniform, so cost and bias gradient are known."""
    frames, labels, vocab_size = 1000, 100, 22_000
    assert frames * (labels + 1) * vocab_size > 2**31
    bias = torch.zeros(vocab_size, requires_grad=True)
    loss = rnnt_op.joint_rnnt_loss(
        torch.zeros(1, frames, 1),
        torch.zeros(1, labels + 1, 1),
        torch.zeros(vocab_size, 1),
        bias,
        torch.ones(1, labels).long(),
        torch.tensor([frames]),
        torch.tensor([labels]),
    )
    cost = uniform_cost(frames, labels, vocab_size)
    assert float(loss.detach()) == pytest.approx(cost, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, bias)
    expected = torch.full_like(bias, (frames + labels) / vocab_size)
    expected[0] -= frames
    expected[1] -= labels
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.every_backend("emulator", "eager")
def test_logits_past_two_to_the_31_elements() -> None:
    """Uniform except for the last node, which every path passes and which lies past the limit."""
    frames, labels, vocab_size = 300, 150, 50_000
    shape = (1, frames, labels + 1, vocab_size)
    assert math.prod(shape) - vocab_size > 2**31
    if torch.get_default_device().type == "cuda":
        logits = torch.zeros(shape, dtype=torch.bfloat16)
    else:
        zeros = mmap.mmap(-1, 2 * math.prod(shape))  # pages that are only read take no memory
        logits = torch.frombuffer(zeros, dtype=torch.bfloat16).view(shape)
    logits[0, -1, -1, 0] = 8.0
    loss = rnnt_op.rnnt_loss(
        logits, torch.ones(1, labels).long(), torch.tensor([frames]), torch.tensor([labels]), 0
    )
    last = math.log(vocab_size - 1 + math.exp(8.0)) - 8.0
    expected = uniform_cost(frames, labels, vocab_size) - math.log(vocab_size) + last
    assert expected < uniform_cost(frames, labels, vocab_size) - 7
    assert float(loss) == pytest.approx(expected, abs=1e-2)
