"""What k2 calls the gradients of px and py: occupancies of labels and of blanks.

They are the gradients of the log-likelihood with respect to the scores of the two, so the loss is
taken of scores alone, two columns for each node.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op import functional, topologies
from rnnt_op.integrations.k2_pruning import label_ranges
from rnnt_op.topologies import Topology
from rnnt_op.validation import check_choice


def topology_of(rnnt_type: str, modified: bool | None = None) -> Topology:
    """The lattice that k2 names, or that fast_rnnt's former ``modified`` does."""
    lattices = {
        "regular": topologies.RNNT,
        "modified": topologies.modified(),
        "constrained": topologies.constrained(),
    }
    check_choice("rnnt_type", rnnt_type, tuple(lattices))
    if modified is None:
        return lattices[rnnt_type]
    if rnnt_type != "regular":
        raise ValueError(f"modified: expected None beside rnnt_type={rnnt_type!r}, got {modified}")
    return lattices["modified" if modified else "regular"]


def next_scores(
    logits: Tensor,
    symbols: Tensor,
    blank: int,
    target_lengths: Tensor,
    ranges: Tensor | None,
    hat: bool,
) -> Tensor:
    """Log-probabilities of blank and next label.

    Args:
        logits: [B, T, S+1, C], or [B, T, R, C] with ranges
        symbols: labels; padding may hold anything. [B, S]
        blank: index of the blank.
        target_lengths: labels of each sample. [B]
        ranges: the states of each frame, consecutive. [B, T, R] or None
        hat: the blank's probability is the sigmoid of its logit.

    Returns:
        [B, T, S+1 or R, 2]
    """
    batch, frames, states, columns = logits.shape
    blank %= columns
    is_label = torch.arange(symbols.shape[1], device=logits.device) < target_lengths.to(
        logits.device
    ).unsqueeze(1)
    labels = F.pad(symbols.long().where(is_label, blank), (0, 1), value=blank)
    if ranges is None:
        labels = labels.unsqueeze(1).expand(batch, frames, states)
    else:
        labels = labels.gather(1, ranges.flatten(1)).view(batch, frames, states)
    label = logits.gather(3, labels.unsqueeze(3)).squeeze(3)
    of_blank = logits[..., blank]
    if not hat:
        return torch.stack([of_blank, label], 3) - logits.logsumexp(3, keepdim=True)
    others = torch.cat([logits[..., :blank], logits[..., blank + 1 :]], 3)
    label = label - others.logsumexp(3) + F.logsigmoid(-of_blank)
    return torch.stack([F.logsigmoid(of_blank), label], 3)


def loss_of_scores(
    scores: Tensor,
    symbols: Tensor,
    frames: Tensor,
    labels: Tensor,
    topology: Topology,
    delay_penalty: float,
    ranges: Tensor | None = None,
    *,
    reduction: str,
) -> Tensor:
    """Loss of the scores of blank and next label. [B, T, S+1 or R, 2]"""
    return functional.rnnt_loss(
        scores,
        torch.ones_like(symbols),
        frames,
        labels,
        blank=0,
        topology=topology,
        delay_penalty=delay_penalty,
        label_ranges=None if ranges is None else label_ranges(ranges),
        reduction=reduction,
        fused_log_softmax=False,
    )


def occupancies(
    scores: Tensor,
    symbols: Tensor,
    frames: Tensor,
    labels: Tensor,
    topology: Topology,
    delay_penalty: float,
    ranges: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Those of the arcs of :func:`loss_of_scores`, as :func:`px_py` has them."""
    with torch.enable_grad():
        leaf = scores.detach().requires_grad_()
        arguments = (leaf, symbols, frames, labels, topology, delay_penalty, ranges)
        (gradient,) = torch.autograd.grad(loss_of_scores(*arguments, reduction="sum"), leaf)
    blank, label = -gradient[..., 0], -gradient[..., 1]
    if ranges is not None:
        nothing = blank.new_zeros(*blank.shape[:2], symbols.shape[1] + 1)
        blank, label = (nothing.scatter(2, ranges, values) for values in (blank, label))
    label = label[:, :, :-1]
    if topology == topologies.constrained():
        # The gradient of a blank's score counts those behind labels, which k2 leaves to the labels.
        blank = blank - F.pad(label, (1, 0))
    return px_py(blank, label, topology)


def px_py(blank: Tensor, label: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """Occupancies in k2's layout; [B, T, S+1] and [B, T, S] here."""
    px = label.transpose(1, 2)
    return F.pad(px, (0, 1)) if topology == topologies.RNNT else px, blank.transpose(1, 2)
