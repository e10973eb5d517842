"""Frames that may be skipped."""

from __future__ import annotations

from dataclasses import replace

from rnnt_op.topology import RNNT, Arc, Topology


def star(penalty: float = 0.0) -> Topology:
    """The regular transducer for transcripts that lack words (Star-Transducer: Bataev 2024, arXiv
    2504.06963): beside every blank but the last, an arc of fixed weight reads a frame, whatever
    the model says.

    Args:
        penalty: taken from 0, the log-weight of such an arc.
    """
    return replace(
        RNNT, arcs=(*RNNT.arcs, Arc(frames=1, labels=0, symbols=(), ends=False, offset=-penalty))
    )
