"""What tests of the integrations share."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from problems import random_labels
from torch import Tensor


def required(name: str) -> Any:
    """The module of that name; the test is skipped where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a package says that another version of torch breaks
        return pytest.skip(f"{name} cannot be imported here: {error}")


@contextmanager
def refused_calls(module: torch.nn.Module) -> Iterator[None]:
    """Fails where the module is called meanwhile, such as by what would build logits."""

    def refuse(called: torch.nn.Module, _: Any) -> None:
        assert called is not module, f"{type(module).__name__} was called"

    # One of the module's own would be refused.
    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def stands_for(name: str) -> Callable[[type], type]:
    """Gives a stub the name by which an adapter knows the class that it stands for."""

    def named(stub: type) -> type:
        stub.__module__, _, stub.__qualname__ = name.rpartition(".")
        return stub

    return named


@contextmanager
def importable(*stubs: type) -> Iterator[None]:
    """Meanwhile pickle finds the stubs where what they stand for would be."""
    modules = {stub.__module__: ModuleType(stub.__module__) for stub in stubs}
    for stub in stubs:
        setattr(modules[stub.__module__], stub.__qualname__, stub)
        top = stub.__module__.partition(".")[0]
        modules.setdefault(top, ModuleType(top))
    with patch.dict(sys.modules, modules):
        yield


@dataclass(frozen=True)
class LogitsProblem:
    """Arguments of losses that take logits."""

    logits: Tensor  # [B, T, U+1, V]
    targets: Tensor  # [B, U]
    frames: Tensor  # [B]
    labels: Tensor  # [B]

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logits, self.targets, self.frames, self.labels

    def to(self, dtype: torch.dtype, index_dtype: torch.dtype = torch.int64) -> LogitsProblem:
        """A copy whose logits are a leaf of another dtype."""
        logits = self.logits.detach().to(dtype).requires_grad_()
        return LogitsProblem(logits, *(t.to(index_dtype) for t in self.arguments[1:]))


def random_logits(
    lengths: Sequence[tuple[int, int]] = ((6, 3), (4, 2), (5, 0)),
    vocab_size: int = 5,
    *,
    blank: int = 0,
    extra_columns: int = 0,
) -> LogitsProblem:
    """A ragged float64 problem whose samples have these T and U."""
    batch = len(lengths)
    frames, labels = (max(sizes) for sizes in zip(*lengths, strict=True))
    columns = vocab_size + extra_columns
    logits = torch.randn(batch, frames, labels + 1, columns, dtype=torch.float64)
    return LogitsProblem(
        logits.requires_grad_(),
        random_labels((batch, labels), vocab_size, blank),
        *(torch.tensor(sizes) for sizes in zip(*lengths, strict=True)),
    )


def value_and_gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The loss, and the gradients of its sum."""
    return [loss.detach(), *torch.autograd.grad(loss.sum(), inputs)]


def assert_equal(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-10
) -> None:
    """Of values and of shapes, but not of dtypes."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a, e, rtol=tolerance, atol=tolerance, check_dtype=False, check_device=False
        )
