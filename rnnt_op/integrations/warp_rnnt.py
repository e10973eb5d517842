"""warp-rnnt's loss (1ytic).

Interface: ``warp_rnnt`` 0.7 (66dfe05), ``warp_rnnt/__init__.py``, whose names, arguments and
defaults these are. Nothing here imports it. Theirs is of float32 on CUDA alone; where its forward
and backward sums disagree it sets a gradient to zero, which is not done here.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rnnt_op import functional
from rnnt_op.integrations.packed_rows import unpacked
from rnnt_op.validation import check_choice

__all__ = ["rnnt_loss"]


def rnnt_loss(
    log_probs: Tensor,
    labels: Tensor,
    frames_lengths: Tensor,
    labels_lengths: Tensor,
    average_frames: bool = False,
    reduction: str | None = "none",
    blank: int = 0,
    gather: bool = False,
    fastemit_lambda: float = 0.0,
    compact: bool = False,
) -> Tensor:
    """Transducer loss of log-probabilities, which are not normalised again.

    Args:
        log_probs: [N, T, U+1, V], or [Σ T (U+1), V] if compact
        labels: labels, int32 or int64. [N, U], or [Σ U] if compact
        frames_lengths: frames T of each sample. [N]
        labels_lengths: labels U of each sample. [N]
        average_frames: divide the loss of each sample by its frames.
        reduction: ``"none"`` or None, ``"sum"``, or ``"mean"`` over the batch.
        blank: index of the blank.
        gather: saves memory there; changes nothing, here or there.
        fastemit_lambda: FastEmit's λ, in gradients alone: the loss is that of λ = 0.
        compact: nodes and labels are packed, a sample behind the other. They are copied into padded
            tensors, for which the lengths are read on the CPU.

    Returns:
        The loss in nats. [N] or []

    Raises:
        TypeError, RuntimeError: as in :func:`rnnt_op.rnnt_loss`.
        ValueError: as there, or packed tensors are not of the size that the lengths say.
    """
    check_choice("reduction", reduction or "none", ("none", "sum", "mean"))
    if compact:
        labels = _unpacked_labels(labels, labels_lengths)
        log_probs = unpacked(
            log_probs, frames_lengths, labels_lengths, labels.shape[1], "log_probs"
        )
    loss = functools.partial(
        functional.rnnt_loss,
        log_probs,
        labels,
        frames_lengths,
        labels_lengths,
        blank=blank,
        fused_log_softmax=False,
        fast_emit=fastemit_lambda,
    )
    if not average_frames:
        return loss(reduction=reduction or "none")
    losses = loss(reduction="none")
    losses = losses / frames_lengths.to(losses)
    return {"sum": losses.sum, "mean": losses.mean}.get(reduction or "none", lambda: losses)()


def _unpacked_labels(labels: Tensor, lengths: Tensor) -> Tensor:
    """[N, U] of [Σ U]"""
    device = labels.device
    is_label = torch.arange(int(lengths.max()), device=device) < lengths.to(device).unsqueeze(1)
    expected = int(is_label.sum())
    if labels.shape != (expected,):
        raise ValueError(
            f"labels: expected shape ({expected},), the labels of all samples, got "
            f"{tuple(labels.shape)}"
        )
    return labels.new_zeros(is_label.shape).masked_scatter(is_label, labels)
