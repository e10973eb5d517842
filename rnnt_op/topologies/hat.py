"""Another normaliser: whether there is a label, and which."""

from __future__ import annotations

from dataclasses import replace

from rnnt_op.topology import RNNT, Symbol, Topology


def hat(topology: Topology = RNNT) -> Topology:
    """The hybrid autoregressive transducer (Variani et al. 2020, arXiv 2003.07705).

    The blank's probability is the sigmoid of its logit; a label's is what that leaves, times a
    softmax over the other tokens. Arcs stay those of ``topology``.

    Raises:
        ValueError: the topology has symbols beside one blank and the labels.
    """
    blank, label = Symbol("blank"), Symbol("label")
    if topology.symbols != (blank, label):
        raise ValueError(
            "normalizer: hat knows one blank beside the labels; expected a topology of these, such "
            "as rnnt_op.topologies.modified()"
        )
    # sigmoid(x) is x's softmax beside a logit of zero, which stands for every label.
    return Topology(
        symbols=(Symbol("blank", softmax=1), label, Symbol("zero", softmax=1)),
        arcs=tuple(
            replace(arc, symbols=(*arc.symbols, 2)) if 1 in arc.symbols else arc
            for arc in topology.arcs
        ),
    )
