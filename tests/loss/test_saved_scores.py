"""Scores of given logits are kept for the gradients where they are small beside the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import relative_error

import rnnt_op
from rnnt_op import functional, topologies
from rnnt_op.scoring import Scorer
from rnnt_op.topology import RNNT

pytestmark = pytest.mark.every_backend

Results = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes whose scores are computed, a number a chunk."""
    counted: list[int] = []
    fill = Scorer._fill

    def counting(scorer: Scorer, scored: Any, rows: Any, *arguments: Any) -> None:
        counted.append(len(rows))
        fill(scorer, scored, rows, *arguments)

    monkeypatch.setattr(Scorer, "_fill", counting)
    return counted


LENGTHS = [(9, 4), (5, 0), (1, 2), (7, 4)]
NODES = sum(t * (u + 1) for t, u in LENGTHS)
TARGETS = torch.tensor([[1, 5, 2, 2], [3, 0, 0, 0], [7, 4, 0, 0], [8, 1, 6, 3]])
INDICES = TARGETS, *(torch.tensor(each) for each in zip(*LENGTHS, strict=True))


def compute(
    monkeypatch: pytest.MonkeyPatch, are_kept: bool, logits: torch.Tensor, **options: Any
) -> Results:
    device = logits.device
    with monkeypatch.context() as patch:
        patch.setattr(functional, "_scores_are_small", lambda *_: are_kept)
        logits = logits.detach().requires_grad_()
        indices = (index.to(device) for index in INDICES)
        losses = rnnt_op.rnnt_loss(logits, *indices, blank=0, reduction="none", **options)
        weights = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=losses.dtype, device=device)
        (gradient,) = torch.autograd.grad(losses, logits, weights)
    return losses.detach(), gradient


def random_logits(dtype: torch.dtype, states: int = 5, vocab_size: int = 12) -> torch.Tensor:
    torch.manual_seed(5)
    logits = torch.randn(4, 9, states, vocab_size, dtype=torch.float64).mul(2)
    return logits.to(torch.get_default_device(), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workspace_bytes": 1, "clamp": 0.2},
        {"fused_log_softmax": False},
        {"topology": topologies.tdt((0, 1, 2)), "fast_emit": 0.1},
        {"normalizer": "hat", "delay_penalty": 0.1},
        {"topology": topologies.star()},
    ],
    ids=["rnnt", "a-sample-at-a-time", "log-probabilities", "tdt", "hat", "star"],
)
def test_gradients_are_the_same(
    options: dict[str, Any],
    dtype: torch.dtype,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits = random_logits(dtype)
    losses, gradient = compute(monkeypatch, False, logits, **options)
    assert sum(scored) == 2 * NODES
    scored.clear()
    same, kept = compute(monkeypatch, True, logits, **options)
    assert sum(scored) == NODES
    assert torch.equal(same, losses)
    assert torch.equal(kept, gradient)
    assert gradient.count_nonzero() > 0


def test_label_ranges(scored: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    low = torch.arange(9).div(3, rounding_mode="floor").expand(4, 9)
    ranges = torch.stack((low, low + 3), 2).contiguous()
    ranges[1] = torch.tensor([0, 1])
    ranges[2] = torch.tensor([0, 3])
    logits = random_logits(torch.float64, states=3)
    ranges = ranges.to(logits.device)
    losses, gradient = compute(monkeypatch, False, logits, label_ranges=ranges)
    nodes = sum(scored)
    scored.clear()
    same, kept = compute(monkeypatch, True, logits, label_ranges=ranges)
    assert 2 * sum(scored) == nodes
    assert losses[0].isfinite()
    assert torch.equal(same, losses)
    assert torch.equal(kept, gradient)


def test_infinite_and_strided_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(torch.float64).mT.contiguous().mT
    logits[0, 3, :, 0], logits[3, 2, 1, 4] = -torch.inf, float("nan")
    for zero_infinity in (False, True):
        losses, gradient = compute(monkeypatch, False, logits, zero_infinity=zero_infinity)
        same, kept = compute(monkeypatch, True, logits, zero_infinity=zero_infinity)
        torch.testing.assert_close(same, losses, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(kept, gradient, rtol=0, atol=0, equal_nan=True)


def test_they_are_kept_where_they_are_small() -> None:
    regular, tdt = RNNT, topologies.tdt((0, 1, 2))
    for topology, dtype, vocab_size, is_small in (
        (regular, torch.float32, 63, False),
        (regular, torch.float32, 64, True),
        (regular, torch.bfloat16, 127, False),
        (regular, torch.bfloat16, 128, True),
        (tdt, torch.float32, 159, False),
        (tdt, torch.float32, 160, True),
    ):
        logits = torch.empty(2, 3, 4, vocab_size, dtype=dtype, device="meta")
        assert functional._scores_are_small(topology, logits) == is_small


def test_what_is_kept_between_loss_and_gradient() -> None:
    """Scores of the padded nodes, and no copy of the logits; nothing without a gradient."""
    vocab_size = 130
    for requires_grad in (False, True):
        logits = random_logits(torch.float32, vocab_size=vocab_size).requires_grad_(requires_grad)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, logits: torch.Tensor = logits) -> torch.Tensor:
            if tensor.data_ptr() != logits.data_ptr() and tensor.dtype == torch.float64:
                sizes.append(tensor.numel())  # noqa: B023
            return tensor

        indices = (index.to(logits.device) for index in INDICES)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = rnnt_op.rnnt_loss(logits, *indices, blank=0)
        assert sizes == ([4 * 9 * 5 * 2] if requires_grad else [])
        assert loss.requires_grad == requires_grad


def test_against_the_reference() -> None:
    """Float64 autograd; the vocabulary is large enough that scores are kept."""
    logits = random_logits(torch.float64, vocab_size=40).requires_grad_()
    indices = [index.to(logits.device) for index in INDICES]
    gradients = []
    for function in (rnnt_op.rnnt_loss, rnnt_op.reference.rnnt_loss):
        loss = function(logits, *indices, blank=0)
        gradients.append(torch.autograd.grad(loss, logits))
    assert relative_error(*gradients) <= 1e-12
