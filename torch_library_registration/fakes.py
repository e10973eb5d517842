"""Fake kernels: shapes, dtypes and strides of each op's outputs, exactly as the real kernels
allocate them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rnnt_op.arguments import JointArguments, LogitsArguments, NetworkArguments
from rnnt_op.logits import accumulation_dtype
from rnnt_op.task import empty_scores

from .schemas import LIBRARY, JointGradients


def joint_loss(*values: Any) -> Tensor:
    joint = JointArguments.of(values)
    dtype = accumulation_dtype(joint.compute_dtype)
    return joint.encoder.new_empty((joint.encoder.shape[0],), dtype=dtype)


def joint_loss_backward(d_losses: Tensor, *values: Any) -> JointGradients:
    *joint, wanted = values
    return _joint_gradients(JointArguments.of(joint), wanted)


def joint_loss_with_grads(
    loss_weights: Tensor, *values: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, wanted = values
    joint = JointArguments.of(fields)
    loss = joint.encoder.new_empty((), dtype=accumulation_dtype(joint.compute_dtype))
    return loss, *_joint_gradients(joint, wanted)


def logits_loss(*values: Any) -> tuple[Tensor, Tensor]:
    *fields, keeps_scores = values
    given = LogitsArguments.of(fields)
    dtype = accumulation_dtype(given.logits.dtype)
    losses = given.logits.new_empty((given.logits.shape[0],), dtype=dtype)
    return losses, empty_scores(given, keeps_scores)


def logits_loss_backward(d_losses: Tensor, scores: Tensor, *values: Any) -> Tensor:
    given = LogitsArguments.of(values)
    return given.logits.new_empty(given.logits.shape)


def posteriors(*values: Any) -> tuple[Tensor, Tensor]:
    network = NetworkArguments.of(values)
    batch, frames, _ = network.encoder.shape
    dtype = accumulation_dtype(network.compute_dtype)
    return (
        network.encoder.new_empty((batch, frames, network.predictor.shape[1], 2), dtype=dtype),
        network.encoder.new_empty((batch,), dtype=dtype),
    )


def align(*values: Any) -> tuple[Tensor, Tensor]:
    network = NetworkArguments.of(values)
    dtype = accumulation_dtype(network.compute_dtype)
    return (
        network.targets.new_empty(network.targets.shape, dtype=torch.int64),
        network.encoder.new_empty((len(network.targets),), dtype=dtype),
    )


def _joint_gradients(joint: JointArguments, wanted: list[bool]) -> JointGradients:
    def gradient(like: Tensor, is_wanted: bool) -> Tensor:
        return like.new_empty(like.shape if is_wanted else (0,))

    weight = joint.encoder.new_empty((0,)) if joint.weight is None else joint.weight
    bias = weight.new_empty((0,)) if joint.bias is None else joint.bias
    d_encoder, d_predictor, d_weight, d_bias = (
        gradient(like, is_wanted)
        for like, is_wanted in zip(
            (joint.encoder, joint.predictor, weight, bias), wanted, strict=True
        )
    )
    return d_encoder, d_predictor, d_weight, d_bias


for _fake in (
    joint_loss,
    joint_loss_backward,
    joint_loss_with_grads,
    logits_loss,
    logits_loss_backward,
    posteriors,
    align,
):
    torch.library.register_fake(f"rnnt_op::{_fake.__name__}", _fake, lib=LIBRARY)
