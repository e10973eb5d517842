"""The log-probabilities of a lattice's arcs as k2 has them: px of labels, py of blanks.

Interface: k2 1.24.4, ``k2/rnnt_loss.py``, and fast_rnnt 1.3. In all of them ``symbols`` are the
labels, [B, S]; ``boundary`` is [0, 0, S, T] of each sample, [B, 4], None: the whole tensors;
``rnnt_type`` as in :mod:`rnnt_op.integrations.k2`. They return px, [B, S, T+1], or [B, S, T] where
a label reads a frame, and py, [B, S+1, T], which
:func:`~rnnt_op.integrations.k2_recursion.mutual_information_recursion` takes. Where labels read no
frame, px is −∞ on frame T of each sample, on which no label can be emitted; in a constrained
lattice, px has the blank behind the label, too. Both are differentiable. Unlike in losses, a label
may equal the blank: its log-probability is then that of the blank, or with HAT what k2 computes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op import topologies
from rnnt_op.integrations.k2_smoothing import smoothed_scores, summed_scores
from rnnt_op.topologies import Topology
from rnnt_op.torch_private import assert_on_device
from rnnt_op.validation import check_choice, check_columns


def get_rnnt_logprobs(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str = "regular",
    boundary: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Those of logits that are sums, without a (B, T, S+1, C) tensor.

    Args:
        lm: predictor's logits. [B, S+1, C]
        am: encoder's logits. [B, T, C]
        termination_symbol: index of the blank.
    """
    check_choice("rnnt_type", rnnt_type, tuple(TYPES))
    blank = check_columns(topologies.RNNT, termination_symbol, lm.shape[2])
    scores = summed_scores(lm, am, next_symbols(symbols, blank, boundary, lm.shape[2]), blank)
    return px_py(scores, rnnt_type, boundary)


def get_rnnt_logprobs_joint(
    logits: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    rnnt_type: str | Tensor | None = "regular",
    boundary: Tensor | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Those of a joint network's logits.

    Args:
        logits: [B, T, S+1, C]
        termination_symbol: index of the blank.
        rnnt_type, boundary: in this order, which is k2's, or in the other, which is fast_rnnt's.
    """
    if not isinstance(rnnt_type, str):
        rnnt_type, boundary = "regular" if boundary is None else boundary, rnnt_type
    if not isinstance(rnnt_type, str) or isinstance(boundary, str):
        raise TypeError("rnnt_type, boundary: expected a str, and a Tensor or None")
    return logprobs(logits, symbols, None, termination_symbol, boundary, rnnt_type, hat=False)


def get_rnnt_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """Those of the logits of some states a frame, and −∞ for the other states.

    Args:
        logits: of a joint network. [B, T, R, C]
        ranges: the states of each frame, consecutive. [B, T, R]
        termination_symbol: index of the blank.
    """
    return logprobs(logits, symbols, ranges, termination_symbol, boundary, rnnt_type, hat=False)


def get_hat_logprobs_pruned(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor,
    termination_symbol: int,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """:func:`get_rnnt_logprobs_pruned` where the blank's probability is the sigmoid of its logit,
    and the labels share the rest by a softmax of their own.

    Args:
        logits, ranges: as there.
        termination_symbol: index of the blank, which may be any token; in k2 it is 0.
    """
    return logprobs(logits, symbols, ranges, termination_symbol, boundary, rnnt_type, hat=True)


def get_rnnt_logprobs_smoothed(
    lm: Tensor,
    am: Tensor,
    symbols: Tensor,
    termination_symbol: int,
    lm_only_scale: float = 0.1,
    am_only_scale: float = 0.1,
    boundary: Tensor | None = None,
    rnnt_type: str = "regular",
) -> tuple[Tensor, Tensor]:
    """:func:`get_rnnt_logprobs` mixed with the log-probabilities of each network alone; they do not
    sum to one.

    Args:
        lm, am, termination_symbol: as there. The padding of ``lm`` counts: the unigram is a mean
            over all of it.
        lm_only_scale: weight of the predictor's own log-probabilities.
        am_only_scale: weight of the encoder's, with a unigram for the predictor.
    """
    check_choice("rnnt_type", rnnt_type, tuple(TYPES))
    blank = check_columns(topologies.RNNT, termination_symbol, lm.shape[2])
    symbols = next_symbols(symbols, blank, boundary, lm.shape[2])
    scores = smoothed_scores(lm, am, symbols, blank, lm_only_scale, am_only_scale)
    return px_py(scores, rnnt_type, boundary)


TYPES: dict[str, Topology] = {
    "regular": topologies.RNNT,
    "modified": topologies.modified(),
    "constrained": topologies.constrained(),
}
"""The lattices that k2 names."""


def type_of(rnnt_type: str, modified: bool | None = None) -> str:
    """A key of :data:`TYPES`: the given one, or that of fast_rnnt's former ``modified``."""
    check_choice("rnnt_type", rnnt_type, tuple(TYPES))
    if modified is None:
        return rnnt_type
    if rnnt_type != "regular":
        raise ValueError(f"modified: expected None beside rnnt_type={rnnt_type!r}, got {modified}")
    return "modified" if modified else "regular"


def logprobs(
    logits: Tensor,
    symbols: Tensor,
    ranges: Tensor | None,
    blank: int,
    boundary: Tensor | None,
    rnnt_type: str,
    *,
    hat: bool,
) -> tuple[Tensor, Tensor]:
    """px and py of logits, [B, T, S+1, C], or [B, T, R, C] with ranges."""
    check_choice("rnnt_type", rnnt_type, tuple(TYPES))
    batch, frames, states, columns = logits.shape
    blank = check_columns(topologies.RNNT, blank, columns)
    labels = next_symbols(symbols, blank, boundary, columns)
    if ranges is None:
        labels = labels.unsqueeze(1).expand(batch, frames, states)
    else:
        labels = labels.gather(1, ranges.flatten(1).long()).view(batch, frames, states)
    label = logits.gather(3, labels.unsqueeze(3)).squeeze(3)
    of_blank = logits[..., blank]
    if hat:
        others = torch.cat([logits[..., :blank], logits[..., blank + 1 :]], 3)
        scores = [F.logsigmoid(of_blank), label - others.logsumexp(3) + F.logsigmoid(-of_blank)]
    else:
        normalizers = logits.logsumexp(3)
        scores = [of_blank - normalizers, label - normalizers]
    if ranges is not None:
        nothing = logits.new_full((batch, frames, symbols.shape[1] + 1), float("-inf"))
        scores = [nothing.scatter(2, ranges.long(), values) for values in scores]
    return px_py(torch.stack(scores, 3), rnnt_type, boundary)


def next_symbols(symbols: Tensor, blank: int, boundary: Tensor | None, columns: int) -> Tensor:
    """The symbol behind each state; for the last one, the blank. [B, S+1]"""
    in_vocabulary = (symbols >= 0) & (symbols < columns)
    if boundary is not None:
        u = torch.arange(symbols.shape[1], device=symbols.device)
        is_padding = u >= boundary[:, 2:3].to(symbols.device)
        symbols = symbols.where(in_vocabulary | ~is_padding, blank)
        in_vocabulary = in_vocabulary | is_padding
    assert_on_device(in_vocabulary.all(), "symbols: a label is no token")
    return F.pad(symbols.long(), (0, 1), value=blank)


def px_py(scores: Tensor, rnnt_type: str, boundary: Tensor | None) -> tuple[Tensor, Tensor]:
    """k2's layout of the scores of blank and next label, [B, T, S+1, 2]."""
    py, px = scores.transpose(1, 2).unbind(3)
    px = px[:, :-1]
    if rnnt_type == "constrained":
        px = px + py[:, 1:]
    if rnnt_type == "regular":
        px = F.pad(px, (0, 1), value=float("-inf"))
        if boundary is not None:
            t = torch.arange(px.shape[2], device=px.device)
            is_last = t == boundary[:, 3].to(px.device).view(-1, 1, 1)
            px = px.masked_fill(is_last, float("-inf"))
    return px, py
