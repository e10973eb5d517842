"""Hands each op's arguments to the engine: one sweep with that op's sample weights and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnt_op.backends import backend_for
from rnnt_op.engine import sweep
from rnnt_op.logits import GivenLogits, JointLogits, Wanted, accumulation_dtype
from rnnt_op.topologies import resolve
from rnnt_op.topology import Topology
from rnnt_op.validation import check_values

from .schemas import LIBRARY, JointArguments, JointGradients, LogitsArguments


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
    *joint, wanted, _ = arguments
    losses, gradients = _joint_sweep(loss_weights, Wanted(*wanted), JointArguments(*joint))
    return (losses * loss_weights.to(losses.dtype)).sum(), *gradients


def logits_loss(*arguments: Any) -> Tensor:
    losses, _ = _logits_sweep(None, LogitsArguments(*arguments))
    return losses


def logits_loss_backward(d_losses: Tensor, *arguments: Any) -> Tensor:
    _, d_logits = _logits_sweep(d_losses, LogitsArguments(*arguments))
    return d_logits


def _topology_of(arguments: JointArguments | LogitsArguments) -> Topology:
    return resolve(
        arguments.topology, arguments.normalizer, arguments.fast_emit, arguments.delay_penalty
    )


def _joint_sweep(
    weights: Tensor | None, wanted: Wanted, joint: JointArguments
) -> tuple[Tensor, JointGradients]:
    topology = _topology_of(joint)
    frames, labels = check_values(
        joint.targets,
        joint.encoder_lengths,
        joint.target_lengths,
        max_frames=joint.encoder.shape[1],
        vocab_size=topology.tokens(joint.weight.shape[0]),
        blanks=topology.blanks(joint.blank, joint.weight.shape[0]),
    )
    device = joint.encoder.device
    # The caller's autocast has chosen compute_dtype already; the engine's GEMMs follow that alone.
    with backend_for(device).guard(device), torch.autocast(device.type, enabled=False):
        source = JointLogits(
            joint.encoder,
            joint.predictor,
            joint.weight,
            joint.bias,
            activation=joint.activation,
            compute_dtype=joint.compute_dtype,
            wanted=wanted,
        )
        losses = sweep(
            source,
            joint.targets,
            frames,
            labels,
            blank=joint.blank,
            topology=topology,
            weights=weights,
            gradient_tolerance=joint.gradient_tolerance,
            clamp=joint.clamp,
            zero_infinity=joint.zero_infinity,
            workspace_bytes=joint.workspace_bytes,
        )
        return losses.to(accumulation_dtype(joint.compute_dtype)), source.gradients()


def _logits_sweep(weights: Tensor | None, given: LogitsArguments) -> tuple[Tensor, Tensor]:
    topology = _topology_of(given)
    frames, labels = check_values(
        given.targets,
        given.logit_lengths,
        given.target_lengths,
        max_frames=given.logits.shape[1],
        vocab_size=topology.tokens(given.logits.shape[3]),
        blanks=topology.blanks(given.blank, given.logits.shape[3]),
        lengths_name="logit_lengths",
    )
    device = given.logits.device
    with backend_for(device).guard(device):
        source = GivenLogits(given.logits, wanted=weights is not None)
        losses = sweep(
            source,
            given.targets,
            frames,
            labels,
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
):
    LIBRARY.impl(_kernel.__name__, _kernel, "CompositeExplicitAutograd")
