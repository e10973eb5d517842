"""The CPU's backend, in torch operations; ``protocol.Backend`` says what each primitive computes.

Chunks are small enough to stay in cache between operations, and sums run in a fixed order, so
results are bitwise reproducible. Half inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rnnt_op.backends.eager_joint import EagerJointChunk
from rnnt_op.backends.eager_lattice import forward_backward, lattice_cells
from rnnt_op.backends.protocol import BINS, Logits
from rnnt_op.nodes import FramesAndStates, Nodes, Rows
from rnnt_op.topology import Topology

__all__ = [
    "CACHE_BYTES",
    "GROUPS_IN_FLIGHT",
    "LATTICE_SHARE",
    "WORKSPACE_BYTES",
    "arc_scores",
    "forward_backward",
    "gradient_mass",
    "guard",
    "joint_chunk",
    "lattice_bytes",
    "logit_gradient_",
    "node_rows",
    "select_nodes",
]

WORKSPACE_BYTES = 256 * 2**20

CACHE_BYTES = 16 * 2**20
"""A chunk's logits, hidden states and gradients, kept within a CPU's last-level cache."""

# Enough for thousands of cells a diagonal; and small groups hold samples of like length, so less of
# a group is padding.
LATTICE_SHARE = 0.25

GROUPS_IN_FLIGHT = 1  # nothing to wait for

# Scores, α, β, occupancies, indices, temporaries.
_CELL_BYTES = 112

# Bit pattern of 2^-256, without all but its quarter octave.
_FIRST_BIN = (1023 - 256) * 4


def guard(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext()


def lattice_bytes(topology: Topology, samples: int, frames: int, states: int, nodes: int) -> int:
    return samples * (lattice_cells(frames, states) * _CELL_BYTES + 3 * 8 * BINS)


def node_rows(packed: FramesAndStates) -> Rows:
    states = packed.states.index_select(0, packed.frame_sample)
    frame = torch.repeat_interleave(states, output_size=packed.group.nodes)
    first_of_frame = packed.first_node.index_select(0, packed.frame_sample)
    first_of_frame += packed.frame_index * states
    first_of_frame -= packed.first_state.index_select(0, packed.frame_sample)
    state = torch.arange(packed.group.nodes, device=frame.device)
    state -= first_of_frame.index_select(0, frame)
    return Rows(frame.int(), state.int())


def joint_chunk(
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    input_dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
) -> EagerJointChunk:
    return EagerJointChunk(weight, bias, activation=activation, compute_dtype=compute_dtype)


def arc_scores(
    logits: Logits, columns: Tensor, rows: Rows, normalize: bool, scores: Tensor
) -> None:
    assert logits.bias is None
    values = logits.values
    columns = columns.index_select(0, rows.state)
    exists = columns >= 0
    columns = _existing(columns, exists)
    # Float32 would round scores at the size of the logits, so they leave it here.
    scores.copy_(values.gather(1, columns))
    if normalize:
        maximum = values.amax(1, keepdim=True)
        scores -= maximum.double()
        # The arcs enter the sum in float64: beside an almost certain arc's 1, a float32 sum would
        # lose the rest, which is all that this arc's score and gradient consist of.
        others = values.sub_(maximum).exp_().scatter_(1, columns, 0.0).sum(1, keepdim=True)
        scores.masked_fill_(~exists, float("-inf"))
        scores -= (others.double() + scores.exp().sum(1, keepdim=True)).log_()
    scores.masked_fill_(~exists, float("-inf"))


def select_nodes(
    nodes: Nodes,
    scores: Tensor,
    occupancy: Tensor,
    *,
    live: Tensor,
    poisoned: Tensor,
    tolerance: float,
) -> Callable[[], Tensor]:
    mass = gradient_mass(scores, occupancy)
    sample = nodes.sample_of(nodes.rows)
    mass.masked_fill_(~live.index_select(0, sample), 0.0)

    # The bit pattern of a positive float64 grows with its value; its top bits are exponent and
    # quarter octave.
    octave = mass.view(torch.int64) >> 50
    octave = octave.sub_(_FIRST_BIN).clamp_(0, BINS - 1)
    histogram = torch.bincount(
        sample * BINS + octave, weights=mass, minlength=len(live) * BINS
    ).view(-1, BINS)
    skipped = histogram.cumsum(1)
    first_kept = (skipped <= tolerance * skipped[:, -1:]).sum(1)
    kept = (octave >= first_kept.index_select(0, sample)) & (mass > 0)
    kept |= poisoned.index_select(0, sample)
    rows = kept.nonzero().squeeze(1)
    return lambda: rows


def gradient_mass(scores: Tensor, occupancy: Tensor) -> Tensor:
    """L1 norm of each node's unit-scale logit gradient, float64. [N]"""
    rest = (1 - scores.exp().sum(1)).clamp_(min=0)
    return rest.mul_(occupancy.sum(1)).add_(_arc_gradient(scores, occupancy).abs_().sum(1))


def logit_gradient_(
    logits: Logits,
    columns: Tensor,
    rows: Rows,
    kept: Tensor,
    nodes: Nodes,
    scores: Tensor,
    occupancy: Tensor,
    weight: Tensor,
    *,
    normalize: bool,
    clamp: float,
) -> Tensor:
    assert logits.bias is None
    values = logits.values
    scores, occupancy = scores.index_select(0, kept), occupancy.index_select(0, kept)
    if normalize:
        torch.softmax(values, 1, out=values)
        values.mul_(occupancy.sum(1, keepdim=True).to(values.dtype))
        arc_gradient = _arc_gradient(scores, occupancy)
    else:
        values.zero_()
        arc_gradient = -occupancy
    columns = columns.index_select(0, rows.state)
    exists = columns >= 0
    values.scatter_(1, _existing(columns, exists), _existing(arc_gradient, exists).to(values.dtype))
    if clamp > 0:
        values.clamp_(-clamp, clamp)
    row_weight = weight.index_select(0, nodes.sample_of(rows))
    return values.mul_(row_weight.unsqueeze(1).to(values.dtype))


def _existing(values: Tensor, exists: Tensor) -> Tensor:
    """Lets an arc that does not exist repeat its row's first arc, which always does. [R, A]"""
    return values.where(exists, values[:, :1])


def _arc_gradient(scores: Tensor, occupancy: Tensor) -> Tensor:
    """γ·p_a − γ_a in float64: for an almost certain arc the two are almost equal. [R, A]"""
    return (occupancy.sum(1, keepdim=True) * scores.exp()).sub_(occupancy)
