"""What it saves to score only the nodes that paths reach, from initialisation to a trained model.

Loss and gradients with and without take turns within a round on the same states. States of a model
as it learns come from files with ``encoder0``, ``predictor0``, ``targets0``, ``encoder1``, ..., and
``weight`` and ``bias``; longer utterances are made by joining them. For a larger vocabulary rows of
small random weights with a bias of −12 are appended, for a larger joint network zeros, which cost
what other numbers do. Nothing is timed whose gradients do not agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import counted_nodes, interleaved_seconds, median_ratio
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Config:
    """Time with and without."""

    states: tuple[Path, ...] = ()
    """npz files of trained states; without any, random states alone are measured."""
    joined: tuple[int, ...] = (1, 2, 4)
    """How many utterances make one."""
    batch: int = 8
    vocab_size: int = 1024
    joint_dim: int = 640
    dtype: DtypeName = "float32"
    frames: int = 435
    """Of random states."""
    labels: int = 62
    """Of random states."""
    repeats: int = 3
    threads: int = 1
    seed: int = 0
    out: Path = Path("benchmarks/results")


def trained(config: Config, file: Path, joined: int) -> Problem:
    """A batch of a file's two utterances, each begun ``joined`` times in turns."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    encoders, predictors, labels = [], [], []
    for b in range(config.batch):
        turns = [(b + j) % 2 for j in range(joined)]
        # Behind its last label an utterance waits for its end; joined, the next one begins there.
        states = [arrays[f"predictor{i}"] for i in turns]
        predictors.append(torch.cat([*(each[:-1] for each in states[:-1]), states[-1]]))
        encoders.append(torch.cat([arrays[f"encoder{i}"] for i in turns]))
        labels.append(torch.cat([arrays[f"targets{i}"] for i in turns]).long())
    weight, bias = arrays["weight"], arrays["bias"]
    columns, rows = config.joint_dim - weight.shape[1], config.vocab_size - len(weight)
    further = 0.02 * torch.randn(rows, weight.shape[1])
    leaves = (
        F.pad(pad_sequence(encoders, batch_first=True), (0, columns)),
        F.pad(pad_sequence(predictors, batch_first=True), (0, columns)),
        F.pad(torch.cat((weight, further)), (0, columns)),
        F.pad(bias, (0, rows), value=-12.0),
    )
    lengths = (torch.tensor([len(sample) for sample in each]) for each in (encoders, labels))
    return Problem(leaves, pad_sequence(labels, batch_first=True), *lengths)


def problems(config: Config) -> Iterator[tuple[str, Problem]]:
    lengths = ((config.frames, config.labels),) * config.batch
    workload = Workload(lengths, config.vocab_size, config.joint_dim, torch.float32)
    yield "uniform", random_joint(workload, score_std=0.0)
    yield "random, std 1", random_joint(workload)
    for file in config.states:
        for joined in config.joined:
            yield f"{file.stem} × {joined}", trained(config, file, joined)


def processor_seconds(function: Callable[[], object]) -> float:
    """Of this thread."""
    start = time.thread_time()
    function()
    return time.thread_time() - start


def measure(name: str, problem: Problem, config: Config) -> dict[str, Any]:
    backend = backend_for(CPU)

    def reached() -> tuple[Tensor, tuple[Tensor, ...]]:
        return problem.gradients(rnnt_op.joint_rnnt_loss, reduction="sum")

    def everything() -> tuple[Tensor, tuple[Tensor, ...]]:
        with patch.object(backend, "reach", lambda *_, **__: None):
            return reached()

    expected_loss, expected = everything()
    with counted_nodes(CPU) as counts:
        loss, gradients = reached()
    error = relative_error(gradients, expected)
    dtype = problem.leaves[0].dtype
    if not error <= 4 * torch.finfo(dtype).eps:
        raise SystemExit(f"gradients differ, nothing measured: {name}, relative error {error:.1e}")
    seconds = interleaved_seconds(
        {"all": everything, "reached": reached},
        repeats=config.repeats,
        seconds_of=processor_seconds,
    )
    labels = int(problem.labels.sum())
    return {
        "states": name,
        "dtype": str(dtype).removeprefix("torch."),
        "T": int(problem.frames.max()),
        "U": int(problem.labels.max()),
        "nats a label": float(expected_loss) / labels,
        "scored %": 100 * counts.scored / problem.nodes,
        "kept %": 100 * counts.kept / problem.nodes,
        "all s": median(seconds["all"]),
        "reached s": median(seconds["reached"]),
        "all / reached": median_ratio(seconds["all"], seconds["reached"]),
        "lost": counts.lost,
        "change of the loss": abs(float(loss / expected_loss) - 1),
        "change of the gradients": error,
    }


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    for name, problem in problems(config):
        rows.append(measure(name, problem.to(dtype_of(config.dtype)), config))
        # What is measured stays, should the rest be cut.
        write_results(config.out, f"scored-nodes-{config.dtype}", config, rows)
    print(
        f"B={config.batch} V={config.vocab_size} H={config.joint_dim}, forward and backward, "
        f"processor time of the first of {config.threads} threads; {describe_machine()}\n"
    )
    print(markdown_table(rows))
    print(
        "\nScored, kept: shares of all nodes, in the score pass and the backward pass. Lost: what "
        "other nodes have of a sample's probability at most, as a share of it."
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
