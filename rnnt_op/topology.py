"""What a lattice is made of: the symbols that a node scores, and the arcs that leave it.

A node (t, u) has read t frames and emitted u labels. A *symbol* is a logit of the node with the
softmax that makes a probability of it. An *arc* reads ``frames`` more frames and emits ``labels``
more labels, so it leads to node (t + frames, u + labels); its probability is the product of those
of its symbols. A path starts in (0, 0) and ends in (T, U). An arc that leads out of that rectangle
does not exist.

The backends know nothing but these tables: a topology is data.
"""

from __future__ import annotations

import ast
import functools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rnnt_op.jit.concurrency import remembered

NO_LABEL = -1
"""Column of a symbol that a node does not have: the label where every label has been emitted."""

ZERO_LOGIT = -2
"""Column of a symbol whose logit is zero by definition."""


@dataclass(frozen=True)
class Symbol:
    """A logit that arcs are scored by.

    Args:
        source: ``"blank"``, ``"label"`` (the next one), ``"token"`` (one of the vocabulary),
            ``"extra"`` (a column after the tokens) or ``"zero"`` (no column: the logit is 0).
        index: of a token, from the end if negative, or of an extra column.
        softmax: that makes a probability of it: 0 is over all tokens except the symbols of 1; 1 is
            over its symbols alone.
    """

    source: Literal["blank", "label", "token", "extra", "zero"]
    index: int = 0
    softmax: Literal[0, 1] = 0


@dataclass(frozen=True)
class Arc:
    """One kind of arc.

    Args:
        frames: that it reads.
        labels: that it emits, 0 or 1.
        symbols: positions in ``Topology.symbols`` of those of its node that score it.
        next_symbols: of those of the node one label ahead on the same frame.
        ends: whether it may be a path's last.
        offset: added to its score.
        delay: λ; its score grows by λ·((T − 1)/2 − t).
        scale: of its occupancy in gradients.
    """

    frames: int
    labels: int
    symbols: tuple[int, ...]
    next_symbols: tuple[int, ...] = ()
    ends: bool = True
    offset: float = 0.0
    delay: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Topology:
    """Symbols in the order of all ``[..., S]`` tensors, and arcs.

    Args:
        symbols: of every node.
        arcs: of every node. Each must lead to a later anti-diagonal t + u.
    """

    symbols: tuple[Symbol, ...]
    arcs: tuple[Arc, ...]
    text: str = field(init=False, compare=False, repr=False)
    """The tables as text, which an op's argument can be; ``decode`` reads it."""
    extra_columns: int = field(init=False, compare=False, repr=False)
    """How many of the logits' columns come after the tokens."""

    def __post_init__(self) -> None:
        for arc in self.arcs:
            if not all(map(math.isfinite, (arc.offset, arc.delay, arc.scale))):
                raise ValueError(f"topology: expected finite numbers, got {arc}")
        extra = sum(symbol.source == "extra" for symbol in self.symbols)
        object.__setattr__(self, "extra_columns", extra)
        # Of tuples, whose text torch.compile knows while tracing.
        symbols = tuple((s.source, s.index, s.softmax) for s in self.symbols)
        arcs = tuple(
            (a.frames, a.labels, a.symbols, a.next_symbols, a.ends, a.offset, a.delay, a.scale)
            for a in self.arcs
        )
        object.__setattr__(self, "text", str((symbols, arcs)))

    @staticmethod
    @functools.lru_cache
    def decode(text: str) -> Topology:
        """The topology whose text it is."""
        symbols, arcs = ast.literal_eval(text)
        return Topology(tuple(Symbol(*s) for s in symbols), tuple(Arc(*a) for a in arcs))

    def tokens(self, column_count: int) -> int:
        """How many of the logits' columns are tokens."""
        return column_count - self.extra_columns

    def blanks(self, blank: int, column_count: int) -> list[int]:
        """Columns of the tokens that can be no label."""
        tokens = self.tokens(column_count)
        return [blank] + [s.index % tokens for s in self.symbols if s.source == "token"]

    def columns(self, next_labels: Tensor, blank: int, column_count: int) -> Tensor:
        """Logit column of each symbol.

        Args:
            next_labels: the label each node would emit next, or ``NO_LABEL``. [R]
            blank: index of the blank token.
            column_count: columns of the logits, the extra ones included.

        Returns:
            Columns, ``NO_LABEL`` or ``ZERO_LOGIT``, int64. [R, S]
        """
        tokens = self.tokens(column_count)
        shape = len(next_labels), len(self.symbols)
        columns = next_labels.new_full(shape, blank, dtype=torch.int64)
        for s, symbol in enumerate(self.symbols):
            if symbol.source == "label":
                columns[:, s] = next_labels
            elif symbol.source == "token":
                columns[:, s] = symbol.index % tokens
            elif symbol.source == "extra":
                columns[:, s] = tokens + symbol.index
            elif symbol.source == "zero":
                columns[:, s] = ZERO_LOGIT
        return columns

    @remembered
    def is_substochastic(self) -> bool:
        """Whether the probabilities of the arcs of a node add up to 1 at most: they are different
        outcomes of a choice by one softmax, or by both, and nothing adds to their scores."""
        outcomes = set()
        for arc in self.arcs:
            first, second = (
                tuple(s for s in arc.symbols if self.symbols[s].softmax == softmax)
                for softmax in (1, 0)
            )
            if arc.offset > 0 or arc.delay != 0 or max(len(first), len(second)) > 1:
                return False
            outcomes.add((first, second))
        return (
            len(outcomes) == len(self.arcs)
            and len({bool(first) for first, _ in outcomes}) == 1
            and not any(second and (first, ()) in outcomes for first, second in outcomes)
        )

    @remembered
    def numbers(self) -> Tensor:
        """Offset, delay and scale of each arc, float64. [A, 3]"""
        rows = [(arc.offset, arc.delay, arc.scale) for arc in self.arcs]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def counted(self) -> Topology:
        """With two more symbols, of probability one: one scores the arcs without a label, one those
        with one, so that their occupancies are how often the path takes either."""
        blanks = len(self.symbols)
        arcs = (replace(arc, symbols=(*arc.symbols, blanks + arc.labels)) for arc in self.arcs)
        return Topology((*self.symbols, Symbol("zero"), Symbol("zero")), tuple(arcs))

    def regularized(self, fast_emit: float, delay_penalty: float) -> Topology:
        """With label arcs that count 1 + ``fast_emit`` times in gradients, and whose score grows by
        ``delay_penalty`` · ((T − 1)/2 − t)."""
        arcs = tuple(
            replace(arc, delay=delay_penalty, scale=1.0 + fast_emit) if arc.labels else arc
            for arc in self.arcs
        )
        return replace(self, arcs=arcs)


RNNT = Topology(
    symbols=(Symbol("blank"), Symbol("label")),
    arcs=(Arc(frames=1, labels=0, symbols=(0,)), Arc(frames=0, labels=1, symbols=(1,))),
)
"""Graves 2012 (arXiv 1211.3711): a blank reads a frame, a label stays on it; a blank comes last."""
