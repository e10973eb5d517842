"""Random problems over everything public, against float64 autograd through the batched reference.

A case is drawn from its number alone: function, lattice, normaliser, regularisers, label ranges,
dtypes, sizes (1 and 0 among them), strides, what is trained, NaN in all padding, infinite and
impossible samples, workspaces of a byte, tolerances, on compiled kernels and on torch operations.
The reference shares no kernel with what it judges, and is itself held to sums over written-out
paths by the tests. A case that fails is printed; ``--first NUMBER --cases 1`` repeats it.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import rnnt_op
from rnnt_op import backends, reference, topologies
from rnnt_op.activations import ACTIVATIONS, activate
from rnnt_op.backends import eager
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

# Beyond twice the error of plain torch in the same dtype, relative to the gradient and a floor.
HAIR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
FLOOR = 1e-2
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Config:
    """Random problems against float64."""

    cases: int = 10_000
    first: int = 0
    """Number of the first case."""
    device: str = "cpu"
    out: Path = Path("benchmarks/results")


@dataclass
class Case:
    """A problem as its caller holds it, and what of it is known to be wrong with it."""

    function: str
    dtype: torch.dtype
    backend: str
    tensors: dict[str, Tensor | None]  # encoder, predictor, weight, bias; or logits
    targets: Tensor
    frames: Tensor
    labels: Tensor
    options: dict[str, Any]
    lengths_on_device: bool
    autocast: bool = False  # to bfloat16, of float32 and bfloat16
    trained: list[str] = field(default_factory=list)
    reduction: str = "mean"
    upstream: Tensor | None = None  # gradient of each loss, where there is no reduction
    bad: int | None = None  # a sample with a state that is not finite

    @property
    def computed_in(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype

    @property
    def kind(self) -> str:
        name = "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")
        return f"{self.function}, {name}"


def draw(number: int) -> Case:
    """The case of that number."""
    dice = random.Random(number)
    torch.manual_seed(number)
    function = dice.choices(("joint", "logits", "posteriors", "align"), (6, 3, 1, 1))[0]
    dtype = dice.choices(list(HAIR), (4, 4, 2, 1))[0]
    topology, tokens, blank = draw_topology(dice)
    columns = tokens + topology.extra_columns
    batch, frames, labels = dice.choice((1, 1, 2, 3, 4)), dice.randint(1, 9), dice.randint(0, 5)
    lengths = [(dice.randint(1, frames), dice.randint(0, labels)) for _ in range(batch)]
    if dice.random() < 0.7:  # else all tensors are longer than the longest sample
        lengths[dice.randrange(batch)] = (frames, labels)
    joint_dim = dice.choice((1, 3, 8, 17))
    taken = set(topology.blanks(blank % tokens, columns))
    usable = [token for token in range(tokens) if token not in taken]
    index = dice.choice((torch.int32, torch.int64))
    targets = torch.tensor(usable)[torch.randint(len(usable), (batch, labels))].to(index)

    options: dict[str, Any] = {"topology": topology, "blank": blank}
    hat = topology.extra_columns == 0 and not any(s.source == "token" for s in topology.symbols)
    options["normalizer"] = dice.choice(("softmax", "softmax", "hat")) if hat else "softmax"
    options["delay_penalty"] = dice.choice((0, 0, 0.3))
    options["workspace_bytes"] = dice.choice((None, 1, 3000, 100_000))
    if dice.random() < 0.3:
        low = torch.randint(0, labels + 1, (batch, frames, 1)).sort(1).values
        ranges = torch.cat([low, low + torch.randint(0, labels + 2, low.shape)], 2)
        options["label_ranges"] = ranges.to(index)
    scale = dice.choice((0.3, 1.0, 3.0))

    def states(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)

    tensors: dict[str, Tensor | None]
    if function == "logits":
        rows = labels + 1
        if "label_ranges" in options:
            rows = max(
                1, int((options["label_ranges"][..., 1] - options["label_ranges"][..., 0]).max())
            )
        tensors = {"logits": states(batch, frames, rows, columns)}
    elif dice.random() < 0.15:
        options["activation"] = "identity"
        tensors = {
            "encoder": states(batch, frames, columns),
            "predictor": states(batch, labels + 1, columns),
            "weight": None,
            "bias": None,
        }
    else:
        options["activation"] = dice.choice(ACTIVATIONS)
        tensors = {
            "encoder": states(batch, frames, joint_dim),
            "predictor": states(batch, labels + 1, joint_dim),
            "weight": states(columns, joint_dim),
            "bias": states(columns) if dice.random() < 0.8 else None,
        }
        if tensors["bias"] is not None and dice.random() < 0.1 and len(usable) > 1:
            # A token that cannot be: no path of these labels uses it, unless one of them is it.
            tensors["bias"][usable[0]] = -INF
            targets = targets.masked_fill(targets == usable[0], usable[1])

    case = Case(
        function=function,
        dtype=dtype,
        backend=dice.choice(("native", "native", "eager")),
        tensors=tensors,
        targets=targets,
        frames=torch.tensor([t for t, _ in lengths], dtype=index),
        labels=torch.tensor([u for _, u in lengths], dtype=index),
        options=options,
        lengths_on_device=dice.random() < 0.5,
    )
    if function in ("joint", "logits"):
        draw_loss(dice, case)
    spoil(dice, case)
    if dtype in (torch.float32, torch.bfloat16) and function != "logits" and dice.random() < 0.2:
        case.autocast = True
        for name, tensor in case.tensors.items():
            if tensor is not None and dice.random() < 0.5:
                case.tensors[name] = tensor.to(torch.bfloat16)
    return case


def draw_topology(dice: random.Random) -> tuple[topologies.Topology, int, int]:
    """A lattice, its number of tokens and its blank."""
    tokens = dice.randint(4, 12)
    name = dice.choice(("rnnt", "rnnt", "modified", "constrained", "star", "multi_blank", "tdt"))
    blank = dice.choice((0, -1, dice.randrange(tokens)))
    if name == "tdt":
        durations = (1, *dice.sample((0, 2, 3, 5), dice.randint(0, 3)))
        return topologies.tdt(durations, sigma=dice.choice((0, 0.05))), tokens, blank
    if name == "multi_blank":
        return topologies.multi_blank((2, 3), sigma=dice.choice((0, 0.05))), tokens, -1
    if name == "star":
        return topologies.star(dice.choice((0.0, 0.7))), tokens, blank
    return getattr(topologies, name)() if name != "rnnt" else topologies.RNNT, tokens, blank


def draw_loss(dice: random.Random, case: Case) -> None:
    """What only a loss takes."""
    options = case.options
    options["fast_emit"] = dice.choice((0, 0, 0.2))
    options["clamp"] = dice.choice((-1, -1, 0.1))
    options["zero_infinity"] = dice.random() < 0.4
    if case.function == "joint":
        options["gradient_tolerance"] = dice.choice((0.0, None))
    else:
        options["fused_log_softmax"] = options["normalizer"] == "hat" or dice.random() < 0.8
        if not options["fused_log_softmax"]:
            logits = case.tensors["logits"]
            assert logits is not None
            case.tensors["logits"] = logits.float().log_softmax(-1).to(case.dtype)
    case.reduction = dice.choice(("mean", "sum", "none"))
    if case.reduction == "none":
        case.upstream = torch.randn(len(case.frames), dtype=torch.float64)
        case.upstream[torch.rand(len(case.frames)) < 0.2] = 0.0
    given = [name for name, tensor in case.tensors.items() if tensor is not None]
    case.trained = [name for name in given if dice.random() < 0.8]


def spoil(dice: random.Random, case: Case) -> None:
    """NaN in the padding, a bad sample, and strides that no one would choose."""
    name = "logits" if case.function == "logits" else "encoder"
    states = case.tensors[name]
    assert states is not None
    if dice.random() < 0.1:
        case.bad = dice.randrange(len(states))
        # What is bounded makes a number of infinity.
        states[case.bad, 0] = dice.choice((INF, NAN)) if name == "logits" else NAN
    for b, (t, u) in enumerate(zip(case.frames.tolist(), case.labels.tolist(), strict=True)):
        states[b, t:] = NAN
        case.targets[b, u:] = dice.choice((-1, 2**30))
        predictor = case.tensors.get("predictor")
        if predictor is not None:
            predictor[b, u + 1 :] = NAN
        elif "label_ranges" not in case.options:
            states[b, :, u + 1 :] = NAN
    for name, tensor in case.tensors.items():
        if tensor is None:
            continue
        layout = dice.random()
        if layout < 0.2:  # every other element of a larger tensor
            wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), NAN)
            wide[..., ::2] = tensor
            case.tensors[name] = wide[..., ::2]
        elif layout < 0.4:
            case.tensors[name] = tensor.transpose(0, -1).contiguous().transpose(0, -1)


# What is right.


@dataclass(frozen=True)
class Truth:
    losses: Tensor  # float64, not finite where a sample has no path or a bad state. [B]
    gradients: dict[str, Tensor]  # of what is trained, from the samples whose loss is finite


def truth_of(case: Case, dtype: torch.dtype = torch.float64) -> Truth:
    """Losses and gradients by the batched reference, computed in a dtype."""
    clean = {
        name: None if tensor is None else tensor.detach().to(dtype)
        for name, tensor in case.tensors.items()
    }
    for name in ("encoder", "predictor", "logits"):
        tensor = clean.get(name)
        if tensor is not None:
            clean[name] = torch.where(tensor.isfinite(), tensor, 0.0)
    leaves = {name: t.requires_grad_() for name, t in clean.items() if t is not None}
    options = {
        key: value
        for key, value in case.options.items()
        if key in ("topology", "blank", "normalizer", "fast_emit", "delay_penalty")
    }
    ranges = case.options.get("label_ranges")
    logits = leaves.get("logits")
    if logits is None:
        logits = band(joint_logits(clean, case.options["activation"]), ranges)
    targets = case.targets.long().clamp(0, logits.shape[-1] - 1)
    losses = reference.rnnt_loss(
        logits,
        targets,
        case.frames,
        case.labels,
        reduction="none",
        fused_log_softmax=case.options.get("fused_log_softmax", True),
        label_ranges=ranges,
        **options,
    )
    finite = losses.isfinite()
    if case.bad is not None:
        finite[case.bad] = False
    losses = losses.where(finite, losses.new_full((), INF))
    gradients = {}
    if case.trained:
        gradients = {name: torch.zeros_like(leaves[name]) for name in case.trained}
        kept = losses.masked_fill(~finite, 0.0).sum()
        if kept.requires_grad:
            (d_logits,) = torch.autograd.grad(kept, logits, retain_graph=True)
            d_logits = d_logits.nan_to_num()  # of samples that have no path
            if case.options["clamp"] > 0:
                d_logits = d_logits.clamp(-case.options["clamp"], case.options["clamp"])
            d_logits = d_logits * scale_of(case, finite).to(dtype)[:, None, None, None]
            found = torch.autograd.grad(logits, [leaves[name] for name in case.trained], d_logits)
            gradients = dict(zip(case.trained, found, strict=True))
    return Truth(losses.detach().double(), gradients)


def scale_of(case: Case, finite: Tensor) -> Tensor:
    """What each sample's loss counts in the scalar; nothing if it is not finite. [B]"""
    scale = torch.ones(len(finite), dtype=torch.float64)
    if case.upstream is not None:
        scale = case.upstream
    elif case.reduction == "mean":
        scale = scale / len(finite)
    return scale * finite


def joint_logits(tensors: dict[str, Tensor | None], activation: str) -> Tensor:
    encoder, predictor, weight = tensors["encoder"], tensors["predictor"], tensors["weight"]
    assert encoder is not None
    assert predictor is not None
    hidden = activate(encoder.unsqueeze(2) + predictor.unsqueeze(1), activation)
    return hidden if weight is None else F.linear(hidden, weight, tensors["bias"])


def widest(ranges: Tensor | None) -> int | None:
    """States of the widest range, at least one; None without ranges."""
    return None if ranges is None else max(1, int((ranges[..., 1] - ranges[..., 0]).max()))


def band(logits: Tensor, ranges: Tensor | None) -> Tensor:
    """Of the logits of all nodes, the rows that ``rnnt_loss`` takes with label ranges."""
    if ranges is None:
        return logits
    low = ranges[..., :1].long()
    u = (low + torch.arange(widest(ranges) or 0, device=low.device)).clamp(max=logits.shape[2] - 1)
    return logits.gather(2, u.unsqueeze(3).expand(-1, -1, -1, logits.shape[3]))


# What comes out.


FUNCTIONS: dict[str, Any] = {
    "joint": rnnt_op.joint_rnnt_loss,
    "logits": rnnt_op.rnnt_loss,
    "posteriors": rnnt_op.posteriors,
    "align": rnnt_op.align,
}


def failure_of(case: Case, device: str = "cpu") -> str | None:
    """What is wrong with the results of a case; None: nothing."""
    with served_by(case.backend):
        if case.function in ("joint", "logits"):
            return failure_of_loss(case, device)
        return failure_of_lattice(case, device)


def called(case: Case, device: str, leaves: dict[str, Tensor | None], **options: Any) -> Any:
    """The function's result, from lengths and ranges on either side."""
    side = device if case.lengths_on_device else "cpu"
    ranges = case.options.get("label_ranges")
    if ranges is not None:
        options["label_ranges"] = ranges.to(side)
    lengths = case.frames.to(side), case.labels.to(side)
    arguments = (*leaves.values(), case.targets.to(device), *lengths)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.autocast):
        return FUNCTIONS[case.function](*arguments, **{**case.options, **options})


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    if backend == "native":
        yield
        return
    with patch.dict(backends.BACKENDS, cpu=lambda device: eager):
        yield


def failure_of_loss(case: Case, device: str) -> str | None:
    leaves = {
        name: None if t is None else t.detach().to(device).requires_grad_(name in case.trained)
        for name, t in case.tensors.items()
    }
    loss = called(case, device, leaves, reduction=case.reduction)
    truth, *others = truth_of(case), truth_of(case, case.computed_in)
    if case.computed_in.itemsize == 2:
        others += [truth_of(rounded(case, seed)) for seed in range(3)]
    finite = truth.losses.isfinite()
    zeroed = (
        truth.losses.masked_fill(~finite, 0.0) if case.options["zero_infinity"] else truth.losses
    )
    expected = zeroed.mean() if case.reduction == "mean" else zeroed.sum()
    if case.reduction == "none":
        expected = zeroed
    wrong = wrong_by(loss.detach().cpu(), expected, HAIR[case.computed_in], truth.losses[finite])
    if wrong:
        return f"loss: {wrong}"
    if not case.trained:
        return "requires a gradient" if loss.requires_grad else None

    upstream = None if case.upstream is None else case.upstream.to(loss)
    trained: Any = [leaves[name] for name in case.trained]
    found = [g.cpu() for g in torch.autograd.grad(loss, trained, upstream)]
    has_weight = torch.ones_like(finite) if case.upstream is None else case.upstream != 0
    poisoned = ~finite & has_weight & (not case.options["zero_infinity"])
    for name, gradient in zip(case.trained, found, strict=True):
        right, *plain = (t.gradients[name] for t in (truth, *others))
        if name in ("encoder", "predictor", "logits"):
            lengths = case.labels + 1 if name == "predictor" else case.frames
            if any(gradient[b, n:].count_nonzero() for b, n in enumerate(lengths.tolist())):
                return f"d_{name}: padding has a gradient"
            gradient, right, *plain = (g[~poisoned] for g in (gradient, right, *plain))
        elif poisoned.any():
            if gradient.isfinite().all() and nodes_of(case)[poisoned].any():
                return f"d_{name}: a sample that is not finite left no trace"
            continue
        error, *plain_errors = (float((g.double() - right).norm()) for g in (gradient, *plain))
        plain_error = max(filter(math.isfinite, plain_errors), default=0.0)
        bar = HAIR[case.computed_in] * (float(right.norm()) + FLOOR) + 2 * plain_error
        if not error <= bar:
            return f"d_{name}: error {error:.2e}, of plain torch {plain_error:.2e}"
    return None


def rounded(case: Case, seed: int) -> Case:
    """The case with states that differ by their dtype's rounding, which shows what that decides.

    One problem's error in half says little by itself: where logits are large it is mostly chance.
    """
    torch.manual_seed(seed)
    eps = torch.finfo(case.computed_in).eps
    tensors = {
        name: None if t is None else t.double() * (1 + eps * (2 * torch.rand(t.shape) - 1))
        for name, t in case.tensors.items()
    }
    return dataclasses.replace(case, tensors=tensors)


def nodes_of(case: Case) -> Tensor:
    """How many nodes each sample has. [B]"""
    t = torch.arange(int(case.frames.max())) < case.frames.unsqueeze(1)
    ranges = case.options.get("label_ranges")
    states = (case.labels.long() + 1).unsqueeze(1).expand(t.shape)
    if ranges is not None:
        ranges = ranges[:, : t.shape[1]].long()
        states = torch.minimum(ranges[..., 1], states).sub(ranges[..., 0]).clamp(min=0)
    return (states * t).sum(1)


def failure_of_lattice(case: Case, device: str) -> str | None:
    """Of posteriors and best paths: their likelihood, and what must hold of every path."""
    tensors = {name: None if t is None else t.to(device) for name, t in case.tensors.items()}
    results = [result.cpu() for result in called(case, device, tensors)]
    truth = truth_of(case)
    finite = truth.losses.isfinite()
    hair = HAIR[case.computed_in]
    if case.function == "align":
        frames, score = results
        losses = truth.losses[finite]
        if (score[finite].double() + losses > 4 * hair * (1 + losses.abs().sum())).any():
            return "a path more probable than all together"
        for b, (t, u) in enumerate(zip(case.frames.tolist(), case.labels.tolist(), strict=True)):
            own = frames[b, :u] if finite[b] else frames[b, :0]
            if ((own < 0) | (own >= t)).any() or (own.diff() < 0).any():
                return f"frames of sample {b} are no path: {own.tolist()}"
            if (frames[b, u:] != -1).any():
                return f"padding of sample {b} has a frame"
        return None
    found = rnnt_op.Posteriors(*results)
    if case.bad is None:
        wrong = wrong_by(found.log_likelihood, -truth.losses, hair, truth.losses[finite])
        if wrong:
            return f"log-likelihood: {wrong}"
    for b, (t, u) in enumerate(zip(case.frames.tolist(), case.labels.tolist(), strict=True)):
        if b == case.bad:
            continue  # neither are its occupancies numbers
        emitted = found.label[b].double().sum(0)
        expected = torch.zeros_like(emitted)
        expected[:u] = float(finite[b])
        if not torch.allclose(emitted, expected, rtol=0, atol=1e-5):
            return f"labels of sample {b} are emitted {emitted.tolist()} times"
        if found.label[b, t:].count_nonzero() or found.blank[b, t:].count_nonzero():
            return f"padding of sample {b} has an occupancy"
    return None


def wrong_by(actual: Tensor, expected: Tensor, hair: float, scale: Tensor) -> str | None:
    """How losses differ, beyond rounding of the largest."""
    actual = actual.double()
    finite = expected.isfinite()
    if actual.isfinite().ne(finite).any():
        return f"{actual.tolist()} for {expected.tolist()}"
    bar = 4 * hair * (1 + float(scale.abs().sum()))
    error = float((actual - expected)[finite].abs().max()) if finite.any() else 0.0
    return None if error <= bar else f"{actual.tolist()} for {expected.tolist()}"


def main(config: Config) -> int:
    counts: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for number in tqdm(range(config.first, config.first + config.cases), leave=False):
        case = draw(number)
        counts[case.kind] += 1
        try:
            wrong = failure_of(case, config.device)
        except Exception as error:  # the drawn problem is valid, so any error is one of ours
            wrong = f"{type(error).__name__}: {error}"
        if wrong is not None:
            failures[case.kind] += 1
            tqdm.write(f"case {number}, {case.kind}, {case.backend}: {wrong}")
    rows = [
        {"kind": kind, "cases": count, "failed": failures[kind], "passed": not failures[kind]}
        for kind, count in sorted(counts.items())
    ]
    print(describe_machine(config.device), markdown_table(rows), sep="\n\n")
    print(f"\n{sum(counts.values())} cases, {sum(failures.values())} failed")
    write_results(config.out, "fuzz", config, rows, device=config.device)
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Config, description=__doc__)))
