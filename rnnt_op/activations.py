"""The activations of joint networks, by name: torch's own, and their derivatives.

``csrc/activations.cuh`` and ``csrc/cpu/activations.h`` have each of them once more, under its name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_aten: Any = torch.ops.aten

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Activation:
    """A function of each element."""

    function: Callable[..., Tensor]
    """Value from argument and numbers."""
    function_gradient: Callable[..., Tensor]
    """Gradient of the argument from that of the value, from argument or value, and from numbers."""
    follows: str
    """What the derivative follows from: ``"argument"``, or ``"value"`` where that is enough."""
    numbers: tuple[float, ...] = ()
    """Parameters, by default torch's."""
    signature: str = ""
    """How they are written."""

    def value(self, argument: Tensor) -> Tensor:
        return self.function(argument, *self.numbers)

    def gradient(self, d_value: Tensor, known: Tensor) -> Tensor:
        """Args: gradient of the value; what the derivative follows from."""
        return self.function_gradient(d_value, known, *self.numbers)


def _tanh_gradient(d_value: Tensor, value: Tensor) -> Tensor:
    # No less than zero where dropout's rounding has put a saturated state beyond 1.
    return d_value * (1 - value * value).clamp_(min=0)


def _sigmoid_gradient(d_value: Tensor, value: Tensor) -> Tensor:
    return d_value * ((1 - value) * value).clamp_(min=0)


def _leaky_relu_gradient(d_value: Tensor, argument: Tensor, slope: float) -> Tensor:
    return d_value.where(argument > 0, d_value * slope)


def _hardtanh_gradient(d_value: Tensor, argument: Tensor, least: float, greatest: float) -> Tensor:
    # A product, so that a NaN stays.
    return d_value * ((argument > least) & (argument < greatest))


_KINDS = {
    "tanh": Activation(torch.tanh, _tanh_gradient, "value"),
    "relu": Activation(torch.relu, lambda d_value, value: d_value * (value > 0), "value"),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_gradient, "value"),
    "identity": Activation(lambda argument: argument, lambda d_value, _: d_value, "value"),
    "leaky_relu": Activation(
        F.leaky_relu, _leaky_relu_gradient, "argument", (0.01,), "leaky_relu(negative_slope)"
    ),
    "hardtanh": Activation(
        F.hardtanh, _hardtanh_gradient, "argument", (-1.0, 1.0), "hardtanh(min_val, max_val)"
    ),
    "silu": Activation(F.silu, _aten.silu_backward, "argument"),
    "gelu": Activation(F.gelu, _aten.gelu_backward, "argument"),
}
ACTIVATIONS = tuple(_KINDS)


def activation_named(text: str, argument: str = "activation") -> Activation:
    """The activation of a name, which numbers may follow, as in ``"leaky_relu(0.2)"``.

    Args:
        text: the name.
        argument: what errors call it.

    Raises:
        ValueError: there is none of this name, or its numbers are others.
    """
    name, parenthesis, rest = str(text).partition("(")
    if name not in _KINDS:
        raise ValueError(f"{argument}: expected one of {', '.join(_KINDS)}, got {text!r}")
    activation = _KINDS[name]
    if not parenthesis:
        return activation
    numbers = _numbers(rest)
    ascend = all(low < high for low, high in itertools.pairwise(numbers))
    if not numbers or len(numbers) != len(activation.numbers) or not ascend:
        expected = f"{name} or {activation.signature}" if activation.numbers else name
        raise ValueError(f"{argument}: expected {expected}, got {text!r}")
    return replace(activation, numbers=numbers)


def activate(argument: Tensor, activation: str) -> Tensor:
    """The value of an activation, by name."""
    return activation_named(activation).value(argument)


def _numbers(text: str) -> tuple[float, ...]:
    """Those of ``"0.2)"``; none if it has others than finite ones of float32."""
    try:
        numbers = tuple(float(number) for number in text.removesuffix(")").split(","))
    except ValueError:
        return ()
    is_finite = all(abs(number) <= _LARGEST for number in numbers)
    return numbers if is_finite and text.endswith(")") else ()
