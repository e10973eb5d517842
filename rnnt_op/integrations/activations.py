"""Activations under the names of :func:`rnnt_op.joint_rnnt_loss`."""

from __future__ import annotations

from torch import nn

_NAMES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Identity: "identity",
}


def activation_name(activation: nn.Module) -> str:
    """The name of the activation that a module computes.

    Raises:
        ValueError: the loss does not know it.
    """
    if type(activation) not in _NAMES:
        known = ", ".join(kind.__name__ for kind in _NAMES)
        raise ValueError(
            f"activation: expected one of {known}, got {type(activation).__name__}; build the "
            "joint network with one of these, or give rnnt_op.rnnt_loss its logits"
        )
    return _NAMES[type(activation)]
