"""The CUDA emulator itself: guarded memory, and the cache of libraries."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch
from emulator import EmulatedModule, EmulatorError, build, guarded
from emulator.build import build_kernels, find_kernels
from emulator_support import Compile

from rnnt_op.jit import KernelSource


@pytest.mark.parametrize("side", ["start", "end"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_guarded_copies(dtype: torch.dtype, side: str) -> None:
    x = torch.randn(3, 5, requires_grad=True).to(dtype).T
    y = guarded(x, side)
    assert y.equal(x)
    assert (y.dtype, y.is_contiguous(), y.requires_grad) == (dtype, True, False)
    assert y.data_ptr() % 16 == 0
    end = y.data_ptr() + y.nbytes
    assert (-end % 4096 < 16) if side == "end" else y.data_ptr() % 4096 == 0
    exact = guarded(x, alignment=y.itemsize)
    assert (exact.data_ptr() + exact.nbytes) % 4096 == 0
    assert guarded(x[:0], side).shape == (0, 3)


def test_guarded_memory_is_freed() -> None:
    x = guarded(torch.zeros(100))
    start = f"{x.data_ptr() // 4096 * 4096:x}-"
    assert start in Path("/proc/self/maps").read_text()
    del x
    gc.collect()
    assert start not in Path("/proc/self/maps").read_text()


def test_kernels_are_found_in_any_dress() -> None:
    text = """
        struct alignas(16) S { int x; };
        __device__ int helper(int x) { return x; }
        extern "C" __global__ void plain(float* a);
        extern "C" __launch_bounds__(N, 2) __global__ void before(long long n) { if (n) helper(1); }
        extern "C" __global__ __attribute__((used)) void
            __launch_bounds__(32 * (W))
            after (double x) {}
        template <class T> __global__ void no_entry_point(T* x) {}
    """
    expected = {"plain": "1024", "before": "N, 2", "after": "32 * (W)"}
    assert find_kernels(text) == expected


def test_names_of_the_c_library(compiled: Compile) -> None:
    module = compiled("""
        #if VARIANT == 2
        extern "C" __global__ void gamma(int*) {}
        #else
        extern "C" __global__ void select(int* select) { *select = VARIANT; }
        #endif
    """, ("VARIANT", "7"))  # fmt: skip
    assert module.kernels == ("select",)
    x = torch.zeros(1, dtype=torch.int32)
    module.launch("select", (1, 1, 1), (1, 1, 1), [x])
    assert x.item() == 7


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNT_OP_EMULATOR_CACHE", str(tmp_path / "cache"))
    header, text = tmp_path / "value.cuh", tmp_path / "test.cu"
    header.write_text("#pragma once\nconstexpr int value = 1;\n")
    text.write_text('#include "value.cuh"\nextern "C" __global__ void k(int* x) { *x = value; }\n')

    def path(*macros: tuple[str, str], checked: bool = True) -> Path:
        return build_kernels(KernelSource("test", macros, tmp_path), checked=checked)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the emulator's own headers give none
        first = path()
    paths = [first, path(("A", "1")), path(checked=False)]
    header.write_text("#pragma once\nconstexpr int value = 2;\n")
    paths.append(path())
    assert len(set(paths)) == 4
    folders = {library.parent for library in (tmp_path / "cache").glob(f"*/{build.LIBRARY}")}
    assert folders == {entry.parent for entry in paths}
    header.write_text("#pragma once\nconstexpr int value = 1;\n")
    with monkeypatch.context() as context:
        context.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
        assert path() == first
    header.write_text("#pragma once\nconstexpr int value = ;\n")
    with pytest.raises(EmulatorError, match=r"value\.cuh:2"):
        path()
    text.write_text('extern "C" __global__ void k(int* unused) {}\n')
    with pytest.warns(UserWarning, match="unused parameter"):
        path()
    assert {library.parent for library in (tmp_path / "cache").glob(f"*/{build.LIBRARY}")} > folders


def test_cache_folder_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.cu").write_text('extern "C" __global__ void k() {}')
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    monkeypatch.setenv("RNNT_OP_EMULATOR_CACHE", str(open_folder))
    with pytest.raises(EmulatorError, match="only this user can write to"):
        EmulatedModule(KernelSource("test", (), tmp_path))


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.cu").write_text('extern "C" __global__ void k() {}')
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_compiler_version", build._compiler_version.__wrapped__)
    with pytest.raises(EmulatorError, match=r"the emulator needs g\+\+ \(or CXX\)"):
        EmulatedModule(KernelSource("test", (), tmp_path))
