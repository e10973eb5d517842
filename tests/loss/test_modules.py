"""``JointRNNTLoss`` as a module: whatever makes its weight, all of its methods see the same one."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from problems import random_joint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rnnt_op
from rnnt_op import reference

Head = rnnt_op.JointRNNTLoss


def norm_of_columns(head: Head) -> Tensor:
    return head.weight_g * head.weight_v / head.weight_v.norm(dim=1, keepdim=True)


def spectrum(head: Head) -> Tensor:
    sigma = head.weight_u @ head.weight_orig @ head.weight_v
    return head.weight_orig / sigma


WRAPPERS: dict[str, tuple[Callable[[Head], object], Callable[[Head], Tensor]]] = {
    "weight_norm": (lambda head: weight_norm(head, "weight"), norm_of_columns),
    "spectral_norm": (lambda head: spectral_norm(head, "weight"), spectrum),
    "prune": (
        lambda head: prune.l1_unstructured(head, "weight", amount=0.5),
        lambda head: head.weight_orig * head.weight_mask,
    ),
    "prune twice": (
        lambda head: [prune.random_unstructured(head, "weight", amount=0.3) for _ in range(2)],
        lambda head: head.weight_orig * head.weight_mask,
    ),
    "parametrized weight_norm": (
        lambda head: parametrizations.weight_norm(head, "weight"),
        lambda head: head.weight,
    ),
    "parametrized spectral_norm": (
        lambda head: parametrizations.spectral_norm(head, "weight"),
        lambda head: head.weight,
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("name", WRAPPERS)
def test_methods_see_the_weight_after_a_step(name: str) -> None:
    wrap, weight_of = WRAPPERS[name]
    problem = random_joint()
    states = problem.encoder.detach(), problem.predictor.detach()
    labels = problem.arguments[4:]
    head = Head(8, 11, dtype=torch.float64)
    wrap(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        head(*states, *labels).backward()
        assert all(p.grad is not None for p in head.parameters())
        optimizer.step()
    head.eval()  # or another power iteration would change what spectral_norm gives

    weight, bias = weight_of(head).detach(), head.bias.detach()
    logits = nn.functional.linear((states[0][:, :, None] + states[1][:, None]).tanh(), weight, bias)
    actual = head.logits(states[0][:, :, None], states[1][:, None])
    torch.testing.assert_close(actual, logits, rtol=1e-12, atol=1e-12)
    for method, function in ((head.posteriors, rnnt_op.posteriors), (head.align, rnnt_op.align)):
        expected = function(*states, weight, bias, *labels)
        torch.testing.assert_close(method(*states, *labels), expected, rtol=1e-12, atol=1e-12)
    expected = rnnt_op.joint_rnnt_loss(*states, weight, bias, *labels)
    torch.testing.assert_close(head(*states, *labels), expected, rtol=1e-12, atol=1e-12)


def projected(states: Tensor, layer: nn.Linear | None) -> Tensor:
    """Written out. [..., H]"""
    return states if layer is None else states @ layer.weight.t() + layer.bias


@pytest.mark.parametrize(
    "dims", [{"encoder_dim": 5, "predictor_dim": 3}, {"encoder_dim": 8}, {"predictor_dim": 3}]
)
def test_projections(dims: dict[str, int]) -> None:
    """Every method applies them; gradients reach them and the states."""
    problem = random_joint()
    labels = problem.arguments[4:]
    head = Head(8, 11, **dims, activation="gelu", dtype=torch.float64)
    states = [
        torch.randn(*given.shape[:2], dims.get(name, 8), dtype=torch.float64, requires_grad=True)
        for name, given in (
            ("encoder_dim", problem.encoder),
            ("predictor_dim", problem.predictor),
        )
    ]
    names = [f"{name.removesuffix('_dim')}_projection" for name in dims]
    expected_keys = {"weight", "bias"} | {f"{n}.{p}" for n in names for p in ("weight", "bias")}
    assert set(head.state_dict()) == expected_keys
    assert {name: layer.in_features for name, layer in head.named_children()} == dict(
        zip(names, dims.values(), strict=True)
    )

    inputs = [*states, *head.parameters()]
    encoder = projected(states[0], head.encoder_projection)
    predictor = projected(states[1], head.predictor_projection)
    network = encoder, predictor, head.weight, head.bias
    expected = reference.joint_rnnt_loss(*network, *labels, activation="gelu")
    loss = head(*states, *labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(expected, inputs, retain_graph=True),
        rtol=1e-10,
        atol=1e-12,
    )
    logits = nn.functional.gelu(encoder[:, :, None] + predictor[:, None]) @ head.weight.t()
    actual = head.logits(states[0][:, :, None], states[1][:, None])
    torch.testing.assert_close(actual, logits + head.bias, rtol=1e-12, atol=1e-12)
    for method, function in ((head.posteriors, rnnt_op.posteriors), (head.align, rnnt_op.align)):
        found = function(*network, *labels, activation="gelu")
        torch.testing.assert_close(method(*states, *labels), found, rtol=1e-11, atol=1e-11)

    before = [parameter.detach().clone() for parameter in head.parameters()]
    head.reset_parameters()
    assert all((p != old).all() for p, old in zip(head.parameters(), before, strict=True))


def test_projections_under_autocast() -> None:
    """As linear layers outside of the module."""
    problem = random_joint(dtype=torch.float32)
    head = Head(6, 11, encoder_dim=8, predictor_dim=8)
    encoder, predictor = problem.encoder.detach(), problem.predictor.detach()
    labels = problem.arguments[4:]
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(encoder, predictor, *labels)
        states = head.encoder_projection(encoder), head.predictor_projection(predictor)
        assert states[0].dtype == torch.bfloat16
        expected = rnnt_op.joint_rnnt_loss(*states, head.weight, head.bias, *labels)
    assert torch.equal(loss, expected)


def test_sizes_that_do_not_fit() -> None:
    problem = random_joint()
    arguments = *problem.arguments[:2], *problem.arguments[4:]
    messages = []
    for head in (Head(7, 11), Head(8, 11, encoder_dim=5), Head(8, 11, predictor_dim=3)):
        for method in (head, head.align, lambda *given, head=head: head.logits(*given[:2])):
            with pytest.raises(ValueError, match=r"coder: |predictor: ") as caught:
                method(*arguments)
            messages.append(str(caught.value))
    assert_expected_inline(
        "\n".join(dict.fromkeys(messages)),
        """\
encoder: expected size 7 in the last dimension, joint_dim, got (3, 7, 8); give encoder_dim to have it projected
encoder: expected size 5 in the last dimension, encoder_dim, got (3, 7, 8)
predictor: expected size 3 in the last dimension, predictor_dim, got (3, 6, 8)""",
    )
