"""NVRTC: cubins and their reports, architectures, and errors in words."""

import sys
from collections.abc import Callable
from pathlib import Path

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import write_kernel
from places import ROOT

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.sources import CUDA
from rnnt_op.jit import (
    CompileError,
    CompilerNotFound,
    KernelSource,
    UnsupportedArchitecture,
    cuda_compiler,
    ptxas,
)
from rnnt_op.jit.compiler import Compiled
from rnnt_op.jit.cuda_compiler import CudaCompiler

CSRC = ROOT / "csrc"
HEADERS = sorted(path.name for path in CSRC.glob("*.cuh"))

nvrtc = jit_support.nvrtc


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a", "sm_120"])
def test_compiles_for(architecture: str, tmp_path: Path) -> None:
    compiled = CudaCompiler(architecture).compile(write_kernel(tmp_path))
    assert compiled.binary.startswith(b"\x7fELF")
    assert str(tmp_path).encode() not in compiled.binary
    (usage,) = ptxas.usages(compiled.log)
    assert usage.kernel == "scale"
    assert 0 < usage.registers < 32
    assert usage.spill_bytes == 0
    assert Compiled.from_bytes(compiled.to_bytes()) == compiled


@pytest.mark.usefixtures("nvrtc")
def test_macros_reach_the_kernel(tmp_path: Path) -> None:
    two, three = (
        CudaCompiler("sm_80").compile(write_kernel(tmp_path, factor)).binary
        for factor in ("2.0", "3.0")
    )
    assert two != three


def test_flags(tmp_path: Path) -> None:
    assert CudaCompiler("sm_90a").flags(write_kernel(tmp_path)) == (
        "--gpu-architecture=sm_90a",
        "-std=c++17",
        "--ptxas-options=-v",
        "-DFACTOR_VALUE=2.0",
    )


@pytest.mark.usefixtures("nvrtc")
def test_compile_error_shows_the_compilers_message(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("\n__global__ void k() { undeclared = 1; }\n")
    with pytest.raises(CompileError) as error:
        CudaCompiler("sm_80").compile(KernelSource("broken", (("N", "1"),), root=tmp_path))
    assert_expected_inline(
        str(error.value),
        """\
broken.cu -DN=1 does not compile for sm_80: NVRTC_ERROR_COMPILATION
broken.cu(2): error: identifier "undeclared" is undefined
  __global__ void k() { undeclared = 1; }
                        ^

1 error detected in the compilation of "broken.cu".""",
    )


def test_spills_and_registers_are_read_from_the_log() -> None:
    log = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]
ptxas info    : Function properties for a_function_it_calls
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
ptxas info    : Function properties for _Z3twoPf
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""
    assert ptxas.usages(log) == (ptxas.Usage("one", 255, 40), ptxas.Usage("_Z3twoPf", 8, 0))
    assert ptxas.usages("") == ()


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_87"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_103"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_121"),
    ],
)
def test_architecture_of_a_capability(capability: tuple[int, int], architecture: str) -> None:
    if cuda_compiler.compiler_version() < (13, 0) and capability > (10, 1):
        pytest.skip("this NVRTC is older than that GPU")
    assert cuda_compiler.architecture_of(capability) == architecture
    major, minor = capability
    for name in (architecture, f"sm_{major}{minor}", f"{major}.{minor}", f"{major}{minor}"):
        assert cuda_compiler.architecture_named(name) == architecture


@pytest.fixture
def nvrtc_of_three(monkeypatch: pytest.MonkeyPatch, nvrtc: None) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bindings, "nvrtcGetSupportedArchs", lambda: (0, [70, 75, 90]))
    monkeypatch.setattr(bindings, "nvrtcVersion", lambda: (0, 12, 4))


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((7, 5), "sm_75"), ((7, 9), "sm_75"), ((9, 0), "sm_90a"), ((10, 3), None), ((9, 5), None)],
)
def test_gpus_newer_than_the_compiler(
    capability: tuple[int, int], architecture: str | None, nvrtc_of_three: None
) -> None:
    """The highest lower minor version serves, except for binaries that run on one alone."""
    if architecture is None:
        with pytest.raises(UnsupportedArchitecture):
            cuda_compiler.architecture_of(capability)
    else:
        assert cuda_compiler.architecture_of(capability) == architecture


@pytest.mark.usefixtures("nvrtc_of_three")
def test_unsupported_architectures() -> None:
    def message(function: Callable[..., str], argument: object) -> str:
        with pytest.raises(UnsupportedArchitecture) as error:
            function(argument)
        return str(error.value)

    assert_expected_inline(
        message(cuda_compiler.architecture_of, (13, 2)),
        """no kernels for compute capability 13.2: NVRTC 12.4 and rnnt_op support sm_75, sm_90a""",
    )
    assert_expected_inline(  # the compiler knows it; the package is not made for it
        message(cuda_compiler.architecture_of, (7, 0)),
        """no kernels for compute capability 7.0: NVRTC 12.4 and rnnt_op support sm_75, sm_90a""",
    )
    assert_expected_inline(
        message(cuda_compiler.architecture_named, "hopper"),
        """no architecture 'hopper': expected one of sm_75, sm_90a""",
    )


def test_missing_nvrtc_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc")

    def not_found() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so":\n  No such file: libnvrtc.so*')

    monkeypatch.setattr(bindings, "nvrtcVersion", not_found)
    monkeypatch.setattr("cuda.bindings.__version__", "13.4.4")
    with pytest.raises(CompilerNotFound) as error:
        cuda_compiler.compiler_version()
    assert_expected_inline(
        str(error.value),
        """cuda-python 13.4.4 finds no NVRTC 13, the CUDA run-time compiler: pip install nvidia-cuda-nvrtc, or install CUDA 13's toolkit where the linker finds it or CUDA_HOME points (Failure finding "libnvrtc.so": No such file: libnvrtc.so*)""",
    )
    monkeypatch.setattr("cuda.bindings.__version__", "12.9.1")
    with pytest.raises(CompilerNotFound, match="pip install nvidia-cuda-nvrtc-cu12, or"):
        cuda_compiler.compiler_version()


def test_missing_cuda_python_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompilerNotFound) as error:
        cuda_compiler.compiler_version()
    assert_expected_inline(
        str(error.value),
        """cuda-python, which reaches the CUDA compiler NVRTC, is not installed: pip install cuda-python nvidia-cuda-nvrtc""",
    )


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.skipif(not HEADERS, reason="csrc holds no header")
@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header: str, tmp_path: Path) -> None:
    for name in HEADERS:
        (tmp_path / name).write_text((CSRC / name).read_text())
    (tmp_path / "alone.cu").write_text(f'#include "{header}"\n')
    for architecture in ("sm_75", "sm_90a"):
        source = KernelSource("alone", macros_around(header), root=tmp_path)
        assert CudaCompiler(architecture).compile(source).binary


def macros_around(header: str) -> tuple[tuple[str, str], ...]:
    """Macros of a kernel that includes the header: a header may speak of its element types."""
    sources = CUDA.needed(Kernels(torch.bfloat16, activation="tanh"))
    return next((source.macros for source in sources if header in source.headers), ())
