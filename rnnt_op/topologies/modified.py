"""At most one symbol a frame."""

from __future__ import annotations

from rnnt_op.topology import Arc, Symbol, Topology


def modified() -> Topology:
    """A label reads a frame, as a blank does: a path is T symbols, and none closes it.

    There is no path where U > T: the loss is then infinite. k2's ``rnnt_type="modified"``; also
    the monotonic transducer (Tripathi et al., ASRU 2019).
    """
    return Topology(
        symbols=(Symbol("blank"), Symbol("label")),
        arcs=(Arc(frames=1, labels=0, symbols=(0,)), Arc(frames=1, labels=1, symbols=(1,))),
    )
