"""What decides which kernels an op takes.

A backend makes a list of sources of it (``sources.Sources.needed``),
which are compiled side by side before the op begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from rnnt_op.topology import RNNT, Topology

Result = Literal["losses", "gradients", "posteriors", "paths"]
LogitsFrom = Literal["joint", "additive", "given"]


@dataclass(frozen=True)
class Kernels:
    """By default those of a joint network's loss with its gradients."""

    compute_dtype: torch.dtype  # of the GEMMs' operands, or of given logits
    topology: Topology = RNNT
    logits: LogitsFrom = "joint"
    input_dtype: torch.dtype | None = None  # of encoder and predictor states, if they share it
    activation: str = "identity"
    has_dropout: bool = False
    is_restricted: bool = False  # by label ranges
    has_part: bool = False  # of the columns; other ranks have the others
    result: Result = "gradients"


USUAL = Kernels(torch.float32, input_dtype=torch.float32, activation="tanh")
"""Of a float32 model without options."""


def variants(dtype: torch.dtype, activation: str, topology: Topology) -> Iterator[Kernels]:
    """What ops on inputs of a dtype may take, under autocast to it, too."""
    results: tuple[Result, ...] = ("gradients", "losses", "posteriors", "paths")
    both = (False, True)
    for result, is_restricted in itertools.product(results, both):
        given = Kernels(dtype, topology, logits="given", is_restricted=is_restricted, result=result)
        yield given
        yield replace(given, logits="additive", input_dtype=dtype)
        joint = replace(given, logits="joint", activation=activation)
        inputs = (dtype, torch.promote_types(dtype, torch.float32))
        for input_dtype, has_dropout, has_part in itertools.product(inputs, both, both):
            yield replace(
                joint, input_dtype=input_dtype, has_dropout=has_dropout, has_part=has_part
            )
