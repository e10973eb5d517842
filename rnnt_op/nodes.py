"""Packed indices of a group's nodes: heavy tensors have node rows, so padding costs nothing.

Encoder rows are packed (sample, t), predictor rows (sample, u), and nodes (sample, t, u), each in
that order. A node knows its encoder row and its predictor row; everything else follows from those
two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnnt_op.plan import Group
from rnnt_op.topology import NO_LABEL


@dataclass(frozen=True)
class Rows:
    """Some nodes of a group, in ascending order."""

    frame: Tensor  # packed encoder row of each node, int32. [R]
    state: Tensor  # packed predictor row of each node, int32. [R]

    def __len__(self) -> int:
        return self.frame.shape[0]

    def slice(self, start: int, stop: int) -> Rows:
        return Rows(self.frame[start:stop], self.state[start:stop])

    def select(self, rows: Tensor) -> Rows:
        return Rows(self.frame.index_select(0, rows), self.state.index_select(0, rows))


@dataclass(frozen=True)
class Nodes:
    """Index tensors of one group of S samples with F packed frames, P packed states and N nodes."""

    group: Group
    samples: Tensor  # position of each sample in the batch. [S]
    frames: Tensor  # T of each sample. [S]
    states: Tensor  # U + 1 of each sample. [S]
    frame_sample: Tensor  # which of the group's samples a packed encoder row belongs to. [F]
    frame_index: Tensor  # its t. [F]
    state_sample: Tensor  # which of the group's samples a packed predictor row belongs to. [P]
    state_index: Tensor  # its u. [P]
    next_label: Tensor  # the label it would emit next, NO_LABEL at u = U. [P]
    rows: Rows  # all nodes. [N]

    @property
    def sample(self) -> Tensor:
        """Which of the group's samples each node belongs to. [N]"""
        return self.sample_of(self.rows)

    def sample_of(self, rows: Rows) -> Tensor:
        return self.frame_sample.index_select(0, rows.frame)

    def next_labels(self, rows: Rows) -> Tensor:
        """The label each row would emit next, NO_LABEL at u = U. [R]"""
        return self.next_label.index_select(0, rows.state)


def pack_nodes(group: Group, targets: Tensor) -> Nodes:
    """Builds the index tensors of a group.

    Args:
        group: the samples and their lengths.
        targets: labels of the whole batch; read only where u < U of a sample. [B, U]
    """
    device = targets.device
    samples = torch.tensor(group.samples, device=device)
    frames = torch.tensor(group.frames, device=device)
    states = torch.tensor(group.states, device=device)

    frame_sample, frame_index = _pack(frames, sum(group.frames))
    state_sample, state_index = _pack(states, sum(group.states))

    next_label = torch.full_like(state_index, NO_LABEL)
    longest = targets.shape[1]
    if longest > 0:
        is_last = state_index == states.index_select(0, state_sample) - 1
        labels = targets[samples[state_sample], state_index.clamp(max=longest - 1)]
        next_label = next_label.where(is_last, labels.long())

    states_of_frame = states.index_select(0, frame_sample)
    frame, u = _pack(states_of_frame, group.nodes)
    first_state = states.cumsum(0) - states
    u += first_state.index_select(0, frame_sample).index_select(0, frame)
    return Nodes(
        group=group,
        samples=samples,
        frames=frames,
        states=states,
        frame_sample=frame_sample,
        frame_index=frame_index,
        state_sample=state_sample,
        state_index=state_index,
        next_label=next_label,
        rows=Rows(frame.int(), u.int()),
    )


def _pack(lengths: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Owner of each packed row, and the row's index within its owner, int64. [total], [total]"""
    owner = torch.repeat_interleave(lengths, output_size=total)
    start = lengths.cumsum(0) - lengths
    index = torch.arange(total, device=lengths.device) - start.index_select(0, owner)
    return owner, index
