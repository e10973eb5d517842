"""What the ops take: each argument list is written here, once.

A public function fills a record by keyword; ``torch_library_registration`` makes the ops' schemas
of the annotations, and hands the record on as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, get_type_hints

import torch
from torch import Tensor

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of an op, in the order of its schema."""

    def values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in _NAMES[type(self)]])

    def named_tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in _NAMES[type(self)] if name in TENSORS}

    def options(self) -> dict[str, Any]:
        """What is no tensor, by name."""
        return {name: getattr(self, name) for name in _NAMES[type(self)] if name not in TENSORS}

    @classmethod
    def of(cls, values: Sequence[Any]) -> Self:
        return cls(**dict(zip(_NAMES[cls], values, strict=True)))

    @classmethod
    def schema(cls) -> str:
        hints = get_type_hints(cls)
        return ", ".join(f"{_SCHEMA_TYPES[hints[name]]} {name}" for name in _NAMES[cls])


@dataclass(frozen=True, kw_only=True)
class NetworkArguments(Arguments):
    """A joint network, and the lattices over it. See :func:`rnnt_op.joint_rnnt_loss`."""

    encoder: Tensor
    predictor: Tensor
    weight: Tensor | None
    bias: Tensor | None
    targets: Tensor
    encoder_lengths: Tensor
    target_lengths: Tensor
    label_ranges: Tensor | None
    blank: int
    topology: str  # its text
    normalizer: str
    delay_penalty: float
    activation: str
    workspace_bytes: int | None
    compute_dtype: torch.dtype = torch.float32  # of the GEMMs' operands
    # If ranks share the output layer: their name, this rank's first row, and the number of all.
    process_group: str = ""
    first_column: int = 0
    all_columns: int = 0

    @property
    def column_count(self) -> int:
        """Of the logits, on all ranks."""
        if self.weight is None:
            return self.encoder.shape[2]
        return self.all_columns if self.process_group else self.weight.shape[0]


@dataclass(frozen=True, kw_only=True)
class JointArguments(NetworkArguments):
    """A loss of a joint network."""

    fast_emit: float
    clamp: float
    dropout: float
    dropout_seed: Tensor | None = None
    gradient_tolerance: float | None
    zero_infinity: bool

    @property
    def tolerance(self) -> float:
        """``gradient_tolerance``, or what it is by default.

        A skipped mass of one rounding unit would show beside the rounding of half dtypes: it is a
        bias, where rounding errors average out. A 128th does not show, and keeps few more nodes.
        """
        if self.gradient_tolerance is not None:
            return self.gradient_tolerance
        return torch.finfo(self.compute_dtype).eps / 128


@dataclass(frozen=True, kw_only=True)
class LogitsArguments(Arguments):
    """A loss of given logits. See :func:`rnnt_op.rnnt_loss`."""

    logits: Tensor
    targets: Tensor
    logit_lengths: Tensor
    target_lengths: Tensor
    label_ranges: Tensor | None
    blank: int
    topology: str
    normalizer: str
    delay_penalty: float
    fast_emit: float
    clamp: float
    fused_log_softmax: bool
    zero_infinity: bool
    workspace_bytes: int | None


_NAMES: dict[type[Arguments], tuple[str, ...]] = {
    record: tuple(field.name for field in fields(record))
    for record in (NetworkArguments, JointArguments, LogitsArguments)
}

TENSORS = frozenset(
    name
    for record in _NAMES
    for name, hint in get_type_hints(record).items()
    if hint in (Tensor, Tensor | None)
)
"""Names of the arguments that are tensors."""
