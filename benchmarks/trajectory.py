"""What skipping saves as a model learns: nodes scored and kept, and time, from initialisation on.

The states are random ones, those of ``examples/asr`` while it trains here (``--train``), and those
in npz files of a folder (``--states``) with ``encoder0``, ``predictor0``, ``targets0``,
``encoder1``, ..., ``weight`` and ``bias``, whose names end in the number of steps. Utterances are
joined to longer ones. For a larger vocabulary rows of small random weights with a bias of −12 are
appended, for a larger joint network zeros, which cost what other numbers do.

Loss and gradients, the same with every node scored, the same with no logits kept until the backward
pass, and the forward GEMM alone take turns within a round. Nothing is timed whose gradients do not
agree.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from speed_cpu import gemm
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.backends.gemm import CpuMatrices, linear
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import (
    counted_nodes,
    interleaved_seconds,
    median_ratio,
    processor_seconds,
    progress,
)
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Config:
    """Measure along a training."""

    states: Path | None = None
    """Folder of npz files of a model as it learns."""
    train: tuple[int, ...] = ()
    """Steps of the example's own training to measure at, ascending; 0 is the initialisation."""
    train_steps: int = 900
    """Steps of the whole training, which its learning rate follows."""
    joined: tuple[int, ...] = (2,)
    """How many utterances make one."""
    strings: int = 8
    """How many of the example's digit strings make an utterance of its own training."""
    batch: int = 8
    vocab_size: int = 1024
    joint_dim: int = 640
    dtype: DtypeName = "float32"
    tolerances: tuple[DtypeName, ...] = ("float32", "bfloat16")
    """Default tolerances of these dtypes, whatever the states' dtype is."""
    frames: int = 435
    """Of random states."""
    labels: int = 62
    """Of random states."""
    repeats: int = 3
    threads: int = 1
    seed: int = 0
    out: Path = Path("benchmarks/results")


Utterance = tuple[Tensor, Tensor, Tensor]
"""Encoder states [T, H], predictor states [U + 1, H], labels [U]."""


@dataclass(frozen=True)
class Moment:
    """What a model's joint network is given after some steps."""

    training: str
    steps: int
    utterances: tuple[Utterance, ...]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]


def join(utterances: list[Utterance]) -> Utterance:
    encoders, predictors, labels = zip(*utterances, strict=True)
    # Behind its last label an utterance waits for its end; joined, the next one begins there.
    states = torch.cat([*(each[:-1] for each in predictors[:-1]), predictors[-1]])
    return torch.cat(encoders), states, torch.cat(labels)


def read_moments(folder: Path) -> Iterator[Moment]:
    """Those of a folder's files, by their steps."""

    def steps_of(file: Path) -> int:
        found = re.search(r"(\d+)$", file.stem)
        if found is None:
            raise SystemExit(f"{file} does not end in a number of steps")
        return int(found[1])

    for file in sorted(folder.glob("*.npz"), key=steps_of):
        arrays = {name: torch.from_numpy(array) for name, array in np.load(file).items()}
        count = sum(name.startswith("encoder") for name in arrays)
        utterances = tuple(
            (arrays[f"encoder{i}"], arrays[f"predictor{i}"], arrays[f"targets{i}"].long())
            for i in range(count)
        )
        name = file.stem.removesuffix(f"-step{steps_of(file)}")
        yield Moment(name, steps_of(file), utterances, arrays["weight"], arrays["bias"])


def train_example(config: Config) -> Iterator[Moment]:
    """Those of a training that runs meanwhile, on held-out strings."""
    sys.path.insert(0, str(ROOT))
    from examples.asr import config as example
    from examples.asr import train
    from examples.asr.model import encoder_lengths
    from examples.asr.parallel import join_world, whole_weights

    with TemporaryDirectory() as out, join_world("none", "cpu") as world:
        run = train.Run(
            example.Config(
                out=Path(out) / "run",
                steps=config.train_steps,
                test_strings=2 * config.strings,
                compile=False,
                seed=config.seed,
            ),
            world,
        )
        window = train.Window()
        for before, steps in pairwise((0, *config.train)):
            with redirect_stdout(sys.stderr):
                for _ in progress(range(before, steps), f"training to step {steps}"):
                    run.train_step(run.budget.progress(run.step), window)
            model = run.evaluated
            model.load_state_dict(whole_weights(run.model))
            strings: list[Utterance] = []
            with torch.no_grad():
                for batch, _ in run.held_out:
                    encoded, predicted = (
                        model.encoder(batch.features),
                        model.predictor(batch.targets),
                    )
                    frames, labels = encoder_lengths(batch.feature_lengths), batch.target_lengths
                    strings += [
                        (encoded[b, :t], predicted[b, : u + 1], batch.targets[b, :u])
                        for b, (t, u) in enumerate(
                            zip(frames.tolist(), labels.tolist(), strict=True)
                        )
                    ]
            # Strings are sorted by length: each utterance gets short and long ones.
            utterances = tuple(join(strings[first::2]) for first in (0, 1))
            weight, bias = model.joint.weight, model.joint.bias
            assert bias is not None
            yield Moment(
                "example", steps, utterances, weight.detach().clone(), bias.detach().clone()
            )


def problem_of(moment: Moment, joined: int, config: Config) -> Problem:
    """A batch of a moment's utterances, each begun ``joined`` times in turns."""
    count = len(moment.utterances)
    samples = [
        join([moment.utterances[(b + j) % count] for j in range(joined)])
        for b in range(config.batch)
    ]
    encoders, predictors, labels = (list(each) for each in zip(*samples, strict=True))
    columns = config.joint_dim - moment.weight.shape[1]
    rows = config.vocab_size - len(moment.weight)
    further = 0.02 * torch.randn(rows, moment.weight.shape[1])
    leaves = (
        F.pad(pad_sequence(encoders, batch_first=True), (0, columns)),
        F.pad(pad_sequence(predictors, batch_first=True), (0, columns)),
        F.pad(torch.cat((moment.weight, further)), (0, columns)),
        F.pad(moment.bias, (0, rows), value=-12.0),
    )
    lengths = (torch.tensor([len(sample) for sample in each]) for each in (encoders, labels))
    return Problem(leaves, pad_sequence(labels, batch_first=True), *lengths)


def problems(config: Config) -> Iterator[tuple[str, int | None, Problem]]:
    """Name, steps and batch."""
    lengths = ((config.frames, config.labels),) * config.batch
    workload = Workload(lengths, config.vocab_size, config.joint_dim, torch.float32)
    yield "uniform", None, random_joint(workload, score_std=0.0)
    yield "random, std 1", None, random_joint(workload)
    moments = [] if config.states is None else list(read_moments(config.states))
    for source in (train_example(config) if config.train else (), moments):
        for moment in source:
            for joined in config.joined:
                yield moment.training, moment.steps, problem_of(moment, joined, config)


def measure(problem: Problem, tolerance: float, config: Config) -> dict[str, Any]:
    backend = backend_for(CPU)
    product = gemm(problem, CHUNK_ROWS, linear, problem.leaves[0].dtype)

    def reached() -> tuple[Tensor, tuple[Tensor, ...]]:
        return problem.gradients(
            rnnt_op.joint_rnnt_loss, reduction="sum", gradient_tolerance=tolerance
        )

    def everything() -> tuple[Tensor, tuple[Tensor, ...]]:
        with patch.object(backend, "reach", lambda *_, **__: None):
            return reached()

    def again() -> tuple[Tensor, tuple[Tensor, ...]]:
        with patch.object(CpuMatrices, "KEEPS_LOGITS", False):
            return reached()

    expected_loss, expected = everything()
    with counted_nodes(CPU) as counts:
        loss, gradients = reached()
    error = relative_error(gradients, expected)
    if not error <= max(4 * torch.finfo(problem.leaves[0].dtype).eps, tolerance):
        raise SystemExit(f"gradients differ by {error:.1e}: nothing measured")
    seconds = interleaved_seconds(
        {"all": everything, "reached": reached, "again": again, "GEMM": product},
        repeats=config.repeats,
        seconds_of=processor_seconds,
    )
    return {
        "T": int(problem.frames.max()),
        "U": int(problem.labels.max()),
        "nats a label": float(expected_loss) / int(problem.labels.sum()),
        "scored %": 100 * counts.scored / problem.nodes,
        "kept %": 100 * counts.kept / problem.nodes,
        "seconds": median(seconds["reached"]),
        "GEMMs": median_ratio(seconds["reached"], seconds["GEMM"]),
        "GEMMs, all scored": median_ratio(seconds["all"], seconds["GEMM"]),
        "all / reached": median_ratio(seconds["all"], seconds["reached"]),
        "again / kept": median_ratio(seconds["again"], seconds["reached"]),
        "lost": counts.lost,
        "change of the loss": abs(float(loss / expected_loss) - 1),
        "change of the gradients": error,
    }


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    rows: list[dict[str, Any]] = []
    for name, steps, problem in problems(config):
        cast = problem.to(dtype_of(config.dtype))
        for of_dtype in config.tolerances:
            tolerance = torch.finfo(dtype_of(of_dtype)).eps / 128
            about = {"states": name, "steps": steps, "tolerance of": of_dtype}
            rows.append({**about, **measure(cast, tolerance, config)})
            # What is measured stays, should the rest be cut.
            shown = replace(config, states=config.states and Path(config.states.name))
            write_results(config.out, f"trajectory-{config.dtype}", shown, rows)
    print(
        f"B={config.batch} V={config.vocab_size} H={config.joint_dim} {config.dtype}, loss and "
        f"gradients, processor time of the first of {config.threads} threads; "
        f"{describe_machine()}\n"
    )
    print(markdown_table(rows))
    print(
        "\nScored, kept: shares of all nodes, in the score pass and the backward pass. GEMMs: time "
        "in forward GEMMs of all nodes. Again: with logits computed again instead "
        "of kept. Lost: what other nodes have of a sample's probability at most, as a share of it."
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
