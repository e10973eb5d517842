"""Packed indices of a group's nodes: heavy tensors have node rows, so padding costs nothing.

Encoder rows are packed (sample, t), predictor rows (sample, u), and nodes (sample, t, u), each in
that order. A node knows its encoder row and its predictor row; everything else follows from those
two. Where label ranges restrict a lattice, a frame has nodes for some of the states alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from rnnt_op.jit.concurrency import remembered
from rnnt_op.plan import Group
from rnnt_op.transfer import to_device

RowIndex: TypeAlias = slice | Tensor
"""Some of a tensor's rows: adjoining ones, or those of ascending numbers, int64."""


def taken(tensor: Tensor, index: RowIndex) -> Tensor:
    """Rows of a tensor, of which adjoining ones stay where they are."""
    return tensor[index] if isinstance(index, slice) else tensor.index_select(0, index)


def put(tensor: Tensor, index: RowIndex, values: Tensor) -> None:
    """Writes rows of a tensor."""
    if isinstance(index, slice):
        tensor[index].copy_(values)
    else:
        tensor.index_copy_(0, index, values)


@dataclass(frozen=True)
class Rows:
    """Some nodes of a group, in ascending order."""

    frame: Tensor  # packed encoder row of each node, int32. [R]
    state: Tensor  # packed predictor row of each node, int32. [R]

    def __len__(self) -> int:
        return self.frame.shape[0]

    def at(self, index: RowIndex) -> Rows:
        """Some of them."""
        return Rows(taken(self.frame, index), taken(self.state, index))


@dataclass(frozen=True)
class FramesAndStates:
    """Index tensors, int64, of one group of S samples with F packed frames and P packed states."""

    group: Group
    samples: Tensor  # position of each sample in the batch. [S]
    frames: Tensor  # T of each sample. [S]
    states: Tensor  # U + 1 of each sample. [S]
    first_state: Tensor  # first packed predictor row of each sample. [S]
    first_frame: Tensor  # first packed encoder row of each sample. [S]
    first_node: Tensor  # first node of each sample, and how many there are in all. [S + 1]
    frame_sample: Tensor  # which of the group's samples a packed encoder row belongs to. [F]
    frame_index: Tensor  # its t. [F]
    low: Tensor  # the u of its first node. [F]
    high: Tensor  # one more than the u of its last; low if it has none. [F]
    frame_node: Tensor  # node (t, u) is number frame_node + u. [F]
    state_sample: Tensor  # which of the group's samples a packed predictor row belongs to. [P]
    state_index: Tensor  # its u. [P]
    next_label: Tensor  # the label it would emit next, NO_LABEL at u = U. [P]

    @remembered
    def frame_positions(self) -> tuple[Tensor, Tensor]:
        """Batch position and t of each packed encoder row. [F], [F]"""
        return self.samples.index_select(0, self.frame_sample), self.frame_index

    @remembered
    def state_positions(self) -> tuple[Tensor, Tensor]:
        """Batch position and u of each packed predictor row. [P], [P]"""
        return self.samples.index_select(0, self.state_sample), self.state_index


@dataclass(frozen=True)
class Nodes:
    """The nodes of one group."""

    packed: FramesAndStates
    rows: Rows  # all of them. [N]

    def sample_of(self, rows: Rows) -> Tensor:
        """Which of the group's samples each row belongs to. [R]"""
        return self.packed.frame_sample.index_select(0, rows.frame)


class PacksNodes(Protocol):
    """What a backend does to pack a group."""

    def pack(self, packed: FramesAndStates, targets: Tensor, label_ranges: Tensor | None) -> None:
        """Fills what is packed by frames and states, from what is known of samples."""

    def node_rows(self, packed: FramesAndStates) -> Rows:
        """The encoder and predictor row of every node, in (sample, t, u) order. [N]"""


def pack_nodes(
    group: Group, targets: Tensor, backend: PacksNodes, label_ranges: Tensor | None = None
) -> Nodes:
    """Builds the index tensors of a group, without waiting for the device.

    Args:
        group: the samples and their lengths.
        targets: labels of the whole batch; read only where u < U of a sample, int64. [B, U]
        backend: that of the targets' device.
        label_ranges: as in ``Batch``; read only where t < T of a sample. [B, T, 2]
    """
    columns = (
        group.samples,
        group.frames,
        group.states,
        _starts(group.states)[:-1],
        _starts(group.frames)[:-1],
        _starts(group.nodes_of_samples),
    )
    of_samples = to_device(
        torch.tensor(list(chain.from_iterable(columns)), device="cpu"), targets.device
    )
    frame_count, state_count = sum(group.frames), sum(group.states)
    sizes = [frame_count] * 5 + [state_count] * 3
    of_frames_and_states = torch.empty(sum(sizes), dtype=torch.int64, device=targets.device)
    packed = FramesAndStates(
        group,
        *of_samples.split_with_sizes([len(column) for column in columns]),
        *of_frames_and_states.split_with_sizes(sizes),
    )
    backend.pack(packed, targets, label_ranges)
    return Nodes(packed, backend.node_rows(packed))


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of some adjoining ranges starts, and where the last one ends."""
    return [0, *accumulate(lengths)]


def aligned(length: int, multiple: int = 8) -> int:
    """The next multiple; of 8 elements, which fill 16 bytes or a multiple of them in any dtype."""
    return -(-length // multiple) * multiple
