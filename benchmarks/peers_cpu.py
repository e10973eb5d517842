"""Loss and gradients of a batch on one thread of a CPU, beside other packages where they are
installed.

Every package gets the same random problem: encoder and predictor states and an output layer. Those
that take logits get them from torch, with the joint network's derivatives. Nothing is timed whose
loss is another one, except for the pruned loss, which is not meant to be the same. All take turns
within a round, and each turn's wall time stands beside the processor time of the calling thread.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

import rnnt_op
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio
from rnnt_op.tools.study.methods import Loss, of_logits, torchaudio_loss, with_narrow_indices
from rnnt_op.tools.study.problems import Problem, random_joint, recorded_lengths
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

OURS = "rnnt_op, joint network"
PRUNED = "fast_rnnt, pruned: another loss"


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
    pruned_states: int = 5
    """Of a frame that the pruned loss keeps."""
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


def fast_rnnt_losses(problem: Problem, states: int) -> dict[str, Loss]:
    """Of k2's authors, whose k2 has the same two; none where it cannot be imported.

    The pruned loss is computed as in its recipes: a smoothed additive loss gives the states of each
    frame, and the joint network is computed for these. The additive loss takes half a weight.
    """
    try:
        package = importlib.import_module("fast_rnnt")
    except (ImportError, OSError):
        return {}
    weight = problem.leaves[2]
    of_encoder, of_predictor = (torch.randn_like(weight) * weight.std() for _ in range(2))

    def options(indices: Sequence[Tensor], blank: int, reduction: str) -> dict[str, Any]:
        targets, frames, labels = indices
        zeros = torch.zeros_like(frames)
        return {
            "symbols": targets,
            "termination_symbol": blank,
            "boundary": torch.stack((zeros, zeros, labels, frames), 1).long(),
            "reduction": reduction,
        }

    def rnnt_loss(logits: Tensor, *indices: Tensor, blank: int, reduction: str) -> Tensor:
        loss: Tensor = package.rnnt_loss(logits, **options(indices, blank, reduction))
        return loss

    def pruned(*arguments: Tensor, blank: int = 0, reduction: str = "mean") -> Tensor:
        encoder, predictor, weight, bias, *indices = arguments
        given = options(indices, blank, reduction)
        additive, occupancies = package.rnnt_loss_smoothed(
            F.linear(predictor, of_predictor),
            F.linear(encoder, of_encoder),
            lm_only_scale=0.25,
            am_only_scale=0.0,
            return_grad=True,
            **given,
        )
        ranges = package.get_rnnt_prune_ranges(*occupancies, given["boundary"], states)
        rows = package.do_rnnt_pruning(am=encoder, lm=predictor, ranges=ranges)
        logits = F.linear(torch.tanh(sum(rows)), weight, bias)
        loss = package.rnnt_loss_pruned(logits, ranges=ranges, **given)
        total: Tensor = 0.5 * additive + loss
        return total

    return {"fast_rnnt": of_logits(rnnt_loss), PRUNED: pruned}


def joint_losses(problem: Problem, config: Config) -> dict[str, Loss]:
    """By name, of what can be imported."""
    of_packages = {
        "rnnt_op, given logits": rnnt_op.rnnt_loss,
        "torchaudio": torchaudio_loss(),
        "warprnnt_numba": warprnnt_numba_loss(),
    }
    for name, loss in of_packages.items():
        if loss is None:
            print(f"{name} left out: it cannot be imported")
    of_fast_rnnt = fast_rnnt_losses(problem, config.pruned_states)
    if not of_fast_rnnt:
        print("fast_rnnt left out: it cannot be imported")
    return {
        OURS: rnnt_op.joint_rnnt_loss,
        "plain torch": rnnt_op.reference.joint_rnnt_loss,
        **{name: of_logits(loss) for name, loss in of_packages.items() if loss is not None},
        **of_fast_rnnt,
    }


def measure(config: Config, problem: Problem) -> list[dict[str, Any]]:
    losses = joint_losses(problem, config)
    values = {name: float(problem.loss(loss, reduction="sum")) for name, loss in losses.items()}
    for name, value in values.items():
        if name != PRUNED and not abs(value / values[OURS] - 1) <= 1e-4:
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
