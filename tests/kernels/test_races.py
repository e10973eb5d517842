"""Threads of the kernels order what they share by barriers, and each barrier is needed for that.

The emulator knows of every access, so that a race is seen in whatever order it happened; and in
shuffled order threads take turns between accesses, which no result may show.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import EmulatedDevice
from emulator import EmulatedModule, EmulatorError, thread_order
from places import ROOT
from problems import loss_and_gradients, random_joint
from torch import Tensor

import rnnt_op
from rnnt_op import backends, topologies
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.jit import KernelSource

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

Run = Callable[[], list[Tensor]]


def loss(dtype: torch.dtype, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    problem = random_joint(3, 9, 5, joint_dim=20, vocab_size=301, dtype=dtype)
    problem = replace(problem, targets=problem.targets.clamp(max=290))
    value, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)
    return [value, *gradients]


def whole(frames: int, labels: int) -> list[Tensor]:
    """One small group of which all nodes have a gradient."""
    torch.manual_seed(0)
    problem = random_joint(2, frames, labels, joint_dim=8, dtype=torch.float32)
    value, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, gradient_tolerance=0.0)
    return [value, *gradients]


def paths() -> list[Tensor]:
    torch.manual_seed(0)
    problem = random_joint(3, 9, 5, dtype=torch.float32)
    arguments = [argument.detach() for argument in problem.arguments]
    return [*rnnt_op.posteriors(*arguments), *rnnt_op.align(*arguments)]


def given() -> list[Tensor]:
    torch.manual_seed(0)
    arguments = random_joint(3, 9, 5, vocab_size=77).arguments[4:]
    logits = torch.randn(3, 9, 6, 77, dtype=torch.bfloat16, requires_grad=True)
    value = rnnt_op.rnnt_loss(logits, *arguments, blank=0, workspace_bytes=50_000)
    return [value.detach(), *torch.autograd.grad(value, logits)]


RANGES = torch.tensor([0, 6]).expand(3, 9, 2)
RUNS: dict[str, Run] = {
    "float32": lambda: loss(torch.float32, workspace_bytes=200_000),
    "bfloat16": lambda: loss(torch.bfloat16, label_ranges=RANGES),
    "tdt": lambda: loss(torch.float32, topology=topologies.tdt()),
    "wide": lambda: whole(20, 40),  # more than one warp of the lattice
    "long": lambda: whole(150, 8),  # more than one that adds up a state's rows, in turns
    "paths": paths,
    "given": given,
}


def serve(monkeypatch: pytest.MonkeyPatch, device: EmulatedDevice) -> None:
    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda _: CudaBackend(device))


@pytest.mark.parametrize("run", RUNS)
def test_no_races(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, EmulatedDevice(watched=True))
    expected = RUNS[run]()
    for seed in (1, 2):
        with thread_order(f"shuffled({seed})"):
            assert all(map(torch.equal, RUNS[run](), expected))


BARRIER = re.compile(r"__sync(threads|warp)\(\);")
BARRIERS = [
    pytest.param(
        path.stem, match.span(), id=f"{path.name}:{text.count(chr(10), 0, match.start()) + 1}"
    )
    for path in sorted((ROOT / "csrc").glob("*.cu*"))
    for text in [path.read_text()]
    for match in BARRIER.finditer(text)
]


@pytest.mark.parametrize(("name", "span"), BARRIERS)
def test_without_a_barrier_there_is_a_race(
    name: str, span: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (ROOT / "csrc").glob("*.cu*"):
        text = path.read_text()
        if path.stem == name:
            text = text[: span[0]] + ";" + text[span[1] :]
        (tmp_path / path.name).write_text(text)

    class Device(EmulatedDevice):
        def module(self, source: KernelSource) -> EmulatedModule:
            is_changed = source.name == name
            return super().module(replace(source, root=tmp_path) if is_changed else source)

    serve(monkeypatch, Device(watched=True))
    runs = {"best_paths": "paths", "lattice": "wide", "joint_gradient": "long"}
    run = runs.get(name, "bfloat16")
    with pytest.raises(EmulatorError, match=r"^race: "):
        RUNS[run]()
