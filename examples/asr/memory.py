"""Measured peak memory, and what the batched way would have needed."""

import sys
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from rnnt_op.memory import Workload, batched_bytes

from .config import Config


def peak_bytes(device: torch.device) -> int:
    """Most memory held so far: of PyTorch on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes(device: torch.device) -> int:
    """Memory held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def readable(count: int) -> str:
    """Bytes as MiB, or as GiB from one GiB."""
    mebibytes = count / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


@dataclass
class LargestBatch:
    """The batch whose (B, T, U + 1, V) tensors would have been the largest."""

    config: Config
    vocab_size: int
    bytes: int = 0
    workload: Workload | None = None

    def add(self, encoder_lengths: Tensor, target_lengths: Tensor) -> None:
        """Take one batch into account: lengths [B] and [B]."""
        workload = Workload(
            tuple(zip(encoder_lengths.tolist(), target_lengths.tolist(), strict=True)),
            self.vocab_size,
            self.config.joint_dim,
            getattr(torch, self.config.dtype),
        )
        needed = batched_bytes(workload)
        if needed > self.bytes:
            self.bytes, self.workload = needed, workload

    def summary(self, before: int, peak: int) -> str:
        """The line at the end of a run."""
        return (
            f"peak memory {readable(peak)} measured ({readable(before)} of it before the first "
            f"step); the batched way would have needed {readable(self.bytes)} for the joint "
            f"network and loss of the largest batch alone ({self.workload})"
        )
