"""Hands each op's arguments to the engine: of a loss, one sweep with that op's sample weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnt_op import engine
from rnnt_op.backends import serving
from rnnt_op.backends.kernels import Kernels, Result
from rnnt_op.backends.protocol import Backend, Dropout
from rnnt_op.logits import GivenLogits, JointLogits, Wanted, accumulation_dtype
from rnnt_op.nodes import Batch
from rnnt_op.shards import Shard
from rnnt_op.topologies import resolve
from rnnt_op.topology import Topology
from rnnt_op.torch_private import process_group_named
from rnnt_op.validation import check_joint, check_logits, read_batch

from .schemas import LIBRARY, JointArguments, JointGradients, LatticeArguments, LogitsArguments

_NOTHING = Wanted()


def joint_loss(*arguments: Any) -> Tensor:
    losses, _ = _joint_sweep(None, _NOTHING, JointArguments(*arguments))
    return losses


def joint_loss_backward(d_losses: Tensor, *arguments: Any) -> JointGradients:
    *joint, wanted = arguments
    _, gradients = _joint_sweep(d_losses, Wanted(*wanted), JointArguments(*joint))
    return gradients


def joint_loss_with_grads(
    loss_weights: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *joint, wanted = arguments
    weights = loss_weights if any(wanted) else None
    losses, gradients = _joint_sweep(weights, Wanted(*wanted), JointArguments(*joint))
    return (losses * loss_weights.to(losses.dtype)).sum(), *gradients


def logits_loss(*arguments: Any) -> Tensor:
    losses, _ = _logits_sweep(None, LogitsArguments(*arguments))
    return losses


def logits_loss_backward(d_losses: Tensor, *arguments: Any) -> Tensor:
    _, d_logits = _logits_sweep(d_losses, LogitsArguments(*arguments))
    return d_logits


def posteriors(*arguments: Any) -> tuple[Tensor, Tensor]:
    network = LatticeArguments(*arguments)
    dtype = accumulation_dtype(network.compute_dtype)
    with _started(network, "posteriors") as task:
        occupancies, log_likelihoods = engine.posteriors(
            _joint_logits(network, task),
            task.batch,
            blank=network.blank,
            topology=task.topology,
            max_frames=network.encoder.shape[1],
            dtype=dtype,
            workspace_bytes=network.workspace_bytes,
        )
        return occupancies, log_likelihoods.to(dtype)


def align(*arguments: Any) -> tuple[Tensor, Tensor]:
    network = LatticeArguments(*arguments)
    with _started(network, "paths") as task:
        frames, log_probabilities = engine.align(
            _joint_logits(network, task),
            task.batch,
            blank=network.blank,
            topology=task.topology,
            workspace_bytes=network.workspace_bytes,
        )
        return frames, log_probabilities.to(accumulation_dtype(network.compute_dtype))


def _joint_sweep(
    weights: Tensor | None, wanted: Wanted, joint: JointArguments
) -> tuple[Tensor, JointGradients]:
    result: Result = "losses" if weights is None else "gradients"
    with _started(joint, result) as task:
        dropout, seed = None, joint.dropout_seed
        if seed is not None:
            dropout = Dropout(
                joint.dropout, seed if task.shard is None else task.shard.agreed(seed)
            )
        source = _joint_logits(joint, task, wanted, dropout)
        losses = engine.sweep(
            source,
            task.batch,
            blank=joint.blank,
            topology=task.topology,
            weights=weights,
            gradient_tolerance=joint.gradient_tolerance,
            clamp=joint.clamp,
            zero_infinity=joint.zero_infinity,
            workspace_bytes=joint.workspace_bytes,
        )
        return losses.to(accumulation_dtype(joint.compute_dtype)), source.gradients()


class _Task(NamedTuple):
    """What the ops on a joint network share."""

    backend: Backend
    topology: Topology
    batch: Batch
    shard: Shard | None


@contextmanager
def _started(network: JointArguments | LatticeArguments, result: Result) -> Iterator[_Task]:
    """Checks arguments, loads kernels and reads the batch, on its device."""
    check_joint(*network[:8])
    fast_emit, has_dropout = 0.0, False
    if isinstance(network, JointArguments):
        fast_emit, has_dropout = network.fast_emit, network.dropout_seed is not None
    topology = resolve(network.topology, network.normalizer, fast_emit, network.delay_penalty)
    shard = _shard(network)
    encoder, predictor, weight = network.encoder, network.predictor, network.weight
    kernels = Kernels(
        network.compute_dtype,
        topology,
        logits="additive" if weight is None else "joint",
        input_dtype=encoder.dtype if encoder.dtype == predictor.dtype else None,
        activation=network.activation,
        has_dropout=has_dropout,
        is_restricted=network.label_ranges is not None,
        has_part=shard is not None,
        result=result,
    )
    columns = encoder.shape[2] if weight is None else weight.shape[0]
    if shard is not None:
        columns = shard.all_columns
    device = encoder.device
    # The caller's autocast has chosen compute_dtype already; the engine's GEMMs follow that alone.
    with serving(device, kernels) as backend, torch.autocast(device.type, enabled=False):
        batch = read_batch(
            network.targets,
            network.encoder_lengths,
            network.target_lengths,
            network.label_ranges,
            max_frames=encoder.shape[1],
            vocab_size=topology.tokens(columns),
            blanks=topology.blanks(network.blank, columns),
        )
        if shard is not None:
            shard.check_batch(batch)
        yield _Task(backend, topology, batch, shard)


def _joint_logits(
    network: JointArguments | LatticeArguments,
    task: _Task,
    wanted: Wanted = _NOTHING,
    dropout: Dropout | None = None,
) -> JointLogits:
    return JointLogits(
        task.backend,
        network.encoder,
        network.predictor,
        network.weight,
        network.bias,
        activation=network.activation,
        compute_dtype=network.compute_dtype,
        wanted=wanted,
        dropout=dropout,
        shard=task.shard,
    )


def _shard(network: JointArguments | LatticeArguments) -> Shard | None:
    if not network.process_group:
        return None
    assert network.weight is not None
    group = process_group_named(network.process_group)
    return Shard(group, network.first_column, network.weight.shape[0], network.all_columns)


def _logits_sweep(weights: Tensor | None, given: LogitsArguments) -> tuple[Tensor, Tensor]:
    check_logits(*given[:5])
    topology = resolve(given.topology, given.normalizer, given.fast_emit, given.delay_penalty)
    _, max_frames, max_states, columns = given.logits.shape
    kernels = Kernels(
        given.logits.dtype,
        topology,
        logits="given",
        is_restricted=given.label_ranges is not None,
        result="losses" if weights is None else "gradients",
    )
    with serving(given.logits.device, kernels) as backend:
        batch = read_batch(
            given.targets,
            given.logit_lengths,
            given.target_lengths,
            given.label_ranges,
            max_frames=max_frames,
            vocab_size=topology.tokens(columns),
            blanks=topology.blanks(given.blank, columns),
            max_states=max_states,
            lengths_name="logit_lengths",
        )
        source = GivenLogits(backend, given.logits, wanted=weights is not None)
        losses = engine.sweep(
            source,
            batch,
            blank=given.blank,
            topology=topology,
            weights=weights,
            zero_infinity=given.zero_infinity,
            normalize=given.fused_log_softmax,
            clamp=given.clamp,
            workspace_bytes=given.workspace_bytes,
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
