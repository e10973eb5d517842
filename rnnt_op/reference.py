"""The batched way in plain differentiable torch: the baseline of benchmarks and an oracle of tests.

Materialises the joint network's hidden states, logits and log-probabilities for every (b, t, u),
padding included, and lets autograd differentiate the forward recursion. In float64 it serves as
ground truth. Any derivative of any order works.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Stands for log 0: its exponential is zero in every dtype, and unlike −∞ its derivatives are
# numbers.
_LOG_ZERO = -1e30


def activate(pre_activation: Tensor, activation: str) -> Tensor:
    """tanh, relu, sigmoid or identity, by name."""
    if activation == "identity":
        return pre_activation
    return {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}[activation](
        pre_activation
    )


def joint_rnnt_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    activation: str = "tanh",
    reduction: str = "mean",
) -> Tensor:
    """The batched transducer loss; arguments and result as in :func:`rnnt_op.joint_rnnt_loss`."""
    hidden = activate(encoder.unsqueeze(2) + predictor.unsqueeze(1), activation)
    logits = F.linear(hidden, weight, bias)
    return rnnt_loss(
        logits, targets, encoder_lengths, target_lengths, blank=blank, reduction=reduction
    )


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
) -> Tensor:
    """The batched loss of logits; arguments and result as in :func:`rnnt_op.rnnt_loss`."""
    frames, labels = logit_lengths.to(logits.device), target_lengths.to(logits.device)
    log_probs = logits
    if fused_log_softmax:
        log_probs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    positions = torch.arange(targets.shape[1], device=targets.device)
    columns = targets.where(positions < labels.unsqueeze(1), 0).long()
    columns = columns[:, None, :, None].expand(-1, logits.shape[1], -1, -1)
    blank_scores = log_probs[..., blank]  # [B, T, U+1]
    label_scores = log_probs[:, :, :-1].gather(3, columns).squeeze(3)  # [B, T, U]
    losses = -_log_likelihood(blank_scores, label_scores, frames.long(), labels.long())
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def _log_likelihood(blank: Tensor, label: Tensor, frames: Tensor, labels: Tensor) -> Tensor:
    """α(T−1, U) + blank(T−1, U), one anti-diagonal d = t + u at a time.

    Args:
        blank: score of reading a frame. [B, T, U+1]
        label: score of emitting the next label. [B, T, U]
        frames: T of each sample. [B]
        labels: U of each sample. [B]
    """
    _, max_frames, states = blank.shape
    device = blank.device
    u = torch.arange(states, device=device)
    diagonal = torch.arange(max_frames + states - 1, device=device).unsqueeze(1)
    t = diagonal - u  # [D, U+1]
    inside = (t >= 0) & (t < max_frames)
    t = t.clamp(0, max_frames - 1)
    # [D, B, U+1] and [D, B, U], each diagonal contiguous
    blank_diagonals = blank[:, t, u].where(inside, _LOG_ZERO).transpose(0, 1).unbind()
    label_diagonals = (
        label[:, t[:, :-1], u[:-1]].where(inside[:, :-1], _LOG_ZERO).transpose(0, 1).unbind()
    )

    alpha = blank.new_full((blank.shape[0], states), _LOG_ZERO)
    alpha[:, 0] = 0.0
    alphas = [alpha]
    for d in range(1, max_frames + states - 1):
        read = alpha + blank_diagonals[d - 1]
        emitted = F.pad(alpha[:, :-1] + label_diagonals[d - 1], (1, 0), value=_LOG_ZERO)
        alpha = torch.logaddexp(read, emitted).clamp(min=_LOG_ZERO)
        alphas.append(alpha)
    batch = torch.arange(blank.shape[0], device=device)
    return (
        torch.stack(alphas)[frames - 1 + labels, batch, labels] + blank[batch, frames - 1, labels]
    )
