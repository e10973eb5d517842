"""k2's transducer losses, which icefall's recipes call.

Interface: k2 1.24.4, ``k2/rnnt_loss.py``, whose names, arguments and defaults these are, and
fast_rnnt 1.3, which has ``return_grad`` in all of them. Nothing here imports either.

In all of them B samples have up to T frames and S labels, of C symbols. ``symbols`` are the labels,
int32 or int64, [B, S]; ``boundary`` is [0, 0, S, T] for each sample, [B, 4], None: the whole
tensors; ``rnnt_type`` is ``"regular"``, ``"modified"`` or ``"constrained"``, of
:mod:`rnnt_op.topologies`, and ``modified`` is what fast_rnnt's first versions had for the first
two; ``reduction`` is ``"none"``, ``"sum"``, or ``"mean"`` over the batch. With ``return_grad`` they
also return the occupancies of labels, [B, S, T+1], or [B, S, T] where a label reads a frame, and of
blanks, [B, S+1, T], which k2 calls gradients of px and py, for :func:`get_rnnt_prune_ranges`. They
raise TypeError, ValueError and RuntimeError as :func:`rnnt_op.rnnt_loss` does. T ≥ S, which k2
asserts where labels read frames, need not hold. A label that equals the blank is refused.

What losses are made of is here, too: the log-probabilities px and py of labels and blanks, of those
shapes (``get_rnnt_logprobs`` and its kin, :mod:`rnnt_op.integrations.k2_logprobs`), and the
recursion over any such scores (:mod:`rnnt_op.integrations.k2_recursion`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op import functional, inference, topologies
from rnnt_op.integrations.k2_logprobs import (
    TYPES,
    get_hat_logprobs_pruned,
    get_rnnt_logprobs,
    get_rnnt_logprobs_joint,
    get_rnnt_logprobs_pruned,
    get_rnnt_logprobs_smoothed,
    logprobs,
    type_of,
)
from rnnt_op.integrations.k2_pruning import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    get_rnnt_prune_ranges_deprecated,
    label_ranges,
)
from rnnt_op.integrations.k2_ragged import RaggedTensor
from rnnt_op.integrations.k2_recursion import (
    gradients_of_arcs,
    joint_mutual_information_recursion,
    loss_of_arcs,
    mutual_information_recursion,
    with_delay_penalty,
)
from rnnt_op.torch_private import assert_on_device
from rnnt_op.validation import check_columns

__all__ = [
    "RaggedTensor",
    "do_rnnt_pruning",
    "get_hat_logprobs_pruned",
    "get_rnnt_logprobs",
    "get_rnnt_logprobs_joint",
    "get_rnnt_logprobs_pruned",
    "get_rnnt_logprobs_smoothed",
    "get_rnnt_prune_ranges",
    "get_rnnt_prune_ranges_deprecated",
    "joint_mutual_information_recursion",
    "label_ranges",
    "mutual_information_recursion",
    "rnnt_loss",
    "rnnt_loss_pruned",
    "rnnt_loss_simple",
    "rnnt_loss_smoothed",
]

LossAndGradients = tuple[Tensor, tuple[Tensor, Tensor]]


def rnnt_loss(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    use_hat_loss: bool = False,
    modified: bool | None = None,
) -> Tensor | LossAndGradients:
    """Transducer loss of logits.

    Args:
        logits: of a joint network. [B, T, S+1, C]
        termination_symbol: index of the blank.
        delay_penalty: as in :func:`rnnt_op.joint_rnnt_loss`.
        use_hat_loss: the blank's probability is the sigmoid of its logit, and the labels share the
            rest by a softmax of their own. k2 has it for pruned logits alone.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    return rnnt_loss_pruned(
        logits,
        symbols,
        None,
        termination_symbol,
        boundary,
        rnnt_type,
        delay_penalty,
        reduction,
        use_hat_loss,
        return_grad=return_grad,
        modified=modified,
    )


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    use_hat_loss: bool = False,
    *,
    return_grad: bool = False,
    modified: bool | None = None,
) -> Tensor | LossAndGradients:
    """Transducer loss of the logits of some states a frame.

    :class:`rnnt_op.JointRNNTLoss` with ``label_ranges(ranges)`` computes it without logits, and
    without :func:`do_rnnt_pruning`.

    Args:
        logits: of a joint network. [B, T, R, C]
        ranges: the states of each frame, consecutive, [B, T, R], or None: all.
        termination_symbol, delay_penalty, use_hat_loss: as in :func:`rnnt_loss`; the blank may be
            any token with ``use_hat_loss``, too.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    rnnt_type = type_of(rnnt_type, modified)
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    loss = functional.rnnt_loss(
        logits,
        symbols,
        frames,
        labels,
        blank=termination_symbol,
        topology=TYPES[rnnt_type],
        normalizer="hat" if use_hat_loss else "softmax",
        delay_penalty=delay_penalty,
        label_ranges=None if ranges is None else label_ranges(ranges),
        reduction=reduction,
    )
    if not return_grad:
        return loss
    with torch.no_grad():
        scores = logits, symbols, ranges, termination_symbol, boundary, rnnt_type
        px, py = logprobs(*scores, hat=use_hat_loss)
        px = with_delay_penalty(px, py, boundary, delay_penalty)
    return loss, gradients_of_arcs(px, py, boundary)


def rnnt_loss_simple(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    modified: bool | None = None,
) -> Tensor | LossAndGradients:
    """Transducer loss of logits that are sums, without a (B, T, S+1, C) tensor.

    Args:
        lm: predictor's logits. [B, S+1, C]
        am: encoder's logits. [B, T, C]
        termination_symbol, delay_penalty: as in :func:`rnnt_loss`.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    frames, labels = _lengths(boundary, am.shape[0], am.shape[1], symbols.shape[1])
    arguments = (am, lm, None, None, symbols, frames, labels)
    rnnt_type = type_of(rnnt_type, modified)
    loss = functional.joint_rnnt_loss(
        *arguments,
        blank=termination_symbol,
        topology=TYPES[rnnt_type],
        delay_penalty=delay_penalty,
        activation="identity",
        reduction=reduction,
    )
    if not return_grad:
        return loss
    with torch.no_grad():
        posteriors = inference.posteriors(
            *arguments,
            blank=termination_symbol,
            topology=TYPES[rnnt_type],
            delay_penalty=delay_penalty,
            activation="identity",
        )
    px, py = posteriors.label.transpose(1, 2), posteriors.blank.transpose(1, 2)
    return loss, (F.pad(px, (0, 1)) if rnnt_type == "regular" else px, py)


def rnnt_loss_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
    delay_penalty: float = 0.0,
    reduction: str = "mean",
    return_grad: bool = False,
    *,
    modified: bool | None = None,
) -> Tensor | LossAndGradients:
    """:func:`rnnt_loss_simple` whose scores are mixed with those of each network alone.

    Args:
        lm, am, termination_symbol, delay_penalty: as there. The padding of ``lm``
            counts: the unigram is a mean over all of it.
        lm_only_scale: weight of the predictor's own log-probabilities.
        am_only_scale: weight of the encoder's, with a unigram for the predictor.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    _, labels = _lengths(boundary, am.shape[0], am.shape[1], symbols.shape[1])
    rnnt_type = type_of(rnnt_type, modified)
    blank = check_columns(topologies.RNNT, termination_symbol, am.shape[2])
    u = torch.arange(symbols.shape[1], device=symbols.device)
    is_label = (symbols != blank) | (u >= labels.to(symbols.device).unsqueeze(1))
    assert_on_device(is_label.all(), "symbols: a label equals the blank")
    scores = lm, am, symbols, blank, lm_only_scale, am_only_scale, boundary, rnnt_type
    px, py = get_rnnt_logprobs_smoothed(*scores)
    px = with_delay_penalty(px, py, boundary, delay_penalty)
    loss = loss_of_arcs(px, py, boundary, reduction)
    return (loss, gradients_of_arcs(px, py, boundary)) if return_grad else loss


def _lengths(boundary: Tensor | None, batch: int, frames: int, labels: int) -> list[Tensor]:
    """Frames and labels of each sample. [B], [B]"""
    if boundary is None:
        return [torch.full((batch,), length) for length in (frames, labels)]
    if boundary.shape != (batch, 4):
        raise ValueError(f"boundary: expected shape ({batch}, 4), got {tuple(boundary.shape)}")
    begins_at_zero = (boundary[:, :2] == 0).all()
    assert_on_device(begins_at_zero, "boundary: expected samples that begin at 0")
    return [boundary[:, 3], boundary[:, 2]]
