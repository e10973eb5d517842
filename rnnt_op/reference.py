"""The batched way in plain differentiable torch: the baseline of benchmarks and an oracle of tests.

Materialises the joint network's hidden states, logits and log-probabilities for every (b, t, u),
padding included, and lets autograd differentiate the forward recursion. In float64 it serves as
ground truth. Any derivative of any order works.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.activations import activate
from rnnt_op.topologies import resolve
from rnnt_op.topology import RNNT, Arc, Symbol, Topology

# Stands for log 0: its exponential is zero in every dtype, and unlike −∞ its derivatives are
# numbers.
_LOG_ZERO = -1e30


def joint_rnnt_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    encoder_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int = 0,
    topology: Topology = RNNT,
    normalizer: str = "softmax",
    fast_emit: float = 0.0,
    delay_penalty: float = 0.0,
    label_ranges: Tensor | None = None,
    activation: str = "tanh",
    reduction: str = "mean",
) -> Tensor:
    """The batched transducer loss; arguments and result as in :func:`rnnt_op.joint_rnnt_loss`."""
    hidden = activate(encoder.unsqueeze(2) + predictor.unsqueeze(1), activation)
    losses = _losses(
        resolve(topology.text, normalizer, fast_emit, delay_penalty),
        hidden if weight is None else F.linear(hidden, weight, bias),
        targets,
        encoder_lengths,
        target_lengths,
        blank,
        label_ranges,
        normalize=True,
    )
    return _reduce(losses, reduction)


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int = -1,
    reduction: str = "mean",
    fused_log_softmax: bool = True,
    *,
    topology: Topology = RNNT,
    normalizer: str = "softmax",
    fast_emit: float = 0.0,
    delay_penalty: float = 0.0,
    label_ranges: Tensor | None = None,
) -> Tensor:
    """The batched loss of logits; arguments and result as in :func:`rnnt_op.rnnt_loss`."""
    if label_ranges is not None:
        u = torch.arange(targets.shape[1] + 1, device=logits.device)
        row = (u - label_ranges.to(logits.device)[:, :, :1]).clamp(0, logits.shape[2] - 1)
        logits = logits.gather(2, row.unsqueeze(3).expand(-1, -1, -1, logits.shape[3]))
    losses = _losses(
        resolve(topology.text, normalizer, fast_emit, delay_penalty),
        logits,
        targets,
        logit_lengths,
        target_lengths,
        blank,
        label_ranges,
        normalize=fused_log_softmax,
    )
    return _reduce(losses, reduction)


def _losses(
    lattice: Topology,
    logits: Tensor,
    targets: Tensor,
    logit_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    label_ranges: Tensor | None,
    *,
    normalize: bool,
) -> Tensor:
    """Losses from the logits of all nodes, ranges or not. [B]"""
    frames, labels = (n.to(logits.device).long() for n in (logit_lengths, target_lengths))
    positions = torch.arange(targets.shape[1], device=targets.device)
    next_labels = targets.where(positions < labels.unsqueeze(1), 0).long()
    blank %= lattice.tokens(logits.shape[-1])
    symbols = _symbol_scores(lattice, logits, next_labels, blank, normalize)
    is_node = None
    if label_ranges is not None:
        u = torch.arange(logits.shape[2], device=logits.device)
        low, high = label_ranges.to(logits.device).unsqueeze(2).unbind(3)
        is_node = (low <= u) & (u < high)
    return -_log_likelihood(lattice, symbols, frames, labels, is_node)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def _symbol_scores(
    lattice: Topology, logits: Tensor, next_labels: Tensor, blank: int, normalize: bool
) -> list[Tensor]:
    """Log-probability of each symbol: S × [B, T, U+1], except labels, which end at U. [B, T, U]"""
    tokens = lattice.tokens(logits.shape[-1])

    def picked(symbol: Symbol, values: Tensor) -> Tensor:
        if symbol.source == "label":
            columns = next_labels[:, None, :, None].expand(-1, values.shape[1], -1, -1)
            return values[:, :, :-1].gather(3, columns).squeeze(3)
        if symbol.source == "zero":
            return values.new_zeros(()).expand(values.shape[:-1])
        column = {"blank": blank, "token": symbol.index % tokens, "extra": tokens + symbol.index}
        return values[..., column[symbol.source]]

    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not normalize:
        return [picked(symbol, logits).to(dtype) for symbol in lattice.symbols]
    others = [symbol for symbol in lattice.symbols if symbol.softmax == 1]
    in_group_0 = logits[..., :tokens]
    if any(symbol.source == "blank" for symbol in others):
        column = torch.tensor([blank], device=logits.device)
        in_group_0 = in_group_0.to(dtype).index_fill(-1, column, _LOG_ZERO)
    log_probs = in_group_0.log_softmax(-1, dtype=dtype)
    if others:
        of_others = torch.stack([picked(symbol, logits) for symbol in others], -1)
        other_scores = iter(of_others.log_softmax(-1, dtype=dtype).unbind(-1))
    return [
        picked(symbol, log_probs) if symbol.softmax == 0 else next(other_scores)
        for symbol in lattice.symbols
    ]


def _arc_score(arc: Arc, symbols: list[Tensor], frames: Tensor, is_node: Tensor | None) -> Tensor:
    """[B, T, U+1], or [B, T, U] if the arc emits a label."""
    batch, max_frames, states = max((symbol.shape for symbol in symbols), key=lambda s: s[2])
    states -= arc.labels
    score = symbols[0].new_zeros((batch, max_frames, states))
    for s in arc.symbols:
        score = score + symbols[s][:, :, :states]
    for s in arc.next_symbols:
        score = score + symbols[s][:, :, 1:]
    score = score.clamp(min=_LOG_ZERO)  # a logit may be −∞
    if arc.offset:
        score = score + arc.offset
    if arc.delay:
        t = torch.arange(score.shape[1], device=score.device)
        score = score + arc.delay * ((frames.unsqueeze(1) - 1) / 2 - t).to(score.dtype).unsqueeze(2)
    if arc.scale != 1.0:
        # Of the gradient alone.
        score = score + (arc.scale - 1.0) * (score - score.detach())
    if is_node is not None:
        score = score.where(is_node[:, :, :states], _LOG_ZERO)
        if arc.next_symbols:
            score = score.where(is_node[:, :, 1:], _LOG_ZERO)
    return score


def _log_likelihood(
    lattice: Topology,
    symbols: list[Tensor],
    frames: Tensor,
    labels: Tensor,
    is_node: Tensor | None,
) -> Tensor:
    """log α(T, U), one anti-diagonal d = t + u at a time.

    Args:
        lattice: its arcs.
        symbols: log-probability of each symbol.
        frames: T of each sample. [B]
        labels: U of each sample. [B]
        is_node: which nodes there are, None: all. [B, T, U+1]
    """
    arcs = [(arc, _arc_score(arc, symbols, frames, is_node)) for arc in lattice.arcs]
    batch, max_frames = arcs[0][1].shape[:2]
    states = max(symbol.shape[2] for symbol in symbols)
    device = frames.device
    u = torch.arange(states, device=device)
    diagonal = torch.arange(max_frames + states - 1, device=device).unsqueeze(1)
    t = diagonal - u  # [D, U+1]
    inside = (t >= 0) & (t < max_frames)
    t = t.clamp(0, max_frames - 1)

    def diagonals(score: Tensor) -> tuple[Tensor, ...]:
        """D × [B, U+1] or [B, U], each contiguous."""
        n = score.shape[2]
        picked = score[:, t[:, :n], u[:n]].where(inside[:, :n], _LOG_ZERO)
        return picked.transpose(0, 1).unbind()

    of_arcs = [(arc, diagonals(score)) for arc, score in arcs]
    nothing = arcs[0][1].new_full((batch, states), _LOG_ZERO)
    start = nothing.clone()
    start[:, 0] = 0.0
    alphas = [start]
    for d in range(1, max_frames + states - 1):
        arriving = []
        for arc, scores in of_arcs:
            before = d - arc.frames - arc.labels
            if before < 0:
                continue
            score = scores[before]
            alpha = alphas[before][:, : score.shape[1]] + score
            arriving.append(F.pad(alpha, (arc.labels, 0), value=_LOG_ZERO) if arc.labels else alpha)
        total = functools.reduce(torch.logaddexp, arriving) if arriving else nothing
        alphas.append(total.clamp(min=_LOG_ZERO))

    stacked = torch.stack(alphas)
    sample = torch.arange(batch, device=device)
    ends = [nothing[:, 0]]
    for arc, score in arcs:
        if not arc.ends or arc.frames == 0 or score.shape[2] == 0:
            continue
        t, u = frames - arc.frames, labels - arc.labels
        exists = (t >= 0) & (u >= 0)
        t, u = t.clamp(min=0), u.clamp(min=0)
        last = stacked[t + u, sample, u] + score[sample, t, u]
        ends.append(last.where(exists, _LOG_ZERO))
    total = functools.reduce(torch.logaddexp, ends)
    return total.where(total > _LOG_ZERO / 2, -torch.inf)
