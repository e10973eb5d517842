"""What the engine asks of a backend. ``csrc`` has the formula of each primitive at its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.records import Dropout, JointBytes, JointStates, Lattice, Logits, Part
from rnnt_op.nodes import FramesAndStates, Nodes, PacksNodes, Rows
from rnnt_op.topology import Topology


class JointChunk(Protocol):
    """The joint network and output layer over a chunk of node rows, forward and backward."""

    row_bytes: int  # of one node row in the chunk's buffers
    packed_bytes: int  # of one packed encoder or predictor row of a group and its gradient
    logits_bytes: int  # of one node row of kept logits; 0: they are not worth keeping

    def allocate(self, chunk_rows: int) -> None:
        """Allocates the buffers of a chunk."""

    def room(self, rows: int) -> Tensor:
        """Where logits can be kept. [N, V]"""

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The encoder or predictor states at some (batch, position)s. [M, H]"""

    def zeros(self, rows: int) -> Tensor:
        """An accumulator for the gradient of packed rows. [M, H]"""

    def logits(self, states: JointStates, rows: Rows, out: Tensor | None = None) -> Logits:
        """Logits of some nodes of a group, valid until the next call; in the first rows of a part
        of ``room``, if a product can be left there."""

    def again(self, states: JointStates, rows: Rows, values: Tensor) -> Logits:
        """The same, for ``backward``, from values that were kept."""

    def backward(self, states: JointStates, rows: Rows, d_logits: Tensor) -> None:
        """Adds the gradients to the sums, of what the last call was given; destroys d_logits
        [R, V]."""


class GivenRows(Protocol):
    """Given logits of a group's nodes."""

    def logits(self, rows: Rows) -> Logits:
        """Those of some nodes, valid until the next call."""

    def backward(self, rows: Rows, d_logits: Tensor) -> None:
        """Takes the gradient of the logits that the last call returned [R, V]."""


class GivenChunk(Protocol):
    """Logits that the caller holds, a chunk of node rows at a time."""

    row_bytes: int  # of one node row in the chunk's buffers

    def allocate(self, chunk_rows: int) -> None:
        """Allocates the buffers of a chunk."""

    def group(self, packed: FramesAndStates) -> GivenRows:
        """Those of a group."""


class Reached(Protocol):
    """Nodes that paths reach with a probability that matters."""

    def __iter__(self) -> Iterator[Tensor]:
        """Numbers of those to score next, ascending, int64, until nothing is missing."""

    @property
    def lost(self) -> Tensor:
        """Of each sample, what paths through other nodes have at most, as a share of what is left
        of its probability; after the last ones. [S]"""

    def rest(self, occupancy: Tensor) -> Tensor:
        """Numbers of those to score as well, ascending, int64: all of a sample whose gradient, by
        the occupancies [N, S] of those scored, is too small for what it has lost."""


class Backend(PacksNodes, Protocol):
    """The primitives of one kind of device.

    ``topology`` has the symbols and arcs of a node; ``nodes`` are a group's, ``rows`` some of them;
    ``columns`` [P, S] is the logit column of each symbol of a state, ``NO_LABEL`` or
    ``ZERO_LOGIT``; ``scores`` [N, S] is its log-probability, float64, −∞ where there is none.
    """

    WORKSPACE_BYTES: int  # where the caller names none
    CACHE_BYTES: int  # size of a chunk beyond which its GEMMs gain nothing
    LATTICE_SHARE: float  # share of the workspace that is for groups rather than for the chunk
    GROUPS_IN_FLIGHT: int  # with two, one's scores are under way while the other's are read

    def load(self, kernels: Kernels) -> None:
        """Compiles and loads kernels, side by side; raises ``JitError`` where one does not."""

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Makes the device current, and refuses states of it in which the engine cannot run."""

    def lattice_bytes(
        self, topology: Topology, samples: int, frames: int, states: int, nodes: int
    ) -> int:
        """Peak of a group's scores, lattice and selection; frames, states: largest T and U + 1."""

    def joint_bytes(
        self,
        column_count: int,
        joint_dim: int,
        *,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        has_dropout: bool = False,
    ) -> JointBytes:
        """What a ``joint_chunk`` takes; neither it nor its device need exist."""

    def joint_chunk(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        activation: str,
        input_dtype: torch.dtype | None,
        compute_dtype: torch.dtype,
        dropout: Dropout | None = None,
    ) -> JointChunk:
        """That of one sweep: an output layer [V, H], the dtype of the encoder and predictor states,
        None if they differ, and that of the GEMMs' operands."""

    def additive_chunk(
        self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
    ) -> JointChunk:
        """One without an output layer: its logits [.., H] are encoder + predictor, wide as sums."""

    def given_chunk(self, logits: Tensor, gradient: Tensor) -> GivenChunk:
        """Given logits [B, T, R, V], of the nodes of each frame from the first on, with any
        strides, and the tensor that their gradient goes to, contiguous, empty if unwanted."""

    def symbol_scores(
        self,
        topology: Topology,
        logits: Logits,
        columns: Tensor,
        rows: Rows,
        normalize: bool,
        scores: Tensor,
        part: Part | None = None,
    ) -> None:
        """Fills the rows' scores [R, S], through softmaxes where ``normalize``; may destroy the
        logits of a chunk. With a part, scores stay logits, and ``part.others`` [R] is filled,
        too."""

    def reach(
        self, topology: Topology, nodes: Nodes, scores: Tensor, row_work: int, tolerance: float
    ) -> Reached | None:
        """Which nodes to fill ``scores`` of, one reading those before; the others are −∞ and change
        a sample's gradient by at most ``tolerance`` of its L1 norm. None where scoring all costs
        less, at ``row_work`` products a node. For a topology that ``is_substochastic``."""

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        """Log-likelihoods of a group, and the occupancies of its symbols if asked for."""

    def best_paths(self, topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Of each sample the largest score of a path, −∞ where there is none [S]; of each state the
        frame by which that path emits its next label, −1 where there is none, int64 [P]."""

    def select_nodes(
        self,
        topology: Topology,
        nodes: Nodes,
        scores: Tensor,
        occupancy: Tensor,
        *,
        weight: Tensor,
        tolerance: float,
        least: float,
    ) -> Callable[[], Tensor]:
        """Starts to find the nodes that the backward pass keeps; a call of the result waits for
        their numbers, ascending, int64. Skipped are those of smallest gradient mass, at most
        ``tolerance`` of their sample's, and those whose mass, times their sample's ``weight``, is
        below ``least``; all where the weight is zero, and none where it is NaN, float64 [S]."""

    def logit_gradient_(
        self,
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
        """Turns the logits of the nodes numbered ``kept`` into their gradient [R, V], in their
        memory or at the place that ``in_place`` names: clamped to ±``clamp`` if that is positive,
        then times their sample's ``weight`` [S]. Without ``normalize``, that of log-probabilities.
        A part has its ``normalizer``."""
