"""How many nodes the backward pass keeps, and what skipping the others costs.

By posterior and tolerance. The skipped gradient mass is measured, not predicted: the L1 norm of
every node's explicit logit gradient is summed over the skipped nodes. Everything runs in float64,
so that no rounding hides behind the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from common import (
    Problem,
    describe_machine,
    markdown_table,
    random_joint,
    relative_error,
    require_correct,
    write_results,
)
from torch import Tensor, nn
from tqdm import tqdm, trange

import rnnt_op
from rnnt_op.backends import backend_for
from rnnt_op.backends.eager import Lattice
from rnnt_op.logits import JointLogits
from rnnt_op.nodes import Nodes, Rows, pack_nodes
from rnnt_op.plan import Group
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
    """Adam steps on one batch, ascending; each makes a trained posterior."""
    seed: int = 0
    out: Path = Path("benchmarks/results")


def posteriors(config: Config) -> dict[str, Problem]:
    """Joint problems from no opinion about the alignment to a firm one."""
    lengths = [(config.frames, config.labels)] * config.batch

    def joint(score_std: float) -> Problem:
        return random_joint(
            lengths,
            vocab_size=config.vocab_size,
            joint_dim=config.joint_dim,
            dtype=torch.float64,
            score_std=score_std,
        )

    return {
        "uniform": joint(0.0),
        "random, std 1": joint(1.0),
        "random, std 3": joint(3.0),
        **train(joint(1.0), config.training_steps),
    }


def train(problem: Problem, snapshots: tuple[int, ...]) -> dict[str, Problem]:
    """Fits linear projections of the given states, and the output layer, to the targets."""
    encoder, predictor, weight, bias = (leaf.float() for leaf in problem.leaves)
    joint_dim = weight.shape[1]
    projections = nn.ModuleList([nn.Linear(joint_dim, joint_dim) for _ in range(2)])
    output = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
    optimizer = torch.optim.Adam([*projections.parameters(), *output], lr=1e-2)

    def joint() -> Problem:
        states = (projections[0](encoder), projections[1](predictor))
        return replace(problem, leaves=(*states, *output))

    trained = {}
    for step in trange(1, max(snapshots, default=0) + 1, desc="training", leave=False):
        optimizer.zero_grad()
        torch.autograd.backward(joint().loss(rnnt_op.joint_rnnt_loss))
        optimizer.step()
        if step in snapshots:
            leaves = tuple(leaf.detach().double() for leaf in joint().leaves)
            trained[f"trained, {step} steps"] = replace(problem, leaves=leaves)
    return trained


@dataclass(frozen=True)
class ScoredLattice:
    """What the backward pass selects nodes from, for a joint problem."""

    nodes: Nodes
    scores: Tensor  # log-probability of each arc. [N, A]
    lattice: Lattice
    source: JointLogits  # has entered the nodes' group

    def selected(self, gradient_tolerance: float) -> Tensor:
        """Rows that the backward pass keeps."""
        live = torch.ones_like(self.lattice.log_likelihood, dtype=torch.bool)
        select_nodes = backend_for(self.scores.device).select_nodes
        rows: Tensor = select_nodes(self.nodes, self.lattice, self.scores, live, gradient_tolerance)
        return rows


def score_lattice(problem: Problem) -> ScoredLattice:
    """The score and lattice passes of the backend, over all samples as one group."""
    encoder, predictor, weight, bias = (leaf.detach() for leaf in problem.leaves)
    backend = backend_for(encoder.device)
    frames = tuple(problem.frames.tolist())
    states = tuple((problem.labels + 1).tolist())
    nodes = pack_nodes(Group(tuple(range(len(frames))), frames, states), problem.targets)
    source = JointLogits(
        encoder, predictor, weight, bias, activation="tanh", compute_dtype=encoder.dtype
    )
    source.allocate(_CHUNK_ROWS)
    source.enter(nodes)
    scores = torch.cat(
        [
            backend.arc_scores(source.logits(rows), RNNT.columns(nodes.next_labels(rows), 0), True)
            for _, rows in chunks(nodes)
        ]
    )
    return ScoredLattice(nodes, scores, backend.forward_backward(RNNT, nodes, scores), source)


def chunks(nodes: Nodes) -> Iterator[tuple[int, Rows]]:
    """Position and rows of each chunk."""
    for start in range(0, len(nodes.rows), _CHUNK_ROWS):
        yield start, nodes.rows.slice(start, min(start + _CHUNK_ROWS, len(nodes.rows)))


def explicit_gradient_mass(scored: ScoredLattice) -> Tensor:
    """L1 norm of each node's logit gradient, from the logit gradients themselves. [N]"""
    nodes, masses = scored.nodes, []
    for start, rows in chunks(nodes):
        occupancy = scored.lattice.occupancy[start : start + len(rows)]
        d_logits = scored.source.logits(rows).softmax(1) * occupancy.sum(1, keepdim=True)
        # An arc that does not exist has occupancy zero, wherever it is subtracted.
        columns = RNNT.columns(nodes.next_labels(rows), 0).clamp(min=0)
        masses.append(d_logits.scatter_add_(1, columns, -occupancy).abs().sum(1))
    return torch.cat(masses)


def measure(name: str, problem: Problem, tolerances: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row a tolerance."""
    scored = score_lattice(problem)
    mass, sample = explicit_gradient_mass(scored), scored.nodes.sample
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
                "loss per label": float(
                    -scored.lattice.log_likelihood.sum() / problem.labels.sum()
                ),
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
