"""Matrices and their products on a CPU.

``torch.mm`` leaves float32 products to the BLAS that torch is built with; torch carries oneDNN,
too. Which is faster depends on the CPU, the output layer and the product, by up to a factor of two
(``benchmarks/gemm_cpu.py``), so it is measured once (``measured``), or the environment says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rnnt_op.backends.measured import fastest
from rnnt_op.backends.sources import Precision
from rnnt_op.jit import JitError
from rnnt_op.jit.environment import CPU_GEMM
from rnnt_op.torch_private import has_onednn_linear, onednn_linear

_LIBRARIES = ("onednn", "blas")
_Kind = Literal["logits", "d_hidden", "d_weight"]

# Elements of an output layer below which the BLAS, whose calls are cheaper, is taken unmeasured.
_LEAST_ELEMENTS = 2**14
_FEW_ROWS, _MANY_ROWS = 256, 1024
_MEASURED_WORK = 2.8e8  # multiplications of a product that is measured at most, 10 ms on a core


class CpuMatrices:
    """See ``device.Matrices``."""

    ADDS_BIAS = KEEPS_LOGITS = True

    def pitch(self, columns: int) -> int:
        return columns

    def rows(self, matrix: Tensor) -> Tensor:
        return matrix.contiguous()

    def empty_rows(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def rounded(self, rows: int) -> int:
        """The next number of four significant bits.

        How many nodes are scored or kept is another number each time. oneDNN prepares anew for a
        number of rows that it has not met, and its results are new tensors: if their sizes did not
        recur, malloc's heap would grow by the holes that they leave.
        """
        grain = 1 << max(0, rows.bit_length() - 4)
        return -(-rows // grain) * grain

    def products(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor | None:
        return None  # oneDNN makes its own

    def bias(self, bias: Tensor, precision: Precision) -> Tensor:
        return bias.to(precision.operand)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    def add_product_(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        # Not in half: every chunk's part would be rounded before it is added.
        a, b = a.to(sums.dtype), b.to(sums.dtype)
        columns, joint_dim = sums.shape
        if onednn_serves(a) and _takes_onednn("d_weight", columns, joint_dim, b, a.t()):
            sums.add_(onednn_linear(a, b.t(), None))
        else:
            sums.addmm_(a, b)

    def copies_bytes(self, columns: int, precision: Precision) -> int:
        # Wider ones of half, and oneDNN's own of what is transposed.
        copies = 1 if precision.operand == precision.real else 2
        return copies * columns * precision.real.itemsize


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, the bias added before half results are rounded.

    Args:
        x: [M, K]
        weight: an output layer, or its transpose. [N, K]
        bias: [N]
    """
    is_layer = weight.is_contiguous()
    columns, joint_dim = weight.shape if is_layer else weight.t().shape
    kind: _Kind = "logits" if is_layer else "d_hidden"
    if onednn_serves(x) and _takes_onednn(kind, columns, joint_dim, x, weight):
        return onednn_linear(x, weight, bias)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN can take the product."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.shape[1] > 0  # oneDNN has no sum of nothing
        and bool(torch.backends.mkldnn.enabled)
        and has_onednn_linear()
    )


def _takes_onednn(kind: _Kind, columns: int, joint_dim: int, x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN computes a product of an output layer.

    Args:
        kind: which one: logits = hidden · weightᵀ, d_hidden = d_logits · weight, or
            d_weight = d_logitsᵀ · hidden.
        columns, joint_dim: of the output layer.
        x, y: the operands; of d_weight hidden and d_logits, a row a node both.
    """
    forced = CPU_GEMM.value
    if forced is not None:
        if forced not in _LIBRARIES:
            raise JitError(f"RNNT_OP_CPU_GEMM is {forced!r}: expected onednn or blas")
        return forced == "onednn"
    size = columns * joint_dim
    if size < _LEAST_ELEMENTS:
        return False
    usual = _FEW_ROWS if len(x) < 2 * _FEW_ROWS else _MANY_ROWS
    rows = max(_FEW_ROWS // 4, min(usual, int(_MEASURED_WORK / size)))

    def candidates() -> dict[str, Callable[[], object]]:
        some = x[:rows]
        if kind == "d_weight":
            others = y[:rows].t()
            return {
                # Its result is added to the sums by a pass of its own.
                "onednn": lambda: onednn_linear(others, some.t(), None).add_(1.0),
                "blas": lambda: torch.mm(others, some),
            }
        return {
            "onednn": lambda: onednn_linear(some, y, None),
            "blas": lambda: torch.mm(some, y.t()),
        }

    return fastest(f"{kind} {rows}x{columns}x{joint_dim}", "onednn", candidates) == "onednn"
