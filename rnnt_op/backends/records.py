"""The data that pass between the engine and a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rnnt_op.jit import Argument
from rnnt_op.nodes import FramesAndStates
from rnnt_op.topology import Topology

BINS = 4 * 320
"""Of a histogram of gradient mass: quarter octaves from 2^-256 to 2^64."""


def least_gradient(dtype: torch.dtype) -> float:
    """What an element of the gradient of logits of a dtype is at least, if it is not zero.

    Its products with numbers down to 2^-26 are normal in float32, or float64 for float64. A CPU
    takes a hundred cycles for one that is not, and where nothing else is skipped there are many:
    occupancies fall off exponentially.
    """
    return torch.finfo(torch.promote_types(dtype, torch.float32)).tiny * 2.0**26


@dataclass(frozen=True)
class Places:
    """Where the nodes of a group lie in a caller's tensor [B, T, R, V]: that of the frame plus that
    of the state, in elements."""

    frame: Tensor  # int64. [F]
    state: Tensor  # int64. [P]

    @staticmethod
    def of(tensor: Tensor, packed: FramesAndStates) -> Places:
        batch_stride, frame_stride, state_stride, _ = tensor.stride()
        b, t = packed.frame_positions
        frame = b * batch_stride + t * frame_stride - packed.low * state_stride
        return Places(frame, packed.state_index * state_stride)


@dataclass(frozen=True)
class InPlace:
    """Logits that are read where the caller has them, and their gradient's place."""

    places: Places  # of the logits
    gradient: Tensor  # [B, T, R, V]
    targets: Places  # of the gradient


@dataclass(frozen=True)
class Logits:
    """A chunk of logits: ``values + bias``, which a backend adds up where it reads them."""

    values: Tensor  # [R, V], or in place [B, T, R, V]
    bias: Tensor | None  # in values' dtype. [V]
    gradient_dtype: torch.dtype  # no wider; torch operations leave the gradient in values' dtype
    in_place: InPlace | None = None  # of a backend's own ``given_chunk``


@dataclass(frozen=True)
class Part:
    """Of the logits' columns, where several ranks have them."""

    tokens: int  # how many of the part's columns are tokens: the first
    others: Tensor  # log Σ exp of these tokens, except symbols; float64. [R] or [N]
    normalizer: Tensor | None = None  # of softmax 0 over all ranks' columns, float64. [N]

    @staticmethod
    def tokens_of(part: Part | None, topology: Topology, logits: Logits) -> int:
        """How many of the logits' columns are tokens."""
        return topology.tokens(logits.values.shape[-1]) if part is None else part.tokens


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
class JointStates:
    """What a joint network has of one group."""

    packed: FramesAndStates
    encoder_rows: Tensor  # [F, H]
    predictor_rows: Tensor  # [P, H]
    sums: JointSums


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

    @property
    def arguments(self) -> dict[str, Argument]:
        """Those of kernels."""
        kept = 1 - self.probability
        return {"seed": self.seed, "threshold": self.threshold, "scale": self.scale, "kept": kept}


@dataclass(frozen=True)
class JointBytes:
    """What a joint network takes beyond its inputs and gradients, in bytes."""

    row: int  # of one node row in a chunk's buffers
    logits: int  # of one node row of kept logits; 0: they are not worth keeping
    packed: int  # of one packed encoder or predictor row of a group and its gradient
    product: int  # of a chunk's part of the weight's gradient, before it is added
