"""Which nodes are scored, against whole lattices in float64: what is lost is within its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tested_backends import NEEDS_CXX, cpu_backend
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.backends import eager, native
from rnnt_op.backends.protocol import Reached
from rnnt_op.nodes import Nodes, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.topologies import constrained, hat, modified, multi_blank, star, tdt
from rnnt_op.topology import NO_LABEL, RNNT, Topology

VOCAB_SIZE = 6
SAMPLES = 20
ENOUGH_WORK = 2**20
BIG = multi_blank((2, 4), columns=(-1, -2))
# The arcs of a node are outcomes of one choice, so that its gradient shows each of them.
CHAINS = {
    "regular": RNNT,
    "modified": modified(),
    "big-blanks": BIG,
    "long-blank": multi_blank((20,), columns=(-1,)),
    "hat": hat(RNNT),
    "hat-modified": hat(modified()),
}
SUBSTOCHASTIC = {
    **CHAINS,
    "constrained": constrained(),
    "tdt": tdt((0, 1, 2, 3)),
    "tdt-sigma": tdt((1, 2), sigma=0.3),
    "big-blanks-sigma": multi_blank((2, 4), columns=(-1, -2), sigma=0.3),
    "fast-emit": RNNT.regularized(0.5, 0.0),
}
# Each is another kernel, which takes longest of all to compile; these have every kind of arc.
RESTRICTED = ("regular", "long-blank", "hat", "big-blanks", "constrained", "tdt", "fast-emit")
OTHERS = {
    "star": star(1.0),
    "delay penalty": RNNT.regularized(0.0, 0.01),
    "bonus": multi_blank((2,), columns=(-1,), sigma=-0.05),
    "posteriors": RNNT.counted(),
}


# ---- logits [T, U + 1, V] of a sample, from what its columns are: label u is due on frame due[u]


def of_times(due: Tensor, labels: Tensor, frames: int, sure: float) -> Tensor:
    """A label is more likely than the blank from its time on, and less before."""
    logits = torch.randn(frames, len(due) + 1, VOCAB_SIZE, dtype=torch.float64) - sure
    is_due = torch.arange(frames).unsqueeze(1) >= due
    of_label = torch.where(is_due, sure / 2, -sure / 2).double()
    logits[:, torch.arange(len(due)), labels] = of_label
    logits[..., 0] = F.pad(-of_label, (0, 1), value=sure / 2)
    return logits


def aligned(labels: Tensor, frames: int, sure: float) -> Tensor:
    due = torch.randint(frames, labels.shape).sort().values
    return of_times(due, labels, frames, sure)


def all_at_the_end(labels: Tensor, frames: int, sure: float) -> Tensor:
    return of_times(torch.full_like(labels, frames - 1), labels, frames, sure)


def all_at_once(labels: Tensor, frames: int, sure: float) -> Tensor:
    return of_times(torch.full_like(labels, frames // 2), labels, frames, sure)


def hidden(labels: Tensor, frames: int, sure: float) -> Tensor:
    """The first label is unlikely on the first frame, and next to impossible later."""
    logits = aligned(labels, frames, sure)
    logits[:, 0, labels[0]] = -60.0
    logits[0, 0, labels[0]] = -18.0
    return logits


def without_blanks(labels: Tensor, frames: int, sure: float) -> Tensor:
    logits = aligned(labels, frames, sure)
    logits[..., 0] = -10.0 * sure
    return logits


def noise(labels: Tensor, frames: int, sure: float) -> Tensor:
    return torch.randn(frames, len(labels) + 1, VOCAB_SIZE, dtype=torch.float64) * sure


def ties(labels: Tensor, frames: int, sure: float) -> Tensor:
    return noise(labels, frames, 1.0).round()


KINDS = [aligned, all_at_the_end, all_at_once, hidden, without_blanks, noise, ties]


@dataclass
class Lattices:
    """A group of samples whose scores are all known."""

    topology: Topology
    nodes: Nodes
    logits: Tensor  # [N, V]
    columns: Tensor  # [N, S]

    @classmethod
    def of(
        cls, topology: Topology, make: Callable[..., Tensor], sure: float, restricted: bool
    ) -> Lattices:
        frames = [int(n) for n in torch.randint(33, 60, (SAMPLES,))]
        labels = [int(n) for n in torch.randint(11, 24, (SAMPLES,))]
        targets = torch.randint(1, VOCAB_SIZE - 2, (SAMPLES, max(labels)))
        logits = [
            make(targets[b, :u], t, sure).flatten(0, 1)
            for b, (t, u) in enumerate(zip(frames, labels, strict=True))
        ]
        ranges, count = None, None
        if restricted:
            low = torch.arange(max(frames)).unsqueeze(0) // 8 - torch.randint(3, (SAMPLES, 1))
            states = torch.tensor(labels).unsqueeze(1) + 1
            low = torch.minimum(low.clamp(min=0), states - 3)
            last = torch.tensor(frames).unsqueeze(1) - 1
            low = torch.maximum(low, states - 1 - (last - torch.arange(max(frames))))
            ranges = torch.stack((low, torch.minimum(low + 8, states)), 2)
            count = tuple(
                int((ranges[b, :t, 1] - ranges[b, :t, 0]).sum()) for b, t in enumerate(frames)
            )
            logits = [
                x[torch.cat([torch.arange(*ends) + t * (u + 1) for t, ends in enumerate(r[:f])])]
                for x, u, f, r in zip(logits, labels, frames, ranges.tolist(), strict=True)
            ]
        group = Group(tuple(range(SAMPLES)), tuple(frames), tuple(u + 1 for u in labels), count)
        nodes = pack_nodes(group, targets, eager, ranges)
        durations = torch.randn(len(nodes.rows), topology.extra_columns, dtype=torch.float64) * sure
        columns = topology.columns(
            nodes.packed.next_label, 0, VOCAB_SIZE + topology.extra_columns
        ).index_select(0, nodes.rows.state)
        return cls(topology, nodes, torch.cat((torch.cat(logits), durations), 1), columns)

    def scores(self, logits: Tensor) -> Tensor:
        """Log-probability of each symbol, by autograd's own operations. [N, S]"""
        if self.topology.symbols[0].softmax == 0:
            tokens, durations = logits.tensor_split([VOCAB_SIZE], 1)
            log_probs = torch.cat((tokens.log_softmax(1), durations.log_softmax(1)), 1)
        else:
            log_probs = torch.cat((F.logsigmoid(logits[:, :1]), logits[:, 1:].log_softmax(1)), 1)
        scores = log_probs.gather(1, self.columns.clamp(min=0))
        if len(self.topology.symbols) == 3 and self.topology.symbols[2].source == "zero":
            scores = torch.cat((scores[:, :2], F.logsigmoid(-logits[:, :1])), 1)
        return scores.masked_fill(self.columns == NO_LABEL, -torch.inf)

    def gradient(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods [S], and the gradient of their negated sum in the logits. [N, V]"""
        lattice = eager.forward_backward(self.topology, self.nodes, scores, occupancies=True)
        assert lattice.occupancy is not None
        logits = self.logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.scores(logits), logits, -lattice.occupancy)
        return lattice.log_likelihood, gradient

    def norms(self, gradient: Tensor) -> Tensor:
        """L1 norm of each sample's gradient. [S]"""
        sums = torch.zeros(SAMPLES, dtype=torch.float64)
        return sums.index_add_(0, self.nodes.sample_of(self.nodes.rows), gradient.abs().sum(1))

    def path_norms(self) -> Tensor:
        """What the L1 norm of the gradient of one path is at most. [S]"""
        packed = self.nodes.packed
        of_arc = max(
            abs(arc.scale) * len(arc.symbols + arc.next_symbols) for arc in self.topology.arcs
        )
        return 2 * of_arc * (packed.frames + packed.states - 1).double()

    def reach(self, scores: Tensor, tolerance: float) -> Reached:
        reached = cpu_backend("native").reach(
            self.topology, self.nodes, scores, ENOUGH_WORK, tolerance
        )
        assert reached is not None
        return reached

    def reached(self, everything: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Scores of the nodes that were asked for [N, S], and what is lost at most [S]."""
        scores = torch.full_like(everything, -torch.inf)
        is_scored = torch.zeros(len(scores), dtype=torch.bool)
        reached = self.reach(scores, tolerance)

        def add(numbers: Tensor) -> None:
            assert (numbers.diff() > 0).all()
            assert not is_scored[numbers].any()
            is_scored[numbers] = True
            scores[numbers] = everything[numbers]

        for numbers in reached:
            add(numbers)
        lattice = eager.forward_backward(self.topology, self.nodes, scores, occupancies=True)
        rest = reached.rest(lattice.occupancy)
        add(rest)
        of_rest = torch.zeros_like(is_scored).index_fill_(0, rest, True)
        sample = self.nodes.sample_of(self.nodes.rows)
        self.rest = {int(s) for s in sample[of_rest]}
        for s in self.rest:
            assert is_scored[sample == s].all()
            assert reached.lost[s] == 0
        assert len(reached.rest(lattice.occupancy)) == 0
        self.fraction = float(is_scored.double().mean())
        return scores, reached.lost


@NEEDS_CXX
@pytest.mark.parametrize(
    ("kind", "name", "restricted"),
    [
        pytest.param(kind, name, how == "restricted", id=f"{kind.__name__}-{name}-{how}")
        for how, names in (("whole", SUBSTOCHASTIC), ("restricted", RESTRICTED))
        for name in names
        for kind in (
            KINDS
            if name in ("regular", "modified", "hat")
            else (aligned, hidden, noise)
            if name in CHAINS
            else (aligned, noise)
        )
    ],
)
def test_what_is_lost_is_within_its_bound(kind, name: str, restricted: bool) -> None:
    skipped = []
    for sure, tolerance in ((4.0, 0.5), (12.0, 1e-6)):
        lattices = Lattices.of(SUBSTOCHASTIC[name], kind, sure, restricted)
        everything = lattices.scores(lattices.logits)
        log_likelihood, expected = lattices.gradient(everything)
        scores, lost = lattices.reached(everything, tolerance)
        found, gradient = lattices.gradient(scores)
        skipped.append(1 - lattices.fraction)

        has_path = log_likelihood > -torch.inf
        norms = lattices.norms(expected)
        if name in CHAINS:
            # A gradient knows how far its sample is from certain.
            assert (norms >= (1 - log_likelihood.exp()) * (1 - 1e-9) - 1e-12)[has_path].all()
            assert not lattices.rest
        assert (found[has_path] <= log_likelihood[has_path] + 1e-10).all()
        upper = found + torch.log1p(lost)
        assert (log_likelihood[has_path] <= upper[has_path] + 1e-10).all()
        assert torch.equal(found[~has_path], log_likelihood[~has_path])
        change = lattices.norms(gradient - expected)
        assert (change <= tolerance * norms + 1e-10)[has_path].all()
        found_norms = lattices.norms(gradient)
        bound = lost * (lattices.path_norms() + found_norms)
        assert (bound <= tolerance * found_norms * (1 + 1e-9))[has_path].all()
    if kind is aligned and name not in ("long-blank", "tdt", "tdt-sigma"):
        assert max(skipped) > (0.01 if restricted else 0.2)


@NEEDS_CXX
def test_a_smaller_tolerance_loses_less() -> None:
    lattices = Lattices.of(RNNT, aligned, 4.0, False)
    everything = lattices.scores(lattices.logits)
    fractions, losses = [], []
    for tolerance in (1e-1, 1e-3, 1e-6, 1e-12):
        _, lost = lattices.reached(everything, tolerance)
        fractions.append(lattices.fraction)
        losses.append(float(lost.max()))
    assert fractions == sorted(fractions)
    assert losses == sorted(losses, reverse=True)
    assert fractions[0] < fractions[-1] < 1
    assert losses[-1] > 0


@NEEDS_CXX
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_scores_that_end_every_path(value: float) -> None:
    """Everything is scored then, as it would be without asking."""
    lattices = Lattices.of(RNNT, aligned, 6.0, False)
    everything = lattices.scores(lattices.logits)
    frame = int(lattices.nodes.packed.first_frame[3]) + 20
    everything[lattices.nodes.rows.frame == frame] = value
    scores, lost = lattices.reached(everything, 1e-6)
    of_sample = lattices.nodes.sample_of(lattices.nodes.rows) == 3
    torch.testing.assert_close(scores[of_sample], everything[of_sample], equal_nan=True)
    assert lost[3] == 0
    assert lattices.fraction < 1
    assert not torch.equal(scores, everything)


@NEEDS_CXX
def test_samples_do_not_change_each_other() -> None:
    lattices = Lattices.of(RNNT, aligned, 4.0, False)
    everything = lattices.scores(lattices.logits)
    scores, _ = lattices.reached(everything, 1e-6)
    changed = everything.clone()
    of_sample = lattices.nodes.sample_of(lattices.nodes.rows) == 5
    changed[of_sample] = torch.nan
    others, _ = lattices.reached(changed, 1e-6)
    assert torch.equal(scores[~of_sample], others[~of_sample])


@NEEDS_CXX
@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads: int) -> None:
    lattices = Lattices.of(RNNT, aligned, 4.0, False)
    everything = lattices.scores(lattices.logits)
    expected, _ = lattices.reached(everything, 1e-6)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores, _ = lattices.reached(everything, 1e-6)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scores, expected)


def test_which_topologies_are_substochastic() -> None:
    assert all(topology.is_substochastic for topology in SUBSTOCHASTIC.values())
    assert not any(topology.is_substochastic for topology in OTHERS.values())


@pytest.mark.parametrize("name", [*SUBSTOCHASTIC, "star", "bonus"])
def test_what_leaves_a_node(name: str) -> None:
    topology = {**SUBSTOCHASTIC, **OTHERS}[name]
    lattices = Lattices.of(topology, noise, 4.0, False)
    scores = lattices.scores(lattices.logits)
    next_scores = scores.roll(-1, 0)  # of the last state they do not matter: it has no label
    leaving = torch.zeros(len(scores), dtype=torch.float64)
    for arc in topology.arcs:
        score = scores[:, arc.symbols].sum(1) + next_scores[:, arc.next_symbols].sum(1)
        leaving += (score + arc.offset).exp()
    assert (float(leaving.max()) <= 1 + 1e-12) == topology.is_substochastic


@NEEDS_CXX
@pytest.mark.parametrize("name", ["regular", "constrained", "tdt", "fast-emit"])
def test_how_small_a_gradient_may_be(name: str) -> None:
    lattices, tolerance = Lattices.of(SUBSTOCHASTIC[name], aligned, 12.0, False), 1e-3
    everything = lattices.scores(lattices.logits)
    scores = torch.full_like(everything, -torch.inf)
    reached = lattices.reach(scores, tolerance)
    for numbers in reached:
        scores[numbers] = everything[numbers]
    lattice = eager.forward_backward(lattices.topology, lattices.nodes, scores, occupancies=True)
    assert lattice.occupancy is not None
    mass = eager.gradient_mass(lattices.topology, scores, lattice.occupancy)
    sample = lattices.nodes.sample_of(lattices.nodes.rows)
    norms = torch.zeros(SAMPLES, dtype=torch.float64).index_add_(0, sample, mass)
    lost = reached.lost.clone()
    least = lost * lattices.path_norms() / (tolerance - lost)
    share = (least / norms).index_select(0, sample).unsqueeze(1)
    assert len(reached.rest(lattice.occupancy * share * 1.001)) == 0
    assert torch.equal(reached.lost, lost)
    rest = reached.rest(lattice.occupancy * share * 0.999)
    assert set(sample[rest].tolist()) == set(lost.nonzero().flatten().tolist()) != set()
    assert (reached.lost == 0).all()


@NEEDS_CXX
def test_a_gradient_too_small_for_what_is_lost() -> None:
    """Node (0, 0) chooses a token of two and a duration of two, evenly. Two of the four pairs lead
    to a path, so P is 1/2, but each token and each duration has the share that the model gives it:
    no gradient. All other nodes are next to certain."""
    frames, states = 64, 13
    logits = torch.full((frames, states, VOCAB_SIZE + 2), -25.0, dtype=torch.float64)
    blank, label, other = 0, 1, 2

    def choose(t: int, u: int, tokens: tuple[int, ...], durations: tuple[int, ...]) -> None:
        logits[t, u] = -25.0
        logits[t, u, [*tokens, *(VOCAB_SIZE + d - 1 for d in durations)]] = 0.0

    for t in range(frames):
        for u in range(states):
            is_due = u < states - 1 and t >= 5 * u
            choose(t, u, (label if is_due else blank,), (1,))
    choose(0, 0, (blank, label), (1, 2))
    choose(1, 0, (other,), (1,))
    choose(2, 1, (other,), (1,))
    choose(2, 0, (label,), (1,))
    choose(1, 1, (blank,), (2,))

    topology = tdt((1, 2))
    group = Group((0,), (frames,), (states,))
    nodes = pack_nodes(group, torch.full((1, states - 1), label), eager)
    columns = topology.columns(nodes.packed.next_label, blank, VOCAB_SIZE + 2)
    lattices = Lattices(
        topology, nodes, logits.flatten(0, 1), columns.index_select(0, nodes.rows.state)
    )
    everything = lattices.scores(lattices.logits)
    log_likelihood, gradient = lattices.gradient(everything)
    assert log_likelihood.exp().item() == pytest.approx(0.5, abs=1e-6)
    assert gradient.abs().sum() < 1e-6
    scores, _ = lattices.reached(everything, 1e-6)
    assert lattices.rest == {0}
    assert torch.equal(scores, everything)


@NEEDS_CXX
def test_where_it_costs_more_than_it_saves() -> None:
    lattices = Lattices.of(RNNT, aligned, 4.0, False)
    scores = lattices.scores(lattices.logits)
    reach = cpu_backend("native").reach
    least = math.ceil(native._LEAST_WORK / sum(lattices.nodes.packed.group.states))
    assert reach(RNNT, lattices.nodes, scores, least, 0.1) is not None
    assert reach(RNNT, lattices.nodes, scores, least - 1, 0.1) is None
    long = multi_blank((native._LONGEST_ARC + 1,), columns=(-1,))
    assert reach(long, lattices.nodes, scores, least, 0.1) is None


@pytest.mark.parametrize("backend", ["eager", "emulator"])
def test_other_backends_score_everything(backend: str) -> None:
    lattices = Lattices.of(RNNT, aligned, 4.0, False)
    scores = lattices.scores(lattices.logits)
    reach = cpu_backend(backend).reach
    assert reach(RNNT, lattices.nodes, scores, ENOUGH_WORK, 0.1) is None
