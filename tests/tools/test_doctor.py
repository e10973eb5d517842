"""What ``rnnt-op doctor`` says of a machine."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline

import rnnt_op
from rnnt_op import doctor
from rnnt_op.backends import gemm
from rnnt_op.backends.sources import CPU, CUDA
from rnnt_op.jit import DriverError, cuda_compiler, driver
from rnnt_op.tools import cli

nvrtc = jit_support.nvrtc
cxx = jit_support.cxx
cache_dir = jit_support.cache_dir


def fake_machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    devices: Callable[[], int],
    torch_cuda: str | None = "13.0",
    torch_devices: int = 1,
    load: Callable[..., Any] = lambda *_: None,
    load_host: Callable[..., None] = lambda *_: None,
) -> None:
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(doctor, "multiplies_bfloat16", lambda: False)  # else it measures
    monkeypatch.setattr(driver, "device_count", devices)
    monkeypatch.setattr(driver, "version", lambda: (13, 1))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_devices)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for language in (CUDA, CPU):
        monkeypatch.setattr(language, "needed", lambda kernels: ["a source"])
    monkeypatch.setattr(doctor, "load_module", load)
    monkeypatch.setattr(doctor, "load_host_module", load_host)


def refuse(message: str, code: str | None = None) -> Callable[..., Any]:
    def raises(*_: object) -> None:
        raise DriverError(message, code)

    return raises


def run_doctor(
    capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, dict[str, str], list[str]]:
    """Status, facts by name, and the lines after them."""
    status = cli.main(["doctor", *options])
    facts, uses, end = capsys.readouterr().out.split("\n\n")
    lines = [line.split("  ", 1) for line in (facts + "\n" + uses).splitlines()]
    return status, {name: text.strip() for name, text in lines}, end.splitlines()


def test_doctor_names_what_will_be_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    """A GPU's fact and its use have one name; only JSON has both."""
    fake_machine(monkeypatch, devices=lambda: 1)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(gemm, "mkl_serves", lambda operand: operand == torch.bfloat16)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["status", "facts", "uses", "problems", "verdict"]
    assert found["facts"]["cuda:0"] == "Some GPU, compute capability 9.0"
    assert found["problems"] == []
    assert_expected_inline(
        "\n".join(f"{name}: {use}" for name, use in found["uses"].items()),
        """\
cpu: C++ kernels for AVX2; GEMMs by torch.mm, in float32 by oneDNN where that is faster, in bfloat16 by MKL with float32 results
cuda:0: CUDA kernels for sm_90a; GEMMs by torch.mm (cuBLAS), of half operands with float32 results""",
    )


@pytest.mark.slow
def test_doctor_needs_no_extra() -> None:
    """Where click and rich cannot be imported, ``python -m rnnt_op.doctor`` prints all of it."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['click', 'rich', 'numpy', 'matplotlib']))\n"
        "runpy.run_module('rnnt_op.doctor', run_name='__main__')"
    )
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True)
    assert process.stderr == b""
    lines = process.stdout.decode().splitlines()
    assert lines[0].split() == ["rnnt_op", rnnt_op.__version__]
    assert any(line.startswith("cpu ") for line in lines)


@pytest.mark.usefixtures("nvrtc")
def test_doctor_without_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    fake_machine(monkeypatch, devices=refuse("no driver"), torch_cuda=None, torch_devices=0)
    monkeypatch.setenv("RNNT_OP_JIT_VERBOSE", "1")
    status, facts, end = run_doctor(capsys)
    assert status == 0
    assert end == ["no GPU; the CPU backend needs none"]
    assert facts["torch"] == torch.__version__
    assert facts["torch's CUDA"] == "none, a CPU build"
    assert facts["driver"] == "no driver"
    assert facts["NVRTC"].startswith(".".join(map(str, cuda_compiler.compiler_version())) + " at /")
    assert facts["cache"] == f"{cache_dir} (writable)"
    assert facts["cache entries"] == "0, 0 bytes"
    assert facts["RNNT_OP_CACHE_DIR"].startswith(f"{cache_dir} (directory of compiled kernels")
    assert facts["RNNT_OP_JIT_VERBOSE"].startswith("1 (")
    assert "RNNT_OP_JIT_DUMP" not in facts
    _, facts, _ = run_doctor(capsys, "--variables")
    assert facts["RNNT_OP_JIT_VERBOSE"].startswith("1 (")
    assert facts["RNNT_OP_JIT_DUMP"].startswith("unset (")
    assert not cache_dir.exists()


@pytest.mark.usefixtures("nvrtc")
def test_doctor_with_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    loaded = []
    fake_machine(
        monkeypatch,
        devices=lambda: 2,
        torch_devices=2,
        load=lambda *arguments: loaded.append(arguments),
    )
    cache_dir.mkdir()
    cache_dir.chmod(0o777)
    status, facts, end = run_doctor(capsys)
    assert status == 0
    verdict, problem = end
    assert verdict == "kernels compile and load on every device"
    assert problem.startswith(f"- the cache {cache_dir} is writable by every user")
    assert problem.endswith("chmod o-w it")
    assert facts["driver"] == "supports CUDA 13.1, 2 device(s)"
    assert facts["cache"] == f"{cache_dir} (not used)"
    assert loaded == [("a source", torch.device("cuda", index)) for index in range(2)]


@pytest.mark.usefixtures("cache_dir")
@pytest.mark.parametrize(
    ("machine", "obstacle"),
    [
        ({"torch_cuda": None}, "is a CPU build: install a CUDA build"),
        ({"torch_devices": 0}, "torch finds no device: update the driver"),
        ({"load": refuse("could not load")}, "cuda:0: could not load"),
        ({"devices": refuse("mismatch", "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")}, "mismatch"),
    ],
)
def test_doctor_names_what_keeps_a_gpu_from_running(
    machine: dict[str, Any],
    obstacle: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_machine(monkeypatch, **{"devices": lambda: 1, **machine})
    monkeypatch.setattr(doctor, "architecture_of", lambda capability: "sm_90a")
    status, _, end = run_doctor(capsys)
    assert status == 1
    assert end[0] == "there is a GPU, but kernels cannot run on it:"
    assert obstacle in end[1]
    assert len(end) == 2


@pytest.mark.usefixtures("cache_dir")
def test_doctor_without_nvrtc(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(bindings, "nvrtcVersion", refuse("no libnvrtc"))
    fake_machine(monkeypatch, devices=lambda: 1)
    status, facts, end = run_doctor(capsys)
    assert status == 1
    assert "pip install nvidia-cuda-nvrtc" in facts["NVRTC"]
    assert "pip install nvidia-cuda-nvrtc" in end[1]


@pytest.mark.usefixtures("cxx", "cache_dir")
def test_doctor_names_the_cpp_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(monkeypatch, devices=refuse("no driver"), torch_devices=0)
    monkeypatch.setenv("CXXFLAGS", "-O1")
    status, facts, _ = run_doctor(capsys)
    assert status == 0
    assert re.fullmatch(r".*\d+\.\d+.* at /\S+", facts["C++ compiler"])
    assert facts["CPU kernels"] == "compile and load"
    assert facts["CXXFLAGS"].startswith("-O1 (flags of that compiler")


@pytest.mark.usefixtures("cache_dir")
def test_doctor_without_a_cpp_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_machine(
        monkeypatch,
        devices=refuse("no driver"),
        torch_devices=0,
        load_host=refuse("no C++ compiler\nand its log"),
    )
    monkeypatch.setenv("CXX", "/nowhere/c++")
    status, facts, end = run_doctor(capsys)
    assert status == 0
    assert_expected_inline(
        facts["C++ compiler"],
        """no C++ compiler: CXX names /nowhere/c++, which is not an executable file on PATH; install a C++17 compiler (apt-get install g++), or name one in CXX""",
    )
    assert facts["CPU kernels"] == "do not run here"
    assert facts["cpu"] == "torch operations, slower than kernels; GEMMs by torch.mm"
    assert end == [
        "no GPU; the CPU backend needs none",
        "- the CPU has no kernels: no C++ compiler",
    ]
