"""What each method needs, from shapes alone: :mod:`rnnt_op.memory` for all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnnt_op.memory import (
    METHODS,
    Cost,
    Held,
    Lengths,
    Workload,
    cost,
    held,
    largest_batch,
    peak_bytes,
)
from rnnt_op.tools.study.problems import DtypeName, dtype_of, recorded_lengths
from rnnt_op.tools.study.report import GB, Row


@dataclass(frozen=True)
class Question:
    """Loss and gradients of which batch, on what; by default the headline's."""

    batch: int = 1024
    frames: int = 1000
    labels: int = 200
    lengths: Path | None = None  # .npy file of [n, 2] lengths (T, U), instead of one shape
    vocab_size: int = 1024
    joint_dim: int = 640
    dtype: DtypeName = "bfloat16"
    workspace_bytes: int | None = None  # None: the default of the device
    limit_gb: float = 80.0
    device: str = "cuda"

    def workload(self, batch: int | None = None) -> Workload:
        """The batch, or the same with another batch size."""
        batch = self.batch if batch is None else batch
        if self.lengths is None:
            lengths: Lengths = ((self.frames, self.labels),) * batch
        else:
            lengths = recorded_lengths(self.lengths, batch)
        return Workload(lengths, self.vocab_size, self.joint_dim, dtype_of(self.dtype))

    def peaks(self, method: str, batches: list[int]) -> list[int]:
        """Bytes at the peak with each batch size."""
        return [peak_bytes(method, self.workload(batch), **self._place) for batch in batches]

    @property
    def _place(self) -> dict[str, Any]:
        return {"workspace_bytes": self.workspace_bytes, "device": self.device}


@dataclass(frozen=True)
class Estimate:
    """What one method needs."""

    method: str
    held: tuple[Held, ...]  # at the peak
    largest_batch: int  # that fits the limit
    cost: Cost  # of rnnt_op, if every node had gradient

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak, inputs and gradients included."""
        return sum(tensor.bytes for tensor in self.held)


def estimates(question: Question) -> list[Estimate]:
    """What each method needs."""
    workload, place = question.workload(), question._place
    limit = round(question.limit_gb * GB)
    return [
        Estimate(
            method=name,
            held=held(name, workload, **place),
            largest_batch=largest_batch(name, question.workload, limit, **place),
            cost=cost(name, workload, **place),
        )
        for name in METHODS
    ]


def method_rows(question: Question, found: list[Estimate]) -> list[Row]:
    """A table of the methods."""
    return [
        {
            "method": each.method,
            "peak GB": each.peak_bytes / GB,
            f"largest B in {question.limit_gb:g} GB": each.largest_batch,
            "GEMM TFLOP": each.cost.gemm_flops / 1e12,
            "GB moved": each.cost.bytes_moved / GB,
            "steps in sequence": each.cost.sequential_steps,
        }
        for each in found
    ]


def tensor_rows(found: list[Estimate]) -> list[Row]:
    """A table of the tensors that each method holds at its peak."""
    return [
        {
            "method": each.method,
            "tensor": tensor.name,
            "shape": tensor.shape,
            "GB": tensor.bytes / GB,
        }
        for each in found
        for tensor in each.held
    ]


def as_json(question: Question, found: list[Estimate]) -> dict[str, Any]:
    """All of it, in bytes."""
    methods = [{**dataclasses.asdict(each), "peak_bytes": each.peak_bytes} for each in found]
    asked = dataclasses.asdict(question)
    asked["lengths"] = question.lengths and question.lengths.name
    return {"question": asked, "methods": methods}
