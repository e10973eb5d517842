"""The engine's primitives in torch operations: the CPU's backend, and what others are held to.

Chunks are small enough to stay in cache between operations, outputs go to preallocated buffers,
and sums run in a fixed order, so results are bitwise reproducible. Half inputs are computed in
float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rnnt_op.backends.eager_lattice import Lattice, forward_backward
from rnnt_op.nodes import Nodes, Rows

__all__ = [
    "CACHE_BYTES",
    "CELL_BYTES",
    "Lattice",
    "activate_",
    "activation_gradient_",
    "add_segment_sums_",
    "arc_scores",
    "forward_backward",
    "gemm_dtype",
    "hidden_",
    "logit_gradient_",
    "select_nodes",
]

CACHE_BYTES = 16 * 2**20
"""A chunk's logits, hidden states and gradients, kept within a CPU's last-level cache."""

CELL_BYTES = 112
"""Peak bytes of a group per lattice cell: scores, α, β, occupancies, indices, temporaries."""


def gemm_dtype(compute_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype GEMMs run in: on a CPU, float16 is slower than float32 and less exact."""
    if compute_dtype == torch.float16 and device.type == "cpu":
        return torch.float32
    return compute_dtype


def hidden_(
    hidden: Tensor, scratch: Tensor, encoder: Tensor, predictor: Tensor, rows: Rows, activation: str
) -> Tensor:
    """hidden = act(encoder[frame] + predictor[state]). [R, H]"""
    torch.index_select(encoder, 0, rows.frame, out=hidden)
    torch.index_select(predictor, 0, rows.state, out=scratch)
    return activate_(hidden.add_(scratch), activation)


def activate_(pre_activation: Tensor, activation: str) -> Tensor:
    if activation == "tanh":
        return pre_activation.tanh_()
    if activation == "relu":
        return pre_activation.relu_()
    if activation == "sigmoid":
        return pre_activation.sigmoid_()
    assert activation == "identity", activation
    return pre_activation


def activation_gradient_(d_hidden: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """Gradient of the pre-activation, from the activation's value alone, in place. [R, H]"""
    aten = torch.ops.aten
    if activation == "tanh":
        aten.tanh_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
    elif activation == "relu":
        aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
    elif activation == "sigmoid":
        aten.sigmoid_backward.grad_input(d_hidden, hidden, grad_input=d_hidden)
    else:
        assert activation == "identity", activation
    return d_hidden


def arc_scores(logits: Tensor, columns: Tensor, normalize: bool) -> Tensor:
    """Log-probability of each arc of each row, −∞ where there is no arc; destroys the logits.

    Args:
        logits: float32 or float64. [R, V]
        columns: logit column of each arc, negative where there is none. [R, A]
        normalize: whether a softmax over the row turns logits into probabilities.

    Returns:
        Scores, float64. [R, A]
    """
    exists = columns >= 0
    columns = _existing(columns, exists)
    # Float32 would round scores at the size of the logits, so they leave it here.
    scores = logits.gather(1, columns).double()
    if normalize:
        maximum = logits.amax(1, keepdim=True)
        scores -= maximum.double()
        # The arcs enter the sum in float64: beside an almost certain arc's 1, a float32 sum would
        # lose the rest, which is all that this arc's score and gradient consist of.
        others = logits.sub_(maximum).exp_().scatter_(1, columns, 0.0).sum(1, keepdim=True)
        scores.masked_fill_(~exists, float("-inf"))
        scores -= (others.double() + scores.exp().sum(1, keepdim=True)).log_()
    return scores.masked_fill_(~exists, float("-inf"))


def select_nodes(
    nodes: Nodes, lattice: Lattice, scores: Tensor, live: Tensor, tolerance: float
) -> Tensor:
    r"""Rows of the nodes that the backward pass keeps, ascending.

    The L1 norm of a node's logit gradient γ·softmax − Σ_a γ_a·onehot_a is known without its logits:

        c = γ·(1 − Σ_a p_a) + Σ_a |γ·p_a − γ_a|        γ = Σ_a γ_a

    Skipped are the nodes of smallest c, as many as carry at most ``tolerance`` of their sample's
    Σc: found in a histogram of c over quarter octaves, without sorting.

    Args:
        nodes: the group's nodes.
        lattice: their occupancies γ_a.
        scores: their log p_a. [N, A]
        live: whether a sample has a gradient at all. [S]
        tolerance: share of a sample's gradient mass that may be skipped.
    """
    mass = gradient_mass(scores, lattice.occupancy)
    sample = nodes.sample
    mass.masked_fill_(~live.index_select(0, sample), 0.0)

    # The bit pattern of a positive float64 grows with its value; its top bits are exponent and
    # quarter octave.
    octave = mass.view(torch.int64) >> 50
    first, bins = (1023 - 256) * 4, 4 * 320
    octave = octave.sub_(first).clamp_(0, bins - 1)
    histogram = torch.bincount(
        sample * bins + octave, weights=mass, minlength=len(live) * bins
    ).view(-1, bins)
    skipped = histogram.cumsum(1)
    budget = tolerance * skipped[:, -1:]
    first_kept = (skipped <= budget).sum(1)
    kept = (octave >= first_kept.index_select(0, sample)) & (mass > 0)
    return kept.nonzero().squeeze(1)


def gradient_mass(scores: Tensor, occupancy: Tensor) -> Tensor:
    """L1 norm of each node's unit-scale logit gradient, float64. [N]"""
    rest = (1 - scores.exp().sum(1)).clamp_(min=0)
    return rest.mul_(occupancy.sum(1)).add_(_arc_gradient(scores, occupancy).abs_().sum(1))


def logit_gradient_(
    logits: Tensor,
    columns: Tensor,
    scores: Tensor,
    occupancy: Tensor,
    weights: Tensor,
    normalize: bool,
    clamp: float,
) -> Tensor:
    """Turns logits into weight · clamp(γ·softmax(logits) − Σ_a γ_a·onehot_a), in place.

    Args:
        logits: [R, V]
        columns: logit column of each arc, negative where there is none; the first arc always
            exists. [R, A]
        scores: log p_a of each arc, float64. [R, A]
        occupancy: γ_a, zero where there is no arc, float64. [R, A]
        weights: gradient of the scalar with respect to each row's loss. [R]
        normalize: whether the logits go through a softmax; without, the gradient is that of
            log-probabilities.
        clamp: bound on the unit-scale gradient's elements; none if not positive.
    """
    if normalize:
        torch.softmax(logits, 1, out=logits)
        logits.mul_(occupancy.sum(1, keepdim=True).to(logits.dtype))
        arc_gradient = _arc_gradient(scores, occupancy)
    else:
        logits.zero_()
        arc_gradient = -occupancy
    exists = columns >= 0
    logits.scatter_(1, _existing(columns, exists), _existing(arc_gradient, exists).to(logits.dtype))
    if clamp > 0:
        logits.clamp_(-clamp, clamp)
    return logits.mul_(weights.unsqueeze(1).to(logits.dtype))


def _existing(values: Tensor, exists: Tensor) -> Tensor:
    """Lets an arc that does not exist repeat its row's first arc, which always does. [R, A]"""
    return values.where(exists, values[:, :1])


def _arc_gradient(scores: Tensor, occupancy: Tensor) -> Tensor:
    """γ·p_a − γ_a in float64: for an almost certain arc the two are almost equal. [R, A]"""
    return (occupancy.sum(1, keepdim=True) * scores.exp()).sub_(occupancy)


def add_segment_sums_(sums: Tensor, values: Tensor, segment: Tensor, *, is_sorted: bool) -> None:
    """sums[segment[r]] += values[r], added in ascending order of r.

    Args:
        sums: [M, H]
        values: [R, H]
        segment: int32. [R]
        is_sorted: whether the segments ascend.
    """
    if is_sorted:
        order = torch.arange(segment.shape[0], dtype=torch.int32, device=segment.device)
    else:
        segment, order = segment.sort(stable=True)
        order = order.int()
    first, last = int(segment[0]), int(segment[-1])
    bounds = torch.arange(first, last + 1, dtype=torch.int32, device=segment.device)
    offsets = torch.searchsorted(segment, bounds, out_int32=True)
    sums[first : last + 1] += F.embedding_bag(order, values, offsets, mode="sum")
