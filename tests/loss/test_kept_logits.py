"""Logits that live from their scores to their gradients, where there is room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import loss_and_gradients, random_joint, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op import logits, plan, reference
from rnnt_op.backends import backend_for, native, sources
from rnnt_op.backends.gemm import CpuMatrices
from rnnt_op.backends.joint import OutputLayerChunk

LENGTHS = [(30, 9), (25, 4), (1, 0), (12, 7)]
NODES = sum(t * (u + 1) for t, u in LENGTHS)

# Enough for all groups; for that of one node; for none.
ROOM = [None, 20_000, 1]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each product that makes logits."""
    rows_of: list[int] = []
    compute = OutputLayerChunk.logits

    def counted(chunk: OutputLayerChunk, states: Any, rows: Any, out: Any = None) -> Any:
        rows_of.append(len(rows))
        return compute(chunk, states, rows, out)

    monkeypatch.setattr(OutputLayerChunk, "logits", counted)
    return rows_of


@pytest.mark.parametrize("gradient_tolerance", [0.0, 0.05])
@pytest.mark.parametrize("workspace_bytes", ROOM)
def test_gradients_are_exact(workspace_bytes: int | None, gradient_tolerance: float) -> None:
    problem = random_joint(4, 30, 9, lengths=LENGTHS)
    options: dict[str, Any] = {"reduction": "none"}
    losses, gradients = loss_and_gradients(
        rnnt_op.joint_rnnt_loss,
        problem,
        workspace_bytes=workspace_bytes,
        gradient_tolerance=gradient_tolerance,
        **options,
    )
    expected_losses, expected = loss_and_gradients(reference.joint_rnnt_loss, problem, **options)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=0)
    assert relative_error(gradients, expected) <= max(1e-12, 2 * gradient_tolerance)


@pytest.mark.parametrize("library", ["onednn", "blas"])
def test_same_gradients_with_and_without(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Whether the product is written where it is kept, or copied."""
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", library)
    monkeypatch.setattr(backend_for(torch.device("cpu")), "CACHE_BYTES", 0)  # small chunks
    problem = random_joint(4, 30, 9, lengths=LENGTHS, dtype=torch.float32)
    _, kept = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    monkeypatch.setattr(CpuMatrices, "KEEPS_LOGITS", False)
    _, anew = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert relative_error(kept, anew) <= 4 * torch.finfo(torch.float32).eps


def test_no_product_is_computed_twice(products: list[int]) -> None:
    problem = random_joint(4, 30, 9, lengths=LENGTHS)
    loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)
    assert sum(products) == NODES


def test_products_are_computed_again_without_room(products: list[int]) -> None:
    problem = random_joint(4, 30, 9, lengths=LENGTHS)
    loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0, workspace_bytes=20_000
    )
    assert NODES < sum(products) < 2 * NODES
    products.clear()
    loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0, workspace_bytes=1)
    assert sum(products) == 2 * NODES


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are too large to keep their logits, and have parts that are not."""
    monkeypatch.setattr(plan, "MOST_KEPT_BYTES", 0)
    monkeypatch.setattr(backend_for(torch.device("cpu")), "CACHE_BYTES", 0)
    monkeypatch.setattr(native, "_LEAST_WORK", 0)


@pytest.mark.usefixtures("parts")
def test_parts_of_a_group_keep_their_logits(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = 2 * [(150, 14), (133, 12), (160, 13), (141, 14)]
    problem = random_joint(8, 160, 14, lengths=lengths, scale=0.1)
    nodes = int((problem.encoder_lengths * (problem.target_lengths + 1)).sum())
    expected = loss_and_gradients(reference.joint_rnnt_loss, problem)[1]
    gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)[1]
    assert relative_error(gradients, expected) <= 1e-12
    assert sum(products) == nodes

    # Too unsure to leave out a node, which is known after some.
    products.clear()
    gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)[1]
    assert relative_error(gradients, expected) <= 1e-12
    assert nodes < sum(products) < 9 / 8 * nodes

    monkeypatch.setattr(plan, "_LEAST_PARTS", 10**9)
    products.clear()
    loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert sum(products) > 1.3 * nodes


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("logits were kept")

    monkeypatch.setattr(logits._KeptLogits, "add", refuse)
    problem = random_joint(4, 30, 9, lengths=LENGTHS)
    with torch.no_grad():
        rnnt_op.joint_rnnt_loss(*problem.arguments)
    rnnt_op.joint_rnnt_loss(*problem.arguments, reduction="none")
    with pytest.raises(AssertionError, match="logits were kept"):
        loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)


def test_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the score pass asked for in one go, as it does where it is unsure."""
    split = logits._KeptLogits.split
    parts: list[tuple[Tensor, Tensor]] = []

    def recorded(kept: Any, numbers: Tensor) -> tuple[Tensor, Tensor]:
        second_chunk = slice(256, 512)
        kept._is_kept[second_chunk] = False
        kept._count -= 256
        parts.append(split(kept, numbers))
        return parts[-1]

    monkeypatch.setattr(logits._KeptLogits, "split", recorded)
    monkeypatch.setattr(backend_for(torch.device("cpu")), "CACHE_BYTES", 0)  # small chunks
    problem = random_joint(1, 60, 39, lengths=[(60, 39)])
    gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)[1]
    ((kept, others),) = parts
    assert len(kept) > 0
    assert len(others) > 0
    assert sorted([*kept.tolist(), *others.tolist()]) == list(range(60 * 40))
    expected = loss_and_gradients(reference.joint_rnnt_loss, problem)[1]
    assert relative_error(gradients, expected) <= 1e-12


@pytest.mark.parametrize("is_fast", [False, True])
def test_products_of_half_operands_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    monkeypatch.setattr(sources, "multiplies_bfloat16", lambda: is_fast)
    sizes = backend_for(torch.device("cpu")).joint_bytes(
        9, 8, input_dtype=torch.bfloat16, compute_dtype=torch.bfloat16
    )
    assert (sizes.logits == 0) == is_fast
