"""What the scripts that draw figures share: colours, files, and the lattice of an utterance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.backends.records import Logits
from rnnt_op.nodes import pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topology import RNNT

INK, MUTED, PALE, KEPT = "#222222", "#6f6f6f", "#e9e9e9", "#c2452d"
HEAT = "Oranges"


def write(draw: Callable[[], Figure], out: Path) -> None:
    """Draws a figure into a file whose ending chooses the format."""
    # The same picture gives the same file: no date, no random element ids, text kept as text.
    with matplotlib.rc_context(
        {"svg.hashsalt": "rnnt_op", "svg.fonttype": "none", "font.size": 9.5}
    ):
        draw().savefig(out, dpi=110, metadata={"Date": None} if out.suffix == ".svg" else None)


@dataclass(frozen=True)
class Lattice:
    """Transposed for display."""

    occupancy: NDArray[np.float64]  # γ of each node. [U + 1, T]
    kept: NDArray[np.bool_]  # whether the backward pass takes it. [U + 1, T]


def compute_lattice(logits: Tensor, labels: Tensor, gradient_tolerance: float) -> Lattice:
    """Score, lattice and selection by the backend's own primitives.

    Args:
        logits: of the utterance, float64, blank at 0. [T, U + 1, V]
        labels: of the utterance. [U]
        gradient_tolerance: as in :func:`rnnt_op.joint_rnnt_loss`.
    """
    frames, states, vocab_size = logits.shape
    backend = backend_for(logits.device)
    nodes = pack_nodes(Group((0,), (frames,), (states,)), labels.unsqueeze(0), backend)
    columns = RNNT.columns(nodes.packed.next_label, 0, vocab_size)
    scores = logits.new_empty((len(nodes.rows), len(RNNT.symbols)))
    chunk = Logits(logits.flatten(0, 1), None, logits.dtype)
    backend.symbol_scores(RNNT, chunk, columns, nodes.rows, True, scores)
    occupancy = backend.forward_backward(RNNT, nodes, scores, occupancies=True).occupancy
    assert occupancy is not None
    weight = torch.ones(1, dtype=torch.float64)
    selection = backend.select_nodes(
        RNNT, nodes, scores, occupancy, weight=weight, tolerance=gradient_tolerance, least=0.0
    )
    kept = torch.zeros(frames * states, dtype=torch.bool)
    kept[selection()] = True
    return Lattice(
        occupancy=occupancy.sum(1).view(frames, states).T.numpy(),
        kept=kept.view(frames, states).T.numpy(),
    )
