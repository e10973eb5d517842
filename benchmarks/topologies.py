"""Time and memory of each topology, normaliser and regulariser, relative to the regular transducer.

All take turns within a round on the same states, lengths and targets, and ratios are taken within a
round. Memory is what the engine plans for one node, from scores to selection; it is the same on
every device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.memory import Workload
from rnnt_op.tools.study.correctness import relative_error
from rnnt_op.tools.study.measure import interleaved_seconds, kept_fraction, median_ratio
from rnnt_op.tools.study.problems import DtypeName, Problem, dtype_of, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results
from rnnt_op.topologies import RNNT, Topology, constrained, hat, modified, multi_blank, star, tdt


@dataclass(frozen=True)
class Config:
    """Time and memory of each variant."""

    dtype: DtypeName = "float32"
    batch: int = 4
    frames: int = 300
    labels: int = 80
    vocab_size: int = 1024
    joint_dim: int = 640
    repeats: int = 5
    seed: int = 0
    out: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Variant:
    topology: Topology
    normalizer: str = "softmax"
    fast_emit: float = 0.0
    delay_penalty: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        return vars(self)


REGULAR = "regular"
VARIANTS = {
    REGULAR: Variant(RNNT),
    "modified": Variant(modified()),
    "constrained": Variant(constrained()),
    "multi-blank 2, 4, 8": Variant(multi_blank((2, 4, 8), columns=(-1, -2, -3), sigma=0.05)),
    "TDT 0 to 4": Variant(tdt((0, 1, 2, 3, 4), sigma=0.05)),
    "star": Variant(star(0.5)),
    "HAT": Variant(RNNT, normalizer="hat"),
    "FastEmit and delay penalty": Variant(RNNT, fast_emit=0.01, delay_penalty=0.01),
}


# Gradients are compared at this size.
SMALL: dict[str, Any] = {"batch": 2, "frames": 20, "labels": 6, "vocab_size": 32, "joint_dim": 24}


def problem_of(variant: Variant, config: Config) -> Problem:
    torch.manual_seed(config.seed)
    lengths = ((config.frames, config.labels),) * config.batch
    columns = config.vocab_size + variant.topology.extra_columns
    problem = random_joint(Workload(lengths, columns, config.joint_dim, dtype_of(config.dtype)))
    # No label is among the columns of further blanks or of durations.
    problem.targets.clamp_(max=config.vocab_size - 9)
    return problem


def require_correct(variant: Variant, config: Config) -> None:
    problem = problem_of(variant, replace(config, **SMALL))
    _, gradients = problem.gradients(rnnt_op.joint_rnnt_loss, **variant.options)
    _, truth = problem.to(torch.float64).gradients(
        rnnt_op.reference.joint_rnnt_loss, **variant.options
    )
    bar = {torch.float64: 1e-9, torch.float32: 2e-5}.get(dtype_of(config.dtype), 2e-2)
    error = relative_error(gradients, truth)
    if not error <= bar:
        raise SystemExit(
            f"wrong gradients, nothing measured: {variant}, relative error {error:.1e}"
        )


def main(config: Config) -> None:
    for variant in VARIANTS.values():
        require_correct(variant, config)
    problems = {name: problem_of(variant, config) for name, variant in VARIANTS.items()}

    def run(name: str) -> Any:
        return problems[name].gradients(rnnt_op.joint_rnnt_loss, **VARIANTS[name].options)

    functions = {name: (lambda name=name: run(name)) for name in VARIANTS}
    seconds = interleaved_seconds(functions, repeats=config.repeats)
    backend = backend_for(torch.device("cpu"))
    rows = []
    for name, variant in VARIANTS.items():
        topology = variant.topology if variant.normalizer == "softmax" else hat(variant.topology)
        nodes = problems[name].nodes
        node_bytes = backend.lattice_bytes(
            topology, config.batch, config.frames, config.labels + 1, nodes
        )
        rows.append(
            {
                "variant": name,
                "symbols": len(topology.symbols),
                "arcs": len(topology.arcs),
                "median s": median(seconds[name]),
                "× regular": median_ratio(seconds[name], seconds[REGULAR]),
                "nodes kept": kept_fraction(problems[name], functions[name]),
                "bytes a node": node_bytes / nodes,
            }
        )
    print(f"{problems[REGULAR].workload}, forward and backward; {describe_machine()}\n")
    print(markdown_table(rows))
    write_results(config.out, "topologies", config, rows)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
