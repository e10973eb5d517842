"""At most one label a frame, and a blank behind it."""

from __future__ import annotations

from rnnt_op.topology import Arc, Symbol, Topology


def constrained() -> Topology:
    """A label is followed by a blank on the same frame: the regular paths that emit at most one
    label a frame.

    There is no path where U > T: the loss is then infinite. k2's ``rnnt_type="constrained"``.
    """
    return Topology(
        symbols=(Symbol("blank"), Symbol("label")),
        arcs=(
            Arc(frames=1, labels=0, symbols=(0,)),
            Arc(frames=1, labels=1, symbols=(1,), next_symbols=(0,)),
        ),
    )
