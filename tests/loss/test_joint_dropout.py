"""Dropout in the losses: the mask of a seed that torch's generator draws, and nothing else."""

import functools
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from masks import is_kept
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rnnt_op
from rnnt_op import reference
from rnnt_op.backends.records import Dropout


def drawn_mask(problem: JointProblem, seed: int, probability: float) -> Tensor:
    """Zero where the hidden state of a (b, t, u) is dropped, float64, on the CPU. [B, T, U+1, H]"""
    batch, frames, joint_dim = problem.encoder.shape
    states = problem.predictor.shape[1]
    dropout = Dropout(probability, torch.tensor([seed], device="cpu"))
    kept = [
        [
            [[is_kept(dropout, (b, t, u), h) for h in range(joint_dim)] for u in range(states)]
            for t in range(frames)
        ]
        for b in range(batch)
    ]
    return torch.tensor(kept, dtype=torch.float64, device="cpu")


def seed_of_next_call(device: torch.device) -> int:
    """What the next call draws, which stays to be drawn."""
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
        seed = int(torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device))
        torch.cuda.set_rng_state(state, device)
        return seed
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(2**63 - 1, (1,), dtype=torch.int64))


def masked_loss(problem: JointProblem, mask: Tensor, probability: float, **options: Any) -> Tensor:
    """The batched loss of a joint network with that mask."""
    hidden = torch.tanh(problem.encoder.unsqueeze(2) + problem.predictor.unsqueeze(1))
    hidden = hidden * mask.to(hidden.device) / (1 - probability)
    logits = torch.nn.functional.linear(hidden, problem.weight, problem.bias)
    return reference.rnnt_loss(logits, *problem.arguments[4:], problem.blank, **options)


@pytest.mark.every_backend
@pytest.mark.parametrize("probability", [0.1, 0.6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients(probability: float, reduction: str) -> None:
    problem = random_joint(3, 7, 5, joint_dim=10)
    seed = seed_of_next_call(problem.encoder.device)
    loss = rnnt_op.joint_rnnt_loss(
        *problem.arguments,
        dropout=probability,
        reduction=reduction,
        gradient_tolerance=0.0,
        workspace_bytes=20_000,
    )
    gradients = torch.autograd.grad(loss.sum(), problem.differentiable)
    mask = drawn_mask(problem, seed, probability)
    expected = masked_loss(problem, mask, probability, reduction=reduction)
    expected_gradients = torch.autograd.grad(expected.sum(), problem.differentiable)
    assert relative_error([loss.detach()], [expected.detach()]) <= 1e-13
    assert relative_error(gradients, expected_gradients) <= 1e-12


@pytest.mark.every_backend
@pytest.mark.parametrize(
    ("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_dtypes_of_the_loss(dtype: torch.dtype, bar: float) -> None:
    problem = random_joint(3, 7, 5, joint_dim=10, dtype=dtype)
    seed = seed_of_next_call(problem.encoder.device)
    _, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, dropout=0.3)
    exact = problem.to(torch.float64)
    expected = masked_loss(exact, drawn_mask(problem, seed, 0.3), 0.3)
    assert relative_error(gradients, torch.autograd.grad(expected, exact.differentiable)) <= bar


@pytest.mark.every_backend
def test_a_node_keeps_its_mask_however_the_work_is_cut() -> None:
    problem = random_joint(4, 20, 9, joint_dim=12)
    results = []
    for workspace_bytes in (1, 50_000, None):
        torch.manual_seed(3)
        results.append(
            loss_and_gradients(
                rnnt_op.joint_rnnt_loss, problem, dropout=0.4, workspace_bytes=workspace_bytes
            )
        )
    for loss, gradients in results[1:]:
        assert relative_error([loss], [results[0][0]]) <= 1e-14
        assert relative_error(gradients, results[0][1]) <= 1e-13
    other, _ = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, dropout=0.4)
    assert not torch.equal(other, results[0][0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointing_repeats_the_mask(reduction: str) -> None:
    problem = random_joint()

    def loss_of(*arguments: Tensor) -> Tensor:
        return rnnt_op.joint_rnnt_loss(*arguments, dropout=0.4, reduction=reduction).sum()

    def checkpointed(*arguments: Tensor) -> Tensor:
        return checkpoint(loss_of, *arguments, use_reentrant=False)

    results = []
    for function in (loss_of, checkpointed):
        torch.manual_seed(5)
        loss = function(*problem.arguments)
        torch.manual_seed(99)  # what is drawn in between does not matter
        results.append((loss, *torch.autograd.grad(loss, problem.differentiable)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(("reduction", "backend"), [("mean", "inductor"), ("none", "aot_eager")])
def test_a_compiled_step_differentiates_the_mask_of_its_loss(reduction: str, backend: str) -> None:
    problem = random_joint()

    @functools.partial(torch.compile, backend=backend, fullgraph=True)
    def step(encoder: Tensor) -> Tensor:
        arguments = (encoder, *problem.arguments[1:])
        return rnnt_op.joint_rnnt_loss(*arguments, dropout=0.4, reduction=reduction).sum()

    def loss_at(encoder: Tensor) -> Tensor:
        torch.manual_seed(11)
        return step(encoder)

    encoder = problem.encoder.detach().requires_grad_()
    loss = loss_at(encoder)
    (gradient,) = torch.autograd.grad(loss, encoder)
    direction = torch.randn_like(gradient)
    h = 1e-5
    ahead, behind = (
        loss_at((encoder + s * h * direction).detach().requires_grad_()) for s in (1, -1)
    )
    slope = float((ahead - behind).detach()) / (2 * h)
    assert slope == pytest.approx(float((gradient * direction).sum()), rel=1e-7)
    torch.manual_seed(12)
    assert not torch.equal(step(encoder), loss)


def test_no_dropout_draws_nothing() -> None:
    problem = random_joint()
    before = torch.get_rng_state()
    loss = rnnt_op.joint_rnnt_loss(*problem.arguments, dropout=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loss, rnnt_op.joint_rnnt_loss(*problem.arguments))


def test_module_drops_while_it_trains() -> None:
    module = rnnt_op.JointRNNTLoss(8, 11, dropout=0.4, dtype=torch.float64)
    problem = random_joint()
    tensors = (problem.encoder, problem.predictor, *problem.arguments[4:])
    first, second = module(*tensors), module(*tensors)
    assert not torch.equal(first, second)
    module.eval()
    plain = rnnt_op.joint_rnnt_loss(
        problem.encoder, problem.predictor, module.weight, module.bias, *problem.arguments[4:]
    )
    assert torch.equal(module(*tensors), plain)
    assert "dropout=0.4" in repr(module)


def test_expected_hidden_states_stay() -> None:
    """With the identity, the mean of the loss's gradient in the bias's place is that of the logits'."""
    problem = random_joint(1, 3, 2, joint_dim=16, scale=0.05)
    plain, _ = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, activation="identity")
    losses = [
        rnnt_op.joint_rnnt_loss(*problem.arguments, dropout=0.5, activation="identity").detach()
        for _ in range(400)
    ]
    drawn = torch.stack(losses)
    # Logits are small, so the loss is close to linear in them.
    assert abs(float(drawn.mean() - plain)) < 5 * float(drawn.std()) / 400**0.5 + 1e-3


def test_wrong_dropout() -> None:
    problem = random_joint()

    def error_of(function: Any, *arguments: Any, **options: Any) -> str:
        with pytest.raises((TypeError, ValueError)) as error:
            function(*arguments, **options)
        return str(error.value)

    without = (problem.encoder, problem.predictor, None)
    others = problem.arguments[4:]
    messages = [
        error_of(rnnt_op.joint_rnnt_loss, *problem.arguments, dropout=1.0),
        error_of(rnnt_op.joint_rnnt_loss, *problem.arguments, dropout=-0.1),
        error_of(rnnt_op.joint_rnnt_loss, *problem.arguments, dropout=float("nan")),
        error_of(rnnt_op.JointRNNTLoss, 8, 11, dropout=2),
        error_of(rnnt_op.joint_rnnt_loss, *without, None, *others),
        error_of(
            rnnt_op.joint_rnnt_loss, *without, None, *others, activation="identity", dropout=0.1
        ),
        error_of(rnnt_op.joint_rnnt_loss, *without, problem.bias, *others, activation="identity"),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
dropout: expected a probability in [0, 1), got 1.0
dropout: expected a probability in [0, 1), got -0.1
dropout: expected a probability in [0, 1), got nan
dropout: expected a probability in [0, 1), got 2
activation: expected 'identity' where weight is None and the logits are encoder + predictor, got 'tanh'
dropout: expected 0 where weight is None, got 0.1
bias: expected None where weight is None, got a tensor""",
    )


@pytest.mark.every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss_without_an_output_layer(dtype: torch.dtype, reduction: str) -> None:
    problem = random_joint(3, 7, 5, joint_dim=9, vocab_size=9, dtype=dtype)
    tensors = (problem.encoder, problem.predictor)
    options = {"activation": "identity", "reduction": reduction}
    loss = rnnt_op.joint_rnnt_loss(
        *tensors, None, None, *problem.arguments[4:], workspace_bytes=20_000, **options
    )
    gradients = torch.autograd.grad(loss.sum(), tensors)
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = reference.joint_rnnt_loss(*exact, None, None, *problem.arguments[4:], **options)
    expected_gradients = torch.autograd.grad(expected.sum(), exact)
    assert relative_error([loss], [expected]) <= (1e-13 if dtype == torch.float64 else 1e-6)
    assert [g.dtype for g in gradients] == [dtype, dtype]
    bar = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    assert relative_error(gradients, expected_gradients) <= bar[dtype]
