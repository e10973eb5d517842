"""What this package uses of torch that torch does not document, each with why; all of it is here.

``tests/loss/test_torch_private.py`` names each of them, so that a torch that changes one fails
there.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup, distributed_c10d

ASSERTION_BYTES = 254
"""Longest message of a device-side assertion: CUDA refuses a longer one."""


TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
"""Key of the dispatcher under which an op comes to the innermost transform of torch.func.

There is no public way to have ``torch.autograd.Function``, which serves transforms, stand for an op
in them; ``torch.library.register_autograd`` serves none.
"""


def below_autograd() -> AbstractContextManager[None]:
    """Within it, an op is not recorded: its Function calls it thus.

    A second op, without derivatives, would do the same publicly, and stand in traced graphs.
    """
    context: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return context


def transforms_are_active() -> bool:
    """Whether a transform of torch.func is at work, and may hold a tensor that backward would
    overwrite."""
    return bool(torch._C._are_functorch_transforms_active())


def backward_keeps_graph() -> bool:
    """Whether the backward pass that runs now leaves its graph for another one.

    If not, what was saved for it may be overwritten. Nothing public says so.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def is_batched_gradient(tensor: Tensor) -> bool:
    """Whether ``is_grads_batched=True`` made the tensor, which holds many gradients as one.

    Nothing can be multiplied by it in place, and its class is that of any tensor.
    """
    return bool(torch._C._functorch.is_legacy_batchedtensor(tensor))


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts on the tensor's device; on a GPU without waiting for it.

    The public assertions bring the condition to the host.

    Args:
        condition: one bool.
        message: of at most ``ASSERTION_BYTES``.
    """
    torch._assert_async(condition, message)


def process_group_named(name: str) -> ProcessGroup:
    """The process group of a name, which is how an op's schema takes one."""
    resolve: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    group: ProcessGroup = resolve(name)
    return group


def weight_hooks(module: nn.Module) -> list[Callable[[nn.Module, tuple[Any, ...]], Any]]:
    """The hooks by which weight_norm, spectral_norm and prune make a weight before ``forward``.

    That is before ``forward`` alone, so other methods have to call them. What hooks a module has is
    not public. The functions of torch.nn.utils.parametrizations need none.
    """
    from torch.nn.utils.prune import BasePruningMethod
    from torch.nn.utils.spectral_norm import SpectralNorm
    from torch.nn.utils.weight_norm import WeightNorm

    kinds = (BasePruningMethod, SpectralNorm, WeightNorm)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def call_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """All hooks that a call of a module runs: before and behind ``forward``, and in backward.

    Who reads a module's parameters instead of calling it has to know that there are none. What
    hooks a module has is not public.
    """
    return [*module._forward_pre_hooks.values(), *hooks_behind_forward(module)]


def hooks_behind_forward(module: nn.Module) -> list[Callable[..., Any]]:
    """Those that get what a module returns, or its gradient."""
    kinds = (module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor stands for a plain one while a graph is made of what is done with it."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def has_onednn_linear() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ in float32 by oneDNN, as torch's own compiler calls it.

    ``torch.mm`` leaves such products to the BLAS that torch is built with (``backends.gemm``).
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def has_mkl_bfloat16_gemm() -> bool:
    return _cblas_gemm_bf16bf16f32() is not None


def mkl_bfloat16_gemm(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """out = a · b, or out += a · b, of bfloat16 matrices in float32.

    On a CPU ``torch.mm`` has no float32 result of them. MKL documents a routine that has, and torch
    exports those of the MKL that is linked into it.

    Args:
        a: bfloat16, its rows or its columns without gaps. [M, K]
        b: likewise. [K, N]
        out: float32, its rows without gaps. [M, N]
    """
    gemm = _cblas_gemm_bf16bf16f32()
    assert gemm is not None
    assert (a.dtype, b.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert a.is_cpu and b.is_cpu and out.is_cpu  # noqa: PT018
    (m, k), n = a.shape, b.shape[1]
    assert out.stride() == (n, 1) or out.numel() == 0, out.stride()
    if k == 0 or out.numel() == 0:  # its leading dimensions must not be zero
        if not add:
            out.zero_()
        return
    a_order, a_pitch = _blas_layout(a)
    b_order, b_pitch = _blas_layout(b)
    sizes = m, n, k
    at = a.data_ptr(), a_pitch, b.data_ptr(), b_pitch
    gemm(_ROW_MAJOR, a_order, b_order, *sizes, 1.0, *at, float(add), out.data_ptr(), n)


_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # of the C interface to the BLAS


def _blas_layout(matrix: Tensor) -> tuple[int, int]:
    """Whether it lies there transposed, and the elements from one of the rows there to the next."""
    (rows, columns), (row_stride, column_stride) = matrix.shape, matrix.stride()
    if column_stride == 1 or columns == 1:
        return _AS_IT_IS, max(columns, row_stride if rows > 1 else columns)
    assert row_stride == 1 or rows == 1, matrix.stride()
    return _TRANSPOSED, max(rows, column_stride)


@functools.cache
def _cblas_gemm_bf16bf16f32() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        gemm = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):  # no MKL, or an older one
        return None
    # Integers of 64 bits serve an interface of 32, too: each has a register or a word of its own.
    integer, number, pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [
        *(integer,) * 6, number, *(pointer, integer) * 2, number, pointer, integer,
    ]  # fmt: skip
    gemm.restype = None
    result: Callable[..., None] = gemm
    return result
