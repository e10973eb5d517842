"""Tokens and how many frames they read, predicted side by side."""

from __future__ import annotations

from collections.abc import Sequence

from rnnt_op.topology import Arc, Symbol, Topology


def tdt(durations: Sequence[int] = (0, 1, 2, 3, 4), *, sigma: float = 0.0) -> Topology:
    """The token-and-duration transducer (Xu et al. 2023, arXiv 2304.06795).

    The last columns of the logits are those of the durations, in this order, with a softmax of
    their own; the tokens come before them. Any symbol reads any of the durations, but a blank reads
    at least one frame. A path ends with a blank.

    Args:
        durations: frames that a symbol may read, distinct and not negative, one at least positive.
        sigma: logit under-normalisation: taken from every token's log-probability.

    Raises:
        ValueError: the durations are not as they should be.
    """
    is_whole = all(isinstance(duration, int) for duration in durations)
    if not is_whole or len(set(durations)) != len(durations) or min(durations, default=-1) < 0:
        raise ValueError(
            f"durations: expected distinct numbers of frames, none negative, got {list(durations)}"
        )
    if max(durations) == 0:
        raise ValueError(
            f"durations: expected one that reads a frame, which a blank must, got {list(durations)}"
        )
    columns = range(2, 2 + len(durations))
    blanks = [
        Arc(frames=duration, labels=0, symbols=(0, column), offset=-sigma)
        for duration, column in zip(durations, columns, strict=True)
        if duration > 0
    ]
    labels = [
        Arc(frames=duration, labels=1, symbols=(1, column), ends=False, offset=-sigma)
        for duration, column in zip(durations, columns, strict=True)
    ]
    return Topology(
        symbols=(
            Symbol("blank"),
            Symbol("label"),
            *(Symbol("extra", i, softmax=1) for i in range(len(durations))),
        ),
        arcs=(*blanks, *labels),
    )
