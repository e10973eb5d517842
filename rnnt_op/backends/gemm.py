"""Matrices and their products on a CPU.

``torch.mm`` leaves float32 products to the BLAS that torch is built with. oneDNN, which torch
carries too and uses for bfloat16, multiplies a chunk of hidden states with the output layer twice
as fast on the AMD CPU measured, where that BLAS is MKL; it is slower only where products are small,
and by a seventh for the gradient of a large output layer (``benchmarks/gemm_cpu.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.backends.sources import Precision
from rnnt_op.torch_private import has_onednn_linear, onednn_linear


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
        if onednn_serves(a):
            sums.add_(linear(a, b.t()))
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
        weight: [N, K]
        bias: [N]
    """
    if onednn_serves(x):
        return onednn_linear(x, weight, bias)
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN takes the product."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.shape[1] > 0  # oneDNN has no sum of nothing
        and bool(torch.backends.mkldnn.enabled)
        and has_onednn_linear()
    )
