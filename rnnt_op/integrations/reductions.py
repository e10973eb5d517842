"""Reductions that NeMo and transformers share, beyond those of the ops."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from rnnt_op.transfer import to_device
from rnnt_op.validation import check_choice

REDUCTIONS = ("mean_batch", "mean_volume", "mean", "sum", "none")


def reduced(loss: Callable[..., Tensor], target_lengths: Tensor, reduction: str) -> Tensor:
    """Reduces a loss by the cheapest of the op's own reductions: with ``"sum"`` and ``"mean"``
    gradients come out of the forward sweep, with ``"none"`` backward recomputes.

    Args:
        loss: takes ``reduction``: ``"none"``, ``"sum"`` or ``"mean"`` over the batch.
        target_lengths: labels U of each sample. [B]
        reduction: ``"mean_batch"``, mean of the samples' losses; ``"mean_volume"``, their sum over
            that of the labels; ``"mean"``, mean of the losses each divided by its labels;
            ``"sum"``; ``"none"``. Where a sum or a sample has no label, its division gives
            infinity, as theirs.

    Returns:
        The loss. [B] or []

    Raises:
        ValueError: the reduction is none of these.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if reduction == "mean_batch":
        return loss(reduction="mean")
    if reduction == "mean":
        losses = loss(reduction="none")
        return (losses / to_device(target_lengths, losses.device)).mean()
    if reduction == "mean_volume":
        total = loss(reduction="sum")
        return total / to_device(target_lengths.sum(), total.device)
    return loss(reduction=reduction)


def with_fast_emit_cost(loss: Tensor, fast_emit: float) -> Tensor:
    """(1 + λ) times the loss, which NeMo's Numba code reports, with the gradient that it had."""
    return loss + fast_emit * loss.detach()
