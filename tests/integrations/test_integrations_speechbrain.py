"""SpeechBrain's loss under our name, against the reference and its own modules."""

import inspect
from typing import Any

import pytest
import torch
from integration_support import (
    assert_equal,
    random_logits,
    required,
    stands_for,
    value_and_gradients,
)
from problems import random_joint
from torch import Tensor, nn

from rnnt_op import reference
from rnnt_op.integrations.speechbrain import joint_transducer_loss, transducer_loss

# Shares of the longest utterance: 6 frames, 3 labels.
SHARES = torch.tensor([1.0, 4 / 6, 5 / 6]), torch.tensor([1.0, 2 / 3, 0.0])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_lengths_are_shares(reduction: str) -> None:
    problem = random_logits(blank=2)
    loss = transducer_loss(
        problem.logits, problem.targets, *SHARES, 2, reduction, use_torchaudio=True
    )
    expected = reference.rnnt_loss(*problem.arguments, blank=2, reduction=reduction)
    assert_equal(
        value_and_gradients(loss, [problem.logits]),
        value_and_gradients(expected, [problem.logits]),
    )


def test_equals_speechbrain() -> None:
    required("torchaudio")
    theirs = required("speechbrain.nnet.losses").transducer_loss
    if "use_torchaudio" not in inspect.signature(theirs).parameters:
        pytest.skip("this SpeechBrain's loss needs a GPU")
    problem = random_logits(blank=2).to(torch.float32, torch.int32)
    for reduction in ("none", "sum", "mean"):
        actual, expected = (
            value_and_gradients(
                loss(problem.logits, problem.targets, *SHARES, 2, reduction, use_torchaudio=True),
                [problem.logits],
            )
            for loss in (transducer_loss, theirs)
        )
        assert_equal(actual, expected, tolerance=1e-5)


@stands_for("speechbrain.nnet.transducer.transducer_joint.Transducer_joint")
class Joint(nn.Module):
    """Stands in for SpeechBrain's, with its attributes."""

    def __init__(self, joint: str = "sum", nonlinearity: type[nn.Module] = nn.LeakyReLU) -> None:
        super().__init__()
        self.joint, self.nonlinearity = joint, nonlinearity()

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return self.nonlinearity(encoder + predictor)


@stands_for("speechbrain.nnet.linear.Linear")
class Linear(nn.Module):
    """Stands in for SpeechBrain's, with its attributes."""

    def __init__(self, n_neurons: int, input_size: int) -> None:
        super().__init__()
        self.max_norm, self.combine_dims = None, False
        self.w = nn.Linear(input_size, n_neurons)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


@pytest.mark.parametrize("nonlinearity", [nn.LeakyReLU, nn.ReLU])
@pytest.mark.parametrize("real", [False, True], ids=["attributes", "speechbrain"])
def test_joint_network(nonlinearity: type[nn.Module], real: bool) -> None:
    problem = random_joint(
        3, 6, 3, joint_dim=4, vocab_size=5, lengths=[(6, 3), (4, 2), (5, 0)], blank=0
    )
    if real:
        joints = required("speechbrain.nnet.transducer.transducer_joint")
        linear = required("speechbrain.nnet.linear")
        joint = joints.Transducer_joint(joint="sum", nonlinearity=nonlinearity)
        layer = linear.Linear(input_size=4, n_neurons=5).double()
    else:
        joint, layer = Joint(nonlinearity=nonlinearity), Linear(5, 4).double()
    encoder, predictor = problem.encoder, problem.predictor
    inputs = [encoder, predictor, layer.w.weight, layer.w.bias]
    loss = joint_transducer_loss(
        joint, layer, encoder, predictor, problem.targets, *SHARES, 0, use_torchaudio=True
    )
    expected = reference.rnnt_loss(
        layer(joint(encoder.unsqueeze(2), predictor.unsqueeze(1))),
        problem.targets,
        problem.encoder_lengths,
        problem.target_lengths,
        blank=0,
    )
    assert_equal(value_and_gradients(loss, inputs), value_and_gradients(expected, inputs))


def joint_loss(joint: Any, layer: Any, **options: Any) -> Tensor:
    states = torch.zeros(3, 6, 4).double(), torch.zeros(3, 4, 4).double()
    targets = random_logits().targets
    return joint_transducer_loss(joint, layer, *states, targets, *SHARES, 0, **options)


def test_whose_loss_it_is_must_be_said() -> None:
    """SpeechBrain 1.0.4 has the argument no more, and another loss."""
    problem = random_logits()
    given = (problem.logits, problem.targets, *SHARES, 0)
    with pytest.raises(TypeError, match="required keyword-only argument: 'use_torchaudio'"):
        transducer_loss(*given)
    with pytest.raises(ValueError, match="use_torchaudio: expected True"):
        transducer_loss(*given, use_torchaudio=False)
    parts = Joint(nonlinearity=nn.Tanh), Linear(5, 4).double()
    with pytest.raises(TypeError, match="required keyword-only argument: 'use_torchaudio'"):
        joint_loss(*parts)
    with pytest.raises(ValueError, match="use_torchaudio: expected True"):
        joint_loss(*parts, use_torchaudio=False)


class Adapted(nn.Module):
    """Stands in for SpeechBrain's ``AdaptedModel``, which answers for what it wraps."""

    def __init__(self, adapted_model: nn.Module) -> None:
        super().__init__()
        self.adapted_model = adapted_model

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("adapted_model"), name)

    def forward(self, *inputs: Tensor) -> Tensor:
        return 2 * self.adapted_model(*inputs)


class LoRA(nn.Module):
    """Stands in for SpeechBrain's ``LoRA``, with its attributes."""

    def __init__(self, target_module: nn.Linear) -> None:
        super().__init__()
        self.pretrained_module = target_module
        self.adapter_down_proj = nn.Linear(4, 2, bias=False)
        self.adapter_up_proj = nn.Linear(2, 5, bias=False)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, inputs, output: 2 * output)
    return module


def changed(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


REFUSED = {
    "Mish": (
        lambda: (Joint(nonlinearity=nn.Mish), Linear(5, 4)),
        "joint.nonlinearity: .* got Mish",
    ),
    "concat": (lambda: (Joint("concat", nn.Tanh), Linear(5, 4)), "joint: expected 'sum', got 'con"),
    "max_norm": (
        lambda: (Joint(nonlinearity=nn.Tanh), changed(Linear(5, 4), max_norm=1.0)),
        "output_layer: expected no max_norm",
    ),
    "combine_dims": (
        lambda: (Joint(nonlinearity=nn.Tanh), changed(Linear(5, 4), combine_dims=True)),
        "output_layer: expected combine_dims=False",
    ),
    "adapted joint": (
        lambda: (Adapted(Joint(nonlinearity=nn.Tanh)), Linear(5, 4)),
        "joint: expected speechbrain.*, got .*Adapted.* put one of these in its place",
    ),
    "adapted layer": (
        lambda: (Joint(nonlinearity=nn.Tanh), Adapted(Linear(5, 4))),
        "output_layer: expected .*, got .*Adapted",
    ),
    "LoRA": (
        lambda: (Joint(nonlinearity=nn.Tanh), changed(Linear(5, 4), w=LoRA(nn.Linear(4, 5)))),
        r"output_layer\.w: expected .*, got .*LoRA",
    ),
    "hook on the joint": (
        lambda: (hooked(Joint(nonlinearity=nn.Tanh)), Linear(5, 4)),
        "joint: expected no hook, got <lambda>",
    ),
    "hook on the nonlinearity": (
        lambda: (changed(Joint(), nonlinearity=hooked(nn.Tanh())), Linear(5, 4)),
        "joint.nonlinearity: expected no hook",
    ),
    "hook on the layer": (
        lambda: (Joint(nonlinearity=nn.Tanh), hooked(Linear(5, 4))),
        "output_layer: expected no hook",
    ),
    "hook on the layer's layer": (
        lambda: (Joint(nonlinearity=nn.Tanh), changed(Linear(5, 4), w=hooked(nn.Linear(4, 5)))),
        r"output_layer\.w: expected no hook",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_map_is_refused(name: str) -> None:
    build, message = REFUSED[name]
    joint, layer = build()
    with pytest.raises(ValueError, match=message):
        joint_loss(joint.double(), layer.double(), use_torchaudio=True)
