"""Time and memory of the loss on a GPU, beside one GEMM, torchaudio and plain torch.

Forward and backward with the gradients of encoder, predictor, weight and bias. All candidates take
turns within a round, timed by CUDA events, and ratios are taken within a round. On a CPU the same
runs at toy sizes, to try the script: those numbers say nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from command_line import parse
from on_device import (
    GIB,
    MIB,
    bytes_of,
    chosen_device,
    device_bytes,
    real_lengths,
    results_folder,
    with_peak_bytes,
)
from posteriors import train
from torch import Tensor
from torch.nn import functional as F

import rnnt_op
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error, require_correct
from rnnt_op.tools.study.measure import (
    interleaved_seconds,
    is_gpu,
    kept_fraction,
    median_ratio,
    seconds_on,
)
from rnnt_op.tools.study.problems import Problem, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

GEMM = "one GEMM"
GEMM_TO_FLOAT = "the same GEMM with a float32 result"
TORCHAUDIO = "joint network + torchaudio"
PLAIN = "plain torch"
OURS = "rnnt_op"

GEMM_BAR, SPEED_BAR, MEMORY_BAR = 4.0, 6.0, 20.0

CaseName = Literal["i", "ii", "iii"]
Gradients = tuple[Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Config:
    """Time and memory of forward and backward."""

    cases: tuple[CaseName, ...] = ("i", "ii", "iii")
    """i: B=32, T=400, U=128, V=1024, H=640 in bfloat16; ii: B=64 LibriSpeech lengths, V=500, H=512
    in bfloat16; iii: i in float32."""
    lengths: Path | None = None
    """LibriSpeech lengths, an .npy file of [n, 2]; else from RNNT_OP_LENGTHS."""
    repeats: int = 10
    training_steps: int = 40
    """Adam steps on the batch that make the trained posterior."""
    gemm_limit_gib: float = 16.0
    """A GEMM whose result is larger goes in chunks of 64k rows into one buffer."""
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    """Folder of the JSON; by default benchmarks/results on a GPU, none on a CPU."""


def cases(config: Config, device: str) -> dict[str, Workload]:
    """The cases asked for, by what they are called; at toy sizes on a CPU."""
    toy = not is_gpu(device)
    found = {}
    for name in config.cases:
        if name == "ii":
            lengths = real_lengths(config.lengths, 4 if toy else 64)
            if isinstance(lengths, str):
                print(f"(ii) left out: {lengths}\n")
                continue
            if toy:
                lengths = tuple((1 + t // 20, u // 10) for t, u in lengths)
            model = (30, 16) if toy else (500, 512)
        else:
            lengths = ((20, 8),) * 3 if toy else ((400, 128),) * 32
            model = (48, 24) if toy else (1024, 640)
        workload = Workload(lengths, *model, torch.float32 if name == "iii" else torch.bfloat16)
        found[f"({name}) {workload}"] = workload
    return found


def gemm(
    problem: Problem, result_dtype: torch.dtype, limit_bytes: float
) -> tuple[Callable[[], object], str]:
    """Hidden states of all nodes times the weight, in one GEMM or into a reused buffer."""
    weight, nodes = problem.leaves[2], problem.nodes
    hidden = torch.randn(nodes, weight.shape[1], device=weight.device).to(weight.dtype)
    whole = nodes * weight.shape[0] * result_dtype.itemsize <= limit_bytes
    rows = nodes if whole else min(nodes, 2**16)
    result = weight.new_empty((rows, weight.shape[0]), dtype=result_dtype)
    options = {} if result_dtype == weight.dtype else {"out_dtype": result_dtype}

    def run() -> None:
        for part in hidden.split(rows):
            torch.mm(part, weight.t(), out=result[: len(part)], **options)

    return run, "one call" if whole else f"chunks of {rows} rows into one buffer"


class TorchaudioLoss:
    """The joint network on padded logits, then ``torchaudio.functional.rnnt_loss`` in float32.

    Args:
        problem: the batch.
        limit_bytes: the batch is cut into pieces that need no more.

    Raises:
        RuntimeError: torchaudio is not usable here; says why.
    """

    def __init__(self, problem: Problem, limit_bytes: float) -> None:
        self._problem = problem
        self._loss = self._checked_loss(problem.leaves[0].device)
        workload = problem.workload
        nodes, vocab_size = workload.frames * (workload.labels + 1), workload.vocab_size
        size = workload.dtype.itemsize
        # Two of the hidden states; logits in both dtypes, their gradient in both.
        node_bytes = 2 * workload.joint_dim * size + 2 * vocab_size * (4 + size)
        # torchaudio indexes elements with 32 bits.
        most = min(limit_bytes / node_bytes, (2**31 - 1) / vocab_size) / nodes
        self.pieces = -(-workload.batch // max(1, int(most)))

    @staticmethod
    def _checked_loss(device: torch.device) -> Callable[..., Tensor]:
        try:
            loss: Callable[..., Tensor] = importlib.import_module("torchaudio").functional.rnnt_loss
            logits = torch.randn(1, 3, 2, 4, device=device)
            targets, frames, labels = (
                torch.tensor(value, dtype=torch.int32, device=device) for value in ([[1]], [3], [1])
            )
            actual = loss(logits, targets, frames, labels, blank=0)
            expected = rnnt_op.reference.rnnt_loss(logits, targets, frames, labels, blank=0)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        except Exception as error:  # a library that cannot be loaded raises anything
            raise RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        return loss

    def gradients(self) -> Gradients:
        _, _, weight, bias = self._problem.leaves
        batch = len(self._problem.frames)
        losses, states = [], []
        shared = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in (weight, bias)]
        samples = -(-batch // self.pieces)
        for start in range(0, batch, samples):
            loss, (d_encoder, d_predictor, *d_shared) = self._piece(slice(start, start + samples))
            losses.append(loss)
            states.append((d_encoder, d_predictor))
            for total, each in zip(shared, d_shared, strict=True):
                total += each
        d_encoder, d_predictor = (torch.cat(each) for each in zip(*states, strict=True))
        d_weight, d_bias = (total.to(weight.dtype) for total in shared)
        return torch.stack(losses).sum(), (d_encoder, d_predictor, d_weight, d_bias)

    def _piece(self, part: slice) -> Gradients:
        problem = self._problem
        encoder, predictor, weight, bias = problem.leaves
        leaves = tuple(
            leaf.detach().requires_grad_()
            for leaf in (encoder[part], predictor[part], weight, bias)
        )
        frames, labels = problem.frames[part], problem.labels[part]
        longest, most = int(frames.max()), int(labels.max())
        hidden = (leaves[0][:, :longest, None] + leaves[1][:, None, : most + 1]).tanh()
        logits = F.linear(hidden, leaves[2], leaves[3]).float()
        loss = self._loss(
            logits,
            problem.targets[part, :most].int().contiguous(),
            frames.int().to(logits.device),
            labels.int().to(logits.device),
            blank=0,
            reduction="sum",
        ) / len(encoder)
        return loss.detach(), torch.autograd.grad(loss, leaves)


@dataclass(frozen=True)
class Candidate:
    """What is measured, with what there is to say about it."""

    run: Callable[[], Gradients]
    note: str = ""
    kept_percent: float | None = None


def candidates(
    problem: Problem, config: Config, device: str
) -> tuple[dict[str, Candidate], list[str]]:
    """All that compute loss and gradients, and why others are left out."""
    limit = 0.7 * device_bytes(device)
    [trained] = train(problem, (config.training_steps,)).values()
    posteriors = {"random": problem, f"trained {config.training_steps} steps": trained}

    found, left_out = {}, []
    for name, each in posteriors.items():
        run = _ours(each)
        found[f"{OURS}, {name}"] = Candidate(run, kept_percent=100 * kept_fraction(each, run))
    try:
        torchaudio = TorchaudioLoss(problem, limit)
        note = f"in {torchaudio.pieces} pieces" if torchaudio.pieces > 1 else ""
        found[TORCHAUDIO] = Candidate(torchaudio.gradients, note)
    except RuntimeError as reason:
        left_out.append(f"{TORCHAUDIO}: {reason}")
    batched = rnnt_op.memory.batched_bytes(problem.workload)
    if batched <= limit:
        found[PLAIN] = Candidate(lambda: problem.gradients(rnnt_op.reference.joint_rnnt_loss))
    else:
        left_out.append(f"{PLAIN}: it needs {batched / GIB:.0f} GiB")
    return found, left_out


def _ours(problem: Problem) -> Callable[[], Gradients]:
    return lambda: problem.gradients(rnnt_op.joint_rnnt_loss)


def require_same_results(found: dict[str, Candidate], dtype: torch.dtype) -> None:
    """Stops unless the others compute the same loss and gradients of the same batch."""
    expected = found[f"{OURS}, random"].run()
    # Of gradients: others run the recursion in float32, and round gradients to bfloat16.
    bar = 1e-2 if dtype == torch.float32 else 3e-2
    for name in (TORCHAUDIO, PLAIN):
        if name not in found:
            continue
        actual = found[name].run()
        loss = relative_error(actual[:1], expected[:1])
        gradients = relative_error(actual[1], expected[1])
        if not (loss <= 1e-3 and gradients <= bar):
            raise SystemExit(
                f"{name} differs, nothing measured: relative distance of the loss {loss:.1e}, of "
                f"the gradients {gradients:.1e} (bar {bar:.0e})"
            )


def peak_bytes(run: Callable[[], Gradients], device: str) -> int:
    """The most that a run uses above its inputs and the gradients that it returns."""
    (_, gradients), before, peak = with_peak_bytes(device, run)
    return peak - before - bytes_of(gradients)


def measure(case: str, workload: Workload, config: Config, device: str) -> dict[str, Any]:
    """Prints one case's table; returns all numbers."""
    dtype, problem = workload.dtype, random_joint(workload, device=device)
    found, left_out = candidates(problem, config, device)
    require_same_results(found, dtype)
    memory = {name: peak_bytes(each.run, device) for name, each in found.items()}

    limit = config.gemm_limit_gib * GIB
    run_gemm, how = gemm(problem, dtype, limit)
    functions: dict[str, Callable[[], object]] = {GEMM: run_gemm}
    if is_gpu(device) and dtype != torch.float32:
        functions[GEMM_TO_FLOAT] = gemm(problem, torch.float32, limit)[0]
    functions |= {name: each.run for name, each in found.items()}
    seconds = interleaved_seconds(functions, repeats=config.repeats, seconds_of=seconds_on(device))

    rows = []
    for name, each in seconds.items():
        candidate = found.get(name)
        rows.append(
            {
                "what": name,
                "nodes kept %": candidate.kept_percent if candidate else None,
                "median ms": 1e3 * median(each),
                "fastest ms": 1e3 * min(each),
                "slowest ms": 1e3 * max(each),
                f"× {GEMM}": median_ratio(each, seconds[GEMM]),
                "MiB above inputs and gradients": memory[name] / MIB if candidate else None,
                "note": candidate.note if candidate else how,
            }
        )
    flops = 2 * workload.nodes * workload.vocab_size * workload.joint_dim
    rate = flops / median(seconds[GEMM]) / 1e12
    print(f"\n{case}\n\n{markdown_table(rows)}")
    print(f"\n{problem.nodes} nodes; {GEMM}: {rate:.3g} TFLOP/s")
    bars = [_bars(name, seconds, memory, device) for name in memory if name.startswith(OURS)]
    print(f"\n{markdown_table(bars)}")
    for reason in left_out:
        print(f"\nLeft out, {reason}")
    return {
        "case": case,
        "left out": left_out,
        "nodes": problem.nodes,
        "GEMM TFLOP/s": rate,
        "bars": bars,
        "rows": rows,
        "seconds": seconds,
    }


def _bars(
    ours: str, seconds: dict[str, list[float]], memory: dict[str, int], device: str
) -> dict[str, Any]:
    def passes(value: float | None, bar: float, most: bool = False) -> bool | None:
        """None where there is nothing to compare, or no GPU that the bar is meant for."""
        if value is None or not is_gpu(device):
            return None
        return value <= bar if most else value >= bar

    def times_faster(other: str) -> float | None:
        return median_ratio(seconds[other], seconds[ours]) if other in seconds else None

    def times_less(other: str) -> float | None:
        if other not in memory or memory[ours] <= 0:  # toy sizes are below what the CPU shows
            return None
        return memory[other] / memory[ours]

    a = median_ratio(seconds[ours], seconds[GEMM])
    b, c = times_faster(TORCHAUDIO), times_faster(PLAIN)
    b_memory, c_memory = times_less(TORCHAUDIO), times_less(PLAIN)
    return {
        "what": ours,
        f"(a) / {GEMM}": a,
        f"a ≤ {GEMM_BAR:g}": passes(a, GEMM_BAR, most=True),
        "(b) × faster than torchaudio": b,
        f"b ≥ {SPEED_BAR:g}": passes(b, SPEED_BAR),
        "(b) × less memory": b_memory,
        f"memory ≥ {MEMORY_BAR:g}": passes(b_memory, MEMORY_BAR),
        "(c) × faster than plain torch": c,
        "(c) × less memory": c_memory,
    }


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the bars that are not met."""
    return [
        f"{result['case']}, {bars['what']}: {name}"
        for result in results
        for bars in result["bars"]
        for name, passed in bars.items()
        if passed is False
    ]


def main(config: Config) -> None:
    device = chosen_device(config.device)
    torch.manual_seed(config.seed)
    found = cases(config, device)
    for dtype in dict.fromkeys(workload.dtype for workload in found.values()):
        require_correct(dtype, device)
    print(f"Forward + backward; {describe_machine(device)}")
    if not is_gpu(device):
        print("Toy sizes on a CPU: the script is tried, nothing is measured.")
    results = []
    for case, workload in found.items():
        results.append(measure(case, workload, config, device))
        if is_gpu(device):
            torch.cuda.empty_cache()
    out = results_folder(config.out, device)
    if out is not None:
        record = replace(config, device=device)
        write_results(
            out, "speed" if is_gpu(device) else "speed-toy", record, results, device=device
        )
    failed = failures(results)
    if failed:
        raise SystemExit("bars not met: " + "; ".join(failed))


if __name__ == "__main__":
    main(parse(Config, __doc__))
