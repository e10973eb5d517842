"""What NeMo's joint network computes, read and not called.

Interface: nemo-toolkit 3.0.0, ``RNNTJoint.joint_after_projection`` and its ``joint_net``.
"""

from __future__ import annotations

from typing import Any

from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.output_layer import check_known, owner, weight_and_bias

# Whose methods the loss stands for.
_JOINT = "nemo.collections.asr.modules.rnnt.RNNTJoint"
_JOINT_METHODS = {
    "forward": _JOINT,
    "joint": "nemo.collections.asr.modules.rnnt_abstract.AbstractRNNTJoint",
    "joint_after_projection": _JOINT,
}

_KEEP_LOGITS = "keep its logits and set model.loss = RNNTLoss(...)"


def joint_network(joint: Any, kind: type) -> dict[str, Any]:
    """Arguments of the loss that are the joint network behind its projections.

    Weight and bias are divided by its ``temperature`` where NeMo divides the logits: with its own
    softmax, which it has with ``log_softmax=True``, and with None unless on a GPU.

    Args:
        joint: the ``RNNTJoint``.
        kind: its class, as it was before the loss was fused.

    Raises:
        ValueError: it computes anything else than the sum, activation, dropout and output layer.
    """
    others = [name for name, known in _JOINT_METHODS.items() if owner(kind, name) != known]
    refused = {
        **{f"{name} of {owner(kind, name)}": True for name in others},
        **{f"{name}, set on the object": name in vars(joint) for name in _JOINT_METHODS},
        "masking_prob": joint.masking_prob > 0,
        "adapters": joint.is_adapter_available(),
    }
    if any(refused.values()):
        found = ", ".join(name for name, is_there in refused.items() if is_there)
        raise ValueError(
            "model.joint: expected encoder + predictor, activation, output layer; got "
            f"{found}; {_KEEP_LOGITS}"
        )
    layers, name = joint.joint_net, "model.joint.joint_net"
    check_known(layers, name, ("torch.nn.modules.container.Sequential",))
    if len(layers) not in (2, 3):
        raise ValueError(
            f"{name}: expected activation, dropout or none, output layer; got "
            f"{len(layers)} layers; {_KEEP_LOGITS}"
        )
    dropout = 0.0
    if len(layers) == 3:
        check_known(layers[1], f"{name}[1]", ("torch.nn.modules.dropout.Dropout",))
        dropout = layers[1].p if layers[1].training else 0.0
    weight, bias = weight_and_bias(layers[-1], f"{name}[{len(layers) - 1}]")
    # Else NeMo leaves the logits as they are, and their softmax to the loss.
    has_softmax = not weight.is_cuda if joint.log_softmax is None else joint.log_softmax
    if has_softmax and joint.temperature != 1:
        weight = weight / joint.temperature
        bias = None if bias is None else bias / joint.temperature
    return {
        "weight": weight,
        "bias": bias,
        "activation": activation_name(layers[0], f"{name}[0]"),
        "dropout": dropout,
    }
