"""The headline: batch 1024 of 40 s audio, loss and all gradients, in how much memory and time.

B=1024, T=1000, U=200, V=1024, H=640, where plain torch's logits alone would take 421 GB in
bfloat16. Memory is the most that torch's tensors take in total, inputs and gradients included. On a
CPU the same runs at a toy size, to try the script.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from command_line import parse
from on_device import (
    bytes_of,
    chosen_device,
    is_gpu,
    results_folder,
    seconds_on,
    with_peak_bytes,
)

import rnnt_op
from rnnt_op.study.correctness import relative_error, require_correct
from rnnt_op.study.measure import kept_fraction
from rnnt_op.study.problems import DtypeName, Problem, dtype_of, first_samples, random_joint
from rnnt_op.study.report import describe_machine, markdown_table, write_results

GB = 1e9
MEMORY_BAR_GB = 4.0  # in bfloat16, at full size
FULL = {"batch": 1024, "frames": 1000, "labels": 200, "vocab_size": 1024, "joint_dim": 640}
TOY = {"batch": 4, "frames": 30, "labels": 9, "vocab_size": 40, "joint_dim": 24}
SAMPLES_CHECKED = 2


@dataclass(frozen=True)
class Config:
    """Memory and time of one big batch."""

    batch: int | None = None
    """None, here and below: the headline's size on a GPU, a toy's on a CPU."""
    frames: int | None = None
    labels: int | None = None
    vocab_size: int | None = None
    joint_dim: int | None = None
    dtypes: tuple[DtypeName, ...] = ("bfloat16", "float32")
    score_std: float = 1.0
    """Standard deviation of the random logits."""
    repeats: int = 2
    """Timed runs, after one that is not."""
    workspace_mib: int | None = None
    """None: the default of the device."""
    device: str = "auto"
    seed: int = 0
    out: Path | None = None
    """Folder of the JSON; by default benchmarks/results on a GPU, none on a CPU."""


def sizes_of(config: Config, device: str) -> dict[str, int]:
    defaults = FULL if is_gpu(device) else TOY
    asked = {name: getattr(config, name) for name in defaults}
    return {name: defaults[name] if size is None else size for name, size in asked.items()}


def release(device: str) -> None:
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()


def measure(name: DtypeName, config: Config, device: str) -> dict[str, Any]:
    """One dtype's row."""
    size, dtype = sizes_of(config, device), dtype_of(name)
    batch, frames, labels = size["batch"], size["frames"], size["labels"]
    workspace = None if config.workspace_mib is None else config.workspace_mib * 2**20
    loss_of = partial(rnnt_op.joint_rnnt_loss, workspace_bytes=workspace)
    require_correct(dtype, device)
    release(device)

    problem = random_joint(
        [(frames, labels)] * batch,
        vocab_size=size["vocab_size"],
        joint_dim=size["joint_dim"],
        dtype=dtype,
        score_std=config.score_std,
        device=device,
    )
    few = first_samples(problem, min(SAMPLES_CHECKED, batch))
    few_result = few.gradients(loss_of)  # compiles kernels and opens cuBLAS, too
    release(device)

    (loss, gradients), before, peak = with_peak_bytes(device, lambda: problem.gradients(loss_of))
    inputs = bytes_of((*problem.leaves, problem.targets))
    checks = check(problem, few, loss_of, (loss, gradients), few_result)
    outputs = bytes_of(gradients)
    del gradients
    release(device)
    seconds_of = seconds_on(device)
    seconds = [seconds_of(lambda: problem.gradients(loss_of)) for _ in range(config.repeats)]
    typical = median(seconds)
    full = is_gpu(device) and size == FULL
    in_total = peak if is_gpu(device) else peak - before + inputs
    return {
        "dtype": name,
        "peak GB in total": in_total / GB,
        f"≤ {MEMORY_BAR_GB:g} GB": in_total <= MEMORY_BAR_GB * GB
        if full and name == "bfloat16"
        else None,
        "inputs GB": inputs / GB,
        "gradients GB": outputs / GB,
        "other GB": (in_total - inputs - outputs) / GB,
        "logits of plain torch GB": problem.nodes * size["vocab_size"] * dtype.itemsize / GB,
        "seconds": typical,
        "slowest s": max(seconds),
        "frames / s": batch * frames / typical,
        "labels / s": batch * labels / typical,
        "nodes / s": problem.nodes / typical,
        "nodes kept %": 100 * kept_fraction(few, lambda: few.gradients(loss_of)),
        "loss": float(loss),
        **checks,
    }


Result = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def check(
    problem: Problem, few: Problem, loss_of: Any, whole: Result, few_result: Result
) -> dict[str, Any]:
    """Whether the big batch's result is finite, and its first samples' the same as on their own.

    GEMMs of other sizes may add in another order, and gradients in half are rounded.
    """
    loss, gradients = whole
    with torch.no_grad():
        losses = problem.loss(loss_of, reduction="none")
        few_losses = few.loss(loss_of, reduction="none")
    count, batch = len(few_losses), len(losses)
    same_losses = relative_error([losses[:count]], [few_losses])
    same_mean = relative_error([loss], [losses.double().mean()])
    # Both are gradients of a mean over their batch.
    own = [gradient[:count].double() * batch / count for gradient in gradients[:2]]
    same_gradients = relative_error(own, few_result[1][:2])
    bar = 2e-2 if problem.leaves[0].dtype.itemsize == 2 else 1e-4
    return {
        "finite": all(bool(tensor.isfinite().all()) for tensor in (loss, *gradients)),
        "first losses as alone": same_losses <= 1e-5 and same_mean <= 1e-5,
        "their gradients as alone": same_gradients <= bar,
        "relative distances": f"{same_losses:.0e}, {same_mean:.0e}, {same_gradients:.0e}",
    }


def main(config: Config) -> None:
    device = chosen_device(config.device)
    rows = []
    for name in config.dtypes:
        torch.manual_seed(config.seed)
        rows.append(measure(name, config, device))
        release(device)
    size = sizes_of(config, device)
    title = " ".join(f"{key}={value}" for key, value in size.items())
    print(
        f"{title}, random posterior of score std {config.score_std:g}; {describe_machine(device)}"
    )
    if not is_gpu(device):
        print("On a CPU: the script is tried, nothing is measured.")
    print(f"\n{markdown_table(rows)}")
    print(
        "\nRelative distances: the first samples' losses from a batch of their own, the loss from "
        "the losses' mean, the first samples' gradients from a batch of their own."
    )
    out = results_folder(config.out, device)
    if out is not None:
        title = "headline" if is_gpu(device) else "headline-toy"
        record = {"sizes": size, "rows": rows}
        write_results(out, title, replace(config, device=device), record, device=device)
    failed = [f"{row['dtype']}: {key}" for row in rows for key in row if row[key] is False]
    if failed:
        raise SystemExit("not met: " + "; ".join(failed))


if __name__ == "__main__":
    main(parse(Config, __doc__))
