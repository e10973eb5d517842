"""A topology's tables as macros of the kernels that need them."""

from __future__ import annotations

from collections.abc import Iterable

from rnnt_op.topology import NO_LABEL, ZERO_LOGIT, Topology

Macros = tuple[tuple[str, str], ...]


def symbol_macros(topology: Topology) -> Macros:
    """``SYMBOLS``; ``SOFTMAXES``, of each; ``HAS_COLUMN``, whether it is a logit at all; and what
    stands for a column where it has none, ``NO_LABEL`` or ``ZERO_LOGIT``."""
    symbols = topology.symbols
    return (
        ("SYMBOLS", str(len(symbols))),
        ("SOFTMAXES", _listed(symbol.softmax for symbol in symbols)),
        ("HAS_COLUMN", _listed(symbol.source != "zero" for symbol in symbols)),
        ("NO_LABEL", str(NO_LABEL)),
        ("ZERO_LOGIT", str(ZERO_LOGIT)),
    )


def arc_macros(topology: Topology) -> Macros:
    """``SYMBOLS``, ``ARCS``, and of each arc ``ARC_FRAMES``, ``ARC_LABELS``, ``ARC_SYMBOLS`` and
    ``ARC_NEXT_SYMBOLS`` (bits), ``ARC_ENDS``."""
    arcs = topology.arcs
    return (
        ("SYMBOLS", str(len(topology.symbols))),
        ("ARCS", str(len(arcs))),
        ("ARC_FRAMES", _listed(arc.frames for arc in arcs)),
        ("ARC_LABELS", _listed(arc.labels for arc in arcs)),
        ("ARC_SYMBOLS", _listed(_bits(arc.symbols) for arc in arcs)),
        ("ARC_NEXT_SYMBOLS", _listed(_bits(arc.next_symbols) for arc in arcs)),
        ("ARC_ENDS", _listed(arc.ends for arc in arcs)),
    )


def _bits(positions: tuple[int, ...]) -> int:
    return sum(1 << position for position in positions)


def _listed(values: Iterable[int]) -> str:
    return ",".join(str(int(value)) for value in values)
