"""Hands each op's arguments to the engine: of a loss, one sweep with that op's sample weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rnnt_op import engine
from rnnt_op.backends import backend_for
from rnnt_op.backends.protocol import Dropout
from rnnt_op.logits import GivenLogits, JointLogits, Wanted, accumulation_dtype
from rnnt_op.nodes import Batch
from rnnt_op.shards import Shard
from rnnt_op.topologies import resolve
from rnnt_op.topology import Topology
from rnnt_op.torch_private import process_group_named
from rnnt_op.validation import check_joint, check_logits, read_batch

from .schemas import LIBRARY, JointArguments, JointGradients, LatticeArguments, LogitsArguments


def joint_loss(*arguments: Any) -> Tensor:
    losses, _ = _joint_sweep(None, Wanted(), JointArguments(*arguments))
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
    topology, batch = _lattice(network, fast_emit=0.0)
    dtype = accumulation_dtype(network.compute_dtype)
    with _on_device(network):
        occupancies, log_likelihoods = engine.posteriors(
            _joint_logits(network, Wanted(), None),
            batch,
            blank=network.blank,
            topology=topology,
            max_frames=network.encoder.shape[1],
            dtype=dtype,
            workspace_bytes=network.workspace_bytes,
        )
        return occupancies, log_likelihoods.to(dtype)


def align(*arguments: Any) -> tuple[Tensor, Tensor]:
    network = LatticeArguments(*arguments)
    topology, batch = _lattice(network, fast_emit=0.0)
    with _on_device(network):
        frames, log_probabilities = engine.align(
            _joint_logits(network, Wanted(), None),
            batch,
            blank=network.blank,
            topology=topology,
            workspace_bytes=network.workspace_bytes,
        )
        return frames, log_probabilities.to(accumulation_dtype(network.compute_dtype))


def _joint_sweep(
    weights: Tensor | None, wanted: Wanted, joint: JointArguments
) -> tuple[Tensor, JointGradients]:
    topology, batch = _lattice(joint, joint.fast_emit)
    dropout = None
    if joint.dropout_seed is not None:
        shard = _shard(joint)
        seed = joint.dropout_seed if shard is None else shard.agreed(joint.dropout_seed)
        dropout = Dropout(joint.dropout, seed)
    with _on_device(joint):
        source = _joint_logits(joint, wanted, dropout)
        losses = engine.sweep(
            source,
            batch,
            blank=joint.blank,
            topology=topology,
            weights=weights,
            gradient_tolerance=joint.gradient_tolerance,
            clamp=joint.clamp,
            zero_infinity=joint.zero_infinity,
            workspace_bytes=joint.workspace_bytes,
        )
        return losses.to(accumulation_dtype(joint.compute_dtype)), source.gradients()


def _lattice(
    network: JointArguments | LatticeArguments, fast_emit: float
) -> tuple[Topology, Batch]:
    """The topology of a joint network's lattices, and the batch, checked."""
    check_joint(*network[:8])
    topology = resolve(network.topology, network.normalizer, fast_emit, network.delay_penalty)
    columns = network.all_columns
    if not network.process_group:
        rows = network.encoder.shape[2:] if network.weight is None else network.weight.shape
        columns = rows[0]
    batch = read_batch(
        network.targets,
        network.encoder_lengths,
        network.target_lengths,
        network.label_ranges,
        max_frames=network.encoder.shape[1],
        vocab_size=topology.tokens(columns),
        blanks=topology.blanks(network.blank, columns),
    )
    shard = _shard(network)
    if shard is not None:
        shard.check_batch(batch)
    return topology, batch


def _joint_logits(
    network: JointArguments | LatticeArguments,
    wanted: Wanted,
    dropout: Dropout | None,
) -> JointLogits:
    return JointLogits(
        network.encoder,
        network.predictor,
        network.weight,
        network.bias,
        activation=network.activation,
        compute_dtype=network.compute_dtype,
        wanted=wanted,
        dropout=dropout,
        shard=_shard(network),
    )


def _shard(network: JointArguments | LatticeArguments) -> Shard | None:
    if not network.process_group:
        return None
    assert network.weight is not None
    group = process_group_named(network.process_group)
    return Shard(group, network.first_column, network.weight.shape[0], network.all_columns)


@contextmanager
def _on_device(network: JointArguments | LatticeArguments) -> Iterator[None]:
    device = network.encoder.device
    # The caller's autocast has chosen compute_dtype already; the engine's GEMMs follow that alone.
    with backend_for(device).guard(device), torch.autocast(device.type, enabled=False):
        yield


def _logits_sweep(weights: Tensor | None, given: LogitsArguments) -> tuple[Tensor, Tensor]:
    check_logits(*given[:5])
    topology = resolve(given.topology, given.normalizer, given.fast_emit, given.delay_penalty)
    _, max_frames, max_states, columns = given.logits.shape
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
    device = given.logits.device
    with backend_for(device).guard(device):
        source = GivenLogits(given.logits, wanted=weights is not None)
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
