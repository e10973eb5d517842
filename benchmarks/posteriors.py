"""Posteriors of a batch that is learned by heart, which is not what training makes of a corpus."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import rnnt_op
from rnnt_op.tools.study.measure import progress
from rnnt_op.tools.study.problems import Problem


def train(problem: Problem, snapshots: tuple[int, ...]) -> dict[str, Problem]:
    """Fits linear projections of the given states, and the output layer, to the targets.

    Args:
        problem: a joint problem, on any device.
        snapshots: numbers of Adam steps, each of which gives a problem in the given one's dtype.
    """
    dtype = problem.leaves[0].dtype
    encoder, predictor, weight, bias = (leaf.float() for leaf in problem.leaves)
    joint_dim = weight.shape[1]
    projections = nn.ModuleList([nn.Linear(joint_dim, joint_dim) for _ in range(2)])
    projections.to(weight.device)
    output = [nn.Parameter(weight.clone()), nn.Parameter(bias.clone())]
    optimizer = torch.optim.Adam([*projections.parameters(), *output], lr=1e-2)

    def joint() -> Problem:
        states = (projections[0](encoder), projections[1](predictor))
        return replace(problem, leaves=(*states, *output))

    trained = {}
    for step in progress(range(1, max(snapshots, default=0) + 1), "training"):
        optimizer.zero_grad()
        torch.autograd.backward(joint().loss(rnnt_op.joint_rnnt_loss))
        optimizer.step()
        if step in snapshots:
            leaves = tuple(leaf.detach().to(dtype) for leaf in joint().leaves)
            trained[f"one batch, {step} steps"] = replace(problem, leaves=leaves)
    return trained
