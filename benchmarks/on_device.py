"""What the GPU's benchmarks share: which device, time by its events, peak memory, real lengths.

All of it works on CPU tensors too, so that a script's logic can be tried without a GPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from rnnt_op.backends.kernels import USUAL
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit.signature import signatures
from rnnt_op.memory import Lengths
from rnnt_op.tools.study.measure import forget_peak, held_bytes, is_gpu, peak_bytes
from rnnt_op.tools.study.problems import recorded_lengths

GIB = 2**30
MIB = 2**20

LENGTHS_VARIABLE = "RNNT_OP_LENGTHS"
_LENGTHS_BESIDE = Path(__file__).parents[2] / "shared/data/librispeech_lengths.npy"
_RESULTS = Path("benchmarks/results")

OUR_KERNELS = tuple(name for source in CUDA.needed(USUAL) for name in signatures(source))
"""Names of the kernels of a loss and its gradients."""

R = TypeVar("R")


def chosen_device(name: str) -> str:
    """``name``, or for ``auto`` the GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def results_folder(out: Path | None, device: str) -> Path | None:
    """Where results go: a toy run on a CPU leaves none unless told where."""
    return _RESULTS if out is None and is_gpu(device) else out


def with_peak_bytes(device: str, function: Callable[[], R]) -> tuple[R, int, int]:
    """Runs a function and watches memory.

    Returns:
        Its result; bytes in use before it; and the most in use while it ran. On a GPU these are
        tensors' bytes, on a CPU the process's resident ones, where the system tells.
    """
    gc.collect()
    if is_gpu(device):
        torch.cuda.synchronize()
    forget_peak(device)
    before = held_bytes(device)
    result = function()
    if is_gpu(device):
        torch.cuda.synchronize()
    return result, before, peak_bytes(device)


def bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def device_bytes(device: str) -> int:
    """Memory of the device; the CPU's is taken to be small, for toy sizes."""
    return torch.cuda.get_device_properties().total_memory if is_gpu(device) else 2 * GIB


def real_lengths(path: Path | None, batch: int) -> Lengths | str:
    """(T, U) of utterances drawn from a file of [n, 2] lengths, or why there are none.

    Args:
        path: None: what RNNT_OP_LENGTHS names, else the file in ``shared`` beside the repository.
        batch: how many are drawn.
    """
    if path is None:
        path = Path(os.environ.get(LENGTHS_VARIABLE) or _LENGTHS_BESIDE)
    if not path.exists():
        return (
            f"no file of LibriSpeech lengths at {path}: name an .npy file of [n, 2] lengths (T, U) "
            f"with --lengths or {LENGTHS_VARIABLE}"
        )
    return recorded_lengths(path, batch)
