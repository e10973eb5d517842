"""``JointRNNTLoss`` as a module: whatever makes its weight, all of its methods see the same one."""

from collections.abc import Callable

import pytest
import torch
from problems import random_joint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import rnnt_op

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
