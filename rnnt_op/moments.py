"""Which tensors are alive together while a transducer's loss and gradients are computed.

Each way to train has several *moments*, and its peak is the one with most bytes. All of it follows
from shapes. ``docs/complexity.md`` derives the moments; :mod:`rnnt_op.tools.study.methods` has the
code that they describe. Left out are tensors with neither V nor H that are gone at the peak: those
of the recursion.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from rnnt_op.backends import backend_for
from rnnt_op.engine import plan_batch
from rnnt_op.plan import Group
from rnnt_op.topology import RNNT

SPLIT_SAMPLES = 4
"""Samples that batch-split takes at a time."""

MERGED_ROWS = 512
"""Rows of logits that a merged softmax and loss reads at a time."""


@dataclass(frozen=True)
class Workload:
    """The sizes of the joint network and loss of a batch."""

    lengths: tuple[tuple[int, int], ...]  # (T, U) of each sample
    vocab_size: int  # V
    joint_dim: int  # H
    dtype: torch.dtype  # of encoder and predictor states, weight and bias

    @classmethod
    def uniform(
        cls,
        batch: int,
        frames: int,
        labels: int,
        *,
        vocab_size: int,
        joint_dim: int,
        dtype: torch.dtype,
    ) -> Workload:
        """A batch of ``batch`` samples of T = ``frames`` and U = ``labels``."""
        return cls(((frames, labels),) * batch, vocab_size, joint_dim, dtype)

    @property
    def frames(self) -> int:
        """T of the longest sample."""
        return max(t for t, _ in self.lengths)

    @property
    def labels(self) -> int:
        """U of the longest sample."""
        return max(u for _, u in self.lengths)

    @property
    def nodes(self) -> int:
        """N = Σ T_b·(U_b + 1)."""
        return sum(t * (u + 1) for t, u in self.lengths)

    @property
    def padded_nodes(self) -> int:
        """B·T·(U + 1)."""
        return len(self.lengths) * self.frames * (self.labels + 1)

    @property
    def real_dtype(self) -> torch.dtype:
        """What softmax and sums are computed in: float32, or float64 for float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def parts(self, samples: int) -> dict[Workload, int]:
        """Some samples at a time, each part padded to its own longest; how often each occurs."""
        lengths = self.lengths
        starts = range(0, len(lengths), samples)
        found = Counter(lengths[first : first + samples] for first in starts)
        return {dataclasses.replace(self, lengths=part): count for part, count in found.items()}


@dataclass(frozen=True)
class Held:
    """A tensor that is alive."""

    name: str
    shape: str  # in symbols, such as B·T·(U+1)·V
    bytes: int


Moment = tuple[Held, ...]
"""Tensors that are alive together."""

Size = tuple[str, int]
"""A symbol and what it stands for."""


def total(moment: Moment) -> int:
    """Bytes."""
    return sum(tensor.bytes for tensor in moment)


def inputs(workload: Workload) -> Moment:
    """The arguments of the loss."""
    sizes = ("B", len(workload.lengths)), ("U", workload.labels)
    targets = _held("targets", torch.int64, *sizes)
    return (*_states(workload), *_output_layer(workload, workload.dtype), targets)


def _held(name: str, dtype: torch.dtype, *sizes: Size) -> Held:
    shape = "·".join(symbol for symbol, _ in sizes)
    return Held(name, shape, dtype.itemsize * math.prod(size for _, size in sizes))


def _states(workload: Workload, prefix: str = "") -> Moment:
    """Encoder and predictor states, or their gradients."""
    batch, dim = ("B", len(workload.lengths)), ("H", workload.joint_dim)
    return (
        _held(f"{prefix}encoder", workload.dtype, batch, ("T", workload.frames), dim),
        _held(f"{prefix}predictor", workload.dtype, batch, ("(U+1)", workload.labels + 1), dim),
    )


def _output_layer(workload: Workload, dtype: torch.dtype, prefix: str = "") -> Moment:
    """Weight and bias, or their gradients."""
    vocab, dim = ("V", workload.vocab_size), ("H", workload.joint_dim)
    return _held(f"{prefix}weight", dtype, vocab, dim), _held(f"{prefix}bias", dtype, vocab)


@dataclass(frozen=True)
class _Rows:
    """Tensors of the joint network over node rows, as torch makes them."""

    workload: Workload
    nodes: Size

    @classmethod
    def padded(cls, workload: Workload, batch: str = "B·") -> _Rows:
        return cls(workload, (f"{batch}T·(U+1)", workload.padded_nodes))

    def logits(self, name: str, *, real: bool = False) -> Held:
        dtype = self.workload.real_dtype if real else self.workload.dtype
        return _held(name, dtype, self.nodes, ("V", self.workload.vocab_size))

    def hidden(self, name: str = "hidden states") -> Held:
        return _held(name, self.workload.dtype, self.nodes, ("H", self.workload.joint_dim))

    def scores(self, name: str, count: int, dtype: torch.dtype | None = None) -> Held:
        """``count`` numbers a node."""
        return _held(name, dtype or self.workload.real_dtype, (str(count), count), self.nodes)

    def output_layer_moments(self) -> Iterator[Moment]:
        """The backward passes of the output layer and of tanh."""
        workload = self.workload
        d_output_layer = _output_layer(workload, workload.dtype, "d_")
        d_hidden = self.hidden("d_hidden")
        yield self.hidden(), self.logits("d_logits"), d_hidden, *d_output_layer
        yield self.hidden(), d_hidden, self.hidden("d_hidden before tanh"), *d_output_layer

    def log_softmax_moments(self) -> Iterator[Moment]:
        """Autograd through a log-softmax, from which blanks and labels are picked."""
        log_softmax = self.logits("log-softmax", real=True)
        yield (
            self.hidden(),
            log_softmax,
            self.logits("d_log-softmax by blanks", real=True),
            self.logits("d_log-softmax by labels", real=True),
        )
        yield from self.output_layer_moments()

    def merged_moments(self, *, in_place: bool) -> Iterator[Moment]:
        """Softmax and loss as one function."""
        workload = self.workload
        logits = self.logits("logits, then d_logits" if in_place else "logits")
        indices = self.scores("label columns", 1, torch.int64)
        scores = self.scores("log-sum-exp and scores", 3)
        block = ("2", 2), (str(MERGED_ROWS), MERGED_ROWS), ("V", workload.vocab_size)
        backward = (
            self.hidden(),
            logits,
            indices,
            scores,
            self.scores("posteriors, and times the loss's gradient", 4),
            _held("a block's softmax", workload.real_dtype, *block),
        )
        yield backward if in_place else (*backward, self.logits("d_logits"))
        yield from self.output_layer_moments()


def _batched(workload: Workload, *_: object) -> Iterator[Moment]:
    return _Rows.padded(workload).log_softmax_moments()


def _padding_free(workload: Workload, *_: object) -> Iterator[Moment]:
    return _Rows(workload, ("N", workload.nodes)).log_softmax_moments()


def _merged(workload: Workload, *_: object, in_place: bool) -> Iterator[Moment]:
    return _Rows.padded(workload).merged_moments(in_place=in_place)


def _in_parts(workload: Workload, *_: object, samples: int) -> Iterator[Moment]:
    """The batched way a part at a time, beside the gradients of the whole batch."""
    sums = (*_states(workload, "d_"), *_output_layer(workload, workload.real_dtype, "sum of d_"))
    for part in workload.parts(samples):
        rows = _Rows.padded(part, "" if samples == 1 else "b·")
        for moment in rows.log_softmax_moments():
            yield *sums, *moment


def _torchaudio(workload: Workload, *_: object) -> Iterator[Moment]:
    """Its forward pass fills a gradient, and its backward pass scales it into another tensor."""
    rows = _Rows.padded(workload)
    yield rows.hidden(), rows.logits("unit d_logits"), rows.logits("d_logits")
    yield from rows.output_layer_moments()


def planned(
    workload: Workload, workspace_bytes: int | None, device: str
) -> tuple[tuple[Group, ...], Moment]:
    """The engine's groups, and the workspace that it fills."""
    backend = backend_for(torch.device(device))
    vocab, dim = workload.vocab_size, workload.joint_dim
    joint = backend.joint_bytes(
        vocab, dim, input_dtype=workload.dtype, compute_dtype=workload.dtype
    )
    plan = plan_batch(
        backend,
        RNNT,
        [t for t, _ in workload.lengths],
        [u for _, u in workload.lengths],
        row_bytes=joint.row,
        state_bytes=joint.state,
        workspace_bytes=workspace_bytes,
    )

    def lattice_bytes(group: Group) -> int:
        longest, most = max(group.frames), max(group.states)
        return backend.lattice_bytes(RNNT, len(group.samples), longest, most, group.nodes)

    def state_bytes(group: Group) -> int:
        return joint.state * (sum(group.frames) + sum(group.states))

    at_once = backend.GROUPS_IN_FLIGHT
    in_flight = max(
        (plan.groups[first : first + at_once] for first in range(len(plan.groups))),
        key=lambda groups: sum(lattice_bytes(g) + state_bytes(g) for g in groups),
    )
    chunk = Held("chunk: logits, hidden states, d_hidden", "R·(V+H)", plan.chunk_rows * joint.row)
    return plan.groups, (
        chunk,
        Held("lattices in flight", "N_g", sum(map(lattice_bytes, in_flight))),
        Held("their states and gradients", "(F_g+P_g)·H", sum(map(state_bytes, in_flight))),
        Held("d_weight of a chunk", "V·H", joint.product),
    )


def _rnnt_op(workload: Workload, workspace_bytes: int | None, device: str) -> Iterator[Moment]:
    _, workspace = planned(workload, workspace_bytes, device)
    real = workload.real_dtype
    gradients = (*_states(workload, "d_"), *_output_layer(workload, real, "sum of d_"))
    yield *gradients, *workspace
    if real != workload.dtype:
        yield *gradients, *_output_layer(workload, workload.dtype, "d_")


PART_SAMPLES = {"batch-split": SPLIT_SAMPLES, "one at a time": 1}

MOMENTS: dict[str, Callable[[Workload, int | None, str], Iterator[Moment]]] = {
    "batched": _batched,
    "function-merged": partial(_merged, in_place=False),
    "padding-free": _padding_free,
    "in-place": partial(_merged, in_place=True),
    **{name: partial(_in_parts, samples=n) for name, n in PART_SAMPLES.items()},
    "rnnt_op": _rnnt_op,
    "torchaudio": _torchaudio,
}
