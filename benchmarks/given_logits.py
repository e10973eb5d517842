"""The loss of given logits on a CPU: read where they lie, copied a chunk at a time, and by others.

Processor time of forward and backward on one thread. The loss reads the logits, and so does their
gradient, which is written; without the scores that the loss has kept it reads them twice. torch's
log_softmax with its gradient reads and writes more, and is what any loss that is not fused takes
before its recursion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

import rnnt_op
from rnnt_op import functional
from rnnt_op.backends.eager_given import EagerRowCopies
from rnnt_op.backends.given import GivenCopies
from rnnt_op.backends.native import NativeBackend
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio, processor_seconds
from rnnt_op.tools.study.methods import torchaudio_loss
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_logits
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

OURS = "rnnt_op"


@dataclass(frozen=True)
class Config:
    """Time of the loss of given logits."""

    dtype: DtypeName = "float32"
    batch: int = 8
    frames: int = 300
    labels: int = 60
    vocab_size: int = 500
    repeats: int = 7
    seed: int = 0
    out: Path = Path("benchmarks/results")


def copied(problem: Problem) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Through a chunk, by index tensors."""

    def given_chunk(_: NativeBackend, logits: Tensor, gradient: Tensor) -> GivenCopies:
        return GivenCopies(EagerRowCopies(), logits, gradient)

    with patch.object(NativeBackend, "given_chunk", given_chunk):
        return problem.gradients(rnnt_op.rnnt_loss, reduction="sum")


def rescored(problem: Problem) -> object:
    """Scores computed again for the gradient."""
    with patch.object(functional, "_scores_are_small", lambda *_: False):
        return problem.gradients(rnnt_op.rnnt_loss, reduction="sum")


def log_softmax(problem: Problem) -> None:
    """Without a recursion."""
    logits = problem.leaves[0].detach().requires_grad_()
    torch.autograd.grad(logits.log_softmax(3)[..., 0].sum(), logits)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    lengths = ((config.frames, config.labels),) * config.batch
    workload = Workload(lengths, config.vocab_size, 1, dtype_of(config.dtype))
    problem = random_logits(workload).to(dtype_of(config.dtype))
    functions: dict[str, Callable[[], object]] = {
        OURS: lambda: problem.gradients(rnnt_op.rnnt_loss, reduction="sum"),
        "rnnt_op, scored twice": lambda: rescored(problem),
        "rnnt_op, rows copied by torch": lambda: copied(problem),
        "log_softmax alone": lambda: log_softmax(problem),
    }
    peer = torchaudio_loss()
    if peer is not None:
        functions["torchaudio"] = lambda: problem.gradients(peer, reduction="sum")

    loss, gradients = problem.gradients(rnnt_op.rnnt_loss, reduction="sum")
    other_loss, other_gradients = copied(problem)
    # Half gradients are rounded once here, and twice where they are copied.
    bar = 1e-5 if problem.leaves[0].dtype.itemsize >= 4 else 1e-3
    if relative_error([loss, *gradients], [other_loss, *other_gradients]) > bar:
        raise SystemExit("losses differ, nothing measured")
    del gradients, other_gradients

    seconds = interleaved_seconds(functions, repeats=config.repeats, seconds_of=processor_seconds)
    rows = [
        {
            "what": name,
            "median s": median(each),
            "fastest s": min(each),
            f"× {OURS}": median_ratio(each, seconds[OURS]),
        }
        for name, each in seconds.items()
    ]
    print(
        f"{config.dtype}, B={config.batch} T={config.frames} U={config.labels} "
        f"V={config.vocab_size}, one thread; {describe_machine()}\n"
    )
    print(markdown_table(rows))
    write_results(config.out, f"given-{config.dtype}", config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
