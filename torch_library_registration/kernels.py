"""Hands each op's arguments to the engine: of a loss, one sweep with that op's sample weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rnnt_op import engine
from rnnt_op.arguments import JointArguments, LogitsArguments, NetworkArguments
from rnnt_op.backends.records import Dropout
from rnnt_op.logits import GivenLogits, JointLogits, Wanted, accumulation_dtype
from rnnt_op.scoring import SavedScores
from rnnt_op.task import empty_scores, logits_task, network_task

from .schemas import LIBRARY, JointGradients

_NOTHING = Wanted()


def joint_loss(*values: Any) -> Tensor:
    losses, _ = _joint_sweep(None, _NOTHING, JointArguments.of(values))
    return losses


def joint_loss_backward(d_losses: Tensor, *values: Any) -> JointGradients:
    *joint, wanted = values
    _, gradients = _joint_sweep(d_losses, Wanted(*wanted), JointArguments.of(joint))
    return gradients


def joint_loss_with_grads(loss_weights: Tensor, *values: Any) -> tuple[Tensor, ...]:
    *joint, wanted = values
    weights = loss_weights if any(wanted) else None
    losses, gradients = _joint_sweep(weights, Wanted(*wanted), JointArguments.of(joint))
    return (losses * loss_weights.to(losses.dtype)).sum(), *gradients


def logits_loss(*values: Any) -> tuple[Tensor, Tensor]:
    *fields, keeps_scores = values
    given = LogitsArguments.of(fields)
    scores = empty_scores(given, keeps_scores)
    losses, _ = _logits_sweep(None, given, scores)
    return losses, scores


def logits_loss_backward(d_losses: Tensor, scores: Tensor, *values: Any) -> Tensor:
    _, d_logits = _logits_sweep(d_losses, LogitsArguments.of(values), scores)
    return d_logits


def posteriors(*values: Any) -> tuple[Tensor, Tensor]:
    network = NetworkArguments.of(values)
    dtype = accumulation_dtype(network.compute_dtype)
    with network_task(network, "posteriors") as task:
        source = JointLogits(task.backend, network, shard=task.shard)
        frames = network.encoder.shape[1]
        occupancies, log_likelihoods = engine.posteriors(task, source, frames, dtype)
        return occupancies, log_likelihoods.to(dtype)


def align(*values: Any) -> tuple[Tensor, Tensor]:
    network = NetworkArguments.of(values)
    with network_task(network, "paths") as task:
        source = JointLogits(task.backend, network, shard=task.shard)
        frames, log_probabilities = engine.align(task, source)
        return frames, log_probabilities.to(accumulation_dtype(network.compute_dtype))


def _joint_sweep(
    weights: Tensor | None, wanted: Wanted, joint: JointArguments
) -> tuple[Tensor, JointGradients]:
    with network_task(joint, "losses" if weights is None else "gradients") as task:
        dropout, seed = None, joint.dropout_seed
        if seed is not None:
            agreed = seed if task.shard is None else task.shard.agreed(seed)
            dropout = Dropout(joint.dropout, agreed)
        source = JointLogits(task.backend, joint, shard=task.shard, dropout=dropout, wanted=wanted)
        losses = engine.sweep(
            task,
            source,
            weights=weights,
            gradient_tolerance=joint.tolerance,
            clamp=joint.clamp,
            zero_infinity=joint.zero_infinity,
        )
        return losses.to(accumulation_dtype(joint.compute_dtype)), source.gradients()


def _logits_sweep(
    weights: Tensor | None, given: LogitsArguments, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses keep the scores of their nodes, if there is room; gradients begin with them."""
    with logits_task(given, "losses" if weights is None else "gradients") as task:
        source = GivenLogits(task.backend, given.logits, wanted=weights is not None)
        saved = None if scores.dim() == 1 else SavedScores(scores, weights is not None)
        losses = engine.sweep(
            task,
            source,
            weights=weights,
            clamp=given.clamp,
            zero_infinity=given.zero_infinity,
            saved=saved,
        )
        return losses.to(accumulation_dtype(given.logits.dtype)), source.d_logits


for _kernel in (
    joint_loss,
    joint_loss_backward,
    joint_loss_with_grads,
    logits_loss,
    logits_loss_backward,
    posteriors,
    align,
):
    LIBRARY.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")
