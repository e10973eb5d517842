"""Loss and gradients of a batch on one thread of a CPU, beside other packages where they are
installed.

Every package gets the same random problem: encoder and predictor states and an output layer. Those
that take logits get them from torch, with the joint network's derivatives. Nothing is timed whose
loss is another one. All take turns within a round, and each turn's wall time stands beside the
processor time of the calling thread.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

import rnnt_op
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio
from rnnt_op.tools.study.methods import Loss, of_logits, torchaudio_loss, with_narrow_indices
from rnnt_op.tools.study.problems import Problem, random_joint, recorded_lengths
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

OURS = "rnnt_op, joint network"


@dataclass(frozen=True)
class Config:
    """Compare packages."""

    batch: int = 6
    frames: int = 300
    labels: int = 60
    lengths: Path | None = None
    """A .npy file of [n, 2] lengths (T, U) to draw ``batch`` samples from, instead of one shape."""
    vocab_size: int = 500
    joint_dim: int = 512
    repeats: int = 3
    seed: int = 0
    out: Path = Path("benchmarks/results")


def warprnnt_numba_loss() -> Loss | None:
    try:
        package = importlib.import_module("warprnnt_numba")
    except ImportError:
        return None

    def rnnt_loss(*given: Tensor, blank: int, reduction: str) -> Tensor:
        loss: Tensor = package.RNNTLossNumba(blank=blank, reduction=reduction)(*given)
        return loss

    return with_narrow_indices(rnnt_loss)


def joint_losses() -> dict[str, Loss]:
    """By name, of what can be imported."""
    of_packages = {
        "rnnt_op, given logits": rnnt_op.rnnt_loss,
        "torchaudio": torchaudio_loss(),
        "warprnnt_numba": warprnnt_numba_loss(),
    }
    for name, loss in of_packages.items():
        if loss is None:
            print(f"{name} left out: it cannot be imported")
    return {
        OURS: rnnt_op.joint_rnnt_loss,
        "plain torch": rnnt_op.reference.joint_rnnt_loss,
        **{name: of_logits(loss) for name, loss in of_packages.items() if loss is not None},
    }


def measure(config: Config, problem: Problem) -> list[dict[str, Any]]:
    losses = joint_losses()
    values = {name: float(problem.loss(loss, reduction="sum")) for name, loss in losses.items()}
    for name, value in values.items():
        if not abs(value / values[OURS] - 1) <= 1e-4:
            raise SystemExit(f"losses differ, nothing measured: {name}, {value}, {values[OURS]}")

    processor: dict[str, list[float]] = {name: [] for name in losses}

    def timed(name: str) -> Callable[[], object]:
        def run() -> None:
            start = time.thread_time()
            problem.gradients(losses[name], reduction="sum")
            processor[name].append(time.thread_time() - start)

        return run

    wall = interleaved_seconds({name: timed(name) for name in losses}, repeats=config.repeats)
    # The warm-up round is not among the wall times.
    seconds = {name: each[-config.repeats :] for name, each in processor.items()}
    return [
        {
            "package": name,
            "processor s": median(seconds[name]),
            "wall s": median(wall[name]),
            "× rnnt_op": median_ratio(seconds[name], seconds[OURS]),
            "loss": values[name],
        }
        for name in losses
    ]


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    lengths: Lengths = ((config.frames, config.labels),) * config.batch
    if config.lengths is not None:
        lengths = recorded_lengths(config.lengths, config.batch, config.seed)
    workload = Workload(lengths, config.vocab_size, config.joint_dim, torch.float32)
    rows = measure(config, random_joint(workload))
    shown = replace(config, lengths=config.lengths and Path(config.lengths.name))
    write_results(config.out, "peers", shown, rows)
    print(f"{workload}, loss and gradients, one thread; {describe_machine()}\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
