"""Groups and chunks: every sample once, within the workspace."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rnnt_op.backends.eager_lattice import lattice_cells
from rnnt_op.plan import MOST_KEPT_BYTES, make_plan

WORKSPACE_BYTES = 2**28


def lattice_bytes(samples: int, frames: int, states: int, nodes: int) -> int:
    return samples * lattice_cells(frames, states) * 112


COSTS = {
    "row_bytes": 4_000,
    "lattice_bytes": lattice_bytes,
    "packed_bytes": 512,
    "logits_bytes": 1_000,
    "cache_bytes": 10**6,
    "workspace_bytes": WORKSPACE_BYTES,
    "lattice_share": 0.25,
    "groups_in_flight": 1,
}

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 90)), min_size=1, max_size=40)


@PATIENT
@given(lengths, st.integers(1, 10**7))
def test_every_sample_is_in_one_group(lengths, workspace_bytes) -> None:
    frames, labels = [t for t, _ in lengths], [u for _, u in lengths]
    plan = make_plan(frames, labels, **{**COSTS, "workspace_bytes": workspace_bytes})
    assert sorted(b for g in plan.groups for b in g.samples) == list(range(len(lengths)))
    for group in plan.groups:
        assert group.frames == tuple(frames[b] for b in group.samples)
        assert group.states == tuple(labels[b] + 1 for b in group.samples)


@PATIENT
@given(lengths, st.integers(1, 10**7), st.integers(1, 2))
def test_groups_and_chunks_fit_the_workspace(lengths, workspace_bytes, in_flight) -> None:
    sizes = {"workspace_bytes": workspace_bytes, "groups_in_flight": in_flight}
    plan = make_plan(
        [t for t, _ in lengths],
        [u for _, u in lengths],
        **{**COSTS, **sizes},
    )
    chunk_bytes = plan.chunk_rows * COSTS["row_bytes"]
    assert plan.chunk_rows == 1 or chunk_bytes <= workspace_bytes
    every = [each for group in plan.groups for each in (group, *group.parts)]
    kept = [group.nodes for group in every if group.keeps_logits]
    assert plan.kept_rows == max(kept, default=0)
    if kept:
        kept_bytes = plan.kept_rows * in_flight * COSTS["logits_bytes"]
        assert kept_bytes + chunk_bytes + workspace_bytes // 4 <= workspace_bytes
    for group in plan.groups:
        samples, longest = len(group.samples), (max(group.frames), max(group.states))
        group_bytes = lattice_bytes(samples, *longest, group.nodes)
        group_bytes += (sum(group.frames) + sum(group.states)) * 512
        assert samples == 1 or group_bytes * in_flight <= workspace_bytes / 4


def test_small_batches_are_one_group() -> None:
    plan = make_plan([50] * 32, [10] * 32, **COSTS)
    assert len(plan.groups) == 1


@pytest.mark.parametrize(("row_bytes", "rows"), [(1, 7 << 17), (4_000, 256), (10**9, 1)])
def test_chunks_stay_in_cache(row_bytes: int, rows: int) -> None:
    plan = make_plan([2_000], [999], **{**COSTS, "row_bytes": row_bytes})
    assert plan.chunk_rows == rows
    assert plan.chunk_rows * row_bytes <= max(WORKSPACE_BYTES, row_bytes)


def test_logits_are_kept_where_they_fit() -> None:
    """In what lattices and chunk leave, and in memory that malloc need not ask for."""
    sizes = {"row_bytes": 1_000, "workspace_bytes": 10**6, "cache_bytes": 300_000}
    costs = {**COSTS, **sizes, "lattice_bytes": lambda *_: 0}
    # A quarter is for lattices, a chunk takes 256 rows, and 494 are left.
    for samples, kept_rows in ((4, 400), (5, 0)):
        plan = make_plan([10] * samples, [9] * samples, **costs)
        assert [group.keeps_logits for group in plan.groups] == [kept_rows > 0]
        assert plan.kept_rows == kept_rows
    plan = make_plan([10], [9], **{**costs, "logits_bytes": 0})
    assert plan.kept_rows == 0
    for labels, keeps_logits in (
        (MOST_KEPT_BYTES // 10_000 - 1, True),
        (MOST_KEPT_BYTES // 10_000, False),
    ):
        (group,) = make_plan([10], [labels], **COSTS).groups
        assert group.keeps_logits is keeps_logits


@PATIENT
@given(lengths, st.integers(1, 10**8), st.integers(1, 2))
def test_parts(lengths, workspace_bytes, in_flight) -> None:
    """Of a group, each sample in one of them; their logits have room, which is used four times."""
    sizes = {"workspace_bytes": workspace_bytes, "groups_in_flight": in_flight}
    costs = {**COSTS, **sizes}
    frames, labels = [t for t, _ in lengths], [u for _, u in lengths]
    plan = make_plan(frames, labels, **costs)
    left = workspace_bytes * 3 // 4 - plan.chunk_rows * COSTS["row_bytes"]
    most = min(left // in_flight // COSTS["logits_bytes"], sum(g.nodes for g in plan.groups) // 4)
    most = most if most >= plan.chunk_rows else 0
    for group in plan.groups:
        largest = max(t * u for t, u in zip(group.frames, group.states, strict=True))
        assert bool(group.parts) == (not group.keeps_logits and largest <= most)
        if group.parts:
            assert tuple(b for part in group.parts for b in part.samples) == group.samples
            assert all(part.keeps_logits and part.nodes <= most for part in group.parts)
            assert not any(part.parts for part in group.parts)
            joined = [a.nodes + b.nodes for a, b in itertools.pairwise(group.parts)]
            assert all(nodes > most for nodes in joined)
    assert not any(
        g.parts for g in make_plan(frames, labels, **{**costs, "logits_bytes": 0}).groups
    )


def test_chunks_are_no_longer_than_the_longest_group() -> None:
    assert make_plan([9], [9], **COSTS).chunk_rows == 90


def test_no_sample_no_group() -> None:
    assert make_plan([], [], **COSTS).groups == ()
