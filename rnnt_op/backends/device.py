"""What compiled kernels need of a device beyond torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rnnt_op.backends.sources import Precision, Sources
from rnnt_op.jit import Argument, KernelSource


class Shape(NamedTuple):
    """Of a launch. A CPU divides its work by itself."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int = 0


class Matrices(Protocol):
    """Node rows as kernels and GEMMs take them."""

    KEEPS_LOGITS: bool
    """Whether small problems wait for products, so that their results are worth keeping. Then
    ``symbol_scores`` must not destroy them."""

    def pitch(self, columns: int) -> int:
        """Elements from one of the kernels' rows to the next."""

    def rows(self, matrix: Tensor) -> Tensor:
        """The same matrix with that pitch."""

    def empty_rows(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """A matrix with that pitch."""

    def rounded(self, rows: int, precision: Precision) -> int:
        """How many rows a product takes, to have these."""

    def products(
        self, rows: int, columns: int, precision: Precision, like: Tensor
    ) -> Tensor | None:
        """A buffer for results of ``linear``; None where they are new tensors."""

    def bias(self, bias: Tensor, precision: Precision) -> Tensor:
        """A bias rounded like any operand, as the kernels take it."""

    def linear(self, x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """x · weightᵀ; that of half operands is float32.

        Args:
            x: [M, K]
            weight: [N, K]
            out: where the result may be: of ``products``, or room for kept logits. [M, N]
        """

    def add_product_(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        """sums += a · b; products of half operands are not rounded to half."""

    def add_column_sums_(self, sums: Tensor, matrix: Tensor) -> None:
        """sums += Σ of the matrix's rows, as wide."""

    def copies_bytes(self, columns: int, precision: Precision) -> int:
        """What ``add_product_`` copies of a row of its operands."""


class Device(Matrices, Protocol):
    """A GPU; a CPU; in tests, a GPU's kernels on a CPU."""

    sources: Sources
    """The kernels in its language."""

    def guard(self) -> AbstractContextManager[object]:
        """Makes the device current.

        Raises:
            RuntimeError: it is in a state in which the engine cannot run.
        """

    def load(self, sources: Sequence[KernelSource]) -> None:
        """Compiles and loads sources, side by side."""

    def call(
        self, source: KernelSource, kernel: str, shape: Shape, arguments: dict[str, Argument]
    ) -> None:
        """Calls a kernel with those of the arguments that are its parameters."""

    def read(self, value: Tensor) -> Callable[[], int]:
        """Starts to copy an integer to the host; a call of the result waits for it."""
