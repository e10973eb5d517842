"""Peak resident memory above inputs and gradients, each configuration in a fresh process.

The peak is the operating system's own high-water mark (Linux), so nothing between two polls is
missed. What the process held before the call is subtracted, and so are the gradients that the call
returns.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

import rnnt_op
from rnnt_op.tools.study.correctness import require_correct
from rnnt_op.tools.study.measure import resident_bytes
from rnnt_op.tools.study.problems import (
    DtypeName,
    Problem,
    dtype_of,
    random_joint,
    recorded_lengths,
)
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results

MIB = 2**20
Method = Literal["rnnt_op", "plain torch"]


@dataclass(frozen=True)
class Config:
    """Peak memory of forward and backward."""

    batches: tuple[int, ...] = (1, 4, 16)
    frames: int = 1000
    labels: int = 200
    lengths: Path | None = None
    """A .npy file of [n, 2] lengths (T, U) to draw each batch from, instead of one shape."""
    vocab_size: int = 1024
    joint_dim: int = 64
    dtype: DtypeName = "float32"
    bar_mib: int = 400
    """Most that rnnt_op may use."""
    reference_limit_mib: int = 6 * 1024
    """Plain torch is measured only where its formula says that it needs less."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Case:
    """One measurement."""

    method: Method
    lengths: tuple[tuple[int, int], ...]  # (T, U) of each sample
    vocab_size: int
    joint_dim: int
    dtype: DtypeName
    seed: int

    @property
    def frames(self) -> int:
        return max(t for t, _ in self.lengths)

    @property
    def labels(self) -> int:
        return max(u for _, u in self.lengths)

    @property
    def batched_bytes(self) -> int:
        return rnnt_op.memory.batched_bytes(
            batch=len(self.lengths),
            frames=self.frames,
            labels=self.labels,
            vocab_size=self.vocab_size,
            joint_dim=self.joint_dim,
            dtype=dtype_of(self.dtype),
        )


def cases(config: Config) -> list[Case]:
    """Ours at every batch size; plain torch at those, and at half the length, where it fits."""

    def case(method: Method, lengths: Sequence[tuple[int, int]]) -> Case:
        return Case(
            method=method,
            lengths=tuple(lengths),
            vocab_size=config.vocab_size,
            joint_dim=config.joint_dim,
            dtype=config.dtype,
            seed=config.seed,
        )

    if config.lengths is None:
        batches = [[(config.frames, config.labels)] * batch for batch in config.batches]
        half = [[(config.frames // 2, config.labels // 2)]]
    else:
        path, seed = config.lengths, config.seed
        batches, half = [recorded_lengths(path, batch, seed) for batch in config.batches], []
    ours = [case("rnnt_op", lengths) for lengths in batches]
    return ours + [case("plain torch", lengths) for lengths in half + batches]


def peak_above_inputs_and_gradients(case: Case) -> int:
    """Bytes; to be called in a fresh process, whose high-water mark nothing else has raised."""
    torch.manual_seed(case.seed)
    joint_rnnt_loss = {
        "rnnt_op": rnnt_op.joint_rnnt_loss,
        "plain torch": rnnt_op.reference.joint_rnnt_loss,
    }[case.method]

    def problem_of(lengths: Sequence[tuple[int, int]]) -> Problem:
        return random_joint(
            lengths,
            vocab_size=case.vocab_size,
            joint_dim=case.joint_dim,
            dtype=dtype_of(case.dtype),
        )

    # Threads, GEMM libraries and autograd allocate what they need once.
    problem_of([(4, 2)]).gradients(joint_rnnt_loss)
    problem = problem_of(case.lengths)
    before = resident_bytes("VmRSS")
    _, gradients = problem.gradients(joint_rnnt_loss)
    gradient_bytes: int = sum(gradient.nbytes for gradient in gradients)
    return resident_bytes("VmHWM") - before - gradient_bytes


def in_fresh_process(case: Case) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_above_inputs_and_gradients, case).result()


def row_of(case: Case, config: Config) -> dict[str, Any]:
    batched_mib = case.batched_bytes / MIB
    ours = case.method == "rnnt_op"
    row: dict[str, Any] = {
        "method": case.method,
        "B": len(case.lengths),
        "T": case.frames,
        "U": case.labels,
        "measured MiB": None,
        "batched_bytes MiB": round(batched_mib),
        "measured / batched_bytes": None,
        "within bar": None,
    }
    if ours or batched_mib <= config.reference_limit_mib:
        measured_mib = in_fresh_process(case) / MIB
        row["measured MiB"] = round(measured_mib)
        row["measured / batched_bytes"] = measured_mib / batched_mib
        row["within bar"] = measured_mib <= config.bar_mib if ours else None
    return row


def main(config: Config) -> None:
    require_correct(dtype_of(config.dtype))
    rows = [row_of(case, config) for case in tqdm(cases(config), desc="processes", leave=False)]
    print(
        f"Peak resident memory above inputs and gradients; V={config.vocab_size} "
        f"H={config.joint_dim} {config.dtype}; {describe_machine()}\n"
    )
    print(markdown_table(rows))
    print(f"\nBar for rnnt_op: {config.bar_mib} MiB at any batch size.")
    ragged = "" if config.lengths is None else "-ragged"
    write_results(config.out, f"memory{ragged}", config, rows)
    if any(row["within bar"] is False for row in rows):
        raise SystemExit(f"rnnt_op used more than {config.bar_mib} MiB")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
