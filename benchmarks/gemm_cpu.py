"""The libraries that torch multiplies float32 matrices with on this CPU, and which one is taken.

``torch.mm`` calls the BLAS that torch was built with; torch carries oneDNN, too. Shapes are those
of one chunk: logits, the gradient of the hidden states, and that of the weight, which is added to
what earlier chunks left. The choice is made anew, in an empty cache. The bar is 3 % above the
faster library, by processor time of the calling thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

from rnnt_op.backends import gemm, measured
from rnnt_op.tools.study.measure import interleaved_seconds, median_ratio, processor_seconds
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results
from rnnt_op.torch_private import onednn_linear


@dataclass(frozen=True)
class Config:
    """Time of a chunk's GEMMs."""

    rows: tuple[int, ...] = (256, 1024, 4096)
    joint_and_vocab: tuple[tuple[int, int], ...] = ((640, 1024), (512, 500), (320, 4096), (64, 40))
    calls: int = 4
    """Timed together."""
    repeats: int = 7
    seed: int = 0
    out: Path = Path("benchmarks/results")


def measure(name: str, products: dict[str, Callable[[], object]], config: Config) -> dict[str, Any]:
    """A product by both libraries, and which one is taken.

    Args:
        products: by ``onednn``, by ``blas``, and as chosen.
    """

    def many(product: Callable[[], object]) -> Callable[[], object]:
        return lambda: [product() for _ in range(config.calls)]

    start = time.perf_counter()
    products["chosen"]()
    first = time.perf_counter() - start
    taken = CHOSEN.pop() if CHOSEN else "blas"
    libraries = {library: many(products[library]) for library in ("onednn", "blas")}
    seconds = interleaved_seconds(libraries, repeats=config.repeats, seconds_of=processor_seconds)
    least = {library: min(each) / config.calls for library, each in seconds.items()}
    return {
        "what": name,
        "oneDNN ms": 1e3 * least["onednn"],
        "BLAS ms": 1e3 * least["blas"],
        "oneDNN / BLAS": median_ratio(seconds["onednn"], seconds["blas"]),
        "taken": taken,
        "× faster one": least[taken] / min(least.values()),
        "first call ms": 1e3 * first,
        "≤ 1.03": least[taken] <= 1.03 * min(least.values()),
    }


CHOSEN: list[str] = []


def main(config: Config) -> int:
    torch.manual_seed(config.seed)
    rows = []
    ask = measured.fastest

    def noted(*question: Any) -> str:
        CHOSEN[:] = [ask(*question)]
        return CHOSEN[0]

    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, {"RNNT_OP_CACHE_DIR": cache}),
        patch.object(gemm, "fastest", noted),
    ):
        for joint_dim, vocab_size in config.joint_and_vocab:
            weight = torch.randn(vocab_size, joint_dim)
            for count in config.rows:
                rows += measure_chunk(weight, count, config)
    print(f"float32; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "gemm", config, rows)
    return int(not all(row["≤ 1.03"] for row in rows))


def measure_chunk(weight: Tensor, count: int, config: Config) -> list[dict[str, Any]]:
    columns, joint_dim = weight.shape
    hidden, d_logits = torch.randn(count, joint_dim), torch.randn(count, columns)
    sums, matrices = torch.zeros_like(weight), gemm.CpuMatrices()
    products: dict[str, dict[str, Callable[[], object]]] = {
        "logits": {
            "onednn": lambda: onednn_linear(hidden, weight),
            "blas": lambda: torch.mm(hidden, weight.t()),
            "chosen": lambda: gemm.linear(hidden, weight),
        },
        "d_hidden": {
            "onednn": lambda: onednn_linear(d_logits, weight.t()),
            "blas": lambda: torch.mm(d_logits, weight),
            "chosen": lambda: gemm.linear(d_logits, weight.t()),
        },
        "d_weight": {
            "onednn": lambda: sums.add_(onednn_linear(d_logits.t(), hidden.t())),
            "blas": lambda: sums.addmm_(d_logits.t(), hidden),
            "chosen": lambda: matrices.add_product_(sums, d_logits.t(), hidden),
        },
    }
    return [
        measure(f"{kind} M={count} V={columns} H={joint_dim}", each, config)
        for kind, each in products.items()
    ]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config, description=__doc__)))
