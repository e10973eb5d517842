r"""Forward-backward over a group of lattices in torch operations.

    α(n) = log Σ_{arcs m → n} exp(α(m) + score)          α(0, 0) = 0
    β(n) = log Σ_{arcs n → m} exp(score + β(m))          β(T, U) = 0
    occupancy(arc n → m) = exp(α(n) + score + β(m) − α(T, U))
    occupancy(symbol) = Σ_{arcs that it scores} scale · occupancy(arc)

Every arc of a topology ends on a later anti-diagonal d = t + u than it starts on, so a diagonal of
all samples is one vector operation. The layout is [diagonal, sample, k] with k the coordinate of
the shorter side (u, or t if T < U), so that a diagonal is never longer than the shorter side.
Cells that hold no node keep score −∞: they take no part, and no path of a sample leaves its nodes
except for its end (T, U).

Float64 throughout: log-likelihoods reach thousands, and the rounding of a float32 sum of that size
alone would spoil the occupancies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rnnt_op.backends.records import Lattice
from rnnt_op.nodes import Nodes
from rnnt_op.plan import Group
from rnnt_op.topology import Topology

MINUS_INFINITY = float("-inf")


def forward_backward(
    topology: Topology, nodes: Nodes, scores: Tensor, *, occupancies: bool
) -> Lattice:
    """See ``protocol.Backend.forward_backward``."""
    layout = Layout.of(topology, nodes.packed.group)
    cell = layout.cells(nodes)
    own_scores = scores_of_arcs(topology, nodes, scores)
    arc_scores = [layout.new_cells(own).index_put_((cell,), own) for own in own_scores]
    end = layout.end_cells(nodes)
    alpha = layout.forward(arc_scores)
    log_likelihood = alpha.index_select(0, end)
    if not occupancies:
        return Lattice(log_likelihood, None)
    beta = layout.backward(arc_scores, end)
    del arc_scores

    before = alpha.index_select(0, cell)
    before -= log_likelihood.index_select(0, nodes.sample_of(nodes.rows))
    del alpha
    occupancy = torch.zeros_like(scores)
    has_next = _has_next(nodes)
    for arc, own, step in zip(topology.arcs, own_scores, layout.cell_steps, strict=True):
        own += before
        own += beta.index_select(0, cell + step)
        own.exp_().mul_(arc.scale)
        occupancy[:, list(arc.symbols)] += own.unsqueeze(1)
        own.masked_fill_(~has_next, 0.0)
        occupancy[1:, list(arc.next_symbols)] += own[:-1].unsqueeze(1)
    return Lattice(log_likelihood, occupancy)


def _has_next(nodes: Nodes) -> Tensor:
    """Whether a node has one a label ahead on its frame. [N]"""
    packed = nodes.packed
    u = packed.state_index.index_select(0, nodes.rows.state)
    return u + 1 < packed.high.index_select(0, nodes.rows.frame)


def scores_of_arcs(topology: Topology, nodes: Nodes, scores: Tensor) -> list[Tensor]:
    """Score of each arc of each node, its terms added in the order of the kernels. A × [N]"""
    packed = nodes.packed
    has_next = _has_next(nodes)
    t = packed.frame_index.index_select(0, nodes.rows.frame)
    frames = packed.frames.index_select(0, nodes.sample_of(nodes.rows))
    until_middle = (frames - 1).double().div_(2).sub_(t)
    found = []
    for arc in topology.arcs:
        own = scores.new_zeros(len(scores))
        for symbol in sorted(arc.symbols):
            own += scores[:, symbol]
        for symbol in sorted(arc.next_symbols):
            own[:-1] += scores[1:, symbol]
        own += until_middle.mul(arc.delay).add_(arc.offset)
        if arc.next_symbols:
            own.masked_fill_(~has_next, MINUS_INFINITY)
        if not arc.ends:
            own.masked_fill_(t + arc.frames == frames, MINUS_INFINITY)
        found.append(own)
    return found


def lattice_cells(frames: int, states: int) -> int:
    """Cells of one sample's anti-diagonals: T + U of them, each as long as the shorter side."""
    return (frames + states) * min(frames + 1, states)


@dataclass(frozen=True)
class Layout:
    """Where a node stands in the anti-diagonal layout, flattened."""

    diagonals: int
    samples: int
    width: int
    by_frame: bool  # k is t rather than u
    steps: tuple[tuple[int, int], ...]  # (diagonals, k) that each arc advances

    @classmethod
    def of(cls, topology: Topology, group: Group) -> Layout:
        frames, states = max(group.frames), max(group.states)
        by_frame = frames < states
        steps = tuple(
            (arc.frames + arc.labels, arc.frames if by_frame else arc.labels)
            for arc in topology.arcs
        )
        # The end node stands at t = T, u = U. The margin gives every arc of every node a cell to
        # end in.
        diagonals = frames + states + max(diagonal for diagonal, _ in steps)
        width = (frames + 1 if by_frame else states) + max(k for _, k in steps)
        return cls(diagonals, len(group.samples), width, by_frame, steps)

    @property
    def cell_steps(self) -> list[int]:
        return [d * self.samples * self.width + k for d, k in self.steps]

    def new_cells(self, like: Tensor) -> Tensor:
        return like.new_full((self.diagonals * self.samples * self.width,), MINUS_INFINITY)

    def _cell(self, t: Tensor, u: Tensor, sample: Tensor) -> Tensor:
        return ((t + u) * self.samples + sample) * self.width + (t if self.by_frame else u)

    def cells(self, nodes: Nodes) -> Tensor:
        """Cell of each node. [N]"""
        # A cell is the sum of a term of the frame and a term of the state, and there are far fewer
        # of those.
        packed = nodes.packed
        zero = packed.frame_index.new_zeros(())
        frame = self._cell(packed.frame_index, zero, packed.frame_sample)
        state = self._cell(zero, packed.state_index, zero)
        cell = frame.index_select(0, nodes.rows.frame)
        return cell.add_(state.index_select(0, nodes.rows.state))

    def end_cells(self, nodes: Nodes) -> Tensor:
        packed = nodes.packed
        sample = torch.arange(self.samples, device=packed.frames.device)
        return self._cell(packed.frames, packed.states - 1, sample)

    def arcs(self, arc_scores: list[Tensor], values: Tensor) -> list[_ArcViews]:
        shape = self.diagonals, self.samples, self.width
        return [
            _ArcViews(
                step,
                score.view(shape)[:, :, : self.width - shift].unbind(),
                values.view(shape)[:, :, : self.width - shift].unbind(),
                values.view(shape)[:, :, shift:].unbind(),
            )
            for (step, shift), score in zip(self.steps, arc_scores, strict=True)
        ]

    def forward(self, arc_scores: list[Tensor]) -> Tensor:
        alpha = self.new_cells(arc_scores[0])
        alpha.view(-1, self.samples, self.width)[0, :, 0] = 0.0
        arcs = self.arcs(arc_scores, alpha)
        for d in range(1, self.diagonals):
            for arc in arcs:
                if d >= arc.step:
                    arriving = arc.start[d - arc.step] + arc.score[d - arc.step]
                    torch.logaddexp(arc.end[d], arriving, out=arc.end[d])
        return alpha

    def backward(self, arc_scores: list[Tensor], end: Tensor) -> Tensor:
        beta = self.new_cells(arc_scores[0])
        beta[end] = 0.0
        arcs = self.arcs(arc_scores, beta)
        for d in range(self.diagonals - 2, -1, -1):
            for arc in arcs:
                if d + arc.step < self.diagonals:
                    leaving = arc.score[d] + arc.end[d + arc.step]
                    torch.logaddexp(arc.start[d], leaving, out=arc.start[d])
        return beta


class _ArcViews(NamedTuple):
    """One arc, diagonal by diagonal: its score and start on d, and a node on d as its end."""

    step: int  # diagonals from start to end
    score: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    end: tuple[Tensor, ...]
