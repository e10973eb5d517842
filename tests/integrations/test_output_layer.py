"""What a layer computes that is read and not called, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_equal, stands_for, value_and_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from rnnt_op.activations import activate, activation_named
from rnnt_op.integrations.activations import activation_name
from rnnt_op.integrations.output_layer import weight_and_bias


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def parametrized(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Halved())
    parametrize.register_parametrization(layer, "bias", Halved())
    return layer


def pruned_for_good(layer: nn.Linear) -> nn.Linear:
    return prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight")


SERVED: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(4, 3),
    "no bias": lambda: nn.Linear(4, 3, bias=False),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "parametrized": lambda: parametrized(nn.Linear(4, 3)),
    "pruned for good": lambda: pruned_for_good(nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    """Value, gradients, and what a forward in training changes of the layer itself."""
    layer = SERVED[name]().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    called = copy.deepcopy(layer)
    expected = value_and_gradients(called(x).square(), list(called.parameters()))
    weight, bias = weight_and_bias(layer, "layer")
    result = nn.functional.linear(x, weight, bias)
    assert_equal(value_and_gradients(result.square(), list(layer.parameters())), expected, 1e-12)
    assert_equal(list(layer.state_dict().values()), list(called.state_dict().values()), 0)


@pytest.mark.parametrize("name", ["Linear", "weight_norm"])
def test_one_graph_with_its_caller(name: str) -> None:
    layer = SERVED[name]()

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, *weight_and_bias(layer, "layer"))

    x = torch.randn(5, 4)
    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert_equal([compiled(x)], [layer(x)], 1e-6)
    layer.register_forward_hook(observe)
    torch.compiler.reset()  # whose guards leave hooks out
    with pytest.raises(Exception, match="expected no hook, got observe"):
        compiled(x)


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *weight_and_bias(self.layer, "layer"))


def test_exported() -> None:
    """Where parameters are fake tensors."""
    model, x = Reading(), torch.randn(5, 4)
    exported = torch.export.export(model, (x,), strict=False)
    assert_equal([exported.module()(x)], [model.layer(x)], 1e-6)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Subclass(nn.Linear):
    pass


@stands_for("loralib.layers.Linear")
class LoralibLinear(nn.Linear):
    """Stands in for the layer that ESPnet's ``create_lora_adapter`` makes."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lora_A, self.lora_B = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.t() @ self.lora_B.t()


@stands_for("bitsandbytes.nn.modules.Linear4bit")
class Linear4bit(nn.Linear):
    """Stands in for a quantised layer that is a subclass."""


class QuantizedTensor(nn.Parameter):
    """Stands in for a weight of torchao's."""


def with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    layer.weight = weight
    return layer


def hooked(register: str, module: nn.Module) -> nn.Module:
    getattr(module, register)(observe)
    return module


def observe(*_: Any) -> None:
    pass


def with_own_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: 2 * x
    return module


HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]
HOOK = r"layer: expected no hook, got observe, .*; call remove\(\) of what registered it returned"
MAKES_WEIGHT = r"layer: expected no hook, got {}, which makes .* torch\.nn\.utils\.parametrizations"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    **{register: (lambda r=register: hooked(r, nn.Linear(4, 3)), HOOK) for register in HOOKS},
    "old weight_norm": (
        lambda: nn.utils.weight_norm(nn.Linear(4, 3)),
        MAKES_WEIGHT.format("WeightNorm"),
    ),
    "old spectral_norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
        MAKES_WEIGHT.format("SpectralNorm"),
    ),
    "prune": (
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
        MAKES_WEIGHT.format("L1Unstructured") + r".*torch\.nn\.utils\.prune\.remove",
    ),
    "lazy": (lambda: nn.LazyLinear(3), r"layer: expected .*, got torch.*LazyLinear, which is not"),
    "forward of the object": (
        lambda: with_own_forward(nn.Linear(4, 3)),
        "layer: expected the forward of torch.nn.modules.linear.Linear, .*; delete layer.forward",
    ),
    "forward of a subclass": (lambda: Scaled(4, 3), "layer: expected .*, got .*Scaled"),
    "subclass": (lambda: Subclass(4, 3), "layer: expected .*, got .*Subclass"),
    "parametrized subclass": (lambda: parametrized(Scaled(4, 3)), "got .*Scaled, which is not"),
    "Sequential": (
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)),
        "got torch.nn.modules.container.Sequential, .* put one of these in its place",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(4, 3)), "got torch.*OptimizedModule"),
    "loralib": (LoralibLinear, "got loralib.layers.Linear"),
    "quantised layer": (lambda: Linear4bit(4, 3), "got bitsandbytes.nn.modules.Linear4bit"),
    "quantised weight": (
        lambda: with_weight(nn.Linear(4, 3), QuantizedTensor(torch.ones(3, 4))),
        "layer: expected a weight and a bias that are plain tensors, got QuantizedTensor",
    ),
    "no module": (lambda: torch.ones(3, 4), "got torch.Tensor"),
    "none": (lambda: None, "got builtins.NoneType"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        weight_and_bias(build(), "layer")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantised_layers_are_refused() -> None:
    quantised = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    with pytest.raises(ValueError, match=r"got torch.ao.nn.quantized.dynamic.*Linear"):
        weight_and_bias(quantised.Linear(4, 3), "layer")


def test_what_changes_later_is_seen() -> None:
    layer = nn.Linear(4, 3)
    handle = layer.register_forward_hook(observe)
    with pytest.raises(ValueError, match="expected no hook"):
        weight_and_bias(layer, "layer")
    handle.remove()
    assert weight_and_bias(layer, "layer")[0] is layer.weight


@stands_for("espnet2.asr_transducer.activation.Swish")
class Swish(nn.Module):
    """Stands in for ESPnet's, with its attributes."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.swish = (lambda x: beta * x * x.sigmoid()) if beta > 1 else nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.swish(x)


def hooked_inside(module: Swish) -> Swish:
    module.swish = hooked("register_forward_hook", module.swish)
    return module


def test_activations() -> None:
    x = torch.linspace(-4, 4, 99, dtype=torch.float64)
    for module, expected in (
        (nn.Tanh(), "tanh"),
        (nn.ReLU(), "relu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Identity(), "identity"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(-0.25), "leaky_relu(-0.25)"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Hardtanh(-2, 3), "hardtanh(-2, 3)"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (Swish(1.0), "silu"),
        (Swish(0.5), "silu"),
    ):
        name = activation_name(module, "act")
        assert activation_named(name) == activation_named(expected)
        torch.testing.assert_close(activate(x, name), module(x))
    assert activation_name(nn.ReLU(inplace=True), "act") == "relu"
    for module, message in (
        (
            nn.Softplus(),
            r"act: expected one of Tanh, .*, got Softplus; build the joint network wit",
        ),
        (nn.ReLU6(), "act: expected one of Tanh, .*, got ReLU6"),
        (nn.GELU("tanh"), r"act: expected GELU\(approximate='none'\), got 'tanh'"),
        (Swish(1.5), "act: expected Swish with a beta of 1, got 1.5"),
        (hooked_inside(Swish(1.0)), r"act\.swish: expected no hook, got observe"),
        (hooked("register_forward_hook", nn.Tanh()), "act: expected no hook, got observe"),
        (with_own_forward(nn.Tanh()), "act: expected the forward of .*Tanh"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_name(module, "act")
