"""GEMMs of bfloat16 operands on this CPU: their speed beside float32, and d_weight's exactness.

A CPU without instructions for bfloat16 computes in float32 (``sources.CPU``), others by MKL, whose
results are float32 (``backends.gemm``); the first table shows why. The second is of the weight's
gradient: with ``torch.mm``, whose result is bfloat16, a chunk's part would be rounded before it is
added. Errors are relative to float64, after the sum is rounded to the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from torch import Tensor

from rnnt_op.jit.cpu import multiplies_bfloat16
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import interleaved_seconds, processor_seconds
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results
from rnnt_op.torch_private import has_mkl_bfloat16_gemm, mkl_bfloat16_gemm


@dataclass(frozen=True)
class Config:
    """Speed and exactness of bfloat16 GEMMs."""

    rows: int = 2048
    vocab_size: int = 1024
    joint_dim: int = 640
    repeats: int = 9
    problems: int = 8
    """Of the second table, each with 16 chunks of 1,024 rows."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def speeds(config: Config) -> list[dict[str, Any]]:
    weight = torch.randn(config.vocab_size, config.joint_dim)
    hidden = torch.randn(config.rows, config.joint_dim)
    d_logits = torch.randn(config.rows, config.vocab_size)
    products: dict[str, tuple[Tensor, Tensor]] = {
        "logits": (hidden, weight.t()),
        "d_hidden": (d_logits, weight),
        "d_weight": (d_logits.t(), hidden),
    }

    def ways(name: str) -> dict[str, Callable[[], object]]:
        wide = products[name]
        # Converted as they lie, transposed or not.
        a, b = (operand.bfloat16() for operand in wide)
        sums = torch.zeros(len(a), b.shape[1])
        found: dict[str, Callable[[], object]] = {
            "float32": lambda: torch.mm(*wide),
            "bfloat16": lambda: torch.mm(a, b),
            "bfloat16, widened": lambda: sums.addmm_(a.float(), b.float()),
        }
        if has_mkl_bfloat16_gemm():
            found["bfloat16, float32 result by MKL"] = partial(
                mkl_bfloat16_gemm, a, b, sums, add=True
            )
        return found

    functions = {
        f"{name}: {way}": function for name in products for way, function in ways(name).items()
    }
    seconds = interleaved_seconds(functions, repeats=config.repeats, seconds_of=processor_seconds)
    work = 2e-9 * config.rows * weight.numel()
    rates = {name: work / min(each) for name, each in seconds.items()}
    return [
        {
            "GFLOP/s": name,
            **{
                key.partition(": ")[2]: rate
                for key, rate in rates.items()
                if key.startswith(f"{name}: ")
            },
        }
        for name in products
    ]


def errors(config: Config) -> list[dict[str, Any]]:
    """Of sums over chunks."""
    found: dict[str, list[float]] = {}
    for _ in range(config.problems):
        hidden = torch.randn(16, 1024, 128).tanh().bfloat16()
        d_logits = (torch.randn(16, 1024, 256) * torch.rand(16, 1024, 1) ** 4).bfloat16()
        parts = [d.float().t() @ h.float() for d, h in zip(d_logits, hidden, strict=True)]
        truth = d_logits.flatten(0, 1).double().t() @ hidden.flatten(0, 1).double()
        wide = sum(parts, torch.zeros(256, 128))
        narrow = sum((part.bfloat16().float() for part in parts), torch.zeros(256, 128))
        for name, gradient in {
            "one product, rounded once, as plain torch": wide.bfloat16(),
            "parts rounded, their sum rounded": narrow.bfloat16(),
            "parts rounded, for a float32 weight": narrow,
        }.items():
            found.setdefault(name, []).append(relative_error([gradient], [truth]))
    return [{"d_weight": name, "relative error": mean(each)} for name, each in found.items()]


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    print(f"{describe_machine()}; instructions for bfloat16: {multiplies_bfloat16()}\n")
    speed, error = speeds(config), errors(config)
    print(f"{markdown_table(speed)}\n\n{markdown_table(error)}")
    write_results(config.out, "gemm-bfloat16", config, {"speed": speed, "error": error})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
