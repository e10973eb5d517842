"""Activations under the names of :func:`rnnt_op.joint_rnnt_loss`."""

from __future__ import annotations

from torch import nn

from rnnt_op.integrations.output_layer import check_known, qualified_name

_NAMES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
}


def activation_name(activation: nn.Module, name: str) -> str:
    """The name of the activation that a module computes.

    Args:
        name: what errors call the module.

    Raises:
        ValueError: the loss does not know it, or it does more, as
            :func:`rnnt_op.integrations.output_layer.check_known` words it.
    """
    if type(activation) not in _NAMES:
        known = ", ".join(kind.__name__ for kind in _NAMES)
        raise ValueError(
            f"{name}: expected one of {known}, got {type(activation).__name__}; build the "
            "joint network with one of these, or give rnnt_op.rnnt_loss its logits"
        )
    check_known(activation, name, [qualified_name(kind) for kind in _NAMES])
    return _NAMES[type(activation)]
