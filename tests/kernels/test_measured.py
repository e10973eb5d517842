"""Which of several ways is fastest: measured once, and one answer for all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import loss_and_gradients, random_joint, relative_error

import rnnt_op
from rnnt_op import reference, torch_private
from rnnt_op.backends import eager, gemm, measured, sources
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
    monkeypatch.setattr(sources, "multiplies_bfloat16", lambda: True)
    problem = random_joint(2, 9, 5, joint_dim=20, vocab_size=31, dtype=dtype)
    loss, gradients = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    again, same = loss_and_gradients(rnnt_op.joint_rnnt_loss, problem)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, same))
    assert bool(products) == (library == "onednn")
    double = problem.to(torch.float64)
    _, expected = loss_and_gradients(reference.joint_rnnt_loss, double)
    assert relative_error(gradients, expected) <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("library", ["onednn", "blas"])
def test_bfloat16_products_are_float32(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of MKL are never rounded to bfloat16; the weight's gradient by no library."""
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", library)
    matrices, precision = (
        gemm.CpuMatrices(),
        sources.Precision(torch.float32, torch.bfloat16, torch.float32, torch.float32),
    )
    is_exact = library == "blas" and torch_private.has_mkl_bfloat16_gemm()
    hidden, weight = torch.randn(40, 33).bfloat16(), torch.randn(70, 33).bfloat16()
    d_logits = torch.randn(40, 70).bfloat16()
    for x, y in ((hidden, weight), (d_logits, weight.t())):
        out = matrices.products(len(x), len(y), precision, x)
        assert (out is not None) == is_exact
        result, expected = matrices.linear(x, y, out), x.double() @ y.double().t()
        assert out is None or result is out
        assert torch.equal(matrices.linear(x, y, None), result)
        assert result.dtype == torch.float32
        error = relative_error([result], [expected])
        assert error < 1e-6 if is_exact else 1e-4 < error < 4e-3
    sums = torch.randn(70, 33)
    expected = sums.double() + d_logits.double().t() @ hidden.double()
    matrices.add_product_(sums, d_logits.t(), hidden)
    assert relative_error([sums], [expected]) < 1e-6
    assert (matrices.copies_bytes(70, precision) == 0) == is_exact


def test_matrices_of_any_device_take_no_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read another device's memory."""
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", "blas")
    monkeypatch.setattr(gemm, "mkl_bfloat16_gemm", None)
    x, weight = torch.randn(9, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    matrices, sums, columns = gemm.AnyMatrices(), torch.zeros(3, 5), torch.zeros(3)
    precision = sources.CPU.precision("joint", torch.bfloat16, torch.bfloat16)
    assert eager._MATRICES.products(9, 3, precision, x) is None
    result = matrices.linear(x, weight, None)
    assert torch.equal(result, (x @ weight.t()).float())
    matrices.add_product_(sums, result.bfloat16().t(), x)
    matrices.add_column_sums_(columns, result.bfloat16())
    assert relative_error([sums], [result.bfloat16().double().t() @ x.double()]) < 1e-6
    assert relative_error([columns], [result.bfloat16().double().sum(0)]) < 1e-6
    assert matrices.copies_bytes(10, precision) > 0


def test_mkl_serves_where_it_is_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch_private.has_mkl_bfloat16_gemm():
        pytest.skip("torch without MKL, or an older one")
    monkeypatch.delenv("RNNT_OP_CPU_GEMM", raising=False)
    x, weight = torch.randn(9, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    exact = x.double() @ weight.double().t()
    errors = {}
    for answer in ("onednn", "blas"):
        asked = []

        def fastest(question: str, default: str, candidates: Any, answer: str = answer) -> str:
            asked.append((question, default))  # noqa: B023
            for run in candidates().values():
                run()
            return answer

        monkeypatch.setattr(gemm, "fastest", fastest)
        errors[answer] = relative_error([gemm.linear(x, weight)], [exact])
        assert asked == [("bfloat16 products", "blas")]
    assert errors["blas"] < 1e-6 < 1e-4 < errors["onednn"]


def test_a_library_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNT_OP_CPU_GEMM", "mkl")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(JitError, match="RNNT_OP_CPU_GEMM is 'mkl': expected onednn or blas"):
            gemm.linear(torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype))


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
