"""k2's transducer losses, which icefall's recipes call.

Interface: k2 1.23.4, ``k2/rnnt_loss.py``: names, arguments and defaults are its. Nothing here
imports k2.

In all of them B samples have up to T frames and S labels, of C symbols. ``symbols`` are the labels,
int32 or int64, [B, S]; ``boundary`` is [0, 0, S, T] for each sample, [B, 4], None: the whole
tensors; ``rnnt_type`` is ``"regular"``, ``"modified"`` or ``"constrained"``, of
:mod:`rnnt_op.topologies`; ``reduction`` is ``"none"``, ``"sum"``, or ``"mean"`` over the batch.
They raise TypeError, ValueError and RuntimeError as :func:`rnnt_op.rnnt_loss` does. T ≥ S and
S ≥ 1, which k2 asserts, need not hold.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op import functional, inference
from rnnt_op.integrations.k2_smoothing import smoothed_scores
from rnnt_op.topologies import RNNT, Topology, constrained, modified
from rnnt_op.torch_private import assert_on_device
from rnnt_op.validation import check_choice

__all__ = [
    "do_rnnt_pruning",
    "get_rnnt_prune_ranges",
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
) -> Tensor:
    """Transducer loss of logits.

    Args:
        logits: of a joint network. [B, T, S+1, C]
        termination_symbol: index of the blank.
        delay_penalty: as in :func:`rnnt_op.joint_rnnt_loss`.

    Returns:
        The loss in nats. [B] or []
    """
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    return functional.rnnt_loss(
        logits,
        symbols,
        frames,
        labels,
        blank=termination_symbol,
        topology=_topology(rnnt_type),
        delay_penalty=delay_penalty,
        reduction=reduction,
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
) -> Tensor:
    """Transducer loss of the logits of some states a frame.

    :class:`rnnt_op.JointRNNTLoss` with ``label_ranges(ranges)`` computes it without logits, and
    without :func:`do_rnnt_pruning`.

    Args:
        logits: of a joint network. [B, T, R, C]
        ranges: the states of each frame, consecutive. [B, T, R]
        termination_symbol, delay_penalty: as in :func:`rnnt_loss`.

    Returns:
        The loss in nats. [B] or []
    """
    frames, labels = _lengths(boundary, logits.shape[0], logits.shape[1], symbols.shape[1])
    return functional.rnnt_loss(
        logits,
        symbols,
        frames,
        labels,
        blank=termination_symbol,
        topology=_topology(rnnt_type),
        delay_penalty=delay_penalty,
        label_ranges=label_ranges(ranges),
        reduction=reduction,
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
) -> Tensor | LossAndGradients:
    """Transducer loss of logits that are sums, without a (B, T, S+1, C) tensor.

    Args:
        lm: predictor's logits. [B, S+1, C]
        am: encoder's logits. [B, T, C]
        termination_symbol, delay_penalty: as in :func:`rnnt_loss`.
        return_grad: also return the occupancies of labels, [B, S, T+1], or [B, S, T] where a label
            reads a frame, and of blanks, [B, S+1, T], for :func:`get_rnnt_prune_ranges`.

    Returns:
        The loss in nats, [B] or [], or the loss and the two tensors.
    """
    frames, labels = _lengths(boundary, am.shape[0], am.shape[1], symbols.shape[1])
    arguments = (am, lm, None, None, symbols, frames, labels)
    topology = _topology(rnnt_type)
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
        occupancies = inference.posteriors(
            *arguments,
            blank=termination_symbol,
            topology=topology,
            delay_penalty=delay_penalty,
            activation="identity",
        )
    return loss, _px_py(occupancies.blank, occupancies.label, rnnt_type)


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
) -> Tensor | LossAndGradients:
    """:func:`rnnt_loss_simple` whose scores are mixed with those of each network alone.

    Args:
        lm, am, termination_symbol, delay_penalty, return_grad: as there. The padding of ``lm``
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

    def loss(scores: Tensor, reduction: str) -> Tensor:
        return functional.rnnt_loss(
            scores,
            torch.ones_like(symbols),
            frames,
            labels,
            blank=0,
            topology=_topology(rnnt_type),
            delay_penalty=delay_penalty,
            reduction=reduction,
            fused_log_softmax=False,
        )

    if not return_grad:
        return loss(scores, reduction)
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, "sum"), leaf)
    blank, label = -gradient[..., 0], -gradient[:, :, :-1, 1]
    if rnnt_type == "constrained":
        # The gradient of a blank's score counts those behind labels, which k2 leaves to the labels.
        blank = blank - F.pad(label, (1, 0))
    return loss(scores, reduction), _px_py(blank, label, rnnt_type)


def get_rnnt_prune_ranges(
    px_grad: Tensor, py_grad: Tensor, boundary: Tensor, s_range: int
) -> Tensor:
    """States that the pruned loss keeps, chosen as k2 1.23.4 chooses them.

    On each frame the consecutive states that a path most probably enters at or above the first of
    and leaves the frame from. They are then moved, down to where no later frame begins below, and
    up to where those of the next frames can be reached; the first frame begins at 0.

    Args:
        px_grad: occupancies of labels. [B, S, T+1] or [B, S, T]
        py_grad: occupancies of blanks. [B, S+1, T]
        boundary: [0, 0, S, T] of each sample. [B, 4]
        s_range: R, how many states a frame keeps; less where S + 1 is less.

    Returns:
        The states, int64. [B, T, R]

    Raises:
        ValueError: s_range is too small for any path.
    """
    device = py_grad.device
    frames = py_grad.shape[2]
    label_reads_frame = px_grad.shape[2] == frames
    least = 1 if label_reads_frame else 2
    if s_range < least:
        raise ValueError(f"s_range: expected at least {least}, got {s_range}")
    s_range = min(s_range, py_grad.shape[1])
    entered = F.pad(px_grad[:, :, :frames], (0, 0, 1, 0))[:, : py_grad.shape[1] - s_range + 1]
    best = (py_grad.unfold(1, s_range, 1).sum(3) - entered).argmax(1)

    t = torch.arange(frames, device=device)
    _, _, labels, lengths = boundary.to(device).unsqueeze(2).unbind(1)
    last = (labels - s_range + 1).clamp(min=0)
    first = best.where(t < lengths - 1, last)
    first = -_cummax_from_end(-first)
    step = 1 if label_reads_frame else s_range - 1
    # A frame begins at most a step above the one before; the first one begins at 0.
    first = torch.minimum(_cummax_from_end(first - step * t), torch.zeros_like(t)) + step * t
    return first.unsqueeze(2) + torch.arange(s_range, device=device)


def do_rnnt_pruning(am: Tensor, lm: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Encoder and predictor states of the nodes that ``ranges`` keep, for a joint network.

    Args:
        am: encoder states. [B, T, H]
        lm: predictor states. [B, S+1, H']
        ranges: states of each frame. [B, T, R]

    Returns:
        Both, [B, T, R, H] and [B, T, R, H'].
    """
    states = ranges.flatten(1).unsqueeze(2).expand(-1, -1, lm.shape[2])
    return (
        am.unsqueeze(2).expand(-1, -1, ranges.shape[2], -1),
        lm.gather(1, states).unflatten(1, ranges.shape[1:]),
    )


def label_ranges(ranges: Tensor) -> Tensor:
    """First state and end, ``label_ranges`` of :func:`rnnt_op.joint_rnnt_loss`, [B, T, 2], of the
    consecutive states of each frame, [B, T, R]."""
    return torch.stack([ranges[:, :, 0], ranges[:, :, -1] + 1], 2)


def _topology(rnnt_type: str) -> Topology:
    topologies = {"regular": RNNT, "modified": modified(), "constrained": constrained()}
    check_choice("rnnt_type", rnnt_type, tuple(topologies))
    return topologies[rnnt_type]


def _lengths(boundary: Tensor | None, batch: int, frames: int, labels: int) -> list[Tensor]:
    """Frames and labels of each sample. [B], [B]"""
    if boundary is None:
        return [torch.full((batch,), length) for length in (frames, labels)]
    if boundary.shape != (batch, 4):
        raise ValueError(f"boundary: expected shape ({batch}, 4), got {tuple(boundary.shape)}")
    begins_at_zero = (boundary[:, :2] == 0).all()
    assert_on_device(begins_at_zero, "boundary: expected samples that begin at 0")
    return [boundary[:, 3], boundary[:, 2]]


def _px_py(blank: Tensor, label: Tensor, rnnt_type: str) -> tuple[Tensor, Tensor]:
    """Occupancies in k2's layout; [B, T, S+1] and [B, T, S] here."""
    px = label.transpose(1, 2)
    return F.pad(px, (0, 1)) if rnnt_type == "regular" else px, blank.transpose(1, 2)


def _cummax_from_end(values: Tensor) -> Tensor:
    return values.flip(1).cummax(1).values.flip(1)
