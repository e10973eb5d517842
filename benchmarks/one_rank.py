"""One step of the vocabulary-parallel loss over NCCL, on the one rank that a single GPU allows.

It shows that the exchange runs on the GPU's stream and changes nothing; not that ranks agree, which
the tests show over gloo. On a CPU it takes gloo, to try the script.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from command_line import parse
from on_device import chosen_device
from step_runner import SKIPPED

import rnnt_op
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import is_gpu
from rnnt_op.tools.study.problems import Problem, ragged_lengths, random_joint

BARS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Config:
    """The loss with its vocabulary over a group of one rank."""

    device: str = "auto"


def distance(problem: Problem) -> float:
    """Of loss and gradients from those without a group."""
    loss = partial(rnnt_op.joint_rnnt_loss, process_group=dist.group.WORLD)
    actual, expected = problem.gradients(loss), problem.gradients(rnnt_op.joint_rnnt_loss)
    return max(relative_error([actual[0]], [expected[0]]), relative_error(actual[1], expected[1]))


def main(config: Config) -> int:
    device = chosen_device(config.device)
    backend = "nccl" if is_gpu(device) else "gloo"
    if backend == "nccl" and not dist.is_nccl_available():
        print("this torch has no NCCL")
        return SKIPPED
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend,
            init_method=(Path(folder) / "store").as_uri(),
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=10),
        )
        found = {}
        for dtype in BARS:
            workload = Workload(ragged_lengths(4, 60, 15), 100, 48, dtype)
            found[dtype] = distance(random_joint(workload, device=device))
        dist.destroy_process_group()
    said = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {each:.1e}" for dtype, each in found.items()
    )
    print(f"{backend}, one rank: distance from the loss without a group: {said}")
    return int(any(each > BARS[dtype] for dtype, each in found.items()))


if __name__ == "__main__":
    sys.exit(main(parse(Config, __doc__)))
