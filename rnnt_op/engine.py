"""The sample-wise algorithm: score → lattice → select → backward, a group of samples at a time.

Logits exist a chunk of node rows at a time. The score pass keeps the log-probability of each
node's symbols, on a CPU only where paths reach the node; the lattice turns them into
log-likelihoods and occupancies; selection keeps the nodes that carry gradient; the backward pass
recomputes the logits of those alone, unless there was room to keep them. Method: Braun, McDermott,
Hsiao 2023 (arXiv 2211.16270), with node rows instead of padded samples and the selection of
``gradient_tolerance``.

How many nodes are kept is known on the device first. A backend that would have to wait for the
number has two groups in flight: the scores of the next group are issued before it is read.

Posteriors and best paths take the score pass and a lattice, without a backward pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.backends.planning import plan_batch
from rnnt_op.backends.protocol import Reached
from rnnt_op.backends.records import Lattice, Logits, Part, Places
from rnnt_op.logits import GroupLogits, LogitSource
from rnnt_op.nodes import Nodes, RowIndex, Rows, pack_nodes, put
from rnnt_op.plan import Group, Plan
from rnnt_op.task import Task
from rnnt_op.topology import Topology

# Of the gradient that may be skipped.
_UNSCORED_SHARE = 1 / 32

# Where a sample wants this share of its group's nodes at once, it is not sure of its path.
_UNSURE_SHARE = 1 / 4

# Then the group is computed in parts, which have room for their logits, if so many times as many
# nodes are wanted as have been scored, whose scores are given up.
_WORTH_LEAVING = 4

# Where this share of the nodes is wanted, all are scored in order: moving rows would cost more.
_NEARLY_ALL = 15 / 16


def sweep(
    task: Task,
    source: LogitSource,
    *,
    weights: Tensor | None,
    gradient_tolerance: float = 0.0,
    clamp: float = 0.0,
    zero_infinity: bool = False,
    saved: SavedScores | None = None,
) -> Tensor:
    """Losses of a batch and, given weights, the gradients of Σ_b weights[b]·loss[b] in ``source``.

    A sample whose loss is not finite contributes NaN to the gradients that it takes part in, or,
    with ``zero_infinity``, loss and gradient zero. It leaves the rows of other samples alone, and
    so does any sample whose weight is zero.

    Args:
        task: the batch, its lattice, and what serves it.
        source: where logits come from and their gradient goes.
        weights: gradient with respect to each sample's loss, None for losses alone. [B]
        gradient_tolerance: share of each sample's logit-gradient L1 mass that may be skipped.
        clamp: bound on the elements of the unit-scale logit gradient; none if not positive.
        zero_infinity: set losses that are not finite, and their gradients, to zero.
        saved: where the scores go, or come from if they are known.

    Returns:
        Losses, float64. [B]
    """
    may_skip = task.topology.is_substochastic and task.normalize and task.shard is None
    skipped = gradient_tolerance * _UNSCORED_SHARE if may_skip else 0.0
    scorer = _Scorer.of(task, source, task.topology, skipped, saved)
    batch = task.batch
    losses = torch.empty(len(batch.frames), dtype=torch.float64, device=batch.targets.device)
    work = _Sweep(scorer, losses, weights, gradient_tolerance, clamp, zero_infinity)
    in_flight: deque[_Occupied] = deque()
    for scored in scorer.groups():
        occupied = work.forward(scored)
        if occupied is not None:
            in_flight.append(occupied)
        del scored, occupied
        if len(in_flight) == task.backend.GROUPS_IN_FLIGHT:
            work.backward(in_flight.popleft())
    while in_flight:
        work.backward(in_flight.popleft())
    return losses


def posteriors(
    task: Task, source: LogitSource, max_frames: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """How often the path takes a blank, and a label, of each node.

    Args:
        task, source: as in ``sweep``.
        max_frames: T of the occupancies.
        dtype: of the occupancies.

    Returns:
        Occupancy of the blanks and of the labels of each node; zero where there is no node, and
        where a sample has no path. [B, T, U + 1, 2]
        Log-likelihoods, float64. [B]
    """
    batch, counting = task.batch, task.topology.counted()
    scorer = _Scorer.of(task, source, counting)
    samples, max_labels = batch.targets.shape
    shape = (samples, max_frames, max_labels + 1, 2)
    occupancies = torch.zeros(shape, dtype=dtype, device=batch.targets.device)
    log_likelihoods = occupancies.new_empty(samples, dtype=torch.float64)

    def compute(scored: _Scored) -> None:
        nodes, packed = scored.nodes, scored.nodes.packed
        lattice = task.backend.forward_backward(
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

    for scored in scorer.groups():
        compute(scored)
        del scored
    return occupancies, log_likelihoods


def align(task: Task, source: LogitSource) -> tuple[Tensor, Tensor]:
    """The most probable path of each sample.

    Args:
        task, source: as in ``sweep``.

    Returns:
        Frame that emits each label, −1 where there is no label or no path, int64. [B, U]
        Log-probability of the path, float64. [B]
    """
    batch = task.batch
    scorer = _Scorer.of(task, source, task.topology)
    samples, max_labels = batch.targets.shape
    device = batch.targets.device
    frames = torch.full((samples, max_labels + 1), -1, dtype=torch.int64, device=device)
    log_probabilities = torch.empty(samples, dtype=torch.float64, device=device)

    def compute(scored: _Scored) -> None:
        packed = scored.nodes.packed
        best = task.backend.best_paths(task.topology, scored.nodes, scored.scores)
        log_probabilities[packed.samples], frames[packed.state_positions] = best

    for scored in scorer.groups():
        compute(scored)
        del scored
    return frames[:, :max_labels].contiguous(), log_probabilities


@dataclass(frozen=True)
class SavedScores:
    """Scores of given logits, from the losses until the gradients."""

    values: Tensor  # float64. [B, T, R, S]
    are_known: bool

    def get(self, nodes: Nodes) -> Tensor:
        """Those of a group. [N, S]"""
        return self._rows().index_select(0, self._places(nodes))

    def put(self, nodes: Nodes, scores: Tensor) -> None:
        self._rows().index_copy_(0, self._places(nodes), scores)

    def _rows(self) -> Tensor:
        return self.values.view(-1, self.values.shape[3])

    def _places(self, nodes: Nodes) -> Tensor:
        places = Places.of(self.values, nodes.packed)
        place = places.frame.index_select(0, nodes.rows.frame)
        place += places.state.index_select(0, nodes.rows.state)
        return place.div_(self.values.shape[3], rounding_mode="floor")


@dataclass(frozen=True)
class _Scored:
    """A group's nodes and the scores of their symbols."""

    nodes: Nodes
    columns: Tensor  # logit column of each symbol of each state, among this rank's. [P, S]
    logits: GroupLogits
    scores: Tensor  # −∞ of nodes that are not scored. [N, S]
    part: Part | None  # where this rank has a part of the columns
    reached: Reached | None  # None: all are scored


@dataclass(frozen=True)
class _Scorer:
    """The plan of a batch, and its score pass."""

    task: Task
    source: LogitSource
    plan: Plan
    tolerance: float  # share of a sample's gradient that nodes which are not scored may cost
    saved: SavedScores | None

    @classmethod
    def of(
        cls,
        task: Task,
        source: LogitSource,
        lattice: Topology,
        tolerance: float = 0.0,
        saved: SavedScores | None = None,
    ) -> _Scorer:
        """Plans the batch; ``lattice`` is the topology that its recursions will have."""
        batch = task.batch
        plan = plan_batch(
            task.backend,
            lattice,
            batch.frames,
            batch.labels,
            restricted_nodes=batch.restricted_nodes,
            row_bytes=source.row_bytes,
            packed_bytes=source.packed_bytes,
            logits_bytes=source.logits_bytes,
            workspace_bytes=task.workspace_bytes,
        )
        source.allocate(plan.chunk_rows, plan.kept_rows)
        return cls(task, source, plan, tolerance, saved)

    def groups(self) -> Iterator[_Scored]:
        """Those of the plan, or their parts. One must be gone before the next is scored."""
        # Ranks agree on groups, and on parts only if their logits take as much.
        has_parts = self.task.shard is None
        groups = deque((group, self.tolerance > 0) for group in self.plan.groups)
        while groups:
            group, may_skip = groups.popleft()
            parts = group.parts if has_parts else ()
            scored = self._score(group, may_skip) if may_skip or not parts else set(group.samples)
            if isinstance(scored, set):
                groups.extendleft(
                    (part, not scored.issuperset(part.samples)) for part in parts[::-1]
                )
            else:
                yield scored
            del scored

    def _score(self, group: Group, may_skip: bool) -> _Scored | set[int]:
        """Where the group's parts are to be scored instead, the samples that are known to be unsure
        of their path."""
        task, batch = self.task, self.task.batch
        nodes = pack_nodes(group, batch.targets, task.backend, batch.label_ranges)
        next_label = nodes.packed.next_label
        all_columns = task.topology.columns(next_label, task.blank, self.source.column_count)
        logits = self.source.group(nodes)
        shape = len(nodes.rows), len(task.topology.symbols)
        scores = all_columns.new_empty(shape, dtype=torch.float64)
        shard = task.shard
        columns = all_columns if shard is None else shard.columns(all_columns)
        part = None
        if shard is not None:
            tokens = shard.tokens(task.topology.tokens(shard.all_columns))
            part = Part(tokens, torch.empty_like(scores[:, 0]))

        saved = self.saved
        if saved is not None and saved.are_known:
            return _Scored(nodes, columns, logits, saved.get(nodes), None, None)
        reached = None
        if may_skip:
            reached = task.backend.reach(
                task.topology, nodes, scores, self.source.row_work, self.tolerance
            )
            if reached is None and group.parts:
                return set(group.samples)
        scored = _Scored(nodes, columns, logits, scores, part, reached)
        if reached is not None:
            scores.fill_(-torch.inf)
            count = 0
            for wanted in reached:
                is_worth_leaving = len(wanted) >= _WORTH_LEAVING * count
                if group.parts and is_worth_leaving and _is_unsure(wanted, scores):
                    return _mostly_wanted(nodes, wanted)
                self.add(scored, wanted)
                count += len(wanted)
            return scored
        for chunk in self.chunks(len(nodes.rows)):
            rows = nodes.rows.at(chunk)
            others = part and replace(part, others=part.others[chunk])
            self._fill(scored, rows, logits.logits(rows, chunk), scores[chunk], others)
        if shard is not None and part is not None:
            scores, normalizer = shard.normalized(
                task.topology, all_columns, nodes.rows, scores, part.others
            )
            part = replace(part, normalizer=normalizer)
        if saved is not None:
            saved.put(nodes, scores)
        return replace(scored, scores=scores, part=part)

    def add(self, scored: _Scored, wanted: Tensor) -> None:
        """Scores the nodes of these numbers, too."""
        # Then many will have a gradient, for which their logits are worth keeping.
        is_unsure = _is_unsure(wanted, scored.scores)
        is_nearly_all = len(wanted) >= _NEARLY_ALL * len(scored.scores)
        for chunk in self.chunks(len(scored.scores) if is_nearly_all else len(wanted)):
            index = chunk if is_nearly_all else wanted[chunk]
            rows = scored.nodes.rows.at(index)
            some = scored.scores.new_empty(len(rows), scored.scores.shape[1])
            logits = scored.logits.logits(rows, index if is_unsure else None)
            self._fill(scored, rows, logits, some)
            put(scored.scores, index, some)

    def _fill(
        self, scored: _Scored, rows: Rows, logits: Logits, scores: Tensor, part: Part | None = None
    ) -> None:
        task = self.task
        task.backend.symbol_scores(
            task.topology, logits, scored.columns, rows, task.normalize, scores, part
        )

    def chunks(self, length: int) -> Iterator[slice]:
        for start in range(0, length, self.plan.chunk_rows):
            yield slice(start, min(start + self.plan.chunk_rows, length))


def _is_unsure(wanted: Tensor, scores: Tensor) -> bool:
    return len(wanted) >= _UNSURE_SHARE * len(scores)


def _mostly_wanted(nodes: Nodes, wanted: Tensor) -> set[int]:
    """Positions in the batch of the samples of which more than half of the nodes are wanted."""
    group, ends = nodes.packed.group, nodes.packed.first_node[1:].contiguous()
    counts = torch.bucketize(wanted, ends, right=True).bincount(minlength=len(ends)).tolist()
    of_samples = zip(group.samples, counts, group.nodes_of_samples, strict=True)
    return {b for b, count, whole in of_samples if 2 * count > whole}


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
    clamp: float
    zero_infinity: bool

    def forward(self, scored: _Scored) -> _Occupied | None:
        """Losses of a group and, where gradients are wanted, what they take."""
        backend, topology = self.scorer.task.backend, self.scorer.task.topology
        nodes, reached = scored.nodes, scored.reached
        lattice = self._lattice(scored)
        tolerance = self.gradient_tolerance
        if reached is not None and lattice.occupancy is not None:
            missing = reached.rest(lattice.occupancy)
            if len(missing) > 0:
                # It must be gone before there is another one.
                del lattice
                self.scorer.add(scored, missing)
                lattice = self._lattice(scored)
            # Twice what nodes that are not scored cost, since masses are rounded.
            tolerance -= 2 * self.scorer.tolerance
        loss = -lattice.log_likelihood
        finite = loss.abs() < torch.inf  # isfinite takes twice as many operations
        samples = nodes.packed.samples
        if self.zero_infinity:
            loss = loss.masked_fill(~finite, 0.0)
        self.losses.index_copy_(0, samples, loss)
        if self.weights is None or lattice.occupancy is None:
            return None

        weight = self.weights.index_select(0, samples).double()
        of_no_loss = 0.0 if self.zero_infinity else float("nan")
        weight = weight.where(finite | (weight == 0), of_no_loss)
        if not self.scorer.task.normalize:
            # Log-probabilities without a softmax have the occupancies as gradients, whose mass is
            # that of a softmax with nothing for its symbols.
            scored.scores.fill_(-torch.inf)
        return _Occupied(
            scored=scored,
            occupancy=lattice.occupancy,
            weight=weight,
            selection=backend.select_nodes(
                topology,
                nodes,
                scored.scores,
                lattice.occupancy,
                weight=weight,
                tolerance=tolerance,
                least=self.scorer.source.least_gradient,
            ),
        )

    def _lattice(self, scored: _Scored) -> Lattice:
        task = self.scorer.task
        return task.backend.forward_backward(
            task.topology, scored.nodes, scored.scores, occupancies=self.weights is not None
        )

    def backward(self, occupied: _Occupied) -> None:
        """Gradients of a group."""
        scored = occupied.scored
        again, anew = scored.logits.split(occupied.selection())
        self._add_gradients(occupied, again, scored.logits.again)
        self._add_gradients(occupied, anew, lambda rows, _: scored.logits.logits(rows))
        scored.logits.finish()

    def _add_gradients(
        self, occupied: _Occupied, selected: Tensor, logits: Callable[[Rows, RowIndex], Logits]
    ) -> None:
        """Those of the selected nodes."""
        scored, task = occupied.scored, self.scorer.task
        for chunk in self.scorer.chunks(len(selected)):
            numbers = selected[chunk]
            index = numbers if len(selected) < len(scored.scores) else chunk
            rows = scored.nodes.rows.at(index)
            # Without a name, a chunk's gradient is gone before the next one's logits are computed.
            scored.logits.backward(
                rows,
                task.backend.logit_gradient_(
                    task.topology,
                    logits(rows, index),
                    scored.columns,
                    rows,
                    numbers,
                    scored.nodes,
                    scored.scores,
                    occupied.occupancy,
                    occupied.weight,
                    normalize=task.normalize,
                    clamp=self.clamp,
                    part=scored.part,
                ),
            )
