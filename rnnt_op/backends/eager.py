"""The CPU's backend, in torch operations; ``protocol.Backend`` says what each primitive computes.

Chunks are small enough to stay in cache between operations, and sums run in a fixed order, so
results are bitwise reproducible. Half inputs are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from rnnt_op.backends import joint
from rnnt_op.backends.eager_best_paths import best_paths
from rnnt_op.backends.eager_given import EagerRowCopies
from rnnt_op.backends.eager_joint import EagerJointKernels, working_bytes
from rnnt_op.backends.eager_lattice import forward_backward, lattice_cells
from rnnt_op.backends.gemm import AnyMatrices
from rnnt_op.backends.given import GivenCopies
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.native import NativeBackend
from rnnt_op.backends.records import (
    BINS,
    Dropout,
    JointBytes,
    Logits,
    Part,
    least_gradient,
)
from rnnt_op.backends.sources import CPU
from rnnt_op.nodes import FramesAndStates, Nodes, Rows
from rnnt_op.topology import NO_LABEL, ZERO_LOGIT, Topology

__all__ = [
    "CACHE_BYTES",
    "GROUPS_IN_FLIGHT",
    "LATTICE_SHARE",
    "WORKSPACE_BYTES",
    "additive_chunk",
    "best_paths",
    "forward_backward",
    "given_chunk",
    "gradient_mass",
    "guard",
    "joint_bytes",
    "joint_chunk",
    "lattice_bytes",
    "load",
    "logit_gradient_",
    "node_rows",
    "pack",
    "reach",
    "select_nodes",
    "symbol_scores",
]

# As much as kernels have: both fit a CPU's caches, and small groups hold samples of like length.
WORKSPACE_BYTES = NativeBackend.WORKSPACE_BYTES
CACHE_BYTES = NativeBackend.CACHE_BYTES
LATTICE_SHARE = NativeBackend.LATTICE_SHARE
GROUPS_IN_FLIGHT = NativeBackend.GROUPS_IN_FLIGHT

_MATRICES = AnyMatrices()

# Scores, α, β, occupancies, indices, temporaries.
_CELL_BYTES = 112

# Bit pattern of 2^-256, without all but its quarter octave.
_FIRST_BIN = (1023 - 256) * 4


def load(kernels: Kernels) -> None:
    """There is nothing to load."""


def guard(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext()


def lattice_bytes(topology: Topology, samples: int, frames: int, states: int, nodes: int) -> int:
    return samples * (lattice_cells(frames, states) * _CELL_BYTES + 3 * 8 * BINS)


def pack(packed: FramesAndStates, targets: Tensor, label_ranges: Tensor | None) -> None:
    for lengths, first, owner, index in (
        (packed.frames, packed.first_frame, packed.frame_sample, packed.frame_index),
        (packed.states, packed.first_state, packed.state_sample, packed.state_index),
    ):
        owner.copy_(torch.repeat_interleave(lengths, output_size=len(owner)))
        torch.arange(len(index), out=index)
        index -= first.index_select(0, owner)

    packed.high.copy_(packed.states.index_select(0, packed.frame_sample))
    packed.low.zero_()
    if label_ranges is not None:
        low, end = label_ranges[packed.frame_positions].unbind(1)
        packed.low.copy_(low)
        packed.high.copy_(torch.maximum(torch.minimum(end, packed.high), low))
    nodes_of_frame = packed.high - packed.low
    packed.frame_node.copy_(nodes_of_frame.cumsum(0) - nodes_of_frame - packed.low)

    packed.next_label.fill_(NO_LABEL)
    has_label = packed.state_index < packed.states.index_select(0, packed.state_sample) - 1
    samples, positions = (of_state[has_label] for of_state in packed.state_positions)
    packed.next_label[has_label] = targets[samples, positions]


def node_rows(packed: FramesAndStates) -> Rows:
    nodes = packed.group.nodes
    frame = torch.repeat_interleave(packed.high - packed.low, output_size=nodes)
    node_of_state = packed.frame_node - packed.first_state.index_select(0, packed.frame_sample)
    state = torch.arange(nodes, device=frame.device) - node_of_state.index_select(0, frame)
    return Rows(frame.int(), state.int())


def joint_bytes(
    column_count: int,
    joint_dim: int,
    *,
    input_dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
    has_dropout: bool = False,
) -> JointBytes:
    precision = CPU.precision("joint", compute_dtype, None)
    found = joint.joint_bytes(_MATRICES, column_count, joint_dim, precision)
    return replace(found, row=found.row + working_bytes(joint_dim, precision, has_dropout))


def joint_chunk(
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str,
    input_dtype: torch.dtype | None,
    compute_dtype: torch.dtype,
    dropout: Dropout | None = None,
) -> joint.OutputLayerChunk:
    precision = CPU.precision("joint", compute_dtype, None)
    kernels = EagerJointKernels(precision, activation, dropout)
    chunk = joint.OutputLayerChunk(_MATRICES, kernels, weight, bias, precision)
    chunk.row_bytes += working_bytes(weight.shape[1], precision, dropout is not None)
    return chunk


def additive_chunk(
    joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
) -> joint.AdditiveChunk:
    precision = CPU.precision("additive", like.dtype, input_dtype)
    kernels = EagerJointKernels(precision, "identity", None)
    chunk = joint.AdditiveChunk(_MATRICES, kernels, joint_dim, precision, like)
    chunk.row_bytes += working_bytes(joint_dim, precision, has_dropout=False)
    return chunk


def given_chunk(logits: Tensor, gradient: Tensor) -> GivenCopies:
    # Indexed on the way to the chunk, and cast on the way back.
    temporary_bytes = 2 * logits.shape[-1] * logits.itemsize
    return GivenCopies(EagerRowCopies(), logits, gradient, temporary_bytes)


def symbol_scores(
    topology: Topology,
    logits: Logits,
    columns: Tensor,
    rows: Rows,
    normalize: bool,
    scores: Tensor,
    part: Part | None = None,
) -> None:
    values = _with_bias(logits)
    columns = columns.index_select(0, rows.state)
    # Float32 would round scores at the size of the logits, so they leave it here.
    scores.copy_(values.gather(1, columns.clamp(min=0)))
    scores.masked_fill_(columns == ZERO_LOGIT, 0.0)
    scores.masked_fill_(columns == NO_LABEL, float("-inf"))
    if not normalize:
        return
    _fill_columns_(values, columns, float("-inf"))
    values = values[:, : Part.tokens_of(part, topology, logits)]
    if part is not None:
        part.others.copy_(values.double().logsumexp(1))
        return
    for softmax in (0, 1):
        members = _members(topology, softmax)
        if not members:
            continue
        own = scores[:, members]
        maximum = own.amax(1, keepdim=True)
        if softmax == 0:
            maximum = torch.maximum(maximum, values.amax(1, keepdim=True).double())
        own -= maximum
        # The symbols enter the sum in float64: beside an almost certain symbol's 1, a float32 sum
        # would lose the rest, which is all that this symbol's score and gradient consist of.
        total = own.exp().sum(1, keepdim=True)
        if softmax == 0:
            total += values.sub_(maximum.to(values.dtype)).exp_().sum(1, keepdim=True).double()
        scores[:, members] = own.sub_(total.log_())
    scores.masked_fill_(columns == NO_LABEL, float("-inf"))


def reach(
    topology: Topology, nodes: Nodes, scores: Tensor, row_work: int, tolerance: float
) -> None:
    """Torch operations on a block of frames would cost more than they save."""


def select_nodes(
    topology: Topology,
    nodes: Nodes,
    scores: Tensor,
    occupancy: Tensor,
    *,
    weight: Tensor,
    tolerance: float,
    least: float,
) -> Callable[[], Tensor]:
    mass = gradient_mass(topology, scores, occupancy)
    sample = nodes.sample_of(nodes.rows)
    weight_of = weight.index_select(0, sample)
    mass.masked_fill_(weight_of == 0, 0.0)

    octave = _bin(mass)
    histogram = torch.bincount(
        sample * BINS + octave, weights=mass, minlength=len(weight) * BINS
    ).view(-1, BINS)
    skipped = histogram.cumsum(1)
    first_kept = (skipped <= tolerance * skipped[:, -1:]).sum(1)
    first_kept = torch.maximum(first_kept, _bin(least / weight.abs()))
    kept = (octave >= first_kept.index_select(0, sample)) & (mass > 0)
    kept |= weight_of.isnan()
    rows = kept.nonzero().squeeze(1)
    return lambda: rows


def _bin(mass: Tensor) -> Tensor:
    # The bit pattern of a positive float64 grows with its value; its top bits are exponent and
    # quarter octave.
    return (mass.view(torch.int64) >> 50).sub_(_FIRST_BIN).clamp_(0, BINS - 1)


def gradient_mass(topology: Topology, scores: Tensor, occupancy: Tensor) -> Tensor:
    """L1 norm of each node's unit-scale logit gradient, float64. [N]"""
    tokens = _members(topology, 0)
    rest = (1 - scores[:, tokens].exp().sum(1)).clamp_(min=0)
    logits = [s for s, symbol in enumerate(topology.symbols) if symbol.source != "zero"]
    gradient = _symbol_gradient(topology, scores, occupancy)[:, logits]
    return rest.mul_(occupancy[:, tokens].sum(1)).add_(gradient.abs_().sum(1))


def logit_gradient_(
    topology: Topology,
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
    part: Part | None = None,
) -> Tensor:
    values = _with_bias(logits)
    scores, occupancy = scores.index_select(0, kept), occupancy.index_select(0, kept)
    columns = columns.index_select(0, rows.state)
    if normalize:
        members = _members(topology, 0)
        of_tokens = values[:, : Part.tokens_of(part, topology, logits)]
        # Symbols of the other softmax are no tokens of this one.
        others = [s for s in range(len(topology.symbols)) if s not in members]
        _fill_columns_(values, columns[:, others], float("-inf"))
        if part is None or part.normalizer is None:
            torch.softmax(of_tokens, 1, out=of_tokens)
        else:
            high, low = _split(part.normalizer.index_select(0, kept).unsqueeze(1), values.dtype)
            of_tokens.sub_(high).sub_(low).exp_()
        gamma = occupancy[:, members].sum(1, keepdim=True).to(values.dtype)
        # Where it has no symbol, nothing of it is used, and it may be no softmax.
        of_tokens.mul_(gamma).masked_fill_(gamma == 0, 0.0)
        gradient = _symbol_gradient(topology, scores, occupancy)
    else:
        values.zero_()
        gradient = -occupancy
    _fill_columns_(values, columns, gradient.to(values.dtype))
    if clamp > 0:
        values.clamp_(-clamp, clamp)
    row_weight = weight.index_select(0, nodes.sample_of(rows))
    values.mul_(row_weight.unsqueeze(1).to(values.dtype))
    return torch.hardshrink(values, least_gradient(values.dtype), out=values)


def _with_bias(logits: Logits) -> Tensor:
    """In the values' place."""
    return logits.values if logits.bias is None else logits.values.add_(logits.bias)


def _fill_columns_(values: Tensor, columns: Tensor, new: Tensor | float) -> None:
    """values[r, columns[r, s]] = new[r, s] where there is such a column.

    Args:
        values: [R, V]
        columns: negative where there is none. [R, S]
        new: [R, S], or a number.
    """
    row, symbol = (columns >= 0).nonzero(as_tuple=True)
    filled = new[row, symbol] if isinstance(new, Tensor) else values.new_tensor(new)
    values[row, columns[row, symbol]] = filled


def _split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two numbers of a narrower type whose sum each value is."""
    high = values.to(dtype)
    return high, (values - high).to(dtype)


def _members(topology: Topology, softmax: int) -> list[int]:
    return [s for s, symbol in enumerate(topology.symbols) if symbol.softmax == softmax]


def _symbol_gradient(topology: Topology, scores: Tensor, occupancy: Tensor) -> Tensor:
    """γ_g·p_s − γ_s in float64: for an almost certain symbol the two are almost equal. [R, S]"""
    softmaxes = [_members(topology, symbol.softmax) for symbol in topology.symbols]
    gamma = torch.stack([occupancy[:, members].sum(1) for members in softmaxes], 1)
    return gamma.mul_(scores.exp()).sub_(occupancy)
