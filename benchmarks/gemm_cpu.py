"""The libraries that torch multiplies float32 matrices with on this CPU, and which is faster.

``torch.mm`` calls the BLAS that torch was built with; oneDNN, which torch carries too, is what
``rnnt_op.backends.gemm`` takes. Shapes are those of one chunk: logits, the gradient of the hidden
states, and that of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import Tensor

from rnnt_op.backends.gemm import linear
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results


@dataclass(frozen=True)
class Config:
    """Time of a chunk's GEMMs."""

    rows: tuple[int, ...] = (16, 256, 1024, 4096)
    joint_and_vocab: tuple[tuple[int, int], ...] = ((640, 1024), (512, 500), (320, 4096), (64, 40))
    calls: int = 10
    """Timed together."""
    repeats: int = 7
    seed: int = 0
    out: Path = Path("benchmarks/results")


def measure(name: str, x: Tensor, weight: Tensor, config: Config) -> dict[str, Any]:
    """x · weightᵀ by both."""

    def many(product: Any) -> Any:
        return lambda: [product() for _ in range(config.calls)]

    seconds = interleaved_seconds(
        {
            "mm": many(lambda: torch.mm(x, weight.t())),
            "oneDNN": many(lambda: linear(x, weight)),
        },
        repeats=config.repeats,
    )
    flop = 2e-9 * x.shape[0] * weight.shape[0] * weight.shape[1] * config.calls
    return {
        "what": name,
        "M": x.shape[0],
        "N": weight.shape[0],
        "K": weight.shape[1],
        "mm GFLOP/s": flop / median(seconds["mm"]),
        "oneDNN GFLOP/s": flop / median(seconds["oneDNN"]),
        "mm / oneDNN": median_ratio(seconds["mm"], seconds["oneDNN"]),
    }


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    rows = []
    for joint_dim, vocab_size in config.joint_and_vocab:
        weight = torch.randn(vocab_size, joint_dim)
        for count in config.rows:
            hidden, d_logits = torch.randn(count, joint_dim), torch.randn(count, vocab_size)
            rows += [
                measure("logits", hidden, weight, config),
                measure("d_hidden", d_logits, weight.t(), config),
                measure("d_weight", d_logits.t(), hidden.t(), config),
            ]
    print(f"float32; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "gemm", config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
