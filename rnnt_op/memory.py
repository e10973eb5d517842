"""Bytes that each way to train a transducer holds at its peak, and what its time is made of.

All of it follows from shapes: nothing runs, and the device need not exist. The ways are those that
Braun et al. 2022 (arXiv 2211.16270) compare, and this one; :mod:`rnnt_op.tools.study.methods` has
the code. Each way has several *moments*, tensors that are alive together, and its peak is the one
with most bytes; ``docs/complexity.md`` derives them. Left out are tensors with neither V nor H that
are gone at the peak: those of the recursion.
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
from rnnt_op.backends.planning import plan_batch
from rnnt_op.plan import Group
from rnnt_op.topology import RNNT

__all__ = [
    "METHODS",
    "Cost",
    "Held",
    "Lengths",
    "Workload",
    "batched_bytes",
    "cost",
    "held",
    "largest_batch",
    "peak_bytes",
]

SPLIT_SAMPLES = 4  # that batch-split takes at a time
MERGED_ROWS = 512  # of logits that a merged softmax and loss reads at a time

Lengths = tuple[tuple[int, int], ...]
"""(T, U) of each sample."""


@dataclass(frozen=True)
class Workload:
    """The sizes of the joint network and loss of a batch."""

    lengths: Lengths
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

    def __str__(self) -> str:
        at_most = "=" if len(set(self.lengths)) == 1 else "≤"
        return (
            f"B={self.batch} T{at_most}{self.frames} U{at_most}{self.labels} V={self.vocab_size} "
            f"H={self.joint_dim} {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def batch(self) -> int:
        """B."""
        return len(self.lengths)

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
        return self.batch * self.frames * (self.labels + 1)

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


@dataclass(frozen=True)
class Cost:
    """What the time of loss and gradients is made of."""

    gemm_flops: float  # of the output layer: logits, and the gradients of weight and hidden states
    bytes_moved: float  # read and written outside GEMMs, of logits, hidden states and their likes
    sequential_steps: int  # anti-diagonals of lattices that wait for one another


def held(
    method: str, workload: Workload, *, workspace_bytes: int | None = None, device: str = "cpu"
) -> tuple[Held, ...]:
    """What is alive at the peak of loss and gradients, inputs included.

    Gradients are there as far as they have been computed by then.

    Args:
        method: one of ``METHODS``, or ``"torchaudio"``.
        workload: the batch. At least one sample.
        workspace_bytes: that of rnnt_op, None for the default.
        device: a device type, whose backend plans rnnt_op's workspace.

    Raises:
        ValueError: no such method.
    """
    if method not in _MOMENTS:
        raise ValueError(f"method: expected one of {', '.join(_MOMENTS)}, got {method!r}")
    moments = list(_MOMENTS[method](workload, workspace_bytes, device))
    return _inputs(workload) + max(moments, key=_total)


def peak_bytes(
    method: str, workload: Workload, *, workspace_bytes: int | None = None, device: str = "cpu"
) -> int:
    """Sum over ``held``, whose arguments it takes."""
    return _total(held(method, workload, workspace_bytes=workspace_bytes, device=device))


def largest_batch(
    method: str,
    workload_of: Callable[[int], Workload],
    memory_bytes: int,
    *,
    workspace_bytes: int | None = None,
    device: str = "cpu",
) -> int:
    """The largest batch whose peak fits in memory, 0 if one sample does not.

    Args:
        method, workspace_bytes, device: as in ``held``.
        workload_of: the workload of a number of samples, which grows with it.
        memory_bytes: what fits.
    """

    def needed(batch: int) -> int:
        workload = workload_of(batch)
        return peak_bytes(method, workload, workspace_bytes=workspace_bytes, device=device)

    fits, bytes_of_fit = 0, 0
    too_large: int | None = None
    guess = tried = 1
    while too_large is None or too_large - fits > 1:
        found = needed(guess)
        slope = max(1.0, (found - bytes_of_fit) / (guess - fits))
        if found > memory_bytes:
            too_large = guess
        else:
            fits, bytes_of_fit = guess, found
        # Peaks grow almost evenly, so this is nearly right; where they do not, halves end it.
        guess = fits + max(1, int((memory_bytes - bytes_of_fit) / slope))
        if too_large is not None:
            middle = (fits + too_large) // 2
            guess = max(fits + 1, middle) if tried % 4 == 0 else min(guess, too_large - 1)
        tried += 1
    return fits


def batched_bytes(workload: Workload) -> int:
    """What the batched way holds at its peak, beyond inputs and parameters, in bytes."""
    return peak_bytes("batched", workload) - _total(_inputs(workload))


def cost(
    method: str,
    workload: Workload,
    kept: float = 1.0,
    *,
    scored: float = 1.0,
    workspace_bytes: int | None = None,
    device: str = "cpu",
) -> Cost:
    """What the time of loss and gradients is made of.

    Args:
        method: one of ``METHODS``.
        workload: the batch.
        kept: κ, the share of nodes whose gradient rnnt_op computes.
        scored: ρ, the share that it scores.
        workspace_bytes, device: as in ``held``.
    """
    if method in _PART_SAMPLES:
        parts = workload.parts(_PART_SAMPLES[method]).items()
        costs = [(cost("batched", part), count) for part, count in parts]
        return Cost(
            sum(each.gemm_flops * count for each, count in costs),
            sum(each.bytes_moved * count for each, count in costs),
            sum(each.sequential_steps * count for each, count in costs),
        )
    is_packed = method in ("padding-free", "rnnt_op")
    nodes = workload.nodes if is_packed else workload.padded_nodes
    product = 2.0 * nodes * workload.vocab_size * workload.joint_dim
    item, real = workload.dtype.itemsize, workload.real_dtype.itemsize
    logits, hidden = nodes * workload.vocab_size * item, nodes * workload.joint_dim * item
    if method == "rnnt_op":
        groups, _ = _planned(workload, workspace_bytes, device)
        steps = sum(max(t + s - 1 for t, s in zip(g.frames, g.states, strict=True)) for g in groups)
        # Hidden states written; logits read. Of the nodes kept: both again, and their gradients.
        moved = (scored + 3 * kept) * (logits + hidden)
        # Where all nodes are scored, groups whose logits fit, or those of their parts, compute them
        # once.
        kept_groups = [group for group in groups if group.keeps_logits or group.parts]
        again = nodes - (sum(group.nodes for group in kept_groups) if scored == 1 else 0)
        return Cost((scored + (2 + again / nodes) * kept) * product, moved, steps)
    # Hidden states: a sum, tanh, its derivative, and a sum for the encoder and the predictor each.
    moved = 8.0 * hidden
    if method in ("batched", "padding-free"):
        # Log-softmax, its two gradients, their sum, the softmax's derivative, the bias's gradient.
        moved += 2 * logits + 9 * logits * real / item
        if not is_packed:
            # Labels end at U: their gradient is made without the last state, then with it.
            moved += 2 * logits * real / item * workload.labels / (workload.labels + 1)
        if real != item:
            # To the softmax's dtype and back.
            moved += logits + 3 * logits * real / item
    else:
        # The scores read logits, the gradient reads and writes them, the bias's gradient reads it.
        moved += 4 * logits
    return Cost(3 * product, moved, 2 * (workload.frames + workload.labels))


_Moment = tuple[Held, ...]
"""Tensors that are alive together."""

_Size = tuple[str, int]
"""A symbol and what it stands for."""


def _total(moment: _Moment) -> int:
    """Bytes."""
    return sum(tensor.bytes for tensor in moment)


def _inputs(workload: Workload) -> _Moment:
    """The arguments of the loss."""
    sizes = ("B", workload.batch), ("U", workload.labels)
    targets = _held("targets", torch.int64, *sizes)
    return (*_states(workload), *_output_layer(workload, workload.dtype), targets)


def _held(name: str, dtype: torch.dtype, *sizes: _Size) -> Held:
    shape = "·".join(symbol for symbol, _ in sizes)
    return Held(name, shape, dtype.itemsize * math.prod(size for _, size in sizes))


def _states(workload: Workload, prefix: str = "") -> _Moment:
    """Encoder and predictor states, or their gradients."""
    batch, dim = ("B", workload.batch), ("H", workload.joint_dim)
    return (
        _held(f"{prefix}encoder", workload.dtype, batch, ("T", workload.frames), dim),
        _held(f"{prefix}predictor", workload.dtype, batch, ("(U+1)", workload.labels + 1), dim),
    )


def _output_layer(workload: Workload, dtype: torch.dtype, prefix: str = "") -> _Moment:
    """Weight and bias, or their gradients."""
    vocab, dim = ("V", workload.vocab_size), ("H", workload.joint_dim)
    return _held(f"{prefix}weight", dtype, vocab, dim), _held(f"{prefix}bias", dtype, vocab)


@dataclass(frozen=True)
class _Rows:
    """Tensors of the joint network over node rows, as torch makes them."""

    workload: Workload
    nodes: _Size

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

    def output_layer_moments(self) -> Iterator[_Moment]:
        """The backward passes of the output layer and of tanh."""
        workload = self.workload
        d_output_layer = _output_layer(workload, workload.dtype, "d_")
        d_hidden = self.hidden("d_hidden")
        yield self.hidden(), self.logits("d_logits"), d_hidden, *d_output_layer
        yield self.hidden(), d_hidden, self.hidden("d_hidden before tanh"), *d_output_layer

    def log_softmax_moments(self) -> Iterator[_Moment]:
        """Autograd through a log-softmax, from which blanks and labels are picked."""
        log_softmax = self.logits("log-softmax", real=True)
        yield (
            self.hidden(),
            log_softmax,
            self.logits("d_log-softmax by blanks", real=True),
            self.logits("d_log-softmax by labels", real=True),
        )
        yield from self.output_layer_moments()

    def merged_moments(self, *, in_place: bool) -> Iterator[_Moment]:
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


def _batched(workload: Workload, *_: object) -> Iterator[_Moment]:
    return _Rows.padded(workload).log_softmax_moments()


def _padding_free(workload: Workload, *_: object) -> Iterator[_Moment]:
    return _Rows(workload, ("N", workload.nodes)).log_softmax_moments()


def _merged(workload: Workload, *_: object, in_place: bool) -> Iterator[_Moment]:
    return _Rows.padded(workload).merged_moments(in_place=in_place)


def _in_parts(workload: Workload, *_: object, samples: int) -> Iterator[_Moment]:
    """The batched way a part at a time, beside the gradients of the whole batch."""
    sums = (*_states(workload, "d_"), *_output_layer(workload, workload.real_dtype, "sum of d_"))
    for part in workload.parts(samples):
        rows = _Rows.padded(part, "" if samples == 1 else "b·")
        for moment in rows.log_softmax_moments():
            yield *sums, *moment


def _torchaudio(workload: Workload, *_: object) -> Iterator[_Moment]:
    """Its forward pass fills a gradient, and its backward pass scales it into another tensor."""
    rows = _Rows.padded(workload)
    yield rows.hidden(), rows.logits("unit d_logits"), rows.logits("d_logits")
    yield from rows.output_layer_moments()


def _planned(
    workload: Workload, workspace_bytes: int | None, device: str
) -> tuple[tuple[Group, ...], _Moment]:
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
        packed_bytes=joint.packed,
        logits_bytes=joint.logits,
        workspace_bytes=workspace_bytes,
    )

    def lattice_bytes(group: Group) -> int:
        longest, most = max(group.frames), max(group.states)
        return backend.lattice_bytes(RNNT, len(group.samples), longest, most, group.nodes)

    def packed_bytes(group: Group) -> int:
        return joint.packed * (sum(group.frames) + sum(group.states))

    at_once = backend.GROUPS_IN_FLIGHT
    in_flight = max(
        (plan.groups[first : first + at_once] for first in range(len(plan.groups))),
        key=lambda groups: sum(lattice_bytes(g) + packed_bytes(g) for g in groups),
    )
    chunk = Held("chunk: logits, hidden states, d_hidden", "R·(V+H)", plan.chunk_rows * joint.row)
    return plan.groups, (
        chunk,
        Held("logits of a group or part that keeps them", "N_g·V", plan.kept_rows * joint.logits),
        Held("lattices in flight", "N_g", sum(map(lattice_bytes, in_flight))),
        Held("their states and gradients", "(F_g+P_g)·H", sum(map(packed_bytes, in_flight))),
        Held("d_weight of a chunk", "V·H", joint.product),
    )


def _rnnt_op(workload: Workload, workspace_bytes: int | None, device: str) -> Iterator[_Moment]:
    _, workspace = _planned(workload, workspace_bytes, device)
    real = workload.real_dtype
    gradients = (*_states(workload, "d_"), *_output_layer(workload, real, "sum of d_"))
    yield *gradients, *workspace
    if real != workload.dtype:
        yield *gradients, *_output_layer(workload, workload.dtype, "d_")


_PART_SAMPLES = {"batch-split": SPLIT_SAMPLES, "one at a time": 1}

_MOMENTS: dict[str, Callable[[Workload, int | None, str], Iterator[_Moment]]] = {
    "batched": _batched,
    "function-merged": partial(_merged, in_place=False),
    "padding-free": _padding_free,
    "in-place": partial(_merged, in_place=True),
    **{name: partial(_in_parts, samples=n) for name, n in _PART_SAMPLES.items()},
    "rnnt_op": _rnnt_op,
    "torchaudio": _torchaudio,
}

METHODS = tuple(name for name in _MOMENTS if name != "torchaudio")
