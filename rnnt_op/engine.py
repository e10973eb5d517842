"""The sample-wise algorithm: score → lattice → select → backward, a group of samples at a time.

Logits exist a chunk of node rows at a time. The score pass keeps the log-probability of each
node's symbols; the lattice turns them into log-likelihoods and occupancies; selection keeps the
nodes that carry gradient; the backward pass recomputes the logits of those alone. Method: Braun,
McDermott, Hsiao 2023 (arXiv 2211.16270), with node rows instead of padded samples and the
selection of ``gradient_tolerance``.

How many nodes are kept is known on the device first. A backend that would have to wait for the
number has two groups in flight: the scores of the next group are issued before it is read.

Posteriors and best paths take the score pass and a lattice, without a backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.backends.protocol import Backend, Part
from rnnt_op.logits import GroupLogits, LogitSource
from rnnt_op.nodes import Batch, Nodes, pack_nodes
from rnnt_op.plan import Group, Plan, make_plan
from rnnt_op.topology import RNNT, Topology


def sweep(
    source: LogitSource,
    batch: Batch,
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
        batch: lengths, labels, and which nodes there are.
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
    scorer = _Scorer.of(source, batch, blank, topology, topology, normalize, workspace_bytes)
    losses = torch.empty(len(batch.frames), dtype=torch.float64, device=batch.targets.device)
    work = _Sweep(
        scorer=scorer,
        losses=losses,
        weights=weights,
        gradient_tolerance=gradient_tolerance,
        zero_infinity=zero_infinity,
        clamp=clamp,
    )
    in_flight: deque[_Occupied] = deque()
    for group in scorer.plan.groups:
        occupied = work.forward(group)
        if occupied is not None:
            in_flight.append(occupied)
        # The group must be gone before the next one is scored.
        del occupied
        if len(in_flight) == scorer.backend.GROUPS_IN_FLIGHT:
            work.backward(in_flight.popleft())
    while in_flight:
        work.backward(in_flight.popleft())
    return losses


def posteriors(
    source: LogitSource,
    batch: Batch,
    *,
    blank: int,
    topology: Topology,
    max_frames: int,
    dtype: torch.dtype,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """How often the path takes a blank, and a label, of each node.

    Args:
        source, batch, blank, topology, workspace_bytes: as in ``sweep``.
        max_frames: T of the occupancies.
        dtype: of the occupancies.

    Returns:
        Occupancy of the blanks and of the labels of each node; zero where there is no node, and
        where a sample has no path. [B, T, U + 1, 2]
        Log-likelihoods, float64. [B]
    """
    counting = topology.counted()
    scorer = _Scorer.of(source, batch, blank, topology, counting, True, workspace_bytes)
    samples, max_labels = batch.targets.shape
    shape = (samples, max_frames, max_labels + 1, 2)
    occupancies = torch.zeros(shape, dtype=dtype, device=batch.targets.device)
    log_likelihoods = occupancies.new_empty(samples, dtype=torch.float64)

    def compute(group: Group) -> None:
        scored = scorer.score(group)
        nodes, packed = scored.nodes, scored.nodes.packed
        lattice = scorer.backend.forward_backward(
            counting, nodes, F.pad(scored.scores, (0, 2)), occupancies=True
        )
        assert lattice.occupancy is not None
        log_likelihoods[packed.samples] = lattice.log_likelihood
        has_path = lattice.log_likelihood != -torch.inf
        is_used = has_path.index_select(0, nodes.sample_of(nodes.rows)).unsqueeze(1)
        b, t = packed.frame_positions
        first = ((b * max_frames + t) * (max_labels + 1)).index_select(0, nodes.rows.frame)
        row = first + packed.state_index.index_select(0, nodes.rows.state)
        occupancies.view(-1, 2).index_copy_(
            0, row, lattice.occupancy[:, -2:].where(is_used, 0.0).to(dtype)
        )

    for group in scorer.plan.groups:
        compute(group)
    return occupancies, log_likelihoods


def align(
    source: LogitSource,
    batch: Batch,
    *,
    blank: int,
    topology: Topology,
    workspace_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """The most probable path of each sample.

    Args:
        source, batch, blank, topology, workspace_bytes: as in ``sweep``.

    Returns:
        Frame that emits each label, −1 where there is no label or no path, int64. [B, U]
        Log-probability of the path, float64. [B]
    """
    scorer = _Scorer.of(source, batch, blank, topology, topology, True, workspace_bytes)
    samples, max_labels = batch.targets.shape
    device = batch.targets.device
    frames = torch.full((samples, max_labels + 1), -1, dtype=torch.int64, device=device)
    log_probabilities = torch.empty(samples, dtype=torch.float64, device=device)

    def compute(group: Group) -> None:
        scored = scorer.score(group)
        packed = scored.nodes.packed
        best = scorer.backend.best_paths(topology, scored.nodes, scored.scores)
        log_probabilities[packed.samples], frames[packed.state_positions] = best

    for group in scorer.plan.groups:
        compute(group)
    return frames[:, :max_labels].contiguous(), log_probabilities


def plan_batch(
    backend: Backend,
    lattice: Topology,
    frames: Sequence[int],
    labels: Sequence[int],
    *,
    restricted_nodes: Sequence[int] | None = None,
    row_bytes: int,
    state_bytes: int,
    workspace_bytes: int | None,
) -> Plan:
    """The plan that a backend's sizes make of a batch.

    Args:
        backend: that of the batch's device.
        lattice: the topology that the recursions have.
        frames, labels, restricted_nodes, row_bytes, state_bytes: as in ``make_plan``.
        workspace_bytes: temporary memory, None for the backend's default.
    """
    return make_plan(
        frames,
        labels,
        restricted_nodes=restricted_nodes,
        row_bytes=row_bytes,
        lattice_bytes=lambda *sizes: backend.lattice_bytes(lattice, *sizes),
        state_bytes=state_bytes,
        cache_bytes=backend.CACHE_BYTES,
        workspace_bytes=backend.WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes,
        lattice_share=backend.LATTICE_SHARE,
        groups_in_flight=backend.GROUPS_IN_FLIGHT,
    )


@dataclass(frozen=True)
class _Scored:
    """A group's nodes and the scores of their symbols."""

    nodes: Nodes
    columns: Tensor  # logit column of each symbol of each state, among this rank's. [P, S]
    logits: GroupLogits
    scores: Tensor  # [N, S]
    part: Part | None  # where this rank has a part of the columns


@dataclass(frozen=True)
class _Scorer:
    """The plan of a batch, and its score pass."""

    backend: Backend
    source: LogitSource
    batch: Batch
    plan: Plan
    blank: int
    topology: Topology
    normalize: bool

    @classmethod
    def of(
        cls,
        source: LogitSource,
        batch: Batch,
        blank: int,
        topology: Topology,
        lattice: Topology,
        normalize: bool,
        workspace_bytes: int | None,
    ) -> _Scorer:
        """Plans the batch; ``lattice`` is the topology that its recursions will have."""
        backend = source.backend
        plan = plan_batch(
            backend,
            lattice,
            batch.frames,
            batch.labels,
            restricted_nodes=batch.restricted_nodes,
            row_bytes=source.row_bytes,
            state_bytes=source.state_bytes,
            workspace_bytes=workspace_bytes,
        )
        source.allocate(plan.chunk_rows)
        return cls(backend, source, batch, plan, blank, topology, normalize)

    def score(self, group: Group) -> _Scored:
        batch = self.batch
        nodes = pack_nodes(group, batch.targets, self.backend, batch.label_ranges)
        all_columns = self.topology.columns(
            nodes.packed.next_label, self.blank, self.source.vocab_size
        )
        logits = self.source.group(nodes)
        shape = len(nodes.rows), len(self.topology.symbols)
        scores = all_columns.new_empty(shape, dtype=torch.float64)
        shard = self.source.shard
        columns = all_columns if shard is None else shard.columns(all_columns)
        part = None
        if shard is not None:
            tokens = shard.tokens(self.topology.tokens(shard.all_columns))
            part = Part(tokens, torch.empty_like(scores[:, 0]))
        for start, stop in self.chunks(len(nodes.rows)):
            rows = nodes.rows.slice(start, stop)
            self.backend.symbol_scores(
                self.topology,
                logits.logits(rows),
                columns,
                rows,
                self.normalize,
                scores[start:stop],
                part and replace(part, log_sum=part.log_sum[start:stop]),
            )
        if shard is not None and part is not None:
            scores, log_sum = shard.normalized(
                self.topology, all_columns, nodes.rows, scores, part.log_sum
            )
            part = replace(part, log_sum=log_sum)
        return _Scored(nodes, columns, logits, scores, part)

    def chunks(self, length: int) -> Iterator[tuple[int, int]]:
        for start in range(0, length, self.plan.chunk_rows):
            yield start, min(start + self.plan.chunk_rows, length)


@dataclass(frozen=True)
class _Occupied:
    """A group whose gradient is still to come."""

    scored: _Scored
    occupancy: Tensor  # [N, S]
    weight: Tensor  # gradient of the scalar with respect to each sample's loss. [S]
    selection: Callable[[], Tensor]


@dataclass(frozen=True)
class _Sweep:
    scorer: _Scorer
    losses: Tensor
    weights: Tensor | None
    gradient_tolerance: float
    zero_infinity: bool
    clamp: float

    def forward(self, group: Group) -> _Occupied | None:
        """Losses of a group and, where gradients are wanted, what they take."""
        backend, topology = self.scorer.backend, self.scorer.topology
        scored = self.scorer.score(group)
        nodes = scored.nodes
        lattice = backend.forward_backward(
            topology, nodes, scored.scores, occupancies=self.weights is not None
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
        return _Occupied(
            scored=scored,
            occupancy=lattice.occupancy,
            weight=weight.masked_fill(poisoned, float("nan")),
            selection=backend.select_nodes(
                topology,
                nodes,
                scored.scores,
                lattice.occupancy,
                live=finite & has_weight,
                poisoned=poisoned,
                tolerance=self.gradient_tolerance,
            ),
        )

    def backward(self, occupied: _Occupied) -> None:
        """Gradients of a group."""
        scored = occupied.scored
        selected = occupied.selection()
        for start, stop in self.scorer.chunks(len(selected)):
            kept = selected[start:stop]
            rows = scored.nodes.rows.select(kept)
            # Without a name, a chunk's gradient is gone before the next one's logits are computed.
            scored.logits.backward(
                rows,
                self.scorer.backend.logit_gradient_(
                    self.scorer.topology,
                    scored.logits.logits(rows),
                    scored.columns,
                    rows,
                    kept,
                    scored.nodes,
                    scored.scores,
                    occupied.occupancy,
                    occupied.weight,
                    normalize=self.scorer.normalize,
                    clamp=self.clamp,
                    part=scored.part,
                ),
            )
        scored.logits.finish()
