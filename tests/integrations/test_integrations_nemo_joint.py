"""What the parts of NeMo's fused joint network do besides is computed or refused, at every forward."""

import copy
import inspect
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import test_integrations_nemo as nemo
from integration_support import (
    assert_equal,
    importable,
    refused_calls,
    stands_for,
    value_and_gradients,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rnnt_op import reference
from rnnt_op.integrations.nemo import RNNTLoss, fuse_loss

BLANK, TOKENS = nemo.BLANK, nemo.TOKENS


def fused(joint: Any) -> Any:
    fuse_loss(SimpleNamespace(joint=joint, loss=RNNTLoss(BLANK), wer=None))
    return joint.double()


def arguments() -> dict[str, Any]:
    problem = nemo.problem_for(nemo.RNNT)
    encoded, predicted = nemo.states()
    return {
        "encoder_outputs": encoded,
        "decoder_outputs": predicted,
        "encoder_lengths": problem.frames,
        "transcripts": problem.targets,
        "transcript_lengths": problem.labels,
    }


def put(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda joint: joint.set_submodule(name, make(joint.get_submodule(name)))


def put_hook(name: str) -> Callable[[Any], None]:
    return lambda joint: joint.get_submodule(name).register_forward_hook(doubled) and None


def doubled(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return 2 * output


class Projecting(nemo.Joint):
    def project_encoder(self, encoder_output: Tensor) -> Tensor:
        return 2 * super().project_encoder(encoder_output)


SERVED: dict[str, Callable[[Any], Any]] = {
    "hook on a projector": put_hook("enc"),
    "projector": put("pred", lambda layer: nn.Sequential(layer, nn.Linear(7, 7))),
    "projection of a subclass": lambda joint: setattr(joint, "__class__", Projecting),
    "weight_norm": lambda joint: parametrizations.weight_norm(joint.joint_net[-1]),
    "no bias": put("joint_net.1", lambda _: nn.Linear(7, TOKENS, bias=False)),
    "identity": put("joint_net.0", lambda _: nn.Identity()),
    "temperature": lambda joint: setattr(joint, "temperature", 2.5),
    "temperature of another softmax": lambda joint: vars(joint).update(
        temperature=2.5, log_softmax=False
    ),
    "temperature of a softmax": lambda joint: vars(joint).update(temperature=0.5, log_softmax=True),
}


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str) -> None:
    joint = nemo.Joint(TOKENS, "tanh")
    SERVED[name](joint)
    joint = fused(joint)
    given = arguments()
    inputs = [given["encoder_outputs"], given["decoder_outputs"], *joint.parameters()]
    with refused_calls(joint.joint_net):
        actual = value_and_gradients(joint(**given)[0], inputs)
    assert_equal(actual, value_and_gradients(true_loss(joint, given), inputs))


def true_loss(joint: Any, given: dict[str, Any]) -> Tensor:
    """Of the logits that the joint network builds."""
    return reference.rnnt_loss(
        nemo.logits_of(joint, given["encoder_outputs"], given["decoder_outputs"]),
        *(given[name] for name in ("transcripts", "encoder_lengths", "transcript_lengths")),
        blank=BLANK,
    )


def test_dropout_of_the_joint_network() -> None:
    """Applied in training alone, and in its own mode where that is another."""
    joint = fused(nemo.Joint(TOKENS, "tanh", dropout=0.5))
    given = arguments()
    first, second = (joint(**given)[0] for _ in range(2))
    assert first != second
    joint.joint_net[1].eval()
    assert joint.training
    assert_equal([joint(**given)[0]], [true_loss(joint, given)])
    joint.train().eval()
    assert_equal([joint(**given)[0]], [true_loss(joint, given)])


@stands_for("nemo.collections.asr.modules.hybrid_autoregressive_transducer.HATJoint")
class HATJoint(nemo.Joint):
    """Stands in for NeMo's, whose blank has a layer of its own."""

    def joint_after_projection(self, f: Tensor, g: Tensor) -> Tensor:
        return super().joint_after_projection(f, g).log_softmax(-1)


@stands_for("nemo.collections.asr.modules.rnnt.SampledRNNTJoint")
class SampledJoint(nemo.Joint):
    """Stands in for NeMo's."""

    def forward(self, **given: Any) -> Any:
        return super().forward(**given)


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "masking_prob": (lambda joint: setattr(joint, "masking_prob", 0.1), "got masking_prob"),
    "adapters": (
        lambda joint: setattr(joint, "is_adapter_available", lambda: True),
        r"model\.joint: expected encoder \+ predictor, .*; got adapters; keep its logits",
    ),
    "method set on the object": (
        lambda joint: setattr(joint, "joint", lambda f, g: f + g),
        "got joint, set on the object",
    ),
    "hook on the layers": (put_hook("joint_net"), r"model\.joint\.joint_net: expected no hook"),
    "hook on the activation": (put_hook("joint_net.0"), r"joint_net\[0\]: expected no hook"),
    "hook on the dropout": (put_hook("joint_net.1"), r"joint_net\[1\]: expected no hook"),
    "hook on the output layer": (put_hook("joint_net.2"), r"joint_net\[2\]: expected no hook, got"),
    "activation": (put("joint_net.0", lambda _: nn.Mish()), r"joint_net\[0\]: .*, got Mish"),
    "dropout": (
        put("joint_net.1", lambda _: nn.AlphaDropout(0.1)),
        r"joint_net\[1\]: expected torch.*Dropout, got .*AlphaDropout",
    ),
    "layers": (
        lambda joint: joint.joint_net.append(nn.LogSoftmax(-1)),
        r"joint_net: expected activation, dropout or none, output layer; got 4 layers",
    ),
    "no Sequential": (
        put("joint_net", lambda layers: nn.ModuleList(layers)),
        r"joint_net: expected .*Sequential, got .*ModuleList",
    ),
    "old weight_norm": (
        put("joint_net.2", nn.utils.weight_norm),
        r"joint_net\[2\]: expected no hook, got WeightNorm",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_refused_when_fused_and_at_every_forward(name: str) -> None:
    change, message = REFUSED[name]
    joint = nemo.Joint(TOKENS, "tanh", dropout=0.1)
    change(joint)
    with pytest.raises(ValueError, match=message):
        fused(joint)
    joint = fused(nemo.Joint(TOKENS, "tanh", dropout=0.1))
    given = arguments()
    assert joint(**given)[0].isfinite()
    change(joint)
    with pytest.raises(ValueError, match=message):
        joint(**given)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (HATJoint, "got joint_after_projection of nemo.*HATJoint; keep its logits"),
        (SampledJoint, "got forward of nemo.*SampledRNNTJoint; keep its logits"),
    ],
)
def test_other_joint_networks_are_refused(kind: type[nemo.Joint], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused(kind(TOKENS, "tanh"))


def test_hooks_on_the_joint() -> None:
    """They get what it returns: logits before, the loss afterwards."""
    joint = nemo.Joint(TOKENS, "tanh")
    handle = joint.register_forward_hook(doubled)
    with pytest.raises(ValueError, match=r"model\.joint: expected no hook that gets its logits"):
        fused(joint)
    joint.fuse_loss_wer = True
    fused(joint)
    handle.remove()
    seen = []
    joint.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert joint(**arguments()) == seen[0]


class OwnLoss(RNNTLoss):
    def forward(self, *given: Any, **named: Any) -> Tensor:
        return 2 * super().forward(*given, **named)


def test_losses_are_known() -> None:
    joint = nemo.Joint(TOKENS, "tanh")
    losses = {
        "got OwnLoss": OwnLoss(BLANK),
        "model.loss: expected no hook": RNNTLoss(BLANK),
        "model.loss: expected nemo.*, got .*Identity": nn.Identity(),
        "model.loss: expected one of RNNTLossNumba, ": Loss(nn.Identity()),
    }
    losses["model.loss: expected no hook"].register_forward_hook(doubled)
    for message, loss in losses.items():
        with pytest.raises(ValueError, match=message):
            fuse_loss(SimpleNamespace(joint=joint, loss=loss, wer=None))
    joint = fused(joint)
    joint.set_fuse_loss_wer(True, nn.Identity(), None)
    with pytest.raises(ValueError, match=r"got Identity; set model\.loss and call fuse_loss"):
        joint(**arguments())


@stands_for("nemo.collections.asr.losses.rnnt.RNNTLoss")
class Loss(nn.Module):
    """Stands in for NeMo's ``RNNTLoss``."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._loss, self.reduction = loss, "mean_batch"


@stands_for("nemo.collections.asr.losses.rnnt_pytorch.RNNTLossPytorch")
class RNNTLossPytorch(nn.Module):
    """Stands in for what NeMo's ``RNNTLoss`` calls, with its attributes."""

    blank = BLANK


def test_hooks_on_nemos_loss_are_refused() -> None:
    loss = Loss(RNNTLossPytorch())
    joint = nemo.Joint(TOKENS, "tanh")
    loss._loss.register_forward_hook(doubled)
    with pytest.raises(ValueError, match=r"model\.loss\._loss: expected no hook, got doubled"):
        fuse_loss(SimpleNamespace(joint=joint, loss=loss, wer=None))
    loss = Loss(RNNTLossPytorch())
    fuse_loss(SimpleNamespace(joint=joint, loss=loss, wer=None))
    assert joint.loss.blank == BLANK


@stands_for("nemo.collections.asr.parts.numba.rnnt_loss.rnnt_pytorch.RNNTLossNumba")
class RNNTLossNumba(nn.Module):
    """Stands in for what NeMo's ``RNNTLoss`` calls by default, with its attributes."""

    blank, fastemit_lambda, clamp = BLANK, 0.25, 0.0


def test_cost_of_fast_emit() -> None:
    joint, given = nemo.Joint(TOKENS, "tanh").double(), arguments()
    inputs = [given["encoder_outputs"], *joint.parameters()]
    results = []
    for options in ({}, {"fastemit_cost": True}):
        fuse_loss(SimpleNamespace(joint=joint, loss=Loss(RNNTLossNumba()), wer=None), **options)
        results.append(value_and_gradients(joint(**given)[0], inputs))
    plain, reported = results
    assert_equal(reported, [1.25 * plain[0], *plain[1:]])
    model = SimpleNamespace(joint=joint, loss=RNNTLoss(BLANK), wer=None)
    with pytest.raises(ValueError, match=r"fastemit_cost: expected False where model\.loss is"):
        fuse_loss(model, fastemit_cost=True)


def test_signature_and_copies() -> None:
    joint = nemo.Joint(TOKENS, "tanh")
    signature = inspect.signature(joint.forward)
    joint, given = fused(fused(joint)), arguments()
    assert inspect.signature(joint.forward) == signature
    expected = joint(**given)[0]
    with importable(nemo.Joint, nemo.AbstractJoint):
        pickled = pickle.loads(pickle.dumps(joint))
    for back in (pickled, copy.deepcopy(joint)):
        assert type(back) is type(joint)
        assert_equal([back(**given)[0]], [expected], 0)
