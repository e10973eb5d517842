"""Lattice topologies: which arcs leave a node, and which logits score them.

A node (t, u) has read t frames and emitted u labels. An arc reads ``frames`` more frames and emits
``labels`` more labels, so it ends in node (t + frames, u + labels). A path starts in (0, 0) and
ends in (T, U). An arc out of that rectangle does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NO_LABEL = -1
"""Column of an arc that does not exist: the label arc of a node that has emitted every label."""


@dataclass(frozen=True)
class Arc:
    """One kind of arc: how far it moves and which logit column scores it."""

    frames: int
    labels: int
    symbol: Literal["blank", "label"]


@dataclass(frozen=True)
class Topology:
    """The arcs that leave every node, in the order of all ``[..., A]`` tensors."""

    arcs: tuple[Arc, ...]

    def columns(self, next_labels: Tensor, blank: int) -> Tensor:
        """Logit column that scores each arc.

        Args:
            next_labels: the label each node would emit next, or ``NO_LABEL``. [R]
            blank: index of the blank token.

        Returns:
            Columns, ``NO_LABEL`` where there is no such arc, int64. [R, A]
        """
        columns = torch.empty(
            next_labels.shape[0], len(self.arcs), dtype=torch.int64, device=next_labels.device
        )
        for a, arc in enumerate(self.arcs):
            if arc.symbol == "blank":
                columns[:, a] = blank
            else:
                columns[:, a] = next_labels
        return columns


RNNT = Topology((Arc(frames=1, labels=0, symbol="blank"), Arc(frames=0, labels=1, symbol="label")))
"""Graves 2012 (arXiv 1211.3711): a blank reads a frame, a label stays on it; a blank comes last."""
