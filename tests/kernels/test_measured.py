"""Which of several ways is fastest: measured once, and one answer for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from problems import loss_and_gradients, random_joint, relative_error

import rnnt_op
from rnnt_op import reference
from rnnt_op.backends import gemm, measured
from rnnt_op.jit import JitError, cpu
from rnnt_op.jit.cache import KernelCache
from rnnt_op.jit.concurrency import Once


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Asks as a new process does; counts measurements in ``asked.calls``."""
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: "flags: avx2\nmodel name : some CPU\n")
    for function in (measured.model, measured.instruction_sets):
        function.cache_clear()

    def candidates() -> measured.Candidates:
        calls.append(1)
        return {"slow": lambda: sum(range(10**5)), "fast": lambda: None}

    def ask() -> str:
        monkeypatch.setattr(measured, "_answers", Once())
        return measured.fastest("a question", "slow", candidates)

    calls: list[int] = []
    ask.calls = calls  # type: ignore[attr-defined]
    return ask


@pytest.fixture(autouse=True)
def forget_cpu() -> object:
    yield
    for function in (cpu.model, cpu.instruction_sets):
        function.cache_clear()


def test_measured_once_for_all_processes(asked: Callable[[], str]) -> None:
    assert [asked(), asked()] == ["fast", "fast"]
    assert len(asked.calls) == 1  # type: ignore[attr-defined]


def test_another_cpu_is_measured_anew(
    asked: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked()
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: "flags: avx2\nmodel name : another CPU\n")
    cpu.model.cache_clear()
    asked()
    assert len(asked.calls) == 2  # type: ignore[attr-defined]


def test_nothing_is_measured_where_processes_could_not_agree(
    asked: Callable[[], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert asked() == "slow"
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_cpuinfo", lambda: "flags: avx2\n")
    cpu.model.cache_clear()
    assert asked() == "slow"
    assert asked.calls == []  # type: ignore[attr-defined]


def test_little_is_not_clearly_faster() -> None:
    def takes(seconds: float) -> Callable[[], None]:
        def run() -> None:
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass

        return run

    assert measured._measured("a", {"a": takes(2e-3), "b": takes(1.99e-3)}) == "a"
    assert measured._measured("a", {"a": takes(2e-3), "b": takes(1e-3)}) == "b"


def test_the_first_to_publish_decides(tmp_path: Path) -> None:
    processes = [KernelCache(tmp_path / "cache") for _ in range(3)]
    key = "0" * 64
    kept = [p.put_first(key, name) for p, name in zip(processes, (b"a", b"b", b"c"), strict=True)]
    assert kept == [b"a"] * 3
    (entry,) = (tmp_path / "cache").iterdir()  # nothing is left of the others
    entry.write_bytes(entry.read_bytes()[:-1] + b"x")
    assert processes[0].get(key) is None
    assert processes[1].put_first(key, b"d") == b"d"
    assert processes[2].get(key) == b"d"


@pytest.mark.parametrize("library", ["onednn", "blas"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_library(library: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", library)
    products = []
    serves = gemm.onednn_linear

    def counted(*operands: object) -> torch.Tensor:
        products.append(1)
        return serves(*operands)  # type: ignore[arg-type]

    monkeypatch.setattr(gemm, "onednn_linear", counted)
    problem = random_joint(2, 9, 5, joint_dim=20, vocab_size=31, dtype=dtype)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    again, same = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, same))
    assert bool(products) == (library == "onednn")
    double = problem.to(torch.float64)
    _, expected = loss_and_gradients(reference.joint_rnnt_loss, double)
    assert relative_error(gradients, expected) <= 16 * torch.finfo(dtype).eps


def test_a_library_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", "mkl")
    with pytest.raises(JitError, match="RNNT_OP_CPU_GEMM is 'mkl': expected onednn or blas"):
        gemm.linear(torch.ones(1, 1), torch.ones(1, 1))


def test_small_layers_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(gemm, "fastest", lambda question, *_: asked.append(question) or "blas")
    for columns in (127, 128):
        hidden, weight = torch.randn(3, 128), torch.randn(columns, 128)
        d_logits = gemm.linear(hidden, weight)
        gemm.linear(d_logits, weight.t())
        gemm.CpuMatrices().add_product_(torch.zeros_like(weight), d_logits.t(), hidden)
    sizes = "256x128x128"
    assert asked == [f"{kind} {sizes}" for kind in ("logits", "d_hidden", "d_weight")]
