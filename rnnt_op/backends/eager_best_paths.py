r"""The path of largest score of each lattice of a group in torch operations.

    α(n) = max_{arcs m → n} α(m) + score          α(0, 0) = 0

A diagonal of all samples is one vector operation, as in ``eager_lattice``; so is a step back from
(T, U) along the arcs that attain α.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.backends.eager_lattice import MINUS_INFINITY, Layout, scores_of_arcs
from rnnt_op.nodes import Nodes
from rnnt_op.topology import Topology


def best_paths(topology: Topology, nodes: Nodes, scores: Tensor) -> tuple[Tensor, Tensor]:
    """See ``protocol.Backend.best_paths``."""
    layout = Layout.of(topology, nodes.packed.group)
    alpha, best_arc = _forward(topology, nodes, scores, layout)
    end = layout.end_cells(nodes)
    score = alpha.index_select(0, end)
    # Nowhere to go: a finite sum has finite terms alone, but others need not lead back to (0, 0).
    best_arc[end[~score.isfinite()]] = len(topology.arcs)
    return score, _backtrace(topology, nodes, layout, best_arc)


def _forward(
    topology: Topology, nodes: Nodes, scores: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """α of each cell, and the arc that attains it, the number of arcs where there is none."""
    cell = layout.cells(nodes)
    arc_scores = [
        layout.new_cells(own).index_put_((cell,), own)
        for own in scores_of_arcs(topology, nodes, scores)
    ]
    alpha = layout.new_cells(scores)
    alpha.view(-1, layout.samples, layout.width)[0, :, 0] = 0.0
    best_arc = torch.full_like(alpha, len(topology.arcs), dtype=torch.uint8)
    of_alpha, of_best_arc = layout.arcs(arc_scores, alpha), layout.arcs(arc_scores, best_arc)
    for d in range(1, layout.diagonals):
        for a, arc in enumerate(of_alpha):
            if d >= arc.step:
                score = arc.score[d - arc.step]
                # An arc of score −∞ is none: NaN must not pass through it, nor +∞ make one.
                is_none = score == MINUS_INFINITY
                arriving = (arc.start[d - arc.step] + score).masked_fill_(is_none, MINUS_INFINITY)
                is_better = (arriving > arc.end[d]) | arriving.isnan()
                torch.where(is_better, arriving, arc.end[d], out=arc.end[d])
                of_best_arc[a].end[d].masked_fill_(is_better, a)
    return alpha, best_arc


def _backtrace(topology: Topology, nodes: Nodes, layout: Layout, best_arc: Tensor) -> Tensor:
    """Frame on which each state's next label is emitted, −1 where none is. [P]"""
    packed = nodes.packed
    label_frame = torch.full_like(packed.state_index, -1)
    # Cell, t and u of each sample's path, and what each arc adds to them.
    position = torch.stack((layout.end_cells(nodes), packed.frames, packed.states - 1), 1)
    moves = [
        (step, arc.frames, arc.labels)
        for step, arc in zip(layout.cell_steps, topology.arcs, strict=True)
    ]
    moves_of_arcs = position.new_tensor([*moves, (0, 0, 0)])
    while True:
        arc = best_arc.index_select(0, position[:, 0])
        if (arc == len(topology.arcs)).all():
            return label_frame
        move = moves_of_arcs.index_select(0, arc.long())
        position -= move
        emits = move[:, 2] > 0
        _, t, u = position[emits].unbind(1)
        label_frame[packed.first_state[emits] + u] = t
