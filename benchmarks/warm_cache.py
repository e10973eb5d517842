"""Compiles once what the GPU's tests and benchmarks run, before many processes want it at once.

What benchmarks take comes first; the cache keeps what was compiled if there is no time for all.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from command_line import parse
from on_device import chosen_device

from rnnt_op import validation
from rnnt_op.activations import ACTIVATIONS
from rnnt_op.precompile import precompile
from rnnt_op.tools.study.measure import is_gpu
from rnnt_op.topologies import constrained, hat, modified, multi_blank, star, tdt
from rnnt_op.topology import RNNT


@dataclass(frozen=True)
class Config:
    """Kernels in the cache of RNNT_OP_CACHE_DIR."""

    device: str = "auto"


def stages(device: str) -> list[dict[str, Any]]:
    """Arguments of ``precompile``, in order; on a CPU, where this is a try, the first alone."""
    halves = (torch.bfloat16, torch.float32)
    first = {"dtypes": halves[:1], "activations": ("tanh",)}
    if not is_gpu(device):
        return [{**first, "architectures": ("cpu",)}]
    numbers = ((2, 4), (0, 1, 2, 3))
    # The numbers of a topology are arguments of its kernels: any will do.
    others = (modified(), constrained(), star(0.5), multi_blank(numbers[0]), tdt(numbers[1]))
    return [
        {"dtypes": halves, "activations": ("tanh",)},
        {"dtypes": validation.FLOAT_DTYPES, "activations": ("tanh",)},
        {
            "dtypes": (torch.float64,),
            "activations": ("tanh",),
            "topologies": (hat(RNNT), *others, *map(hat, others[:3])),
        },
        {"dtypes": validation.FLOAT_DTYPES, "activations": ACTIVATIONS},
    ]


def compiled(asked: Sequence[dict[str, Any]]) -> Counter[str]:
    """Compiles stage by stage; returns how many came from where."""
    counts: Counter[str] = Counter()
    for number, options in enumerate(asked, 1):
        start = time.perf_counter()
        kernels = precompile(**options)
        counts.update("cache" if kernel.cached else "compiler" for kernel in kernels)
        print(f"stage {number}: {len(kernels)} sources, {time.perf_counter() - start:.1f} s")
    return counts


def main(config: Config) -> None:
    counts = compiled(stages(chosen_device(config.device)))
    print(", ".join(f"{count} from the {place}" for place, count in counts.items()))


if __name__ == "__main__":
    main(parse(Config, __doc__))
