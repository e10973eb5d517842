"""What tests of the integrations share."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def refuse_calls(module: torch.nn.Module) -> None:
    """Fails where the module is called, such as by what would build logits."""

    def refuse(*_: Any) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    module.register_forward_pre_hook(refuse)


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
