"""A model given methods keeps its package's signatures, and comes back from copies and pickles."""

import copy
import inspect
import io
import pickle
import typing
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnnt_op.integrations.method_override import class_before, override_methods


class Base(nn.Module, ABC):
    @abstractmethod
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor: ...


class Model(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.note = "kept"

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Theirs."""
        return scale * self.layer(x)

    def other(self) -> str:
        return "theirs"


class Doubled(nn.Module):
    def forward(self, x: Any, *, scale: Any = 1.0) -> Any:
        return self.doubled(super().forward(x, scale=scale))

    def doubled(self, x: Any) -> Any:
        return 2 * x


def doubled_model() -> Model:
    model = Model()
    override_methods(model, Doubled)
    return model


X = torch.arange(3.0)


def test_methods_are_replaced_once() -> None:
    model = Model()
    expected = 2 * model(X, scale=3.0)
    override_methods(model, Doubled)
    override_methods(model, Doubled)
    assert torch.equal(model(X, scale=3.0), expected)
    assert model.other() == "theirs"
    assert isinstance(model, Model)
    assert (type(model).__name__, type(model).__module__) == ("Model", __name__)
    assert class_before(model, Doubled) is class_before(Model(), Doubled) is Model


def test_methods_keep_signature_and_words() -> None:
    model = doubled_model()
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert typing.get_type_hints(model.forward) == {"x": Tensor, "scale": float, "return": Tensor}
    assert inspect.getdoc(model.forward) == "Theirs."
    assert model.forward.__qualname__ == "Model.forward"


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle of an old protocol": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "torch.save": through_torch,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy of what holds it": lambda model: copy.deepcopy(nn.Sequential(model))[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_copies_have_the_methods_too(way: str) -> None:
    model = doubled_model().eval()
    model.register_forward_hook(hook)
    back = WAYS[way](model)
    assert type(back) is type(model)
    assert not back.training
    assert back.note == "kept"
    assert torch.equal(back(X), model(X))
    assert torch.equal(back(X), 3 * 2 * model.layer(X))
    if way != "copy":
        with torch.no_grad():
            back.layer.weight.zero_()
        assert model.layer.weight.any()


def hook(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 3 * output


class Wrapping(nn.Module):
    """What a package like FSDP2 puts before a class of its own making."""


def test_a_class_made_of_the_models_is_not_lost() -> None:
    model = doubled_model()
    model.__class__ = type("Wrapped", (Wrapping, type(model)), {})
    assert class_before(model, Doubled) is Model
    with pytest.raises(pickle.PicklingError, match="Wrapped"):
        pickle.dumps(model)
    assert isinstance(copy.deepcopy(model), Wrapping)


def test_a_method_of_the_object_is_refused() -> None:
    model = Model()
    model.forward = model.forward
    with pytest.raises(ValueError, match=r"the forward of Model, got one .* before what sets it"):
        override_methods(model, Doubled)
