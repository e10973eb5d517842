"""The plan: which samples are computed together, and how many node rows a GEMM takes.

Work is cut twice. The lattice recursion needs whole samples, so samples are cut into *groups*; the
GEMMs need only rows, so the nodes of a group are cut into *chunks*. Both follow from lengths and
byte counts alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# glibc's malloc has room for so much in memory that it has used before. Beyond, the first touch of
# fresh pages can take as long as the products that are saved.
MOST_KEPT_BYTES = 32 * 2**20

# At least so many parts, whose logits have the same room one after the other, are worth its first
# touch.
_LEAST_PARTS = 4

# Below this a GEMM rereads the weight too often to be worth staying inside a cache.
_MIN_CACHED_ROWS = 256


@dataclass(frozen=True)
class Group:
    """Whole samples whose lattices are computed together."""

    samples: tuple[int, ...]  # positions in the batch
    frames: tuple[int, ...]  # T of each sample
    states: tuple[int, ...]  # U + 1 of each sample
    restricted_nodes: tuple[int, ...] | None = None
    """Nodes of each sample, None: one for every frame and state."""
    keeps_logits: bool = False  # from its scores until its gradients
    parts: tuple[Group, ...] = ()
    """The same samples in smaller groups that keep theirs, for where most nodes have a gradient."""

    @property
    def nodes_of_samples(self) -> Sequence[int]:
        if self.restricted_nodes is not None:
            return self.restricted_nodes
        return [t * u for t, u in zip(self.frames, self.states, strict=True)]

    @property
    def nodes(self) -> int:
        return sum(self.nodes_of_samples)


@dataclass(frozen=True)
class Plan:
    """Groups in the order they are computed, and the node rows of their chunks."""

    groups: tuple[Group, ...]
    chunk_rows: int

    @property
    def kept_rows(self) -> int:
        """Nodes of the largest group that keeps its logits."""
        every = [each for group in self.groups for each in (group, *group.parts)]
        return max((group.nodes for group in every if group.keeps_logits), default=0)


def make_plan(
    frames: Sequence[int],
    labels: Sequence[int],
    *,
    restricted_nodes: Sequence[int] | None = None,
    row_bytes: int,
    lattice_bytes: Callable[[int, int, int, int], int],
    packed_bytes: int,
    logits_bytes: int,
    cache_bytes: int,
    workspace_bytes: int,
    lattice_share: float,
    groups_in_flight: int,
) -> Plan:
    """Cuts a batch into groups of samples and chunks of node rows.

    Args:
        frames: T of each sample.
        labels: U of each sample.
        restricted_nodes: nodes of each sample, None: T·(U + 1).
        row_bytes: bytes of one node row in a chunk (logits, hidden and their copies).
        lattice_bytes: bytes of a group's lattice, from its number of samples, largest T, largest
            U + 1, and number of nodes.
        packed_bytes: bytes of one packed encoder or predictor row of a group and its gradient.
        logits_bytes: bytes of one node row of logits; a group keeps them if they fit into
            ``MOST_KEPT_BYTES``, and into what it and a chunk leave. 0: they are not kept. Larger
            groups have parts that keep them, where what is left is enough.
        cache_bytes: a chunk is kept below this where the GEMM allows, so that its logits stay in
            cache.
        workspace_bytes: bytes for groups and chunks together. One sample's lattice and one row are
            the least that can be planned, and are planned even if they exceed it.
        lattice_share: share of the workspace that is for groups; the rest is the chunk's.
        groups_in_flight: groups that live at once.
    """
    nodes_of_samples = (
        [t * (u + 1) for t, u in zip(frames, labels, strict=True)]
        if restricted_nodes is None
        else restricted_nodes
    )
    share = int(workspace_bytes * lattice_share)
    group_bytes = share // groups_in_flight

    cached_rows = max(cache_bytes // row_bytes, _MIN_CACHED_ROWS)
    chunk_rows = max(1, min(cached_rows, (workspace_bytes - share) // row_bytes))
    # Three significant bits: a size that a GEMM library meets in other batches, too.
    chunk_rows -= chunk_rows % (1 << max(0, chunk_rows.bit_length() - 3))
    chunk_rows = max(1, min(chunk_rows, sum(nodes_of_samples)))
    most_kept = most_of_part = 0
    if logits_bytes > 0:
        left = max(0, workspace_bytes - share - chunk_rows * row_bytes) // groups_in_flight
        most_kept = min(left, MOST_KEPT_BYTES) // logits_bytes
        most_of_part = min(left // logits_bytes, sum(nodes_of_samples) // _LEAST_PARTS)
        if most_of_part < chunk_rows:
            most_of_part = 0

    groups: list[Group] = []
    members: list[int] = []

    def group_of(samples: Sequence[int], **others: Any) -> Group:
        return Group(
            samples=tuple(samples),
            frames=tuple(frames[b] for b in samples),
            states=tuple(labels[b] + 1 for b in samples),
            restricted_nodes=None
            if restricted_nodes is None
            else tuple(restricted_nodes[b] for b in samples),
            **others,
        )

    def parts_of(samples: Sequence[int]) -> Iterator[Group]:
        part: list[int] = []
        size = 0
        for b in samples:
            if part and size + nodes_of_samples[b] > most_of_part:
                yield group_of(part, keeps_logits=True)
                part, size = [], 0
            part.append(b)
            size += nodes_of_samples[b]
        yield group_of(part, keeps_logits=True)

    def close_group() -> None:
        keeps_logits = 0 < nodes <= most_kept
        parts: Iterable[Group] = ()
        if not keeps_logits and max(nodes_of_samples[b] for b in members) <= most_of_part:
            parts = parts_of(members)
        groups.append(group_of(members, keeps_logits=keeps_logits, parts=tuple(parts)))
        members.clear()

    # Samples of like length share a group: where a lattice is padded, little of it is padding.
    max_frames = max_states = packed_rows = nodes = 0
    for b in sorted(range(len(frames)), key=lambda b: (labels[b], frames[b], b)):
        states = labels[b] + 1
        more_frames, more_states = max(max_frames, frames[b]), max(max_states, states)
        more_rows, more_nodes = packed_rows + frames[b] + states, nodes + nodes_of_samples[b]
        needed = lattice_bytes(len(members) + 1, more_frames, more_states, more_nodes)
        is_full = needed + more_rows * packed_bytes > group_bytes
        if members and is_full:
            close_group()
            more_frames, more_states = frames[b], states
            more_rows, more_nodes = frames[b] + states, nodes_of_samples[b]
        max_frames, max_states, packed_rows, nodes = more_frames, more_states, more_rows, more_nodes
        members.append(b)
    if members:
        close_group()
    most_nodes = max((group.nodes for group in groups), default=1)
    return Plan(tuple(groups), max(1, min(chunk_rows, most_nodes)))
