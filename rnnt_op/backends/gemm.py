"""Matrix products on a CPU.

``torch.mm`` leaves float32 products to the BLAS that torch is built with. oneDNN, which torch
carries too and uses for bfloat16, multiplies a chunk of hidden states with the output layer twice
as fast on the AMD CPU measured, where that BLAS is MKL; it is slower only where products are small,
and by a seventh for the gradient of a large output layer (``benchmarks/gemm_cpu.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rnnt_op.torch_private import has_onednn_linear, onednn_linear


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


def padded_rows(rows: int) -> int:
    """The next number of three significant bits, as those of a plan's chunks.

    Results of oneDNN are new tensors, and how many nodes are kept is another number each time: if
    their sizes did not recur, malloc's heap would grow by the holes that they leave.
    """
    grain = 1 << max(0, rows.bit_length() - 3)
    return -(-rows // grain) * grain


def add_product_(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a · b, for a [M, K] and b [K, N]."""
    if onednn_serves(a):
        sums.add_(linear(a, b.t()))
    else:
        sums.addmm_(a, b)


def onednn_serves(x: Tensor) -> bool:
    """Whether oneDNN takes the product."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and x.shape[1] > 0  # oneDNN has no sum of nothing
        and bool(torch.backends.mkldnn.enabled)
        and has_onednn_linear()
    )
