"""Op schemas of the ``rnnt_op`` namespace, made of the records of ``rnnt_op.arguments``.

Scalar reductions and per-sample losses are different ops, as in PyTorch's own fused losses: where
the weight of every sample's loss is known, one sweep yields losses and gradients; where it is not,
gradients are recomputed later, of given logits from the scores of their nodes, where these were
worth keeping. Every op is functional. Empty tensors stand for what is unwanted or was not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.arguments import JointArguments, LogitsArguments, NetworkArguments

# The registrations live as long as this object.
LIBRARY = torch.library.Library("rnnt_op", "DEF")

JointGradients = tuple[Tensor, Tensor, Tensor, Tensor]

_NETWORK, _JOINT = NetworkArguments.schema(), JointArguments.schema()
_LOGITS = LogitsArguments.schema()
_GRADIENTS = "Tensor d_encoder, Tensor d_predictor, Tensor d_weight, Tensor d_bias"

for _schema in (
    f"joint_loss({_JOINT}) -> Tensor losses",
    f"joint_loss_backward(Tensor d_losses, {_JOINT}, bool[4] wanted) -> ({_GRADIENTS})",
    f"joint_loss_with_grads(Tensor loss_weights, {_JOINT}, bool[4] wanted)"
    f" -> (Tensor loss, {_GRADIENTS})",
    f"logits_loss({_LOGITS}, bool keeps_scores) -> (Tensor losses, Tensor scores)",
    f"logits_loss_backward(Tensor d_losses, Tensor scores, {_LOGITS}) -> Tensor d_logits",
    f"posteriors({_NETWORK}) -> (Tensor occupancies, Tensor log_likelihoods)",
    f"align({_NETWORK}) -> (Tensor frames, Tensor log_probabilities)",
):
    # What is launched depends on lengths and posteriors, so a recorded graph would not fit the next
    # batch.
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe))
