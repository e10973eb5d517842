"""The scores of k2's simple and smoothed losses (Kuang et al. 2022, arXiv 2206.13236, section 3.3).

The logits of a simple joint network are sums of its states'. A smoothed score is a weighted mean of
three log-probabilities: of that network, of the predictor alone, and of the encoder with a unigram
in the predictor's place.

In both functions ``lm`` are the predictor's logits, [B, S+1, C], ``am`` the encoder's, [B, T, C],
and ``next_symbols`` the symbol behind each state, [B, S+1]. They return the scores of blank and of
this symbol, [B, T, S+1, 2].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def summed_scores(lm: Tensor, am: Tensor, next_symbols: Tensor, blank: int) -> Tensor:
    """Log-probabilities of the simple network."""
    of_state, of_frame = _columns(next_symbols, blank, am.shape[1])
    return of_frame(am) + of_state(lm) - _log_normalizers(lm, am).unsqueeze(3)


def smoothed_scores(
    lm: Tensor,
    am: Tensor,
    next_symbols: Tensor,
    blank: int,
    lm_only_scale: float,
    am_only_scale: float,
) -> Tensor:
    """The weighted means.

    Args:
        lm_only_scale: weight of the predictor alone.
        am_only_scale: weight of the encoder alone. The simple network has what is left of 1.
    """
    of_state, of_frame = _columns(next_symbols, blank, am.shape[1])
    unigram = lm.softmax(2).mean((0, 1)) + torch.finfo(lm.dtype).tiny
    joint = summed_scores(lm, am, next_symbols, blank)
    lm_only = of_state(lm.log_softmax(2))
    am_only = of_frame((am + unigram.log()).log_softmax(2))
    joint_scale = 1 - lm_only_scale - am_only_scale
    return joint_scale * joint + lm_only_scale * lm_only + am_only_scale * am_only


Columns = Callable[[Tensor], Tensor]


def _columns(next_symbols: Tensor, blank: int, frames: int) -> tuple[Columns, Columns]:
    """What takes the blank's and the next symbol's columns of what states and frames have."""
    states = next_symbols.shape[1]
    columns = torch.stack([torch.full_like(next_symbols, blank), next_symbols], 2)
    frame_columns = columns.flatten(1).unsqueeze(1).expand(-1, frames, -1)

    def of_state(values: Tensor) -> Tensor:
        return values.gather(2, columns).unsqueeze(1)

    def of_frame(values: Tensor) -> Tensor:
        return values.gather(2, frame_columns).view(-1, frames, states, 2)

    return of_state, of_frame


def _log_normalizers(lm: Tensor, am: Tensor) -> Tensor:
    """log Σ_c exp(am[b, t, c] + lm[b, u, c]), by a product of matrices. [B, T, S+1]"""
    lm_shift, am_shift = (x.detach().amax(2, keepdim=True) for x in (lm, am))
    sums = (am - am_shift).exp() @ (lm - lm_shift).exp().transpose(1, 2)
    # Where sums of maxima are far above the maximum of sums, all terms underflow.
    log_sums = (sums + torch.finfo(sums.dtype).tiny).log()
    return log_sums + am_shift + lm_shift.transpose(1, 2)
