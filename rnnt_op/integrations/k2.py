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
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op import functional, inference
from rnnt_op.integrations.k2_occupancies import (
    loss_of_scores,
    next_scores,
    occupancies,
    px_py,
    topology_of,
)
from rnnt_op.integrations.k2_pruning import (
    do_rnnt_pruning,
    get_rnnt_prune_ranges,
    get_rnnt_prune_ranges_deprecated,
    label_ranges,
)
from rnnt_op.integrations.k2_smoothing import smoothed_scores
from rnnt_op.topologies import Topology
from rnnt_op.torch_private import assert_on_device

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_prune_ranges",
    "get_rnnt_prune_ranges_deprecated",
    "label_ranges",
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
    lattice = topology_of(rnnt_type, modified)
    return _loss_of_logits(
        logits,
        symbols,
        None,
        termination_symbol,
        boundary,
        lattice,
        delay_penalty,
        reduction,
        return_grad,
        use_hat_loss,
    )


def rnnt_loss_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
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
        ranges: the states of each frame, consecutive. [B, T, R]
        termination_symbol, delay_penalty, use_hat_loss: as in :func:`rnnt_loss`; the blank may be
            any token with ``use_hat_loss``, too.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    lattice = topology_of(rnnt_type, modified)
    return _loss_of_logits(
        logits,
        symbols,
        ranges,
        termination_symbol,
        boundary,
        lattice,
        delay_penalty,
        reduction,
        return_grad,
        use_hat_loss,
    )


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
    topology = topology_of(rnnt_type, modified)
    loss = functional.joint_rnnt_loss(
        *arguments,
        blank=termination_symbol,
        topology=topology,
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
            topology=topology,
            delay_penalty=delay_penalty,
            activation="identity",
        )
    return loss, px_py(posteriors.blank, posteriors.label, topology)


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
    frames, labels = _lengths(boundary, am.shape[0], am.shape[1], symbols.shape[1])
    scores = smoothed_scores(
        lm, am, symbols, termination_symbol, labels, lm_only_scale, am_only_scale
    )
    topology = topology_of(rnnt_type, modified)
    arguments = (scores, symbols, frames, labels, topology, delay_penalty)
    loss = loss_of_scores(*arguments, reduction=reduction)
    return (loss, occupancies(*arguments)) if return_grad else loss


def _loss_of_logits(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    blank: int,
    boundary: Tensor | None,
    topology: Topology,
    delay_penalty: float,
    reduction: str,
    return_grad: bool,
    hat: bool,
) -> Tensor | LossAndGradients:
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    loss = functional.rnnt_loss(
        logits,
        symbols,
        frames,
        labels,
        blank=blank,
        topology=topology,
        normalizer="hat" if hat else "softmax",
        delay_penalty=delay_penalty,
        label_ranges=None if ranges is None else label_ranges(ranges),
        reduction=reduction,
    )
    if not return_grad:
        return loss
    with torch.no_grad():
        scores = next_scores(logits, symbols, blank, labels, ranges, hat)
    return loss, occupancies(scores, symbols, frames, labels, topology, delay_penalty, ranges)


def _lengths(boundary: Tensor | None, batch: int, frames: int, labels: int) -> list[Tensor]:
    """Frames and labels of each sample. [B], [B]"""
    if boundary is None:
        return [torch.full((batch,), length) for length in (frames, labels)]
    if boundary.shape != (batch, 4):
        raise ValueError(f"boundary: expected shape ({batch}, 4), got {tuple(boundary.shape)}")
    begins_at_zero = (boundary[:, :2] == 0).all()
    assert_on_device(begins_at_zero, "boundary: expected samples that begin at 0")
    return [boundary[:, 3], boundary[:, 2]]
