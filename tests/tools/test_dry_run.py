"""The launches that benchmarks count on paper are those that the engine makes."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from places import ROOT
from problems import loss_and_gradients, random_joint
from torch import Tensor

import rnnt_op
from rnnt_op import backends
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.jit import KernelSource
from rnnt_op.memory import Workload

Launches = list[tuple[Any, ...]]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("workspace_bytes", [None, 30_000, 120_000])
def test_launches(
    dtype: torch.dtype, workspace_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import dry_run
    from emulated import EmulatedDevice

    made: Launches = []
    counted: Launches = []
    # So unsure that no node is without a gradient.
    problem = random_joint(5, 14, 6, joint_dim=40, vocab_size=70, dtype=dtype, scale=0.3)

    class Device(EmulatedDevice):
        def call(self, source: KernelSource, kernel: str, shape: Any, arguments: Any) -> None:
            made.append((kernel, shape))
            super().call(source, kernel, shape, arguments)

        def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
            made.append(("matmul", a.shape, b.shape))
            super().matmul(a, b, out)

    class Dry(dry_run._Device):
        def call(self, source: KernelSource, kernel: str, shape: Any, arguments: Any) -> None:
            counted.append((kernel, shape))
            super().call(source, kernel, shape, arguments)

        def matmul(self, a: Tensor, b: Tensor, out: Tensor) -> None:
            counted.append(("matmul", a.shape, b.shape))
            super().matmul(a, b, out)

    monkeypatch.setattr(dry_run, "_Device", Dry)
    lengths = zip(problem.encoder_lengths.tolist(), problem.target_lengths.tolist(), strict=True)
    workload = Workload(tuple(lengths), vocab_size=70, joint_dim=40, dtype=dtype)
    dry_run.count_step(workload, 1.0, workspace_bytes=workspace_bytes)

    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device: CudaBackend(Device()))
    loss_and_gradients(
        rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0, workspace_bytes=workspace_bytes
    )
    assert counted == made
    assert len(made) >= 18


@pytest.mark.parametrize(
    ("lengths", "warps"),
    [
        # As many as a block has, for 11 states of 2,000 rows.
        (((2000, 10),), {"encoder": 1, "predictor": 16}),
        # A chunk has 82 states or more, in three slices of the columns, and 254 frames.
        (((400, 128),) * 32, {"encoder": 1, "predictor": 3}),
        (((1000, 500),) * 4, {"encoder": 3, "predictor": 6}),
        # No more than rows to add up.
        (((60, 60),), {"encoder": 1, "predictor": 1}),
    ],
)
def test_few_long_sums_take_several_warps(
    lengths: tuple[tuple[int, int], ...],
    warps: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import dry_run

    of_first_chunk: dict[str, int] = {}

    class Dry(dry_run._Device):
        def call(self, source: KernelSource, kernel: str, shape: Any, arguments: Any) -> None:
            if kernel == "joint_gradient":
                name = "encoder" if arguments["state_sample"] is None else "predictor"
                of_first_chunk.setdefault(name, shape.block[1])
            super().call(source, kernel, shape, arguments)

    monkeypatch.setattr(dry_run, "_Device", Dry)
    dry_run.count_step(Workload(lengths, 1024, 640, torch.bfloat16), 1.0)
    assert of_first_chunk == warps
