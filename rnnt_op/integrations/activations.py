"""Activations under the names of :func:`rnnt_op.joint_rnnt_loss`.

Known are torch's modules, and those of transformers and ESPnet that compute the same, by their
classes' names, so that no package is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rnnt_op.integrations.output_layer import check_known, qualified_name


def activation_name(activation: nn.Module, name: str) -> str:
    """The name of the activation that a module computes, with its numbers.

    Args:
        name: what errors call the module.

    Raises:
        ValueError: the loss does not know it, or it does more, as
            :func:`rnnt_op.integrations.output_layer.check_known` words it.
    """
    kind = qualified_name(type(activation))
    if kind not in _NAMES:
        known = ", ".join(kind.rpartition(".")[2] for kind in _NAMES)
        raise ValueError(
            f"{name}: expected one of {known}, got {type(activation).__name__}; {_INSTEAD}"
        )
    check_known(activation, name, _NAMES)
    found = _NAMES[kind]
    return found if isinstance(found, str) else found(activation, name)


def _leaky_relu(module: Any, name: str) -> str:
    return f"leaky_relu({module.negative_slope})"


def _hardtanh(module: Any, name: str) -> str:
    return f"hardtanh({module.min_val}, {module.max_val})"


def _gelu(module: Any, name: str) -> str:
    if module.approximate != "none":
        raise ValueError(
            f"{name}: expected GELU(approximate='none'), got {module.approximate!r}, which is "
            f"another function; {_INSTEAD}"
        )
    return "gelu"


def _espnet_swish(module: Any, name: str) -> str:
    if module.beta > 1:
        raise ValueError(
            f"{name}: expected Swish with a beta of 1, got {module.beta}, which multiplies it; "
            f"{_INSTEAD}"
        )
    if isinstance(module.swish, nn.Module):
        return activation_name(module.swish, f"{name}.swish")
    return "silu"


_INSTEAD = "build the joint network with one of these, or give rnnt_op.rnnt_loss its logits"

_NAMES: dict[str, str | Callable[[Any, str], str]] = {
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.LeakyReLU": _leaky_relu,
    "torch.nn.modules.activation.Hardtanh": _hardtanh,
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.GELU": _gelu,
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.LinearActivation": "identity",
    "espnet2.asr_transducer.activation.Swish": _espnet_swish,
}
