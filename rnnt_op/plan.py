"""The plan: which samples are computed together, and how many node rows a GEMM takes.

Work is cut twice. The lattice recursion needs whole samples, so samples are cut into *groups*; the
GEMMs need only rows, so the nodes of a group are cut into *chunks*. Both follow from lengths and
byte counts alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DEFAULT_WORKSPACE_BYTES = 256 * 2**20

# The rest of the workspace holds the chunk's rows. A quarter is enough for thousands of cells a
# diagonal, and small groups hold samples of like length, so less of a group is padding.
_LATTICE_SHARE = 0.25

# Below this a GEMM rereads the weight too often to be worth staying inside a cache.
_MIN_CACHED_ROWS = 256


@dataclass(frozen=True)
class Group:
    """Whole samples whose lattices are computed together."""

    samples: tuple[int, ...]  # positions in the batch
    frames: tuple[int, ...]  # T of each sample
    states: tuple[int, ...]  # U + 1 of each sample

    @property
    def nodes(self) -> int:
        return sum(t * u for t, u in zip(self.frames, self.states, strict=True))


@dataclass(frozen=True)
class Plan:
    """Groups in the order they are computed, and the node rows of their chunks."""

    groups: tuple[Group, ...]
    chunk_rows: int


def make_plan(
    frames: Sequence[int],
    labels: Sequence[int],
    *,
    row_bytes: int,
    cell_bytes: int,
    state_bytes: int,
    cache_bytes: int,
    workspace_bytes: int | None = None,
) -> Plan:
    """Cuts a batch into groups of samples and chunks of node rows.

    Args:
        frames: T of each sample.
        labels: U of each sample.
        row_bytes: bytes of one node row in a chunk (logits, hidden and their copies).
        cell_bytes: bytes of one lattice cell of a group.
        state_bytes: bytes of one packed encoder or predictor row of a group and its gradient.
        cache_bytes: a chunk is kept below this where the GEMM allows, so that its logits stay in
            cache.
        workspace_bytes: bytes for groups and chunks together. One sample's lattice and one row are
            the least that can be planned, and are planned even if they exceed it.
    """
    workspace = DEFAULT_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    lattice_bytes = int(workspace * _LATTICE_SHARE)

    cached_rows = max(cache_bytes // row_bytes, _MIN_CACHED_ROWS)
    chunk_rows = max(1, min(cached_rows, (workspace - lattice_bytes) // row_bytes))

    groups: list[Group] = []
    members: list[int] = []

    def close_group() -> None:
        groups.append(
            Group(
                samples=tuple(members),
                frames=tuple(frames[b] for b in members),
                states=tuple(labels[b] + 1 for b in members),
            )
        )
        members.clear()

    max_frames = max_states = 0
    # Samples of like length share a group: a group is padded to its longest sample.
    for b in sorted(range(len(frames)), key=lambda b: (labels[b], frames[b], b)):
        max_frames, max_states = max(max_frames, frames[b]), max(max_states, labels[b] + 1)
        sample_bytes = (
            lattice_cells(max_frames, max_states) * cell_bytes
            + (max_frames + max_states) * state_bytes
        )
        if members and (len(members) + 1) * sample_bytes > lattice_bytes:
            close_group()
            max_frames, max_states = frames[b], labels[b] + 1
        members.append(b)
    if members:
        close_group()
    most_nodes = max((group.nodes for group in groups), default=1)
    return Plan(tuple(groups), min(chunk_rows, most_nodes))


def lattice_cells(frames: int, states: int) -> int:
    """Cells of one sample's anti-diagonals: T + U of them, each as long as the shorter side."""
    return (frames + states) * min(frames + 1, states)
