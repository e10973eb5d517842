"""How many nodes the backward pass keeps, and what skipping the others costs.

By posterior and tolerance. The skipped gradient mass is measured, not predicted: the L1 norm of
every node's explicit logit gradient is summed over the skipped nodes. Everything runs in float64,
so that no rounding hides behind the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from posteriors import train
from torch import Tensor
from tqdm import tqdm

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.backends.records import Logits, least_gradient
from rnnt_op.logits import JointLogits
from rnnt_op.memory import Workload
from rnnt_op.nodes import Nodes, Rows, pack_nodes
from rnnt_op.plan import Group
from rnnt_op.tools.study.correctness import relative_error, require_correct
from rnnt_op.tools.study.problems import Problem, random_joint
from rnnt_op.tools.study.report import describe_machine, markdown_table, write_results
from rnnt_op.topology import RNNT

_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Config:
    """Kept nodes, skipped gradient mass and gradient error."""

    batch: int = 2
    frames: int = 400
    labels: int = 80
    vocab_size: int = 256
    joint_dim: int = 64
    tolerances: tuple[float, ...] = (1e-3, 1e-4, 1e-6, 1.2e-7, 9.3e-10, 0.0)
    """1.2e-7 is the rounding unit of float32; a 128th of it is the default for float32."""
    training_steps: tuple[int, ...] = (40, 300)
    """Adam steps on one batch, ascending, which learn it by heart; each makes a posterior."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def posteriors(config: Config) -> dict[str, Problem]:
    """Joint problems from no opinion about the alignment to a firm one."""
    lengths = ((config.frames, config.labels),) * config.batch
    workload = Workload(lengths, config.vocab_size, config.joint_dim, torch.float64)
    return {
        "uniform": random_joint(workload, score_std=0.0),
        "random, std 1": random_joint(workload),
        "random, std 3": random_joint(workload, score_std=3.0),
        **train(random_joint(workload), config.training_steps),
    }


@dataclass(frozen=True)
class ScoredLattice:
    """What the backward pass selects nodes from, for a joint problem."""

    nodes: Nodes
    columns: Tensor  # logit column of each symbol of each state. [P, S]
    scores: Tensor  # log-probability of each symbol. [N, S]
    log_likelihood: Tensor  # [S]
    occupancy: Tensor  # [N, S]
    logits: Callable[[Rows], Logits]

    def selected(self, gradient_tolerance: float) -> Tensor:
        """Rows that the backward pass keeps."""
        return backend_for(self.scores.device).select_nodes(
            RNNT,
            self.nodes,
            self.scores,
            self.occupancy,
            weight=torch.ones_like(self.log_likelihood),
            tolerance=gradient_tolerance,
            least=least_gradient(torch.float32),
        )()


def score_lattice(problem: Problem) -> ScoredLattice:
    """The score and lattice passes of the backend, over all samples as one group."""
    encoder, _, weight, _ = problem.leaves
    backend = backend_for(encoder.device)
    frames = tuple(problem.frames.tolist())
    states = tuple((problem.labels + 1).tolist())
    group = Group(tuple(range(len(frames))), frames, states)
    nodes = pack_nodes(group, problem.targets, backend)
    columns = RNNT.columns(nodes.packed.next_label, 0, weight.shape[0])
    source = JointLogits(backend, problem.arguments)
    source.allocate(_CHUNK_ROWS, 0)
    logits = source.group(nodes).logits
    scores = encoder.new_empty((len(nodes.rows), len(RNNT.symbols)), dtype=torch.float64)
    for start, rows in chunks(nodes):
        chunk = scores[start : start + len(rows)]
        backend.symbol_scores(RNNT, logits(rows), columns, rows, True, chunk)
    lattice = backend.forward_backward(RNNT, nodes, scores, occupancies=True)
    assert lattice.occupancy is not None
    return ScoredLattice(nodes, columns, scores, lattice.log_likelihood, lattice.occupancy, logits)


def chunks(nodes: Nodes) -> Iterator[tuple[int, Rows]]:
    """Position and rows of each chunk."""
    for start in range(0, len(nodes.rows), _CHUNK_ROWS):
        yield start, nodes.rows.at(slice(start, start + _CHUNK_ROWS))


def explicit_gradient_mass(scored: ScoredLattice) -> Tensor:
    """L1 norm of each node's logit gradient, from the logit gradients themselves. [N]"""
    nodes, masses = scored.nodes, []
    for start, rows in chunks(nodes):
        occupancy = scored.occupancy[start : start + len(rows)]
        d_logits = scored.logits(rows).values.softmax(1) * occupancy.sum(1, keepdim=True)
        # A symbol that does not exist has occupancy zero, wherever it is subtracted.
        columns = scored.columns.index_select(0, rows.state).clamp(min=0)
        masses.append(d_logits.scatter_add_(1, columns, -occupancy).abs().sum(1))
    return torch.cat(masses)


def measure(name: str, problem: Problem, tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row a tolerance."""
    scored = score_lattice(problem)
    mass = explicit_gradient_mass(scored)
    sample = scored.nodes.sample_of(scored.nodes.rows)
    # A node's explicit mass is a difference of numbers as large as its occupancy: it rounds there.
    path_length = (problem.frames + problem.labels).double()
    sample_mass = mass.new_zeros(len(problem.frames)).index_add_(0, sample, mass)
    rounding = 4 * torch.finfo(mass.dtype).eps * path_length / sample_mass
    _, exact = problem.gradients(rnnt_op.joint_rnnt_loss, gradient_tolerance=0.0)

    rows = []
    for tolerance in tolerances:
        kept = scored.selected(tolerance)
        skipped = mass.index_fill(0, kept, 0.0)
        share = torch.zeros_like(sample_mass).index_add_(0, sample, skipped) / sample_mass
        _, gradients = problem.gradients(rnnt_op.joint_rnnt_loss, gradient_tolerance=tolerance)
        rows.append(
            {
                "posterior": name,
                "loss per label": float(-scored.log_likelihood.sum() / problem.labels.sum()),
                "tolerance": f"{tolerance:g}",
                "nodes kept %": 100 * len(kept) / len(sample),
                "skipped mass": float(share.max()),
                "gradient error": relative_error(gradients, exact),
                "mass ≤ tolerance": bool((share <= tolerance + rounding).all()),
            }
        )
    return rows


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    require_correct(torch.float64)
    rows: list[dict[str, Any]] = []
    for name, problem in tqdm(posteriors(config).items(), desc="posteriors", leave=False):
        rows += measure(name, problem, config.tolerances)
    print(
        f"B={config.batch} T={config.frames} U={config.labels} V={config.vocab_size} "
        f"H={config.joint_dim}, float64; {describe_machine()}\n"
    )
    print(markdown_table(rows))
    print(
        "\nSkipped mass: largest share of a sample's logit-gradient L1 norm. Gradient error: "
        "relative L2 distance of all gradients from those at tolerance 0."
    )
    write_results(config.out, "selection", config, rows)
    if not all(row["mass ≤ tolerance"] for row in rows):
        raise SystemExit("more gradient mass was skipped than the tolerance allows")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
