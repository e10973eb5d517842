"""An output layer under peft: what it computes in each state, and which are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_equal, required, value_and_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from rnnt_op.integrations.output_layer import weight_and_bias

pytestmark = pytest.mark.slow  # importing peft takes seconds


class Model(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.head, self.other = nn.Linear(4, 5, bias=bias), nn.Linear(4, 4)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.head(self.other(x))


def lora(**options: Any) -> Any:
    given = {"target_modules": ["head"], "r": 2, "lora_alpha": 3, "init_lora_weights": False}
    return required("peft").LoraConfig(**{**given, **options})


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    """A float64 model, in training mode, with LoRA that is not zero."""
    model = (Model() if model is None else model).double()
    return required("peft").get_peft_model(model, lora(**options)).train()


def of_several(*active: str) -> Any:
    model = adapted()
    model.add_adapter("second", lora(r=3, lora_alpha=1))
    model.add_adapter("elsewhere", lora(target_modules=["other"]))
    model.double().base_model.set_adapter(list(active))
    return model


def merged() -> Any:
    model = adapted(lora_bias=True)
    model.merge_adapter()
    return model


def disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def with_dora_beside() -> Any:
    model = adapted()
    model.add_adapter("dora", lora(use_dora=True))
    return model.double()


def scaled() -> Any:
    model = adapted()
    model.base_model.model.head.scale_layer(0.25)
    return model


def normalised() -> Any:
    model = Model()
    parametrizations.weight_norm(model.head)
    return adapted(model)


def saved(**options: Any) -> Any:
    return adapted(target_modules=["other"], modules_to_save=["head"], **options)


def saved_in_another() -> Any:
    model = saved()
    model.add_adapter("second", lora(target_modules=["other"]))
    model.set_adapter("second")
    return model.double()


def saved_elsewhere() -> Any:
    """As older versions of peft leave a layer that the active adapter has no copy of."""
    model = saved()
    model.base_model.model.head._active_adapter = "elsewhere"
    return model


SERVED: dict[str, Callable[[], Any]] = {
    "LoRA": adapted,
    "no bias": lambda: adapted(Model(bias=False)),
    "rank-stabilised": lambda: adapted(use_rslora=True),
    "bias of its own": lambda: adapted(lora_bias=True),
    "bias of its own alone": lambda: adapted(Model(bias=False), lora_bias=True),
    "trained bias": lambda: adapted(bias="all"),
    "scaled": scaled,
    "evaluated with dropout": lambda: adapted(lora_dropout=0.5).eval(),
    "the second": lambda: of_several("second"),
    "several": lambda: of_several("default", "second", "elsewhere"),
    "none here": lambda: of_several("elsewhere"),
    "merged": merged,
    "disabled": lambda: disabled(adapted()),
    "disabled when merged": lambda: disabled(merged()),
    "DoRA beside": with_dora_beside,
    "DoRA disabled": lambda: disabled(adapted(use_dora=True)),
    "on a parametrized layer": normalised,
    "modules_to_save": saved,
    "modules_to_save, disabled": lambda: disabled(saved()),
    "modules_to_save of another": saved_in_another,
    "modules_to_save elsewhere": saved_elsewhere,
}


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_served(name: str) -> None:
    model = SERVED[name]()
    layer, called = model.base_model.model.head, copy.deepcopy(model).base_model.model.head
    for head in (layer, called):  # of everything, trained or not
        head.requires_grad_(True)
    x = torch.randn(6, 4, dtype=torch.float64)
    names = [name for name, _ in called.named_parameters()]
    expected = with_gradients(called(x), called)
    actual = with_gradients(nn.functional.linear(x, *weight_and_bias(layer, "head")), layer)
    assert_equal(actual, expected, 1e-12)
    reached = {name for name, gradient in zip(names, expected[1:], strict=True) if gradient.any()}
    assert any("lora_B" in name or "modules_to_save" in name for name in reached) == (
        "disabled" not in name and "merged" not in name and name not in ALONE
    )
    assert_equal(list(layer.state_dict().values()), list(called.state_dict().values()), 1e-12)


ALONE = ("none here", "modules_to_save of another", "modules_to_save elsewhere")
"""Names of cases in which the layer is as if without peft."""


def with_gradients(result: Tensor, layer: nn.Module) -> list[Tensor]:
    """Zeros of parameters that the result does not depend on."""
    loss = result.square().sum()
    gradients = torch.autograd.grad(loss, list(layer.parameters()), materialize_grads=True)
    return [result.detach(), *gradients]


def test_states_change_between_readings() -> None:
    model = adapted()
    layer, x = model.base_model.model.head, torch.randn(6, 4, dtype=torch.float64)

    def read() -> Tensor:
        return nn.functional.linear(x, *weight_and_bias(layer, "head"))

    base = layer.base_layer(x)
    assert not torch.allclose(read(), base)
    with model.disable_adapter():
        assert_equal([read()], [base], 0)
    assert_equal([read()], [layer(x)], 1e-12)
    bare = model.unload().head
    assert_equal([nn.functional.linear(x, *weight_and_bias(bare, "head"))], [base], 0)


def test_the_layers_dtype_is_kept() -> None:
    """peft keeps its own weights in float32; autocast would round their product before the sum."""
    model = required("peft").get_peft_model(Model().bfloat16(), lora(lora_bias=True))
    layer = model.base_model.model.head
    assert layer.lora_A["default"].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        weight, bias = weight_and_bias(layer, "head")
    a, b, scaling = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    base = layer.base_layer
    expected = base.weight.double() + scaling * b.weight.double() @ a.weight.double()
    assert_equal([weight], [expected.bfloat16()], 0)
    assert_equal([bias], [(base.bias.double() + scaling * b.bias.double()).bfloat16()], 0)
    assert weight.dtype == bias.dtype == torch.bfloat16
    gradients = torch.autograd.grad(weight.sum() + bias.sum(), [a.weight, b.weight, b.bias])
    assert all(gradient.any() for gradient in gradients)


def test_one_graph_with_its_caller() -> None:
    layer = adapted().base_model.model.head
    x = torch.randn(5, 4, dtype=torch.float64)

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x, *weight_and_bias(layer, "head"))

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    expected = value_and_gradients(layer(x), [layer.lora_A["default"].weight])
    assert_equal(value_and_gradients(compiled(x), [layer.lora_A["default"].weight]), expected)
    with torch.no_grad():
        layer.merge()
    assert_equal([compiled(x)], [layer.base_layer(x)])


def hooked(find: Callable[[Any], nn.Module]) -> Any:
    model = adapted()
    find(model.base_model.model.head).register_forward_hook(lambda _, inputs, output: 2 * output)
    return model


def other_method(kind: str, **options: Any) -> Any:
    config = getattr(required("peft"), kind)(target_modules=["head"], **options)
    return required("peft").get_peft_model(Model(), config)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (
        lambda: adapted(use_dora=True),
        "head: expected LoRA, got adapter 'default' with DoraLinearVariant; leave the output layer",
    ),
    "aLoRA": (lambda: adapted(alora_invocation_tokens=[1]), "with ALoraLinearVariant"),
    "dropout": (
        lambda: adapted(lora_dropout=0.5),
        r"head\.lora_dropout\['default'\]: expected none while training, got 0.5, .*lora_dropout=0",
    ),
    "hook": (lambda: hooked(lambda head: head), "head: expected no hook"),
    "hook on the base": (
        lambda: hooked(lambda head: head.base_layer),
        r"head\.base_layer: expected no hook",
    ),
    "hook on A": (
        lambda: hooked(lambda head: head.lora_A["default"]),
        r"head\.lora_A\['default'\]: expected no hook",
    ),
    "hook on the dropout": (
        lambda: hooked(lambda head: head.lora_dropout["default"]),
        r"head\.lora_dropout\['default'\]: expected no hook",
    ),
    "IA3": (
        lambda: other_method("IA3Config", feedforward_modules=[]),
        "head: expected .*, got peft.tuners.ia3.layer.Linear, which is not called here",
    ),
    "LoHa": (lambda: other_method("LoHaConfig"), "head: expected .*, got peft.tuners.loha"),
    "weight as a target": (
        lambda: adapted(target_modules=[], target_parameters=["head.weight"]),
        "head: expected .*, got peft.tuners.lora.layer.ParamWrapper",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_refused(name: str) -> None:
    build, message = REFUSED[name]
    layer = build().base_model.model.head
    with pytest.raises(ValueError, match=message):
        weight_and_bias(layer, "head")


def test_batches_of_several_adapters_are_refused() -> None:
    """peft tells layers which sample has which adapter by hooks, while the model is called."""
    model = of_several("default").eval()
    head = model.base_model.model.head
    model.base_model.model.forward = lambda x: weight_and_bias(head, "head")
    with pytest.raises(ValueError, match="head: expected no hook, got partial"):
        model(torch.ones(2, 4).double(), adapter_names=["default", "second"])
