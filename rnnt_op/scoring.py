"""The score pass: which nodes' logits are computed, in which groups, and what is kept of them.

On a CPU only nodes that paths reach are scored, in rounds of a block of frames. Where a sample is
not sure of its path, most are: then its group is divided into parts, which have room for their
logits, so that the backward pass need not compute them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rnnt_op.backends.planning import plan_batch
from rnnt_op.backends.protocol import Reached
from rnnt_op.backends.records import Logits, Part, Places
from rnnt_op.logits import GroupLogits, LogitSource
from rnnt_op.nodes import Nodes, Rows, pack_nodes, put
from rnnt_op.plan import Group, Plan
from rnnt_op.task import Task
from rnnt_op.topology import Topology

# Where a sample wants this share of its group's nodes at once, it is not sure of its path.
_UNSURE_SHARE = 1 / 4

# Then the group is computed in parts, which have room for their logits, if so many times as many
# nodes are wanted as have been scored, whose scores are given up.
_WORTH_LEAVING = 4

# Where this share of the nodes is wanted, all are scored in order: moving rows would cost more.
_NEARLY_ALL = 15 / 16


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
class Scored:
    """A group's nodes and the scores of their symbols."""

    nodes: Nodes
    all_columns: Tensor  # logit column of each symbol of each state. [P, S]
    columns: Tensor  # the same among this rank's. [P, S]
    logits: GroupLogits
    scores: Tensor  # −∞ of nodes that are not scored. [N, S]
    part: Part | None = None  # where this rank has a part of the columns
    reached: Reached | None = None  # None: all are scored


@dataclass(frozen=True)
class Scorer:
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
    ) -> Scorer:
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

    def groups(self) -> Iterator[Scored]:
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

    def _score(self, group: Group, may_skip: bool) -> Scored | set[int]:
        """Where the group's parts are to be scored instead, the samples that are known to be unsure
        of their path."""
        scored = self._begun(group)
        if self.saved is not None and self.saved.are_known:
            return replace(scored, scores=self.saved.get(scored.nodes))
        if may_skip:
            reached = self.task.backend.reach(
                self.task.topology,
                scored.nodes,
                scored.scores,
                self.source.row_work,
                self.tolerance,
            )
            if reached is not None:
                scored = replace(scored, reached=reached)
                unsure = self._score_reached(scored, reached)
                return scored if unsure is None else unsure
            if group.parts:
                return set(group.samples)
        return self._score_all(scored)

    def _begun(self, group: Group) -> Scored:
        """A group without scores."""
        task, shard = self.task, self.task.shard
        nodes = pack_nodes(group, task.batch.targets, task.backend, task.batch.label_ranges)
        next_label = nodes.packed.next_label
        columns = task.topology.columns(next_label, task.blank, self.source.column_count)
        shape = len(nodes.rows), len(task.topology.symbols)
        scored = Scored(
            nodes=nodes,
            all_columns=columns,
            columns=columns,
            logits=self.source.group(nodes),
            scores=columns.new_empty(shape, dtype=torch.float64),
        )
        if shard is None:
            return scored
        tokens = shard.tokens(task.topology.tokens(shard.all_columns))
        part = Part(tokens, torch.empty_like(scored.scores[:, 0]))
        return replace(scored, columns=shard.columns(columns), part=part)

    def _score_reached(self, scored: Scored, reached: Reached) -> set[int] | None:
        """Scores what paths reach, unless it is given up: then see ``_score``."""
        has_parts = bool(scored.nodes.packed.group.parts)
        scored.scores.fill_(-torch.inf)
        count = 0
        for wanted in reached:
            is_worth_leaving = len(wanted) >= _WORTH_LEAVING * count
            if has_parts and is_worth_leaving and _is_unsure(wanted, scored.scores):
                return _mostly_wanted(scored.nodes, wanted)
            self.add(scored, wanted)
            count += len(wanted)
        return None

    def _score_all(self, scored: Scored) -> Scored:
        task, shard, part = self.task, self.task.shard, scored.part
        nodes, scores = scored.nodes, scored.scores
        for chunk in self.chunks(len(nodes.rows)):
            rows = nodes.rows.at(chunk)
            others = part and replace(part, others=part.others[chunk])
            self._fill(scored, rows, scored.logits.logits(rows, chunk), scores[chunk], others)
        if shard is not None and part is not None:
            scores, normalizer = shard.normalized(
                task.topology, scored.all_columns, nodes.rows, scores, part.others
            )
            part = replace(part, normalizer=normalizer)
        if self.saved is not None:
            self.saved.put(nodes, scores)
        return replace(scored, scores=scores, part=part)

    def add(self, scored: Scored, wanted: Tensor) -> None:
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
        self, scored: Scored, rows: Rows, logits: Logits, scores: Tensor, part: Part | None = None
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
