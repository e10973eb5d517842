"""Likelihoods and occupancies as sums over the paths of a topology, by autograd."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rnnt_op.topology import Topology


def all_nodes(frames: int, labels: int) -> list[tuple[int, int]]:
    """The (t, u) of a lattice that nothing restricts."""
    return list(itertools.product(range(frames), range(labels + 1)))


def sum_over_paths(
    topology: Topology,
    frames: int,
    labels: int,
    nodes: Sequence[tuple[int, int]],
    scores: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Log-likelihood and occupancies of one sample, None where it has no path.

    Args:
        topology: the symbols and arcs of a node.
        frames: T.
        labels: U.
        nodes: (t, u) of each node.
        scores: log-probability of each symbol of each node. [N, S]
    """
    end = frames, labels
    scores = scores.detach().requires_grad_()

    @functools.cache
    def sum_from(t: int, u: int) -> Tensor | None:
        if (t, u) == end:
            return scores.new_zeros(())
        if (t, u) not in of_node:
            return None
        paths = []
        for arc in topology.arcs:
            to = t + arc.frames, u + arc.labels
            rest = sum_from(*to)
            if rest is None or (to == end and not arc.ends):
                continue
            terms = [of_node[t, u][s] for s in arc.symbols]
            if arc.next_symbols:
                if (t, u + 1) not in of_node:
                    continue
                terms += [of_node[t, u + 1][s] for s in arc.next_symbols]
            score = functools.reduce(torch.add, terms)
            if arc.scale != 1:  # its gradient is that many times as large as it would be
                score = score.detach() + arc.scale * (score - score.detach())
            paths.append(score + (arc.offset + arc.delay * ((frames - 1) / 2 - t)) + rest)
        return torch.stack(paths).logsumexp(0) if paths else None

    with torch.enable_grad():
        # Once for all: each scalar taken by an index of its own would fill a gradient of its own.
        values = iter(scores.flatten().unbind())
        of_node = {node: [next(values) for _ in topology.symbols] for node in nodes}
        assert next(values, None) is None
        log_likelihood = sum_from(0, 0)
        if log_likelihood is None:
            return None
        (occupancy,) = torch.autograd.grad(log_likelihood, scores)
    return log_likelihood.detach(), occupancy
