"""The scores of k2's smoothed loss (Kuang et al. 2022, arXiv 2206.13236, section 3.3).

A node's score of a symbol is a weighted mean of three log-probabilities: of the joint network
that adds up the states, of the predictor alone, and of the encoder with a unigram in the
predictor's place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def smoothed_scores(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    target_lengths: Tensor,
    lm_only_scale: float,
    am_only_scale: float,
) -> Tensor:
    """Scores of blank and next label; differentiable.

    Args:
        lm: predictor's logits. [B, S+1, C]
        am: encoder's logits. [B, T, C]
        symbols: labels; padding may hold anything. [B, S]
        termination_symbol: index of the blank.
        target_lengths: labels of each sample. [B]
        lm_only_scale: weight of the predictor alone.
        am_only_scale: weight of the encoder alone. The joint network has what is left of 1.

    Returns:
        What ``rnnt_loss`` takes as log-probabilities of two tokens, though they do not sum to one.
        [B, T, S+1, 2]
    """
    frames, states = am.shape[1], lm.shape[1]
    is_label = torch.arange(states - 1, device=lm.device) < target_lengths.to(lm.device)[:, None]
    next_labels = symbols.long().where(is_label, termination_symbol)
    labels = torch.nn.functional.pad(next_labels, (0, 1), value=termination_symbol)
    columns = torch.stack([torch.full_like(labels, termination_symbol), labels], 2)
    frame_columns = columns.flatten(1).unsqueeze(1).expand(-1, frames, -1)

    def of_state(values: Tensor) -> Tensor:
        return values.gather(2, columns).unsqueeze(1)

    def of_frame(values: Tensor) -> Tensor:
        return values.gather(2, frame_columns).view(-1, frames, states, 2)

    unigram = lm.softmax(2).mean((0, 1)) + torch.finfo(lm.dtype).tiny
    joint = of_frame(am) + of_state(lm) - _log_normalizers(lm, am).unsqueeze(3)
    lm_only = of_state(lm.log_softmax(2))
    am_only = of_frame((am + unigram.log()).log_softmax(2))
    joint_scale = 1 - lm_only_scale - am_only_scale
    return joint_scale * joint + lm_only_scale * lm_only + am_only_scale * am_only


def _log_normalizers(lm: Tensor, am: Tensor) -> Tensor:
    """log Σ_c exp(am[b, t, c] + lm[b, u, c]), by a product of matrices. [B, T, S+1]"""
    lm_shift, am_shift = (x.detach().amax(2, keepdim=True) for x in (lm, am))
    sums = (am - am_shift).exp() @ (lm - lm_shift).exp().transpose(1, 2)
    # Where sums of maxima are far above the maximum of sums, all terms underflow.
    log_sums = (sums + torch.finfo(sums.dtype).tiny).log()
    return log_sums + am_shift + lm_shift.transpose(1, 2)
