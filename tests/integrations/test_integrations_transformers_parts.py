"""What a fused Parakeet's parts do besides is computed or refused, at every forward."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import test_integrations_transformers as parakeet
import torch
from integration_support import assert_equal, refused_calls, required, value_and_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rnnt_op.activations import activate
from rnnt_op.integrations.activations import activation_name

pytestmark = [
    pytest.mark.slow,  # importing transformers takes seconds
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in parakeet.trained(model) if parameter.requires_grad]


def truth(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of the logits that the model itself builds."""
    losses = parakeet.reference_losses(model, batch, sigma=0.0)
    return value_and_gradients(losses.sum(), trained(model))


def fused(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of the fused model, which builds no logits."""
    with refused_calls(model.joint):
        loss = model(**batch, reduction="sum").loss
    return value_and_gradients(loss, trained(model))


def lora(model: Any, targets: tuple[str, ...] = ("head",), **options: Any) -> Any:
    peft = required("peft")
    config = peft.LoraConfig(
        target_modules=list(targets), r=2, lora_alpha=3, init_lora_weights=False, **options
    )
    peft.get_peft_model(model, config)
    return model.double()


PROJECTORS = ("encoder_projector", "decoder_projector")
ADAPTED: dict[str, Callable[[Any], Any]] = {
    "head": lora,
    "projectors": lambda model: lora(model, PROJECTORS),
    "projectors with dropout": lambda model: lora(model, PROJECTORS, lora_dropout=0.2),
    "head and projectors": lambda model: lora(model, ("head", *PROJECTORS)),
    "modules_to_save": lambda model: lora(model, PROJECTORS, modules_to_save=["head"]),
}


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize(("kind", "order"), [("RNNT", "fuse, adapt"), ("TDT", "adapt, fuse")])
def test_peft(kind: str, name: str, order: str) -> None:
    model = parakeet.random_model(kind)
    batch = parakeet.batch_for(model)
    steps = {"fuse": parakeet.fuse_loss, "adapt": ADAPTED[name]}
    for step in order.split(", "):
        steps[step](model)
    assert len(trained(model)) < len(list(model.parameters())) / 2
    torch.manual_seed(1)
    expected = truth(model, batch)
    torch.manual_seed(1)
    actual = fused(model, batch)
    assert_equal(actual, expected, 1e-6)
    assert all(gradient.any() for gradient in actual[1:])


def test_peft_in_each_state() -> None:
    """Each forward takes the state that it finds."""
    model = lora(parakeet.random_model("TDT"))
    parakeet.fuse_loss(model)
    batch, head = parakeet.batch_for(model), model.joint.head
    adapted = fused(model, batch)
    assert_equal(adapted, truth(model, batch), 1e-6)
    head.merge()
    loss = model(**batch, reduction="sum").loss
    assert_equal([loss], [adapted[0]], 1e-6)
    head.enable_adapters(False)
    loss = model(**batch, reduction="sum").loss
    assert not head.merged
    assert abs(loss - adapted[0]) > 1e-5
    assert_equal([loss], [parakeet.reference_losses(model, batch, 0.0).sum()], 1e-6)


def test_dropout_on_the_head_is_refused_while_training() -> None:
    model = lora(parakeet.random_model("RNNT"), lora_dropout=0.2)
    with pytest.raises(ValueError, match=r"model\.joint\.head\.lora_dropout\['default'\]: exp"):
        parakeet.fuse_loss(model)
    parakeet.fuse_loss(model.eval())
    batch = parakeet.batch_for(model)
    assert_equal(fused(model, batch), truth(model, batch), 1e-6)
    with pytest.raises(ValueError, match=r"expected none while training, got 0\.2"):
        model.train()(**batch)


def test_parametrized_head() -> None:
    model = parakeet.random_model("RNNT")
    parametrizations.weight_norm(model.joint.head)
    parakeet.fuse_loss(model)
    batch = parakeet.batch_for(model)
    assert_equal(fused(model, batch), truth(model, batch), 1e-6)


def doubled(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return 2 * output


def shifted(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    return inputs[0] + 1 if inputs else None


@pytest.mark.parametrize("projector", ["encoder_projector", "decoder.decoder_projector"])
def test_hooks_on_projectors_run(projector: str) -> None:
    model = parakeet.random_model("RNNT")
    batch = parakeet.batch_for(model)
    before = truth(model, batch)
    parakeet.fuse_loss(model)
    module = model.get_submodule(projector)
    module.register_forward_hook(doubled)
    module.register_forward_pre_hook(shifted)
    actual = fused(model, batch)
    assert_equal(actual, truth(model, batch), 1e-6)
    assert abs(actual[0] - before[0]) > 1e-5


def subclass_of(kind: type, method: str = "forward") -> type:
    """With a method of its own."""

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(made, self), method)(*args, **kwargs)

    made = type("Own", (kind,), {method: own})
    return made


def put_hook(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_hook(doubled) and None


def put_pre_hook(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).register_forward_pre_hook(shifted) and None


def put(name: str, make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    return lambda model: model.set_submodule(name, make(model.get_submodule(name)))


def of_class(make: Callable[[type], type]) -> Callable[[Any], Any]:
    def changed(module: nn.Module) -> nn.Module:
        module.__class__ = make(type(module))
        return module

    return changed


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook on the head": (put_hook("joint.head"), r"model\.joint\.head: expected no hook, got doub"),
    "pre-hook on the head": (put_pre_hook("joint.head"), r"model\.joint\.head: .*got shifted"),
    "hook on the joint": (put_hook("joint"), r"model\.joint: expected no hook, got doubled"),
    "pre-hook on the joint": (put_pre_hook("joint"), r"model\.joint: expected no hook"),
    "hook on the activation": (
        put_hook("joint.activation"),
        r"model\.joint\.activation: expected no hook",
    ),
    "spectral_norm": (
        put("joint.head", lambda head: nn.utils.spectral_norm(head)),
        r"model\.joint\.head: expected no hook, got SpectralNorm",
    ),
    "Sequential": (
        put("joint.head", lambda head: nn.Sequential(nn.Dropout(0.1), head)),
        r"model\.joint\.head: expected .*, got .*Sequential",
    ),
    "head with a forward": (
        put("joint.head", of_class(subclass_of)),
        r"model\.joint\.head: expected .*, got .*Own",
    ),
    "joint with a forward": (
        put("joint", of_class(subclass_of)),
        r"model\.joint: expected transformers.*, got .*Own",
    ),
    "activation": (put("joint.activation", lambda _: nn.Mish()), "activation: .* got Mish"),
    "loss function": (
        lambda model: setattr(model, "loss_function", nn.functional.cross_entropy),
        "model: expected the loss function of its class",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_fused_and_at_every_forward(name: str) -> None:
    change, message = REFUSED[name]
    model = parakeet.random_model("TDT")
    change(model)
    with pytest.raises(ValueError, match=message):
        parakeet.fuse_loss(model)

    model = parakeet.random_model("TDT")
    batch = parakeet.batch_for(model)
    parakeet.fuse_loss(model)
    assert model(**batch).loss.isfinite()
    change(model)
    with pytest.raises(ValueError, match=message):
        model(**batch)
    if name != "loss function":
        del batch["labels"]
        assert model(**batch).logits is not None  # what computes it itself goes on


def test_a_models_own_ways() -> None:
    model = parakeet.random_model("RNNT")
    model.__class__ = subclass_of(type(model))
    with pytest.raises(ValueError, match=r"model: expected the forward of transformers.*Own"):
        parakeet.fuse_loss(model)
    model = parakeet.random_model("RNNT")
    model.forward = model.forward
    with pytest.raises(ValueError, match="model: expected the forward of ParakeetForRNNT, got one"):
        parakeet.fuse_loss(model)
    model = parakeet.random_model("RNNT")
    model.__class__ = subclass_of(type(model), "get_audio_features")
    parakeet.fuse_loss(model)
    batch = parakeet.batch_for(model)
    assert_equal(fused(model, batch), truth(model, batch), 1e-6)
    config = required("peft").LoraConfig(target_modules=["head"])
    wrapped = required("peft").get_peft_model(model, config)
    with pytest.raises(TypeError, match="got PeftModel; of what wraps one, give the model inside"):
        parakeet.fuse_loss(wrapped)


@pytest.mark.parametrize("kind", ["RNNT", "TDT"])
def test_signature_and_copies(kind: str) -> None:
    model = parakeet.random_model(kind)
    batch = parakeet.batch_for(model)
    signature, words = inspect.signature(model.forward), inspect.getdoc(model.forward)
    parakeet.fuse_loss(model)
    assert inspect.signature(model.forward) == signature
    assert inspect.getdoc(model.forward) == words
    expected = fused(model, batch)
    for back in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(back) is type(model)
        assert_equal(fused(back, batch), expected, 0)


def test_activations() -> None:
    """Of the names that a configuration may have for ``hidden_act``."""
    known = required("transformers.activations").ACT2FN
    x = torch.linspace(-4, 4, 99, dtype=torch.float64)
    names = ("relu", "tanh", "sigmoid", "linear", "leaky_relu", "silu", "swish", "gelu")
    for name in (*names, "gelu_python"):
        module = known[name]
        torch.testing.assert_close(activate(x, activation_name(module, "joint")), module(x))
    for name in ("gelu_new", "gelu_pytorch_tanh", "quick_gelu", "mish"):
        with pytest.raises(ValueError, match=r"joint: expected one of Tanh, .*, got "):
            activation_name(known[name], "joint")
