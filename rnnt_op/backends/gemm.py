"""Matrices and their products on a CPU.

``torch.mm`` leaves float32 products to the BLAS that torch is built with; torch carries oneDNN,
too. Which is faster depends on the CPU, the output layer and the product, by up to a factor of two
(``benchmarks/gemm_cpu.py``), so it is measured once (``measured``), or the environment says.

Of bfloat16 operands ``torch.mm`` has a bfloat16 result. MKL has a float32 one, to which it adds;
where torch has no MKL, or it is slow, logits and gradients of hidden states are rounded, and
operands of the weight's gradient are widened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rnnt_op.backends.measured import fastest
from rnnt_op.backends.sources import Precision, real_dtype
from rnnt_op.jit import JitError
from rnnt_op.jit.environment import CPU_GEMM
from rnnt_op.torch_private import (
    has_mkl_bfloat16_gemm,
    has_onednn_linear,
    mkl_bfloat16_gemm,
    onednn_linear,
)

_LIBRARIES = ("onednn", "blas")
_Kind = Literal["logits", "d_hidden", "d_weight"]

# Elements of an output layer below which the BLAS, whose calls are cheaper, is taken unmeasured.
_LEAST_ELEMENTS = 2**14
_FEW_ROWS, _MANY_ROWS = 256, 1024
_MEASURED_WORK = 1.4e9  # multiplications of a product that is measured at most


class CpuMatrices:
    """See ``device.Matrices``."""

    KEEPS_LOGITS = True

    def pitch(self, columns: int) -> int:
        return columns

    def rows(self, matrix: Tensor) -> Tensor:
        return matrix.contiguous()

    def empty_rows(self, rows: int, columns: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        return like.new_empty((rows, columns), dtype=dtype)

    def rounded(self, rows: int, precision: Precision) -> int:
        """The next number of four significant bits, except for MKL.

        How many nodes are scored or kept is another number each time. oneDNN prepares anew for a
        number of rows that it has not met, and its results are new tensors: if their sizes did not
        recur, malloc's heap would grow by the holes that they leave.
        """
        if self._takes_mkl(precision.operand):
            return rows
        grain = 1 << max(0, rows.bit_length() - 4)
        return -(-rows // grain) * grain

    def products(
        self, rows: int, columns: int, precision: Precision, like: Tensor
    ) -> Tensor | None:
        if self._takes_mkl(precision.operand):
            return self.empty_rows(rows, columns, precision.real, like)
        return None  # oneDNN makes its own

    def bias(self, bias: Tensor, precision: Precision) -> Tensor:
        return bias.to(precision.operand).to(precision.real).contiguous()

    def linear(self, x: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        if self._takes_mkl(x.dtype):
            if out is None:
                out = x.new_empty((len(x), len(weight)), dtype=torch.float32)
            mkl_bfloat16_gemm(x, weight.t(), out, add=False)
            return out
        is_layer = weight.is_contiguous()
        columns, joint_dim = weight.shape if is_layer else weight.t().shape
        kind: _Kind = "logits" if is_layer else "d_hidden"
        if onednn_serves(x) and _takes_onednn(kind, columns, joint_dim, x, weight):
            return onednn_linear(x, weight)
        if out is not None:
            return torch.mm(x, weight.t(), out=out)
        return torch.mm(x, weight.t()).to(real_dtype(x.dtype))

    def add_product_(self, sums: Tensor, a: Tensor, b: Tensor) -> None:
        if self._takes_mkl(a.dtype):
            mkl_bfloat16_gemm(a, b, sums, add=True)
            return
        # Not in half: every chunk's part would be rounded before it is added.
        a, b = a.to(sums.dtype), b.to(sums.dtype)
        columns, joint_dim = sums.shape
        if onednn_serves(a) and _takes_onednn("d_weight", columns, joint_dim, b, a.t()):
            sums.add_(onednn_linear(a, b.t()))
        else:
            sums.addmm_(a, b)

    def add_column_sums_(self, sums: Tensor, matrix: Tensor) -> None:
        if self._takes_mkl(matrix.dtype):
            self.add_product_(sums.unsqueeze(0), matrix.new_ones(1, len(matrix)), matrix)
        else:
            sums.add_(torch.sum(matrix, 0, dtype=sums.dtype))

    def copies_bytes(self, columns: int, precision: Precision) -> int:
        # Wider ones of half, results in half, and oneDNN's own of what is transposed.
        if self._takes_mkl(precision.operand):
            return 0
        copies = columns * precision.real.itemsize
        is_half = precision.operand != precision.real
        return 2 * copies + columns * precision.operand.itemsize if is_half else copies

    def _takes_mkl(self, operand: torch.dtype) -> bool:
        return mkl_serves(operand)


class AnyMatrices(CpuMatrices):
    """See ``device.Matrices``. They may lie on a device whose memory MKL cannot read."""

    KEEPS_LOGITS = False  # torch operations work in their place

    def _takes_mkl(self, operand: torch.dtype) -> bool:
        return False


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ on a CPU; that of half operands is float32.

    Args:
        x: [M, K]
        weight: an output layer, or its transpose. [N, K]
    """
    return CpuMatrices().linear(x, weight, None)


def mkl_serves(operand: torch.dtype) -> bool:
    """Whether MKL takes products of such operands on the CPU."""
    if operand != torch.bfloat16 or not has_mkl_bfloat16_gemm():
        return False
    chosen = _forced_library() or fastest("bfloat16 products", "blas", _bfloat16_products)
    return chosen == "blas"


def _bfloat16_products() -> dict[str, Callable[[], object]]:
    """Logits, and the gradient of their weight."""
    hidden, weight, d_logits = torch.rand(3, 512, 512, dtype=torch.bfloat16)
    sums = torch.zeros(512, 512)

    def torch_and_onednn() -> None:
        torch.mm(hidden, weight.t()).float()
        sums.addmm_(d_logits.t().float(), hidden.float())

    def mkl() -> None:
        mkl_bfloat16_gemm(hidden, weight.t(), torch.empty_like(sums), add=False)
        mkl_bfloat16_gemm(d_logits.t(), hidden, sums, add=True)

    return {"onednn": torch_and_onednn, "blas": mkl}


def _forced_library() -> str | None:
    forced = CPU_GEMM.value
    if forced is not None and forced not in _LIBRARIES:
        raise JitError(f"RNNT_OP_CPU_GEMM is {forced!r}: expected onednn or blas")
    return forced


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
    forced = _forced_library()
    if forced is not None:
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
                "onednn": lambda: onednn_linear(others, some.t()).add_(1.0),
                "blas": lambda: torch.mm(others, some),
            }
        return {
            "onednn": lambda: onednn_linear(some, y),
            "blas": lambda: torch.mm(some, y.t()),
        }

    return fastest(f"{kind} {rows}x{columns}x{joint_dim}", "onednn", candidates) == "onednn"
