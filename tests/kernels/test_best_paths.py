"""The best path of each lattice: natively, in torch operations, in the CUDA emulator, and on a GPU
if there is one. Against all paths, written out; and the backends against each other, bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import operator
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import test_kernels
import torch
from emulator.module import thread_order
from test_kernels import KERNELS, Kernels, random_scores
from tested_backends import EAGER, EMULATOR
from torch import Tensor

from rnnt_op.backends import compiled, eager
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.topology import RNNT, Arc, Symbol, Topology

NAN, INF = float("nan"), float("inf")

Lengths = Sequence[tuple[int, int]]  # T and U of each sample
NodeScores = dict[tuple[int, int], list[float]]  # of the symbols of each node (t, u)
Ranges = list[list[tuple[int, int]]]  # first u and end of each frame of each sample

kernels = test_kernels.kernels
every_backend = pytest.mark.parametrize("kernels", [*KERNELS, EAGER], indirect=True)
on_emulator = pytest.mark.parametrize("kernels", [EMULATOR], indirect=True)
TOPOLOGIES = {
    **test_kernels.TOPOLOGIES,
    # Nobody's, with arcs of many terms, and as likely as others for all that.
    "any": Topology(
        symbols=(Symbol("blank"), Symbol("label"), Symbol("token", -1), Symbol("token", -2)),
        arcs=(
            Arc(frames=2, labels=0, symbols=(3, 0, 2), offset=5.0),
            Arc(frames=1, labels=1, symbols=(2, 1, 3), next_symbols=(3, 0, 2), offset=12.0),
            Arc(frames=1, labels=0, symbols=(0,), offset=-1.3),
            Arc(frames=0, labels=1, symbols=(1, 3), ends=False),
        ),
    ),
}
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

SMALL = [*itertools.product([1, 2, 4], [0, 1, 3]), (5, 2)]
LARGE = [(60, 40), (3, 17), (33, 0), (40, 39), (1, 1)]

HOST = Kernels("eager", eager, torch.device("cpu"), lambda tensor: tensor)


def everywhere(lengths: Lengths) -> None:
    """No ranges."""


def band(lengths: Lengths) -> Ranges:
    """Four states about the diagonal."""

    def first(t: int, frames: int, labels: int) -> int:
        return round(max(0, labels - 3) * t / max(1, frames - 1))

    return [
        [(u := first(t, frames, labels), min(u + 4, labels + 1)) for t in range(frames)]
        for frames, labels in lengths
    ]


def scattered(lengths: Lengths) -> Ranges:
    """Any that hold the diagonal; in some samples a frame has no node, and may lie beyond U."""
    draw = random.Random(0)

    def drawn(t: int, frames: int, labels: int) -> tuple[int, int]:
        least, most = labels * t // frames, -(-labels * (t + 1) // frames)
        return draw.randint(0, least), 1 + draw.randint(most, labels)

    ranges = []
    for frames, labels in lengths:
        ranges.append([drawn(t, frames, labels) for t in range(frames)])
        if draw.random() < 0.2:
            ranges[-1][draw.randrange(frames)] = (labels + 3, labels + 3)
    return ranges


every_restriction = pytest.mark.parametrize("restrict", [everywhere, band, scattered])


def pack(kernels: Kernels, lengths: Lengths, ranges: Ranges | None = None) -> Nodes:
    """Nodes of a group, by torch operations: other kernels have tests of their own."""
    group = test_kernels.group(lengths)
    label_ranges = None
    if ranges is not None:
        counts = tuple(sum(high - low for low, high in frames) for frames in ranges)
        group = replace(group, restricted_nodes=counts)
        padding = [[(9, -9)] * (max(group.frames) - len(frames)) for frames in ranges]
        label_ranges = torch.tensor(list(map(list.__add__, ranges, padding)), device=kernels.device)
    targets = torch.zeros(len(lengths), max(group.states) - 1, dtype=torch.int64)
    nodes = pack_nodes(group, targets.to(kernels.device), eager, label_ranges)
    packed = {f.name: getattr(nodes.packed, f.name) for f in fields(nodes.packed)}
    guarded = {name: kernels.guard(t) for name, t in packed.items() if isinstance(t, Tensor)}
    return replace(nodes, packed=replace(nodes.packed, **guarded))


def best_paths(
    kernels: Kernels, topology: Topology, nodes: Nodes, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores, and label frames, on the CPU; what holds for all of them is checked."""
    score, label_frame = kernels.backend.best_paths(topology, nodes, scores)
    assert (score.dtype, label_frame.dtype) == (torch.float64, torch.int64)
    assert score.shape == nodes.packed.samples.shape
    assert label_frame.shape == nodes.packed.state_index.shape
    has_path = score.isfinite()[nodes.packed.state_sample]
    is_last = nodes.packed.state_index == nodes.packed.states[nodes.packed.state_sample] - 1
    assert torch.equal(label_frame >= 0, has_path & ~is_last)
    assert (label_frame >= -1).all()
    return score.cpu(), label_frame.cpu()


def of_samples(nodes: Nodes, label_frame: Tensor) -> list[list[int]]:
    return [frames.tolist() for frames in label_frame.split(nodes.packed.group.states)]


def numbered(topology: Topology) -> Topology:
    """With offsets and delays that weigh, and round wherever they are added or multiplied."""
    arcs = enumerate(topology.arcs, 1)
    return replace(
        topology,
        arcs=tuple(replace(arc, offset=arc.offset - 0.7 / a, delay=0.3 / a) for a, arc in arcs),
    )


# ---- against all paths


def arc_score(arc: Arc, scores: NodeScores, start: tuple[int, int], frames: int) -> float:
    """Summed as all backends do."""
    t, u = start
    terms = [scores[t, u][s] for s in sorted(arc.symbols)]
    terms += [scores[t, u + 1][s] for s in sorted(arc.next_symbols)]
    terms.append(arc.offset + arc.delay * ((frames - 1) / 2 - t))
    return functools.reduce(operator.add, terms)


def best_of_all_paths(
    topology: Topology, frames: int, labels: int, scores: NodeScores
) -> tuple[float, list[int]]:
    """Score and label frames of one sample.

    Args:
        topology: the symbols and arcs of a node.
        frames: T.
        labels: U.
        scores: of the symbols of each node (t, u).
    """

    def steps_into(t: int, u: int) -> list[tuple[int, int, int, float]]:
        """Number, start and score of each arc."""
        found = []
        for a, arc in enumerate(topology.arcs):
            start = t - arc.frames, u - arc.labels
            next_node = start[0], start[1] + 1
            if start not in scores or (arc.next_symbols and next_node not in scores):
                continue
            if t == frames and not arc.ends:
                continue
            score = arc_score(arc, scores, start, frames)
            if score > -INF:
                found.append((a, *start, score))
        return found

    @functools.cache
    def paths_into(t: int, u: int) -> list[tuple[float, tuple[int, ...]]]:
        """Score and arcs of all paths from (0, 0)."""
        if (t, u) == (0, 0):
            return [(0.0, ())]
        return [
            (before + score, (*arcs, a))
            for a, from_t, from_u, score in steps_into(t, u)
            for before, arcs in paths_into(from_t, from_u)
        ]

    label_frame = [-1] * (labels + 1)
    if not paths_into(frames, labels):
        return -INF, label_frame
    t, u = frames, labels
    while (t, u) != (0, 0):
        best = max(score for score, _ in paths_into(t, u))
        last = min(arcs[-1] for score, arcs in paths_into(t, u) if score == best)
        t, u = t - topology.arcs[last].frames, u - topology.arcs[last].labels
        if topology.arcs[last].labels:
            label_frame[u] = t
    return max(score for score, _ in paths_into(frames, labels)), label_frame


def scores_of_sample(nodes: Nodes, sample: int, scores: Tensor) -> NodeScores:
    packed, rows = nodes.packed, nodes.rows
    mine = (nodes.sample_of(rows) == sample).nonzero().flatten()
    t = packed.frame_index[rows.frame[mine].long()].tolist()
    u = packed.state_index[rows.state[mine].long()].tolist()
    return dict(zip(zip(t, u, strict=True), scores[mine].tolist(), strict=True))


@every_backend
@every_topology
@pytest.mark.parametrize(
    ("restrict", "has_ties"),
    [(everywhere, False), (everywhere, True), (band, False), (scattered, True)],
)
def test_best_of_all_paths(
    kernels: Kernels,
    topology: str,
    restrict: Callable[[Lengths], Ranges | None],
    has_ties: bool,
) -> None:
    tables = TOPOLOGIES[topology]
    nodes = pack(kernels, SMALL, restrict(SMALL))
    scores = random_scores(kernels, nodes, tables)
    if has_ties:  # of few numbers, whose sums are exact
        scores.round_()
        tables = replace(tables, arcs=tuple(replace(arc, offset=0.0) for arc in tables.arcs))
    else:
        tables = numbered(tables)
    score, label_frame = best_paths(kernels, tables, nodes, scores)
    assert score.isfinite().any()
    for s, frames in enumerate(of_samples(nodes, label_frame)):
        of_nodes = scores_of_sample(nodes, s, scores)
        assert (score[s].item(), frames) == best_of_all_paths(tables, *SMALL[s], of_nodes)


@every_backend
@pytest.mark.parametrize(
    ("topology", "expected"),
    [("rnnt", [0, 0, -1]), ("modified", [0, 1, -1]), ("constrained", [0, 1, -1])],
)
def test_first_of_equal_arcs(kernels: Kernels, topology: str, expected: list[int]) -> None:
    """Where all paths are equal, blanks come last: theirs is the first arc, and the path is found
    from its end."""
    nodes = pack(kernels, [(4, 2)])
    scores = kernels.guard(torch.zeros(12, 2, dtype=torch.float64, device=kernels.device))
    score, label_frame = best_paths(kernels, TOPOLOGIES[topology], nodes, scores)
    assert score.item() == 0.0
    assert label_frame.tolist() == expected
    arcs = TOPOLOGIES[topology].arcs[::-1]
    _, label_frame = best_paths(kernels, Topology(RNNT.symbols, arcs), nodes, scores)
    last = {"rnnt": [3, 3, -1], "modified": [2, 3, -1], "constrained": [2, 3, -1]}
    assert label_frame.tolist() == last[topology]


# ---- backends against each other


def assert_as_on_host(
    kernels: Kernels, topology: Topology, lengths: Lengths, ranges: Ranges | None, scores: Tensor
) -> tuple[Nodes, Tensor, Tensor]:
    """The results, which are those of torch operations, bit for bit."""
    nodes = pack(HOST, lengths, ranges)
    expected = best_paths(HOST, topology, nodes, scores.cpu())
    actual = best_paths(kernels, topology, pack(kernels, lengths, ranges), scores)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    return nodes, *expected


def score_along(
    topology: Topology, nodes: Nodes, scores: Tensor, sample: int, emitted: list[int]
) -> float:
    """Of a path over a topology of a blank and a label, which emits labels on these frames."""
    of_nodes = scores_of_sample(nodes, sample, scores)
    frames, total, t, u = int(nodes.packed.frames[sample]), 0.0, 0, 0
    while t < frames:
        arc = topology.arcs[emitted[u] == t]
        total += arc_score(arc, of_nodes, (t, u), frames)
        t, u = t + arc.frames, u + arc.labels
    assert u == len(emitted) - 1
    return total


@every_topology
@every_restriction
def test_backends_agree(
    kernels: Kernels, topology: str, restrict: Callable[[Lengths], Ranges | None]
) -> None:
    tables = numbered(TOPOLOGIES[topology])
    ranges = restrict(LARGE)
    scores = random_scores(kernels, pack(kernels, LARGE, ranges), tables)
    nodes, score, label_frame = assert_as_on_host(kernels, tables, LARGE, ranges, scores)
    assert score.isfinite().any()
    scores = scores.cpu()
    if len(tables.arcs) == 2:
        for s, emitted in enumerate(of_samples(nodes, label_frame)):
            if score[s].isfinite():
                assert score_along(tables, nodes, scores, s, emitted) == score[s]
    # The path's labels are possible where it emits them, and no better ones are there.
    t = nodes.packed.frame_index[nodes.rows.frame.long()]
    is_elsewhere = label_frame[nodes.rows.state.long()] != t
    scores[:, 1].masked_fill_(is_elsewhere, -INF)
    again = best_paths(HOST, tables, nodes, scores)
    torch.testing.assert_close(again, (score, label_frame), rtol=0, atol=0)


@on_emulator
@every_restriction
@pytest.mark.parametrize("lengths", [[(50, 70), (70, 50)], [(90, 41)]])
def test_more_nodes_than_threads(
    kernels: Kernels,
    lengths: Lengths,
    restrict: Callable[[Lengths], Ranges | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a diagonal; and whatever thread comes first, the diagonal before is complete."""
    monkeypatch.setattr(compiled, "_PATH_THREADS", 32)
    tables, ranges = TOPOLOGIES["tdt"], restrict(lengths)
    scores = random_scores(kernels, pack(kernels, lengths, ranges), tables)
    for order in ("ascending", "descending", "shuffled(1)"):
        with thread_order(order):
            assert_as_on_host(kernels, tables, lengths, ranges, scores)


def test_many_states(kernels: Kernels) -> None:
    lengths = [(3, 1500), (1200, 2), (1, 700)]
    scores = random_scores(kernels, pack(kernels, lengths), RNNT)
    assert_as_on_host(kernels, RNNT, lengths, None, scores)


# ---- samples without a path, and scores that are not numbers


@every_backend
def test_samples_without_a_path(kernels: Kernels) -> None:
    ranges = [
        [(0, 3), (0, 3), (0, 3)],
        [(0, 3), (5, 5), (0, 3)],  # a frame without nodes
        [(1, 3), (0, 3), (0, 3)],  # no (0, 0)
        [(0, 3), (0, 3), (0, 2)],  # no (T − 1, U)
        [(0, 1), (2, 3), (0, 3)],  # ranges that do not meet
        [(4, 4), (3, 3), (0, 0)],
    ]
    nodes = pack(kernels, [(3, 2)] * 6, ranges)
    scores = kernels.guard(torch.zeros(len(nodes.rows), 2, dtype=torch.float64))
    score, label_frame = best_paths(kernels, RNNT, nodes, scores.to(kernels.device))
    assert score.tolist() == [0.0] + [-INF] * 5
    assert label_frame.tolist() == [0, 0, -1] + [-1] * 15

    nodes = pack(kernels, [(2, 1), (1, 0)], [[(0, 0), (2, 2)], [(1, 1)]])
    score, label_frame = best_paths(kernels, RNNT, nodes, scores[:0].to(kernels.device))
    assert score.tolist() == [-INF] * 2
    assert label_frame.tolist() == [-1] * 3


@every_backend
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_score_that_is_no_number(kernels: Kernels, value: float) -> None:
    """Each symbol of each node once, in a sample of its own: what arcs it scores are part of some
    path, or there are none."""
    frames, labels = 3, 2
    cases = list(itertools.product(range(frames), range(labels + 1), (0, 1)))
    lengths = [(frames, labels)] * (len(cases) + 1)
    scores = (
        torch.randn(frames, labels + 1, 2, dtype=torch.float64).sub(3).repeat(len(lengths), 1, 1, 1)
    )
    for s, (t, u, symbol) in enumerate(cases):
        scores[s, t, u, symbol] = value
    scores = kernels.guard(scores.view(-1, 2).to(kernels.device))
    nodes = pack(kernels, lengths)
    score, label_frame = best_paths(kernels, RNNT, nodes, scores)
    of_sample = of_samples(nodes, label_frame)
    for s, (t, u, symbol) in enumerate(cases):
        is_used = u < labels if symbol else t < frames - 1 or u == labels
        if not is_used:
            assert (score[s], of_sample[s]) == (score[-1], of_sample[-1])
        elif value == -INF:
            assert score[s] <= score[-1]
        else:
            assert torch.equal(score[s].isnan(), torch.tensor(value).isnan())
            assert not score[s].isfinite()


@every_topology
@every_restriction
def test_any_scores(
    kernels: Kernels, topology: str, restrict: Callable[[Lengths], Ranges | None]
) -> None:
    """Numbers or not, large or small, some in most samples."""
    lengths = SMALL * 6
    ranges, tables = restrict(lengths), TOPOLOGIES[topology]
    scores = random_scores(kernels, pack(kernels, lengths, ranges), tables)
    wild = torch.tensor([NAN, INF, -INF, 1e308, -1e308, 0.0], dtype=torch.float64)
    drawn = torch.randint(len(wild) * 15, scores.shape)
    wild = wild[drawn.clamp(max=len(wild) - 1)].to(kernels.device)
    is_wild = (drawn < len(wild)).to(kernels.device)
    scores = kernels.guard(torch.where(is_wild, wild, scores))
    _, score, _ = assert_as_on_host(kernels, tables, lengths, ranges, scores)
    assert 0 < score.isfinite().sum() < len(lengths)
