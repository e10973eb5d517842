"""What a fused ESPnet model's parts do besides is computed or refused, at every forward."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import test_integrations_espnet as espnet
from integration_support import (
    assert_equal,
    importable,
    refused_calls,
    stands_for,
    value_and_gradients,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rnnt_op.integrations.espnet import fuse_loss
from rnnt_op.integrations.warprnnt_pytorch import RNNTLoss
from rnnt_op.topologies import RNNT


@stands_for("loralib.layers.Linear")
class LoraLinear(nn.Linear):
    """Stands in for the layer that ESPnet's ``create_lora_adapter`` puts in a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.lora_A = nn.Parameter(nn.init.normal_(layer.weight.new_empty(2, layer.in_features)))
        self.lora_B = nn.Parameter(nn.init.normal_(layer.weight.new_empty(layer.out_features, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.t() @ self.lora_B.t()


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


def of_four_dimensions(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert inputs[0].dim() == 4  # as the joint network gets them


def small_model() -> Any:
    return espnet.Model(espnet.Joint(nn.Tanh()), RNNTLoss(), 0).double()


def put(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.set_submodule(name, make(model.get_submodule(name)))


def put_hook(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(doubled) and None


SERVED: dict[str, Callable[[Any], Any]] = {
    "hook on a projector": put_hook("joint_network.lin_enc"),
    "pre-hook on a projector": lambda model: model.joint_network.lin_dec.register_forward_pre_hook(
        of_four_dimensions
    ),
    "LoRA on projectors": lambda model: [
        put(f"joint_network.{name}", LoraLinear)(model) for name in ("lin_enc", "lin_dec")
    ],
    "weight_norm": lambda model: parametrizations.weight_norm(model.joint_network.lin_out),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    model = small_model()
    fuse_loss(model)
    SERVED[name](model)
    model.double()
    encoder_out, labels = espnet.batch(0)
    inputs = [encoder_out, *model.parameters()]
    with refused_calls(model.joint_network):
        loss, *_ = model._calc_transducer_loss(encoder_out, espnet.FRAMES, labels)
    expected = value_and_gradients(model.loss_of_logits(encoder_out, labels, RNNT), inputs)
    assert_equal(value_and_gradients(loss, inputs), expected)


class OwnJoint(espnet.Joint):
    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return super().forward(encoder_out, decoder_out) / 2


def adapted_joint(joint: Any) -> Any:
    """An adapter between the states and the activation, in a joint network's forward."""
    joint.adapter = nn.Linear(6, 6)
    joint.__class__ = OwnJoint
    return joint


def set_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda *inputs: type(module).forward(module, *inputs) / 2
    return module


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "loralib": (
        put("joint_network.lin_out", LoraLinear),
        r"model\.joint_network\.lin_out: expected .*, got loralib\.layers\.Linear",
    ),
    "hook on the output layer": (
        put_hook("joint_network.lin_out"),
        r"model\.joint_network\.lin_out: expected no hook, got doubled",
    ),
    "hook on the joint": (put_hook("joint_network"), r"model\.joint_network: expected no hook"),
    "hook on the activation": (
        put_hook("joint_network.joint_activation"),
        r"model\.joint_network\.joint_activation: expected no hook",
    ),
    "hook on the criterion": (
        put_hook("criterion_transducer"),
        r"model\.criterion_transducer: expected no hook",
    ),
    "adapter in the joint": (
        put("joint_network", adapted_joint),
        r"model\.joint_network: expected espnet2.*JointNetwork, got .*OwnJoint",
    ),
    "forward set on the joint": (
        put("joint_network", set_forward),
        r"model\.joint_network: expected the forward of espnet2.*; delete model\.joint_network\.f",
    ),
    "spectral_norm": (
        put("joint_network.lin_out", nn.utils.spectral_norm),
        "lin_out: expected no hook, got SpectralNorm",
    ),
    "Sequential": (
        put("joint_network.lin_out", lambda layer: nn.Sequential(nn.Dropout(), layer)),
        "lin_out: expected .*, got .*Sequential",
    ),
    "criterion": (
        put("criterion_transducer", lambda _: nn.CrossEntropyLoss()),
        "criterion_transducer: expected one of RNNTLoss, ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_fused_and_at_every_forward(name: str) -> None:
    change, message = REFUSED[name]
    model = small_model()
    change(model)
    with pytest.raises(ValueError, match=message):
        fuse_loss(model)
    model = small_model()
    fuse_loss(model)
    encoder_out, labels = espnet.batch(0)
    assert model._calc_transducer_loss(encoder_out, espnet.FRAMES, labels)[0].isfinite()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.double()._calc_transducer_loss(encoder_out, espnet.FRAMES, labels)


class OwnModel(espnet.Model):
    def _calc_transducer_loss(self, *given: Any) -> Any:
        return super()._calc_transducer_loss(*given)


def test_a_models_own_loss_is_refused() -> None:
    model = OwnModel(espnet.Joint(nn.Tanh()), RNNTLoss(), 0)
    with pytest.raises(ValueError, match=r"model: expected the _calc_transducer_loss .*OwnModel"):
        fuse_loss(model)


def test_signature_and_copies() -> None:
    model = small_model()
    signature = inspect.signature(model._calc_transducer_loss)
    encoder_out, labels = espnet.batch(0)
    fuse_loss(model)
    fuse_loss(model)
    assert inspect.signature(model._calc_transducer_loss) == signature
    given = encoder_out, espnet.FRAMES, labels
    expected = model._calc_transducer_loss(*given)[0]
    with importable(espnet.Model, espnet.Joint):
        pickled = pickle.loads(pickle.dumps(model))
    for back in (pickled, copy.deepcopy(model)):
        assert type(back) is type(model)
        assert_equal([back._calc_transducer_loss(*given)[0]], [expected], 0)
