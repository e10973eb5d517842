"""The sample-wise algorithm: score → lattice → select → backward, a group of samples at a time.

Logits exist a chunk of node rows at a time. The score pass keeps the log-probability of each
node's symbols; the lattice turns them into log-likelihoods and occupancies; selection keeps the
nodes that carry gradient; the backward pass recomputes the logits of those alone. Method: Braun,
McDermott, Hsiao 2023 (arXiv 2211.16270), with node rows instead of padded samples and the
selection of ``gradient_tolerance``.

How many nodes are kept is known on the device first. A backend that would have to wait for the
number has two groups in flight: the scores of the next group are issued before it is read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.backends.protocol import Backend
from rnnt_op.logits import GroupLogits, LogitSource
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.plan import Group, make_plan
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
        workspace_bytes: temporary memory, None for the backend's default.
        topology: the symbols and arcs of the lattice.

    Returns:
        Losses, float64. [B]
    """
    backend = backend_for(targets.device)
    plan = make_plan(
        frames,
        labels,
        row_bytes=source.row_bytes,
        lattice_bytes=lambda *sizes: backend.lattice_bytes(topology, *sizes),
        state_bytes=source.state_bytes,
        cache_bytes=backend.CACHE_BYTES,
        workspace_bytes=backend.WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        lattice_share=backend.LATTICE_SHARE,
        groups_in_flight=backend.GROUPS_IN_FLIGHT,
    )
    source.allocate(plan.chunk_rows)
    losses = torch.empty(len(frames), dtype=torch.float64, device=targets.device)
    work = _Sweep(
        backend=backend,
        source=source,
        targets=targets,
        losses=losses,
        weights=weights,
        chunk_rows=plan.chunk_rows,
        blank=blank,
        gradient_tolerance=gradient_tolerance,
        zero_infinity=zero_infinity,
        normalize=normalize,
        clamp=clamp,
        topology=topology,
    )
    in_flight: deque[_Scored] = deque()
    for group in plan.groups:
        scored = work.score(group)
        if scored is not None:
            in_flight.append(scored)
        # The group must be gone before the next one is scored.
        del scored
        if len(in_flight) == backend.GROUPS_IN_FLIGHT:
            work.backward(in_flight.popleft())
    while in_flight:
        work.backward(in_flight.popleft())
    return losses


@dataclass(frozen=True)
class _Scored:
    """A group whose gradient is still to come."""

    nodes: Nodes
    columns: Tensor  # logit column of each symbol of each state. [P, S]
    logits: GroupLogits
    scores: Tensor  # [N, S]
    occupancy: Tensor  # [N, S]
    weight: Tensor  # gradient of the scalar with respect to each sample's loss. [S]
    selection: Callable[[], Tensor]


@dataclass(frozen=True)
class _Sweep:
    backend: Backend
    source: LogitSource
    targets: Tensor
    losses: Tensor
    weights: Tensor | None
    chunk_rows: int
    blank: int
    gradient_tolerance: float
    zero_infinity: bool
    normalize: bool
    clamp: float
    topology: Topology

    def score(self, group: Group) -> _Scored | None:
        """Losses of a group and, where gradients are wanted, what they take."""
        nodes = pack_nodes(group, self.targets, self.backend)
        columns = self.topology.columns(nodes.packed.next_label, self.blank, self.source.vocab_size)
        logits = self.source.group(nodes)
        scores = self.losses.new_empty((len(nodes.rows), len(self.topology.symbols)))
        for start, stop in self._chunks(len(nodes.rows)):
            rows = nodes.rows.slice(start, stop)
            self.backend.symbol_scores(
                self.topology,
                logits.logits(rows),
                columns,
                rows,
                self.normalize,
                scores[start:stop],
            )

        lattice = self.backend.forward_backward(
            self.topology, nodes, scores, occupancies=self.weights is not None
        )
        loss = -lattice.log_likelihood
        finite = loss.isfinite()
        samples = nodes.packed.samples
        self.losses[samples] = loss.masked_fill(~finite, 0.0) if self.zero_infinity else loss
        if self.weights is None or lattice.occupancy is None:
            return None

        weight = self.weights.index_select(0, samples).double()
        has_weight = weight != 0
        poisoned = ~finite & has_weight
        if self.zero_infinity:
            poisoned = torch.zeros_like(poisoned)
        return _Scored(
            nodes=nodes,
            columns=columns,
            logits=logits,
            scores=scores,
            occupancy=lattice.occupancy,
            weight=weight.masked_fill(poisoned, float("nan")),
            selection=self.backend.select_nodes(
                self.topology,
                nodes,
                scores,
                lattice.occupancy,
                live=finite & has_weight,
                poisoned=poisoned,
                tolerance=self.gradient_tolerance,
            ),
        )

    def backward(self, scored: _Scored) -> None:
        """Gradients of a group."""
        selected = scored.selection()
        for start, stop in self._chunks(len(selected)):
            kept = selected[start:stop]
            rows = scored.nodes.rows.select(kept)
            # Without a name, a chunk's gradient is gone before the next one's logits are computed.
            scored.logits.backward(
                rows,
                self.backend.logit_gradient_(
                    self.topology,
                    scored.logits.logits(rows),
                    scored.columns,
                    rows,
                    kept,
                    scored.nodes,
                    scored.scores,
                    scored.occupancy,
                    scored.weight,
                    normalize=self.normalize,
                    clamp=self.clamp,
                ),
            )
        scored.logits.finish()

    def _chunks(self, length: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, self.chunk_rows):
            yield start, min(start + self.chunk_rows, length)
