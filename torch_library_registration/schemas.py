"""Op schemas of the ``rnnt_op`` namespace and the arguments their implementations share.

Scalar reductions and per-sample losses are different ops, as in PyTorch's own fused losses: where
the weight of every sample's loss is known, one sweep yields losses and gradients; where it is not,
gradients are recomputed later. Every op is functional. Empty tensors stand for unwanted gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The registrations live as long as this object.
LIBRARY = torch.library.Library("rnnt_op", "DEF")

JointGradients = tuple[Tensor, Tensor, Tensor, Tensor]


class JointArguments(NamedTuple):
    """What every joint loss takes, in schema order."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor
    encoder_lengths: Tensor
    target_lengths: Tensor
    label_ranges: Tensor | None
    dropout_seed: Tensor | None
    blank: int
    topology: str
    normalizer: str
    fast_emit: float
    delay_penalty: float
    clamp: float
    activation: str
    compute_dtype: torch.dtype
    workspace_bytes: int | None
    process_group: str
    first_column: int
    all_columns: int
    dropout: float
    gradient_tolerance: float
    zero_infinity: bool


class LatticeArguments(NamedTuple):
    """What the ops on a joint network's lattice take, in schema order."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor
    encoder_lengths: Tensor
    target_lengths: Tensor
    label_ranges: Tensor | None
    blank: int
    topology: str
    normalizer: str
    delay_penalty: float
    activation: str
    compute_dtype: torch.dtype
    workspace_bytes: int | None
    process_group: str
    first_column: int
    all_columns: int


class LogitsArguments(NamedTuple):
    """What every logits op takes, in schema order."""

    logits: Tensor
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    label_ranges: Tensor | None
    blank: int
    topology: str
    normalizer: str
    fast_emit: float
    delay_penalty: float
    clamp: float
    fused_log_softmax: bool
    zero_infinity: bool
    workspace_bytes: int | None


_REGULARIZED = (
    "int blank, str topology, str normalizer, float fast_emit, float delay_penalty, float clamp"
)
_NETWORK = (
    "Tensor encoder, Tensor predictor, Tensor? weight, Tensor? bias, Tensor targets, "
    "Tensor encoder_lengths, Tensor target_lengths, Tensor? label_ranges"
)
# If ranks share the output layer: their group's name, this rank's first row, and the number of all.
_COMPUTED = (
    "str activation, ScalarType compute_dtype, int? workspace_bytes, str process_group, "
    "int first_column, int all_columns"
)
_JOINT = (
    f"{_NETWORK}, Tensor? dropout_seed, {_REGULARIZED}, {_COMPUTED}, float dropout, "
    "float gradient_tolerance, bool zero_infinity"
)
_LATTICE = f"{_NETWORK}, int blank, str topology, str normalizer, float delay_penalty, {_COMPUTED}"
_JOINT_GRADIENTS = "Tensor d_encoder, Tensor d_predictor, Tensor d_weight, Tensor d_bias"
_LOGITS = (
    "Tensor logits, Tensor targets, Tensor logit_lengths, Tensor target_lengths, "
    f"Tensor? label_ranges, {_REGULARIZED}, "
    "bool fused_log_softmax, bool zero_infinity, int? workspace_bytes"
)

for _schema in (
    f"joint_loss({_JOINT}) -> Tensor losses",
    f"joint_loss_backward(Tensor d_losses, {_JOINT}, bool[4] wanted) -> ({_JOINT_GRADIENTS})",
    f"joint_loss_with_grads(Tensor loss_weights, {_JOINT}, bool[4] wanted)"
    f" -> (Tensor loss, {_JOINT_GRADIENTS})",
    f"logits_loss({_LOGITS}) -> Tensor losses",
    f"logits_loss_backward(Tensor d_losses, {_LOGITS}) -> Tensor d_logits",
    f"posteriors({_LATTICE}) -> (Tensor occupancies, Tensor log_likelihoods)",
    f"align({_LATTICE}) -> (Tensor frames, Tensor log_probabilities)",
):
    # What is launched depends on lengths and posteriors, so a recorded graph would not fit the next
    # batch.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
