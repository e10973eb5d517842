"""The engine on the emulated CUDA backend: what the shared suites do not ask of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from emulated import EmulatedDevice, emulate_cuda_on_cpu
from emulator import EmulatedModule, thread_order
from problems import JointProblem, loss_and_gradients, random_joint, relative_error
from torch import Tensor

import rnnt_op
from rnnt_op import backends
from rnnt_op.backends.cuda import CudaBackend
from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import KernelSource

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["tanh", "relu", "sigmoid", "identity"]
Result = tuple[Tensor, tuple[Tensor, ...]]
Macros = tuple[tuple[str, str], ...]


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate_cuda_on_cpu(monkeypatch)


@contextmanager
def launches() -> Iterator[set[tuple[str, Macros]]]:
    """Sources whose kernels are launched."""
    launched: set[tuple[str, Macros]] = set()
    module = EmulatedDevice.module

    def recorded(device: EmulatedDevice, source: KernelSource) -> EmulatedModule:
        launched.add((source.name, source.macros))
        return module(device, source)

    with patch.object(EmulatedDevice, "module", recorded):
        yield launched


def run(problem: JointProblem, **options: object) -> Result:
    return loss_and_gradients(rnnt_op.joint_rnnt_loss, problem, **options)


@pytest.mark.parametrize(
    ("dtype", "reduction", "activation"),
    [
        *itertools.product(DTYPES, ["mean"], ACTIVATIONS),
        *itertools.product([torch.float32], ["none"], ACTIVATIONS),
        (torch.float64, "none", "gelu"),
        (torch.float32, "mean", "silu"),
        (torch.bfloat16, "mean", "hardtanh(-0.5, 2)"),
        (torch.float16, "none", "leaky_relu(-0.2)"),
    ],
)
def test_equals_the_cpu(
    dtype: torch.dtype, reduction: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd sizes, several groups and chunks."""
    problem = random_joint(4, 15, 8, joint_dim=33, vocab_size=57, dtype=dtype, scale=0.5)
    options = {"activation": activation, "reduction": reduction, "workspace_bytes": 300_000}
    expected = run(problem, **options)
    emulate_cuda_on_cpu(monkeypatch)
    actual = run(problem, **options)
    # The CPU rounds hidden states and logits of halves in other places.
    allowed = (4 if dtype.itemsize == 2 else 200) * torch.finfo(dtype).eps
    assert relative_error([actual[0]], [expected[0]]) <= allowed
    assert relative_error(actual[1], expected[1]) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["descending", "shuffled(1)", "shuffled(2)"])
def test_order_of_threads_changes_nothing(emulator: None, dtype: torch.dtype, order: str) -> None:
    """A race would show, and so would a sum in an order of chance."""
    problem = random_joint(4, 20, 9, joint_dim=20, vocab_size=70, dtype=dtype)
    options = {"workspace_bytes": 200_000, "reduction": "none"}
    expected = run(problem, **options)
    with thread_order(order):
        actual = run(problem, **options)
    for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)


def test_autocast_keeps_wide_states(emulator: None) -> None:
    """Float32 states are added before the sum is rounded to bfloat16."""
    problem = random_joint(2, 9, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), launches() as launched:
        run(problem)
    sources = {macros for name, macros in launched if name == "hidden"}
    assert [dict(macros)["PACKED"] for macros in sources] == ["float"]
    assert [dict(macros)["OPERAND"] for macros in sources] == ["bfloat16"]


def test_every_kernel_is_launched_and_every_source_listed(emulator: None) -> None:
    cases = [*itertools.product(DTYPES, ACTIVATIONS), (torch.float16, "leaky_relu(-0.2)")]
    for dtype, activation in cases:
        with launches() as launched:
            run(random_joint(2, 4, 2, dtype=dtype), activation=activation)
        kernels = Kernels(dtype, input_dtype=dtype, activation=activation)
        assert launched == {(s.name, s.macros) for s in CUDA.needed(kernels)}


def test_selection_is_read_after_the_next_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the device has work while the host waits."""
    events: list[str] = []

    class Device(EmulatedDevice):
        def module(self, source: KernelSource) -> EmulatedModule:
            if source.name == "lattice":
                events.append("lattice")
            return super().module(source)

        def read(self, value: Tensor) -> Callable[[], int]:
            group = sum(event.startswith("issue") for event in events)
            events.append(f"issue {group}")

            def wait() -> int:
                events.append(f"wait {group}")
                return int(value)

            return wait

    monkeypatch.setitem(backends.BACKENDS, "cpu", lambda device: CudaBackend(Device()))
    run(random_joint(3, 9, 4, lengths=[(9, 4)] * 3), workspace_bytes=20_000)
    issued = [event for event in events if event != "lattice"]
    assert issued == ["issue 0", "issue 1", "wait 0", "issue 2", "wait 1", "wait 2"]


@pytest.mark.parametrize("workspace_bytes", [1, 30_000, 100_000, None])
def test_groups_in_flight_change_nothing_but_rounding(
    emulator: None, workspace_bytes: int | None
) -> None:
    problem = random_joint(9, 12, 6, joint_dim=9, vocab_size=12)
    expected = run(problem)
    actual = run(problem, workspace_bytes=workspace_bytes)
    assert relative_error(actual[1], expected[1]) <= 1e-13
