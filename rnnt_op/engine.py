"""The sample-wise algorithm: score → lattice → select → backward, a group of samples at a time.

Logits exist a chunk of node rows at a time. The score pass keeps the log-probability of each
node's arcs; the lattice turns them into log-likelihoods and arc occupancies; selection keeps the
nodes that carry gradient; the backward pass recomputes the logits of those alone. Method: Braun,
McDermott, Hsiao 2023 (arXiv 2211.16270), with node rows instead of padded samples and the
selection of ``gradient_tolerance``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.logits import LogitSource
from rnnt_op.nodes import pack_nodes
from rnnt_op.plan import make_plan
from rnnt_op.topology import RNNT, Topology


def sweep(
    source: LogitSource,
    targets: Tensor,
    frames: Sequence[int],
    labels: Sequence[int],
    *,
    blank: int,
    weights: Tensor | None,
    gradient_tolerance: float = 0.0,
    zero_infinity: bool = False,
    normalize: bool = True,
    clamp: float = 0.0,
    workspace_bytes: int | None = None,
    topology: Topology = RNNT,
) -> Tensor:
    """Losses of a batch and, given weights, the gradients of Σ_b weights[b]·loss[b] in ``source``.

    A sample whose loss is not finite contributes NaN to the gradients that it takes part in, or,
    with ``zero_infinity``, loss and gradient zero. It leaves the rows of other samples alone, and
    so does any sample whose weight is zero.

    Args:
        source: where logits come from and their gradient goes.
        targets: labels, valid where u < labels[b]. [B, U]
        frames: T of each sample.
        labels: U of each sample.
        blank: index of the blank token.
        weights: gradient with respect to each sample's loss, None for losses alone. [B]
        gradient_tolerance: share of each sample's logit-gradient L1 mass that may be skipped.
        zero_infinity: set losses that are not finite, and their gradients, to zero.
        normalize: whether a softmax turns logits into probabilities.
        clamp: bound on the elements of the unit-scale logit gradient; none if not positive.
        workspace_bytes: temporary memory, None for the plan's default.
        topology: the arcs of the lattice.

    Returns:
        Losses, float64. [B]
    """
    backend = backend_for(targets.device)
    plan = make_plan(
        frames,
        labels,
        row_bytes=source.row_bytes,
        cell_bytes=backend.CELL_BYTES,
        state_bytes=source.state_bytes,
        cache_bytes=backend.CACHE_BYTES,
        workspace_bytes=workspace_bytes,
    )
    source.allocate(plan.chunk_rows)
    losses = torch.empty(len(frames), dtype=torch.float64, device=targets.device)
    for group in plan.groups:
        nodes = pack_nodes(group, targets)
        source.enter(nodes)

        scores = losses.new_empty((len(nodes.rows), len(topology.arcs)))
        for start, stop in _chunks(len(nodes.rows), plan.chunk_rows):
            rows = nodes.rows.slice(start, stop)
            scores[start:stop] = backend.arc_scores(
                source.logits(rows), topology.columns(nodes.next_labels(rows), blank), normalize
            )

        lattice = backend.forward_backward(topology, nodes, scores)
        loss = -lattice.log_likelihood
        finite = loss.isfinite()
        losses[nodes.samples] = loss.masked_fill(~finite, 0.0) if zero_infinity else loss
        if weights is None:
            continue

        weight = weights.index_select(0, nodes.samples).double()
        has_weight = weight != 0
        selected = backend.select_nodes(
            nodes, lattice, scores, finite & has_weight, gradient_tolerance
        )
        for start, stop in _chunks(len(selected), plan.chunk_rows):
            kept = selected[start:stop]
            rows = nodes.rows.select(kept)
            d_logits = backend.logit_gradient_(
                source.logits(rows),
                topology.columns(nodes.next_labels(rows), blank),
                scores.index_select(0, kept),
                lattice.occupancy.index_select(0, kept),
                weight.index_select(0, nodes.sample_of(rows)),
                normalize,
                clamp,
            )
            source.backward(rows, d_logits)

        poisoned = ~finite & has_weight & (not zero_infinity)
        source.leave(torch.zeros_like(weight).masked_fill_(poisoned, float("nan")))
    return losses


def _chunks(length: int, chunk_rows: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, chunk_rows):
        yield start, min(start + chunk_rows, length)
