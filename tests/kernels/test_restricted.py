"""Kernels of lattices that label ranges restrict, on every backend: sums over the paths that are
left, and larger lattices against torch operations.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import test_kernels
import torch
from emulator import thread_order
from path_sums import sum_over_paths
from test_kernels import (
    AT_MOST_ONE_LABEL_A_FRAME,
    KERNELS,
    LATTICES,
    LATTICES_OF_TOPOLOGIES,
    REGULARIZED,
    TOPOLOGIES,
    Kernels,
    random_scores,
)
from tested_backends import EAGER, EMULATOR
from torch import Tensor

from rnnt_op.backends import eager
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topology import NO_LABEL, RNNT

Lengths = Sequence[tuple[int, int]]  # T and U of each sample
Ranges = list[list[tuple[int, int]]]  # first u and end of each frame of each sample
Restrict = Callable[[Lengths], Ranges]

kernels = test_kernels.kernels
every_backend = pytest.mark.parametrize("kernels", [*KERNELS, EAGER], indirect=True)
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)

SMALL = [*itertools.product([1, 2, 4, 6], [0, 1, 3]), (5, 6), (6, 2)]
WILD = (7, -3)  # beyond a sample's frames, where nobody may look
HOST = Kernels("eager", eager, torch.device("cpu"), lambda tensor: tensor)


def band(lengths: Lengths, states: int) -> Ranges:
    """Some states about the diagonal, beyond U, too."""

    def first(t: int, frames: int, labels: int) -> int:
        return round(max(0, labels + 1 - states) * t / max(1, frames - 1))

    return [
        [(u := first(t, frames, labels), u + states) for t in range(frames)]
        for frames, labels in lengths
    ]


def wide(lengths: Lengths) -> Ranges:
    """All that a path may need, and some more; a share of the states where there are many."""

    def drawn(t: int, frames: int, labels: int) -> tuple[int, int]:
        least, most = labels * t // frames, -(-labels * (t + 1) // frames)
        return max(0, least - (2 + 7 * t) % 11), most + 1 + (3 + 5 * t) % 13

    return [[drawn(t, frames, labels) for t in range(frames)] for frames, labels in lengths]


def scattered(lengths: Lengths) -> Ranges:
    """Any ranges: empty ones, ones that do not meet, all of them, none at all."""
    draw = random.Random(0)

    def drawn(t: int, labels: int) -> tuple[int, int]:
        first = draw.randint(0, labels // 2) if t else 0
        return first, first + draw.randint(0 if draw.random() < 0.1 else 1, labels + 2)

    ranges = [[drawn(t, labels) for t in range(frames)] for frames, labels in lengths]
    frames, labels = lengths[-1]
    ranges[-1] = [(0, labels + 1)] * frames
    frames, labels = lengths[len(lengths) // 2]
    ranges[len(lengths) // 2] = [(labels + 1 + t, labels + 2 + t) for t in range(frames)]
    return ranges


every_restriction = pytest.mark.parametrize(
    "restrict",
    [
        pytest.param(functools.partial(band, states=2), id="band-2"),
        pytest.param(functools.partial(band, states=3), id="band-3"),
        wide,
        scattered,
    ],
)


def nodes_of(lengths: Lengths, ranges: Ranges) -> list[list[tuple[int, int]]]:
    """The (t, u) of each sample, in order."""
    return [
        [
            (t, u)
            for t, (low, high) in enumerate(of_sample)
            for u in range(labels + 1)
            if low <= u < high
        ]
        for (_, labels), of_sample in zip(lengths, ranges, strict=True)
    ]


def pack(kernels: Kernels, lengths: Lengths, ranges: Ranges) -> Nodes:
    counts = tuple(map(len, nodes_of(lengths, ranges)))
    group = replace(test_kernels.group(lengths), restricted_nodes=counts)
    longest = max(group.frames)
    padded = [[*of_sample, *[WILD] * (longest - len(of_sample))] for of_sample in ranges]
    targets = torch.zeros(len(lengths), max(group.states) - 1, dtype=torch.int64)
    nodes = pack_nodes(
        group,
        targets.to(kernels.device),
        kernels.backend,
        torch.tensor(padded, device=kernels.device),
    )
    packed = {f.name: getattr(nodes.packed, f.name) for f in fields(nodes.packed)}
    guarded = {name: kernels.guard(t) for name, t in packed.items() if isinstance(t, Tensor)}
    return replace(nodes, packed=replace(nodes.packed, **guarded))


@every_backend
@pytest.mark.parametrize("restrict", [None, wide, scattered])
def test_pack(kernels: Kernels, restrict: Restrict | None) -> None:
    """Samples in any order, among others; a sample of more frames than a block has threads."""
    lengths = [(1, 0), (300, 3), (5, 7), (2, 2)]
    samples = (4, 0, 3, 1)
    ranges = restrict(lengths) if restrict else [[(0, u + 1)] * t for t, u in lengths]
    nodes = tuple(map(len, nodes_of(lengths, ranges)))
    targets = torch.arange(5 * 7).view(5, 7)
    padded = torch.tensor(WILD).expand(5, 300, 2).clone()
    for b, of_sample in zip(samples, ranges, strict=True):
        padded[b, : len(of_sample)] = torch.tensor(of_sample)
    group = Group(
        samples,
        tuple(t for t, _ in lengths),
        tuple(u + 1 for _, u in lengths),
        nodes if restrict else None,
    )
    packed = pack_nodes(
        group,
        kernels.guard(targets),
        kernels.backend,
        kernels.guard(padded) if restrict else None,
    ).packed

    frames = [(s, t) for s, (frames, _) in enumerate(lengths) for t in range(frames)]
    states = [(s, u) for s, (_, labels) in enumerate(lengths) for u in range(labels + 1)]
    low = [ranges[s][t][0] for s, t in frames]
    high = [max(min(ranges[s][t][1], lengths[s][1] + 1), ranges[s][t][0]) for s, t in frames]
    before = itertools.accumulate(
        (end - first for first, end in zip(low, high, strict=True)), initial=0
    )
    expected = {
        "samples": list(samples),
        "frame_sample": [s for s, _ in frames],
        "frame_index": [t for _, t in frames],
        "low": low,
        "high": high,
        "frame_node": [node - first for node, first in zip(before, low, strict=False)],
        "state_sample": [s for s, _ in states],
        "state_index": [u for _, u in states],
        "next_label": [
            NO_LABEL if u == lengths[s][1] else int(targets[samples[s], u]) for s, u in states
        ],
    }
    for name, values in expected.items():
        assert getattr(packed, name).tolist() == values, name


@every_backend
@every_restriction
def test_node_rows(kernels: Kernels, restrict: Restrict) -> None:
    ranges = restrict(SMALL)
    nodes = pack(kernels, SMALL, ranges)
    expected = [
        (sum(t for t, _ in SMALL[:s]) + t, sum(u + 1 for _, u in SMALL[:s]) + u)
        for s, of_sample in enumerate(nodes_of(SMALL, ranges))
        for t, u in of_sample
    ]
    for rows in (nodes.rows, kernels.backend.node_rows(nodes.packed)):
        assert rows.frame.dtype == rows.state.dtype == torch.int32
        assert list(zip(rows.frame.tolist(), rows.state.tolist(), strict=True)) == expected


# ---- against sums over paths


@every_backend
@every_restriction
@pytest.mark.parametrize(("topology", "is_regularized"), REGULARIZED)
def test_lattice_is_a_sum_over_paths(
    kernels: Kernels, topology: str, restrict: Restrict, is_regularized: bool
) -> None:
    tables = TOPOLOGIES[topology]
    if is_regularized:
        tables = tables.regularized(0.5, 0.1)
    ranges = restrict(SMALL)
    nodes = pack(kernels, SMALL, ranges)
    scores = random_scores(kernels, nodes, tables)
    lattice = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    alone = kernels.backend.forward_backward(tables, nodes, scores, occupancies=False)
    assert alone.occupancy is None
    assert torch.equal(alone.log_likelihood, lattice.log_likelihood)
    assert lattice.occupancy is not None
    of_samples = nodes_of(SMALL, ranges)
    sizes = list(map(len, of_samples))
    feasible = 0
    for (frames, labels), of_sample, mine, log_likelihood, occupancy in zip(
        SMALL,
        of_samples,
        scores.cpu().split(sizes),
        lattice.log_likelihood.cpu(),
        lattice.occupancy.cpu().split(sizes),
        strict=True,
    ):
        expected = sum_over_paths(tables, frames, labels, of_sample, mine)
        if expected is None:
            assert log_likelihood == -torch.inf
            continue
        feasible += 1
        torch.testing.assert_close(log_likelihood, expected[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(occupancy, expected[1], rtol=1e-11, atol=1e-14)
        if topology == "rnnt" and not is_regularized:
            path = torch.tensor([frames, labels], dtype=torch.float64)
            torch.testing.assert_close(occupancy.sum(0), path, rtol=1e-12, atol=1e-13)
    assert feasible >= len(SMALL) // 2


@every_backend
@every_topology
def test_ranges_that_leave_all(kernels: Kernels, topology: str) -> None:
    tables = TOPOLOGIES[topology].regularized(0.5, 0.1)
    nodes = pack(kernels, SMALL, [[(0, labels + 1)] * frames for frames, labels in SMALL])
    scores = random_scores(kernels, nodes, tables)
    actual = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    full = kernels.nodes(SMALL)
    expected = kernels.backend.forward_backward(tables, full, scores, occupancies=True)
    torch.testing.assert_close(nodes.rows.state, full.rows.state)
    torch.testing.assert_close(
        actual.log_likelihood, expected.log_likelihood, rtol=1e-14, atol=1e-14
    )
    feasible = expected.log_likelihood.isfinite()[full.sample_of(full.rows)]
    assert actual.occupancy is not None
    assert expected.occupancy is not None
    torch.testing.assert_close(
        actual.occupancy[feasible], expected.occupancy[feasible], rtol=1e-13, atol=1e-15
    )


@every_backend
def test_samples_without_a_path(kernels: Kernels) -> None:
    ranges = [
        [(0, 3), (0, 3), (0, 3)],
        [(0, 3), (5, 5), (0, 3)],  # a frame without nodes
        [(1, 3), (0, 3), (0, 3)],  # no (0, 0)
        [(0, 3), (0, 3), (0, 2)],  # no (T − 1, U)
        [(0, 1), (2, 3), (0, 3)],  # ranges that do not meet
        [(4, 4), (3, 9), (0, 0)],  # no node
    ]
    for group in (ranges, ranges[-1:]):
        nodes = pack(kernels, [(3, 2)] * len(group), group)
        scores = random_scores(kernels, nodes, RNNT)
        lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
        assert lattice.occupancy is not None
        assert lattice.occupancy.shape == scores.shape
        assert lattice.log_likelihood.isfinite().tolist() == [g == ranges[0] for g in group]
        assert not lattice.log_likelihood.isnan().any()


# ---- against torch operations


@pytest.mark.parametrize(("lengths", "topology"), LATTICES_OF_TOPOLOGIES)
def test_lattice(kernels: Kernels, topology: str, lengths: str) -> None:
    """More states than threads, or than fit in shared memory."""
    tables, sizes = TOPOLOGIES[topology], LATTICES[lengths]
    if topology != "rnnt":
        tables = tables.regularized(0.5, 0.001)
    nodes, host = (pack(each, sizes, wide(sizes)) for each in (kernels, HOST))
    scores = random_scores(kernels, nodes, tables)
    lattice = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    expected = eager.forward_backward(tables, host, scores.cpu(), occupancies=True)
    assert lattice.occupancy is not None
    assert expected.occupancy is not None
    torch.testing.assert_close(
        lattice.log_likelihood.cpu(), expected.log_likelihood, rtol=1e-12, atol=1e-12
    )
    feasible = expected.log_likelihood.isfinite()
    assert topology in AT_MOST_ONE_LABEL_A_FRAME or feasible.all()
    is_feasible = feasible[host.sample_of(host.rows)]
    torch.testing.assert_close(
        lattice.occupancy.cpu()[is_feasible],
        expected.occupancy[is_feasible],
        rtol=1e-9,
        atol=1e-13,
    )


@pytest.mark.parametrize("kernels", [EMULATOR], indirect=True)
@pytest.mark.parametrize("topology", ["rnnt", "tdt"])
def test_order_of_threads_changes_nothing(kernels: Kernels, topology: str) -> None:
    lengths, tables = [(40, 50), (50, 41), (3, 17)], TOPOLOGIES[topology]
    nodes = pack(kernels, lengths, wide(lengths))
    scores = random_scores(kernels, nodes, tables)
    expected = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
    for order in ("descending", "shuffled(1)"):
        with thread_order(order):
            actual = kernels.backend.forward_backward(tables, nodes, scores, occupancies=True)
        assert torch.equal(actual.log_likelihood, expected.log_likelihood)
        assert actual.occupancy is not None
        assert expected.occupancy is not None
        assert torch.equal(actual.occupancy, expected.occupancy)


@every_backend
@every_restriction
@pytest.mark.parametrize("tolerance", [0.5, 1e-3, 0.0])
def test_selection(kernels: Kernels, restrict: Restrict, tolerance: float) -> None:
    """What is skipped is bounded in every sample; one without a path keeps all nodes, if any."""
    lengths = [*SMALL, (40, 20)]
    nodes = pack(kernels, lengths, restrict(lengths))
    scores = random_scores(kernels, nodes, RNNT)
    lattice = kernels.backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    assert lattice.occupancy is not None
    poisoned = lattice.log_likelihood.isinf()
    weight = torch.where(poisoned, torch.nan, lattice.log_likelihood)
    weight[0] = 0.0
    kept = kernels.backend.select_nodes(
        RNNT,
        nodes,
        scores,
        kernels.guard(lattice.occupancy),
        weight=kernels.guard(weight),
        tolerance=tolerance,
        least=0.0,
    )()
    assert (kept.diff() > 0).all()
    sample = nodes.sample_of(nodes.rows)
    is_kept = torch.zeros(len(nodes.rows), dtype=torch.bool, device=kernels.device)
    is_kept[kept] = True
    assert is_kept[weight.isnan()[sample]].all()
    assert not is_kept[sample == 0].any()
    mass = eager.gradient_mass(RNNT, scores, lattice.occupancy)
    for s in (~poisoned).nonzero().flatten().tolist():
        if s == 0:
            continue
        mine = sample == s
        skipped = mass[mine & ~is_kept].sum()
        assert skipped <= tolerance * mass[mine].sum() * (1 + 1e-9) + 1e-13


@every_backend
def test_selection_without_nodes(kernels: Kernels) -> None:
    nodes = pack(kernels, [(2, 1), (1, 0)], [[(0, 0), (2, 2)], [(1, 1)]])
    scores = torch.empty(0, 2, dtype=torch.float64, device=kernels.device)
    weight = torch.tensor([torch.nan, 1.0], dtype=torch.float64, device=kernels.device)
    kept = kernels.backend.select_nodes(
        RNNT, nodes, scores, scores, weight=weight, tolerance=1e-9, least=0.0
    )()
    assert (kept.dtype, kept.shape) == (torch.int64, (0,))
