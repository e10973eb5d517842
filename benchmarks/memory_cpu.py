"""Peak resident memory above inputs and gradients, each configuration in a fresh process.

The peak is the operating system's own high-water mark (Linux), so nothing between two polls is
missed. What the process held before the call is subtracted, and so are the gradients that the call
returns.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

import rnnt_op
from rnnt_op.memory import Lengths, Workload
from rnnt_op.tools.study.correctness import require_correct
from rnnt_op.tools.study.measure import resident_bytes
from rnnt_op.tools.study.problems import DtypeName, dtype_of, random_joint, recorded_lengths
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


def cases(config: Config) -> list[tuple[Method, Workload]]:
    """Ours at every batch size; plain torch at those, and at half the length, where it fits."""
    model = config.vocab_size, config.joint_dim, dtype_of(config.dtype)
    if config.lengths is None:
        shape, half_shape = (config.frames, config.labels), (config.frames // 2, config.labels // 2)
        batches: list[Lengths] = [(shape,) * batch for batch in config.batches]
        half: list[Lengths] = [(half_shape,)]
    else:
        path, seed = config.lengths, config.seed
        batches, half = [recorded_lengths(path, batch, seed) for batch in config.batches], []
    ours: list[tuple[Method, Workload]] = [("rnnt_op", Workload(b, *model)) for b in batches]
    return ours + [("plain torch", Workload(b, *model)) for b in half + batches]


def peak_above_inputs_and_gradients(method: Method, workload: Workload, seed: int) -> int:
    """Bytes; to be called in a fresh process, whose high-water mark nothing else has raised."""
    torch.manual_seed(seed)
    joint_rnnt_loss = {
        "rnnt_op": rnnt_op.joint_rnnt_loss,
        "plain torch": rnnt_op.reference.joint_rnnt_loss,
    }[method]
    # Threads, GEMM libraries and autograd allocate what they need once.
    random_joint(replace(workload, lengths=((4, 2),))).gradients(joint_rnnt_loss)
    problem = random_joint(workload)
    before = resident_bytes("VmRSS")
    _, gradients = problem.gradients(joint_rnnt_loss)
    gradient_bytes: int = sum(gradient.nbytes for gradient in gradients)
    return resident_bytes("VmHWM") - before - gradient_bytes


def in_fresh_process(method: Method, workload: Workload, seed: int) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(peak_above_inputs_and_gradients, method, workload, seed).result()


def row_of(method: Method, workload: Workload, config: Config) -> dict[str, Any]:
    batched_mib = rnnt_op.memory.batched_bytes(workload) / MIB
    ours = method == "rnnt_op"
    row: dict[str, Any] = {
        "method": method,
        "B": workload.batch,
        "T": workload.frames,
        "U": workload.labels,
        "measured MiB": None,
        "batched_bytes MiB": round(batched_mib),
        "measured / batched_bytes": None,
        "within bar": None,
    }
    if ours or batched_mib <= config.reference_limit_mib:
        measured_mib = in_fresh_process(method, workload, config.seed) / MIB
        row["measured MiB"] = round(measured_mib)
        row["measured / batched_bytes"] = measured_mib / batched_mib
        row["within bar"] = measured_mib <= config.bar_mib if ours else None
    return row


def main(config: Config) -> None:
    require_correct(dtype_of(config.dtype))
    rows = [row_of(*case, config) for case in tqdm(cases(config), desc="processes", leave=False)]
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
