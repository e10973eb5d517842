"""Blanks that skip frames."""

from __future__ import annotations

from collections.abc import Sequence

from rnnt_op.topology import Arc, Symbol, Topology


def multi_blank(
    durations: Sequence[int] = (2, 4, 8),
    *,
    columns: Sequence[int] | None = None,
    sigma: float = 0.0,
) -> Topology:
    """The regular transducer with further blanks that read several frames (Xu et al. 2022,
    arXiv 2211.03541).

    A path may not read beyond the last frame, so its last blank ends there exactly.

    Args:
        durations: frames that each further blank reads, at least 2.
        columns: its token, negative from the end. None: −2, −3, …, which is NeMo's order with its
            ordinary blank at −1.
        sigma: logit under-normalisation: taken from every log-probability.

    Raises:
        ValueError: a duration is below 2, or columns are not as many as durations or not distinct.
    """
    if columns is None:
        columns = [-2 - i for i in range(len(durations))]
    if any(not isinstance(duration, int) or duration < 2 for duration in durations):
        raise ValueError(f"durations: expected at least 2 frames each, got {list(durations)}")
    if len(set(columns)) != len(durations) or len(columns) != len(durations):
        raise ValueError(
            f"columns: expected {len(durations)} distinct tokens, one a duration, "
            f"got {list(columns)}"
        )
    big = [
        Arc(frames=duration, labels=0, symbols=(2 + i,), offset=-sigma)
        for i, duration in enumerate(durations)
    ]
    return Topology(
        symbols=(
            Symbol("blank"),
            Symbol("label"),
            *(Symbol("token", column) for column in columns),
        ),
        arcs=(
            Arc(frames=1, labels=0, symbols=(0,), offset=-sigma),
            Arc(frames=0, labels=1, symbols=(1,), offset=-sigma),
            *big,
        ),
    )
