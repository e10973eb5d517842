"""What the engine asks of a backend, and the data that passes between the two."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rnnt_op.backends.kernels import Kernels
from rnnt_op.nodes import FramesAndStates, Nodes, PacksNodes, Rows
from rnnt_op.topology import Topology

BINS = 4 * 320
"""Of a histogram of gradient mass: quarter octaves from 2^-256 to 2^64."""


@dataclass(frozen=True)
class Logits:
    """A chunk of logits: ``values + bias``, which a backend adds up where it reads them."""

    values: Tensor  # [R, V]
    bias: Tensor | None  # in values' dtype. [V]
    gradient_dtype: torch.dtype  # what their gradient is needed in; a backend may leave it wider


@dataclass(frozen=True)
class Part:
    """Of the logits' columns, where several ranks have them."""

    tokens: int  # how many of the part's columns are tokens: the first
    log_sum: Tensor  # see who takes it, float64

    @staticmethod
    def tokens_of(part: Part | None, topology: Topology, logits: Logits) -> int:
        """How many of the logits' columns are tokens."""
        return topology.tokens(logits.values.shape[1]) if part is None else part.tokens


@dataclass(frozen=True)
class Lattice:
    """What the recursions leave behind."""

    log_likelihood: Tensor  # float64. [S]
    occupancy: Tensor | None
    """Σ over the arcs that a symbol of a node scores: posterior that the path uses the arc, times
    the arc's ``scale``; float64. [N, S]"""


@dataclass(frozen=True)
class JointSums:
    """Accumulators of a joint's gradients, None where unwanted; made by ``JointChunk.zeros``."""

    encoder_rows: Tensor | None  # of a group. [F, H]
    predictor_rows: Tensor | None  # of a group. [P, H]
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]


@dataclass(frozen=True)
class Dropout:
    """Of the joint network's hidden states: each is zero with some probability, and the others grow
    so that the expectation stays.

    Whether element h of node (t, u) of sample b is dropped depends on these and the seed alone:
    word h mod 4 of Philox4x32-10 (Salmon et al. 2011) with key (low, high half of seed) and counter
    (h // 4, u, t, b) is below ``threshold``.
    """

    probability: float  # in (0, 1)
    seed: Tensor  # int64, on the device. [1]

    @property
    def threshold(self) -> int:
        """probability · 2³², in 32 bits."""
        return min(round(self.probability * 2**32), 2**32 - 1)

    @property
    def scale(self) -> float:
        """What kept states grow by."""
        return 1 / (1 - self.probability)


@dataclass(frozen=True)
class JointBytes:
    """What a joint network takes beyond its inputs and gradients, in bytes."""

    row: int  # of one node row in a chunk's buffers
    state: int  # of one packed encoder or predictor row of a group and its gradient
    product: int  # of a chunk's part of the weight's gradient, before it is added


class JointChunk(Protocol):
    """The joint network and output layer over a chunk of node rows, forward and backward."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one node row in the chunk's buffers."""

    @property
    def state_bytes(self) -> int:
        """Bytes of one packed encoder or predictor row of a group and its gradient."""

    def allocate(self, chunk_rows: int) -> None:
        """Allocates the buffers of a chunk."""

    def pack(self, states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        """The encoder or predictor states at some (batch, position)s. [M, H]"""

    def zeros(self, rows: int) -> Tensor:
        """An accumulator for the gradient of packed rows. [M, H]"""

    def logits(
        self, encoder_rows: Tensor, predictor_rows: Tensor, rows: Rows, packed: FramesAndStates
    ) -> Logits:
        """Logits of some nodes of a group, valid until the next call."""

    def backward(self, rows: Rows, d_logits: Tensor, sums: JointSums) -> None:
        """Adds the gradients of the rows that the last call of ``logits`` filled.

        Args:
            rows: those of the last call.
            d_logits: gradient of their logits; destroyed. [R, V]
            sums: where the gradients are added.
        """


class Backend(PacksNodes, Protocol):
    """The primitives of one kind of device."""

    @property
    def WORKSPACE_BYTES(self) -> int:
        """Workspace where the caller names none."""

    @property
    def CACHE_BYTES(self) -> int:
        """Size of a chunk beyond which its GEMMs gain nothing."""

    @property
    def LATTICE_SHARE(self) -> float:
        """Share of the workspace that is for groups rather than for the chunk."""

    @property
    def GROUPS_IN_FLIGHT(self) -> int:
        """Groups whose lattices live at once: with two, one's scores are under way while the host
        waits for the other's selection."""

    def load(self, kernels: Kernels) -> None:
        """Compiles and loads kernels, side by side, before the first of them is needed.

        Raises:
            JitError: one of them does not compile or load.
        """

    def guard(self, device: torch.device) -> AbstractContextManager[object]:
        """Makes the device current, and refuses states of it in which the engine cannot run."""

    def lattice_bytes(
        self, topology: Topology, samples: int, frames: int, states: int, nodes: int
    ) -> int:
        """Peak bytes of a group's scores, lattice and selection.

        Args:
            topology: the symbols and arcs of a node.
            samples: S.
            frames: largest T.
            states: largest U + 1.
            nodes: Σ T·(U + 1).
        """

    def joint_bytes(
        self,
        vocab_size: int,
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
        """The joint network of one sweep.

        Args:
            weight: [V, H]
            bias: [V]
            activation: its name.
            input_dtype: of the encoder and predictor states, None if they differ.
            compute_dtype: of the GEMMs' operands.
            dropout: of the hidden states, none if None.
        """

    def additive_chunk(
        self, joint_dim: int, *, input_dtype: torch.dtype | None, like: Tensor
    ) -> JointChunk:
        """A joint network without an output layer: its logits are encoder + predictor.

        Sums, logits and their gradients are float32 (float64 for float64).

        Args:
            joint_dim: H, which is V here.
            input_dtype: of the encoder and predictor states, None if they differ.
            like: a tensor on the device.
        """

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
        """Log-probability of each symbol of each row, −∞ where there is none; may destroy the
        logits.

        A symbol's probability is its share of exp(logit) summed over its group: for group 0 all
        tokens that are no symbol of group 1, for group 1 its symbols alone.

        Args:
            topology: whose symbols they are.
            logits: of the rows.
            columns: logit column of each symbol of a state, ``NO_LABEL`` or ``ZERO_LOGIT``. [P, S]
            rows: the rows' nodes.
            normalize: whether these softmaxes turn logits into probabilities.
            scores: the result, float64. [R, S]
            part: where the logits are a part of the columns; then scores stay logits, and
                ``part.log_sum`` takes log Σ exp of the part's tokens that are no symbols. [R]
        """

    def forward_backward(
        self, topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
    ) -> Lattice:
        """Log-likelihoods of a group, and the occupancies of its symbols if asked for.

        The score of an arc of node (t, u) is the sum of its symbols' scores there and of its next
        symbols' at (t, u + 1), plus offset + delay·((T − 1)/2 − t). It exists where it leads to a
        node or to (T, U), and where (t, u + 1) is a node if it has next symbols.

        Args:
            topology: the symbols and arcs of a node.
            nodes: the group's nodes.
            scores: log-probability of each symbol of each node, float64. [N, S]
            occupancies: whether they are needed.
        """

    def best_paths(self, topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The path of largest score of each sample of a group.

        Scores and arcs are those of ``forward_backward``. Of equal arcs into a node, the topology's
        first is taken.

        Args:
            topology: the symbols and arcs of a node.
            nodes: the group's nodes.
            scores: log-probability of each symbol of each node, float64. [N, S]

        Returns:
            The path's score, −∞ where there is none, float64. [S]
            The frame t of the arc by which the path emits each state's next label, −1 where there
            is no label or no path, int64. [P]
        """

    def select_nodes(
        self,
        topology: Topology,
        nodes: Nodes,
        scores: Tensor,
        occupancy: Tensor,
        *,
        live: Tensor,
        poisoned: Tensor,
        tolerance: float,
    ) -> Callable[[], Tensor]:
        r"""Starts to find the nodes that the backward pass keeps; a call of the result waits for
        their numbers, ascending, int64.

        The L1 norm of a node's logit gradient Σ_g γ_g·softmax_g − Σ_s γ_s·onehot_s is known without
        its logits:

            c = γ_0·(1 − Σ_{s in group 0} p_s) + Σ_s |γ_g(s)·p_s − γ_s|        γ_g = Σ_{s in g} γ_s

        where the last sum leaves out symbols without a column.

        Skipped are the nodes of smallest c, as many as carry at most ``tolerance`` of their
        sample's Σc: found in a histogram of c over quarter octaves, without sorting.

        Args:
            topology: whose symbols they are.
            nodes: the group's nodes.
            scores: their log p_s. [N, S]
            occupancy: their γ_s. [N, S]
            live: whether a sample has a gradient. [S]
            poisoned: whether a sample keeps all its nodes, whatever their mass. [S]
            tolerance: share of a sample's gradient mass that may be skipped.
        """

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
        """Turns logits into weight · clamp(Σ_g γ_g·softmax_g(logits) − Σ_s γ_s·onehot_s), in their
        memory.

        Args:
            topology: whose symbols they are.
            logits: of the rows.
            columns: logit column of each symbol of a state, ``NO_LABEL`` or ``ZERO_LOGIT``. [P, S]
            rows: the rows' nodes.
            kept: their numbers. [R]
            nodes: the group's nodes.
            scores: log p_s of each symbol, float64. [N, S]
            occupancy: γ_s, zero where there is no symbol, float64. [N, S]
            weight: gradient of the scalar with respect to each sample's loss, float64. [S]
            normalize: whether the logits go through softmaxes; without, the gradient is that of
                log-probabilities.
            clamp: bound on the unit-scale gradient's elements; none if not positive.
            part: where the logits are a part of the columns; ``part.log_sum`` is log Σ exp of group
                0, which else follows from a symbol's score. [N]

        Returns:
            The gradient, a view of the logits' memory. [R, V]
        """
