"""Lattices as their papers define them, and the sum over their paths, written out.

Nothing here reads the tables of ``rnnt_op.topologies``: each lattice is described again, as what
may follow at a node.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from problems import NAN, JointProblem, random_joint
from tested_backends import CUDA, EAGER, EMULATOR, NATIVE
from torch import Tensor
from torch.nn import functional as F

from rnnt_op.topologies import RNNT, Topology, constrained, modified, multi_blank, star, tdt

INF = float("inf")
SIGMA = 0.05


# The lattices, again.

Term = tuple[int, int, int]  # t, u and column of a log-probability
Move = tuple[int, int, list[Term]]  # frames that it reads, labels that it emits, its factors
Ranges = tuple[tuple[tuple[int, int], ...], ...]  # first u and end of each frame of each sample


@dataclass(frozen=True)
class Variant:
    """A lattice: how the library is asked for it, and how it is enumerated here."""

    name: str
    topology: Topology
    moves: Callable[["Variant", int, int, int, int | None], Iterator[Move]]
    tokens: int
    blank: int  # as the caller gives it, negative from the end
    durations: tuple[int, ...] = ()  # of a TDT
    big_blanks: tuple[tuple[int, int], ...] = ()  # column and duration
    normalizer: str = "softmax"
    sigma: float = 0.0
    skip_penalty: float = 0.0  # of a star

    @property
    def columns(self) -> int:
        return self.tokens + len(self.durations)

    @property
    def blank_column(self) -> int:
        return self.blank % self.tokens

    @property
    def labels(self) -> list[int]:
        """Columns of tokens that are no blanks."""
        taken = {self.blank_column, *(column for column, _ in self.big_blanks)}
        return [column for column in range(self.tokens) if column not in taken]

    @property
    def options(self) -> dict[str, Any]:
        return {"topology": self.topology, "normalizer": self.normalizer}

    def __str__(self) -> str:
        return self.name


def regular_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    yield 1, 0, [(t, u, v.blank_column)]
    if label is not None:
        yield 0, 1, [(t, u, label)]


def modified_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    """A path is T symbols."""
    yield 1, 0, [(t, u, v.blank_column)]
    if label is not None:
        yield 1, 1, [(t, u, label)]


def constrained_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    """After a label on a frame comes the blank of that frame."""
    yield 1, 0, [(t, u, v.blank_column)]
    if label is not None:
        yield 1, 1, [(t, u, label), (t, u + 1, v.blank_column)]


def multi_blank_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    yield from regular_moves(v, t, u, frames, label)
    for column, duration in v.big_blanks:
        yield duration, 0, [(t, u, column)]


def star_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    """Any frame but the last may be skipped, at a weight that no logit has a say in."""
    yield from regular_moves(v, t, u, frames, label)
    if t + 1 < frames:
        yield 1, 0, [(t, u, v.columns)]


def tdt_moves(v: Variant, t: int, u: int, frames: int, label: int | None) -> Iterator[Move]:
    """A token and a duration, each with a softmax of its own."""
    for d, duration in enumerate(v.durations):
        if duration > 0:
            yield duration, 0, [(t, u, v.blank_column), (t, u, v.tokens + d)]
        if label is not None and t + duration < frames:
            yield duration, 1, [(t, u, label), (t, u, v.tokens + d)]


def tdt_variant(durations: tuple[int, ...], blank: int) -> Variant:
    name = "tdt" + "".join(map(str, durations))
    topology = tdt(durations, sigma=SIGMA)
    return Variant(name, topology, tdt_moves, 5, blank, durations=durations, sigma=SIGMA)


REGULAR = Variant("regular", RNNT, regular_moves, 5, 0)
MODIFIED = Variant("modified", modified(), modified_moves, 5, 2)
CONSTRAINED = Variant("constrained", constrained(), constrained_moves, 5, -1)
MULTI_BLANK = Variant(
    "multi_blank",
    multi_blank((2, 4), sigma=SIGMA),
    multi_blank_moves,
    6,
    -1,
    big_blanks=((4, 2), (3, 4)),
    sigma=SIGMA,
)
PLACED_MULTI_BLANK = Variant(
    "multi_blank_placed",
    multi_blank((3, 2), columns=(0, -2), sigma=SIGMA),
    multi_blank_moves,
    6,
    2,
    big_blanks=((0, 3), (4, 2)),
    sigma=SIGMA,
)
TDT = tdt_variant((0, 1, 2, 3), -1)
STAR = Variant("star", star(0.7), star_moves, 5, -2, skip_penalty=0.7)
HAT = [
    replace(v, name=f"{v}_hat", normalizer="hat") for v in (REGULAR, MODIFIED, CONSTRAINED, STAR)
]
VARIANTS = [
    REGULAR,
    MODIFIED,
    CONSTRAINED,
    MULTI_BLANK,
    PLACED_MULTI_BLANK,
    STAR,
    TDT,
    tdt_variant((1, 2), 0),
    tdt_variant((0, 2, 5), 3),
    # The normaliser is of symbols, the rest of arcs: these two have all of it.
    HAT[0],
    HAT[2],
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)

OF_KERNELS = (REGULAR, CONSTRAINED, MULTI_BLANK, STAR, TDT, HAT[0])
"""All kinds of symbols and arcs. Kernels are compiled for a lattice, which takes longer than they run."""


def on_every_backend(
    names: str, cases: Sequence[tuple[Variant, *tuple[Any, ...]]]
) -> pytest.MarkDecorator:
    """Cases of lattices, of which kernels take those of ``OF_KERNELS``."""
    return pytest.mark.parametrize(
        ("backend", *names.split(", ")),
        [
            pytest.param(
                *(*backend.values, *case),
                marks=backend.marks,
                id="-".join(map(str, (backend.id, *case))),
            )
            for backend in (NATIVE, EAGER, EMULATOR, CUDA)
            for case in cases
            if backend is EAGER or case[0] in OF_KERNELS
        ],
        indirect=["backend"],
    )


# Every T and U of a small grid, and a T beyond every duration.
LENGTHS = (*((t, u) for t in (1, 2, 3, 4) for u in (0, 1, 2, 3)), (6, 2), (7, 1))


# The sum over paths.


def log_probabilities(v: Variant, logits: Tensor) -> Tensor:
    """Of every column, before regularisers. [..., columns]"""
    tokens, durations = logits.split([v.tokens, len(v.durations)], -1)
    if v.normalizer == "hat":
        blank = tokens[..., v.blank_column, None]
        others = [c for c in range(v.tokens) if c != v.blank_column]
        labels = F.logsigmoid(-blank) + tokens[..., others].log_softmax(-1)
        parts = labels.split([v.blank_column, v.tokens - 1 - v.blank_column], -1)
        tokens = torch.cat([parts[0], F.logsigmoid(blank), parts[1]], -1)
    else:
        tokens = tokens.log_softmax(-1)
    return torch.cat([tokens - v.sigma, durations.log_softmax(-1)], -1)


def factors(v: Variant, logits: Tensor) -> Tensor:
    """Log-probability of every column, and behind them the weight of a skipped frame.
    [..., columns + 1]"""
    log_probs = log_probabilities(v, logits)
    return torch.cat([log_probs, torch.full_like(log_probs[..., :1], -v.skip_penalty)], -1)


@dataclass(frozen=True)
class Step:
    """A move of a path from a node."""

    t: int
    u: int
    labels: int  # that it emits
    terms: list[Term]


def paths(
    v: Variant,
    frames: int,
    labels: Sequence[int],
    is_node: Callable[[int, int], bool] = lambda t, u: True,
) -> list[list[Step]]:
    """All paths from (0, 0) to (T, U) over nodes."""
    found = []

    def walk(t: int, u: int, steps: list[Step]) -> None:
        if t == frames:
            if u == len(labels):
                found.append(steps)
            return
        if not is_node(t, u):
            return
        label = labels[u] if u < len(labels) else None
        for read, emitted, terms in v.moves(v, t, u, frames, label):
            if t + read <= frames and all(is_node(at, state) for at, state, _ in terms):
                walk(t + read, u + emitted, [*steps, Step(t, u, emitted, terms)])

    walk(0, 0, [])
    return found


def enumerated(
    v: Variant,
    logits: Tensor,
    labels: Sequence[int],
    fast_emit: float = 0.0,
    delay_penalty: float = 0.0,
    is_node: Callable[[int, int], bool] = lambda t, u: True,
) -> Tensor:
    """−log of the sum over every path of one sample; differentiable.

    Args:
        logits: [T, U+1, columns]
        labels: the sample's labels. U
        fast_emit: λ: moves that emit a label have 1 + λ times their gradient.
        delay_penalty: λ: λ·((T − 1)/2 − t) is added to labels' log-probabilities.
        is_node: whether a lattice has the node (t, u).
    """
    plain = factors(v, logits)
    frames = len(plain)
    bonus = torch.zeros_like(plain)
    t = torch.arange(frames, dtype=plain.dtype)
    bonus[..., v.labels] = (delay_penalty * ((frames - 1) / 2 - t))[:, None, None]
    of_label_moves = plain + bonus
    of_label_moves = of_label_moves + fast_emit * (of_label_moves - of_label_moves.detach())
    tables = torch.stack([plain, of_label_moves])
    found = paths(v, frames, labels, is_node)
    if not found:
        return plain.new_full((), INF)
    places = [
        (number, step.labels, *term)
        for number, path in enumerate(found)
        for step in path
        for term in step.terms
    ]
    of_path, *place = torch.tensor(places).unbind(1)
    sums = plain.new_zeros(len(found)).index_add(0, of_path, tables[tuple(place)])
    return -sums.logsumexp(0)


@dataclass(frozen=True)
class Truth:
    """What is right, on the CPU."""

    problem: JointProblem
    logits: Tensor  # of its joint network. [B, T, U+1, columns]
    losses: Tensor  # [B]
    label_ranges: Tensor | None  # [B, T, 2]
    d_logits: Tensor  # of each sample's loss, zero where it is infinite. [B, T, U+1, columns]

    @property
    def feasible(self) -> Tensor:
        return self.losses.isfinite()

    def joint_gradients(self, d_logits: Tensor) -> tuple[Tensor, ...]:
        """Gradients of encoder, predictor, weight and bias."""
        return torch.autograd.grad(
            joint_logits(self.problem), self.problem.differentiable, d_logits
        )

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """Of ``rnnt_loss``, with NaN in the logits' padding."""
        targets, frames, labels = self.problem.arguments[4:]
        valid = torch.zeros(self.logits.shape[:3], dtype=torch.bool, device="cpu")
        for b, (t, u) in enumerate(zip(frames, labels, strict=True)):
            valid[b, :t, : u + 1] = True
        logits = self.logits.where(valid.unsqueeze(3), NAN)
        logits, targets, *lengths = (
            x.to(torch.get_default_device()) for x in (logits, targets, frames, labels)
        )
        return logits.requires_grad_(), targets, *lengths


@functools.cache
def truth(
    v: Variant,
    lengths: tuple[tuple[int, int], ...] = LENGTHS,
    fast_emit: float = 0.0,
    delay_penalty: float = 0.0,
    ranges: Ranges | None = None,
) -> Truth:
    def is_node(b: int, t: int, u: int) -> bool:
        return ranges is None or ranges[b][t][0] <= u < ranges[b][t][1]

    with torch.device("cpu"):
        problem = problem_of(v, lengths)
        logits = joint_logits(problem).detach()
        d_logits = torch.zeros_like(logits)
        losses = []
        for b, (t, u) in enumerate(lengths):
            own = logits[b, :t, : u + 1].clone().requires_grad_()
            labels = problem.targets[b, :u].tolist()
            nodes = functools.partial(is_node, b)
            loss = enumerated(v, own, labels, fast_emit, delay_penalty, nodes)
            if loss.requires_grad:
                (d_logits[b, :t, : u + 1],) = torch.autograd.grad(loss, own)
            losses.append(loss.detach())
        label_ranges = None if ranges is None else torch.tensor(ranges)
        return Truth(problem, logits, torch.stack(losses), label_ranges, d_logits)


def joint_logits(problem: JointProblem) -> Tensor:
    hidden = torch.tanh(problem.encoder.unsqueeze(2) + problem.predictor.unsqueeze(1))
    return hidden @ problem.weight.t() + problem.bias


def problem_of(v: Variant, lengths: Sequence[tuple[int, int]], seed: int = 0) -> JointProblem:
    """A problem on the CPU, the same whatever ran before."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        problem = random_joint(
            len(lengths),
            max(t for t, _ in lengths),
            max(u for _, u in lengths),
            joint_dim=4,
            vocab_size=v.columns,
            lengths=lengths,
            scale=1.5,
        )
        labels = torch.tensor(v.labels)
        targets = labels[torch.randint(len(labels), problem.targets.shape)]
    return replace(problem, targets=targets, blank=v.blank)


def placed(problem: JointProblem) -> JointProblem:
    """On the device under test, with NaN in its padding."""
    device = torch.get_default_device()
    moved = [t.detach().to(device).requires_grad_() for t in problem.differentiable]
    targets, *lengths = (t.to(device) for t in problem.arguments[4:])
    return JointProblem(*moved, targets, *lengths, blank=problem.blank).poisoned()


def on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().cpu() for t in tensors]


def finite(losses: Tensor) -> Tensor:
    """Zeros for infinities."""
    return losses.masked_fill(losses.isinf(), 0.0)
