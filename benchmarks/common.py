"""What the benchmarks share: random problems, a correctness gate, timing, tables and JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import rnnt_op
from rnnt_op.backends import backend_for

DtypeName = Literal["float64", "float32", "bfloat16"]
Row = Mapping[str, Any]
T = TypeVar("T")


def progress(items: Iterable[T], description: str) -> Iterable[T]:
    """The items, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False)


def dtype_of(name: DtypeName) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@dataclass(frozen=True)
class Problem:
    """Arguments of a loss; blank is token 0."""

    leaves: tuple[Tensor, ...]  # (encoder, predictor, weight, bias), or (logits,)
    targets: Tensor  # [B, U]
    frames: Tensor  # T of each sample. [B]
    labels: Tensor  # U of each sample. [B]

    def to(self, dtype: torch.dtype) -> Problem:
        return dataclasses.replace(self, leaves=tuple(leaf.to(dtype) for leaf in self.leaves))

    def loss(self, function: Callable[..., Tensor], **options: Any) -> Tensor:
        return function(*self.leaves, self.targets, self.frames, self.labels, blank=0, **options)

    def gradients(
        self, function: Callable[..., Tensor], **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and its gradient in each leaf."""
        leaves = tuple(leaf.detach().requires_grad_() for leaf in self.leaves)
        loss = dataclasses.replace(self, leaves=leaves).loss(function, **options)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    @property
    def nodes(self) -> int:
        """Lattice nodes of the batch, padding excluded."""
        return int((self.frames * (self.labels + 1)).sum())


def random_joint(
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    joint_dim: int,
    dtype: torch.dtype,
    score_std: float = 1.0,
    device: str = "cpu",
) -> Problem:
    """A random joint network whose logits have standard deviation ``score_std``.

    Args:
        lengths: (T, U) of each sample.
    """
    batch, frames, labels = _batch_shape(lengths)
    # Drawn in their dtype: the states of a big batch need not exist twice.
    encoder = torch.randn(batch, frames, joint_dim, dtype=dtype, device=device)
    predictor = torch.randn(batch, labels + 1, joint_dim, dtype=dtype, device=device)
    hidden = (encoder[0, :64, None].float() + predictor[0, :64].float()).tanh()
    hidden_norm = hidden.norm(dim=-1).mean()
    weight = torch.randn(vocab_size, joint_dim, device=device) * (score_std / hidden_norm)
    bias = torch.randn(vocab_size, device=device) * (0.1 * score_std)
    return _problem((encoder, predictor, weight, bias), lengths, vocab_size, dtype, device)


def random_logits(
    lengths: Sequence[tuple[int, int]],
    *,
    vocab_size: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Problem:
    """Independent standard normal logits."""
    batch, frames, labels = _batch_shape(lengths)
    logits = torch.randn(batch, frames, labels + 1, vocab_size, device=device)
    return _problem((logits,), lengths, vocab_size, dtype, device)


def ragged_lengths(batch: int, frames: int, labels: int) -> list[tuple[int, int]]:
    """(T, U) drawn from the upper half of the range; the first sample has full length."""
    drawn = [
        (
            int(torch.randint(frames // 2, frames + 1, ())),
            int(torch.randint(labels // 2, labels + 1, ())),
        )
        for _ in range(batch - 1)
    ]
    return [(frames, labels), *drawn]


def recorded_lengths(path: Path, batch: int, seed: int = 0) -> list[tuple[int, int]]:
    """(T, U) of each sample, drawn from a .npy file of [n, 2] lengths."""
    available = np.load(path)
    drawn = np.random.default_rng(seed).permutation(len(available))[:batch]
    return [(int(t), int(u)) for t, u in available[drawn]]


def _batch_shape(lengths: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    return len(lengths), max(t for t, _ in lengths), max(u for _, u in lengths)


def _problem(
    leaves: tuple[Tensor, ...],
    lengths: Sequence[tuple[int, int]],
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
) -> Problem:
    batch, _, labels = _batch_shape(lengths)
    return Problem(
        leaves=tuple(leaf.to(device, dtype) for leaf in leaves),
        targets=torch.randint(1, vocab_size, (batch, labels)).to(device),
        frames=torch.tensor([t for t, _ in lengths]),
        labels=torch.tensor([u for _, u in lengths]),
    )


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 distance of a list of tensors, in float64."""
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    difference = sum(float((a - e).square().sum()) for a, e in pairs)
    norm = sum(float(e.square().sum()) for _, e in pairs)
    return float((difference / norm) ** 0.5)


def gradient_bar(dtype: torch.dtype, plain_error: float) -> float:
    """Largest relative gradient error that passes.

    Half gradients round by themselves; what counts is to be no worse than plain torch in the same
    dtype.
    """
    bars = {torch.float64: 1e-9, torch.float32: 2e-5}
    return bars[dtype] if dtype in bars else 1.1 * plain_error + 1e-4


def require_correct(dtype: torch.dtype, device: str = "cpu") -> None:
    """Stops the benchmark unless a small ragged problem's loss and gradients are right."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lengths = ragged_lengths(3, 40, 12)
        problem = random_joint(lengths, vocab_size=32, joint_dim=24, dtype=dtype, device=device)
    loss, gradients = problem.gradients(rnnt_op.joint_rnnt_loss)
    reference = rnnt_op.reference.joint_rnnt_loss
    true_loss, truth = problem.to(torch.float64).gradients(reference)
    _, plain = problem.gradients(reference)
    bar = gradient_bar(dtype, relative_error(plain, truth))
    error = relative_error(gradients, truth)
    loss_error = relative_error([loss], [true_loss])
    if not (error <= bar and loss_error <= max(bar, 1e-3 if dtype == torch.bfloat16 else 0.0)):
        raise SystemExit(
            f"wrong result in {dtype} on {device}, nothing measured: relative error of the "
            f"gradients {error:.1e} (bar {bar:.1e}), of the loss {loss_error:.1e}"
        )


def kept_fraction(problem: Problem, run: Callable[[], object]) -> float:
    """Share of nodes that the backward pass of ``run`` keeps."""
    backend = backend_for(problem.leaves[0].device)
    select_nodes, kept = backend.select_nodes, 0

    def counting(*args: Any, **options: Any) -> Callable[[], Tensor]:
        nonlocal kept
        rows = select_nodes(*args, **options)()
        kept += len(rows)
        return lambda: rows

    with patch.object(backend, "select_nodes", counting):
        run()
    return kept / problem.nodes


def resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """What this process holds now, or its high-water mark (Linux)."""
    # ru_maxrss would not do: it is handed down from the parent process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def first_samples(problem: Problem, count: int) -> Problem:
    encoder, predictor, *output = problem.leaves
    return Problem(
        leaves=(encoder[:count], predictor[:count], *output),
        targets=problem.targets[:count],
        frames=problem.frames[:count],
        labels=problem.labels[:count],
    )


def wall_clock_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    seconds_of: Callable[[Callable[[], object]], float] = wall_clock_seconds,
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one warm-up round.

    All functions take turns within a round, so a ratio within a round is free of the machine's
    slower drifts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    turns = [(round_, name) for round_ in range(repeats + 1) for name in functions]
    for round_, name in progress(turns, "rounds"):
        elapsed = seconds_of(functions[name])
        if round_ > 0:
            seconds[name].append(elapsed)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return median(n / d for n, d in zip(numerator, denominator, strict=True))


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table whose columns are the keys of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[c]) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "pass" if value else "**FAIL**"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def write_results(
    out: Path,
    name: str,
    parameters: Any,
    results: Mapping[str, Any] | Sequence[Row],
    *,
    device: str | None = "cpu",
) -> None:
    """Writes ``out/name-{cpu,cuda}.json``, or ``out/name.json`` where no device is concerned.

    Args:
        parameters: the script's configuration, a dataclass.
    """
    kind = None if device is None else torch.device(device).type
    record: dict[str, Any] = {
        "machine": _machine(kind),
        "versions": {
            "rnnt_op": rnnt_op.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parameters": dataclasses.asdict(parameters),
        "results": results,
    }
    del record["parameters"]["out"]
    out.mkdir(parents=True, exist_ok=True)
    path = out / (f"{name}.json" if kind is None else f"{name}-{kind}.json")
    path.write_text(json.dumps(record, indent=2, default=_file_name) + "\n")
    print(f"\nwrote {path}", file=sys.stderr)


def _file_name(path: Path) -> str:
    # Where a file lies says nothing about the measurement.
    return path.name


def _machine(kind: str | None) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "kind": kind or "any",
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if kind == "cuda":
        properties = torch.cuda.get_device_properties()
        machine["gpu"] = properties.name
        machine["gpu_memory_bytes"] = properties.total_memory
        machine["multiprocessors"] = properties.multi_processor_count
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def describe_machine(device: str = "cpu") -> str:
    """One line for the head of a table."""
    machine = _machine(torch.device(device).type)
    if "gpu" in machine:
        return f"{machine['gpu']}, CUDA {machine['cuda']}, torch {torch.__version__}"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"torch {torch.__version__}"
    )
