"""What people see of run-time compilation: precompiling, the command line, dumps and log lines."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import write_host_kernel, write_kernel

from rnnt_op import cli, doctor
from rnnt_op.backends import cuda_sources, native_sources
from rnnt_op.jit import (
    CompileError,
    DriverError,
    KernelSource,
    build,
    cuda_compiler,
    driver,
    environment,
)
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.precompile import precompile, precompile_sources
from rnnt_op.topology import Topology

nvrtc = jit_support.nvrtc
cxx = jit_support.cxx
cache_dir = jit_support.cache_dir


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand for the backend's: one for each dtype, one that all share."""

    def sources(dtype: torch.dtype, activation: str, topology: Topology) -> list[KernelSource]:
        number = {torch.float32: "32.0", torch.bfloat16: "16.0"}[dtype]
        shared = write_kernel(tmp_path / "csrc", "1.0")
        return [write_kernel(tmp_path / "csrc", number), shared]

    monkeypatch.setattr(cuda_sources, "kernel_sources", sources)
    monkeypatch.setattr(cuda_sources, "optional_sources", sources)


@pytest.fixture
def host_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands for the CPU backend's."""
    source = write_host_kernel(tmp_path / "csrc")
    for name in ("kernel_sources", "optional_sources"):
        monkeypatch.setattr(native_sources, name, lambda *options: [source])


@pytest.mark.usefixtures("nvrtc", "cache_dir", "two_kernels")
def test_precompile_compiles_each_source_once_then_finds_it() -> None:
    options: dict[str, Any] = {
        "dtypes": [torch.float32, torch.bfloat16],
        "activations": ["tanh", "relu"],
        "architectures": ["sm_80", "9.0", "sm_90a"],
    }
    first = precompile(**options)
    assert [(made.architecture, made.macros[0][1]) for made in first] == [
        (architecture, factor)
        for architecture in ("sm_80", "sm_90a")
        for factor in ("32.0", "1.0", "16.0")
    ]
    assert all(made.name == "scale" and made.registers for made in first)
    assert all(made.spill_bytes == 0 and made.seconds > 0 for made in first)
    assert not any(made.cached for made in first)
    second = precompile(**options)
    assert all(made.cached for made in second)
    assert [made.registers for made in second] == [made.registers for made in first]


def test_precompile_refuses_what_the_losses_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"dtypes: expected one of float64, .*, got 'int32'"):
        precompile(dtypes=[torch.int32], architectures=["sm_80"])
    with pytest.raises(ValueError, match=r"activations: expected one of tanh, .*, got 'gelu'"):
        precompile(activations=["gelu"], architectures=["sm_80"])


@pytest.mark.usefixtures("cxx", "cache_dir", "host_kernel")
def test_precompile_takes_the_cpu_where_no_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (made,) = precompile()
    assert (made.name, made.architecture, made.cached) == ("scale", "cpu", False)
    assert (made.registers, made.spill_bytes) == (None, None)
    (found,) = precompile(architectures=["cpu"])
    assert found.cached


@pytest.mark.usefixtures("nvrtc", "cxx", "cache_dir", "two_kernels", "host_kernel")
def test_precompile_gives_each_compiler_its_sources() -> None:
    made = precompile(dtypes=[torch.float32], architectures=["cpu", "sm_80"])
    assert [(one.architecture, one.macros) for one in made] == [
        ("cpu", ()),
        ("sm_80", (("FACTOR_VALUE", "32.0"),)),
        ("sm_80", (("FACTOR_VALUE", "1.0"),)),
    ]


@pytest.mark.usefixtures("nvrtc", "cache_dir", "two_kernels")
def test_precompile_takes_the_architectures_of_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    capabilities = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    made = precompile(dtypes=[torch.float32])
    assert [one.architecture for one in made] == ["sm_90a"] * 2 + ["sm_86"] * 2


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_precompile_reports_what_does_not_compile(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("nonsense")
    with pytest.raises(CompileError, match=r"broken\.cu does not compile for sm_80"):
        precompile_sources(
            [write_kernel(tmp_path), KernelSource("broken", root=tmp_path)],
            [CudaCompiler("sm_80")],
        )


@pytest.mark.usefixtures("nvrtc", "cache_dir", "two_kernels")
def test_precompile_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["precompile", "--arch", "sm_80", "--dtype", "bfloat16", "--activation", "tanh"]
    assert cli.main(command) == 0
    assert cli.main(command) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:6] == ["source", "macros", "architecture", "from", "seconds", "registers"]
    assert [(line[0], line[1], line[2], line[3]) for line in (*lines[1:3], *lines[4:])] == [
        ("scale", f"FACTOR_VALUE={factor}", "sm_80", origin)
        for origin in ("compiler", "cache")
        for factor in ("16.0", "1.0")
    ]


@pytest.mark.usefixtures("cxx", "cache_dir", "host_kernel")
def test_precompile_command_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["precompile", "--arch", "cpu"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    *first, seconds, registers, spills = line.split()
    assert first == ["scale", "-", "cpu", "compiler"]
    assert float(seconds) > 0
    assert (registers, spills) == ("-", "-")


def test_command_says_errors_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cli.main(["precompile", "--arch", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("rnnt-op: no C++ compiler: CXX names /nowhere/c++")


def fake_machine(
    monkeypatch: pytest.MonkeyPatch,
    *,
    devices: Callable[[], int],
    torch_cuda: str | None = "13.0",
    torch_devices: int = 1,
    load: Callable[..., None] = lambda *_: None,
    load_host: Callable[..., None] = lambda *_: None,
) -> None:
    properties = SimpleNamespace(name="Some GPU", major=9, minor=0)
    monkeypatch.setattr(driver, "device_count", devices)
    monkeypatch.setattr(driver, "version", lambda: (13, 1))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: torch_devices)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for sources in (cuda_sources, native_sources):
        monkeypatch.setattr(sources, "kernel_sources", lambda dtype, activation: ["a source"])
    monkeypatch.setattr(doctor, "load_module", load)
    monkeypatch.setattr(doctor, "load_host_module", load_host)


def refuse(message: str, code: str | None = None) -> Callable[..., Any]:
    def raises(*_: object) -> None:
        raise DriverError(message, code)

    return raises


def run_doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], list[str]]:
    """Status, facts by name, and the lines after them."""
    status = cli.main(["doctor"])
    table, _, end = capsys.readouterr().out.partition("\n\n")
    facts = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in table.splitlines()}
    return status, facts, end.splitlines()


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
    assert end == ["kernels compile and load on every device"]
    assert facts["driver"] == "supports CUDA 13.1, 2 device(s)"
    assert facts["cuda:1"] == "Some GPU, compute capability 9.0, sm_90a"
    assert facts["cache"].startswith(f"{cache_dir} (not used: it is writable by every user")
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
    assert_expected_inline(
        facts["CPU kernels"], """torch operations serve instead, slower: no C++ compiler"""
    )
    assert end == ["no GPU; the CPU backend needs none"]


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_dump_holds_what_was_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_kernel(tmp_path)
    made = build.build(source, CudaCompiler("sm_80"))  # a kernel that the cache holds is dumped too
    monkeypatch.setenv("RNNT_OP_JIT_DUMP", str(tmp_path / "dump"))
    assert build.build(source, CudaCompiler("sm_80")).cached
    (folder,) = (tmp_path / "dump").iterdir()
    name, architecture, digest = folder.name.split("-")
    assert (name, architecture, len(digest)) == ("scale", "sm_80", 16)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert contents == {
        "scale.cu": source.text.encode(),
        **{name: text.encode() for name, text in source.headers.items()},
        "scale.cubin": made.compiled.binary,
        "scale.log": made.compiled.log.encode() + b"\n",
        "flags.txt": "\n".join(CudaCompiler("sm_80").flags(source)).encode() + b"\n",
    }
    assert b"registers" in contents["scale.log"]


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_dump_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dump").write_text("a file")
    monkeypatch.setenv("RNNT_OP_JIT_DUMP", str(tmp_path / "dump"))
    with pytest.warns(RuntimeWarning, match="no dump in"):
        assert build.build(write_kernel(tmp_path), CudaCompiler("sm_80")).compiled.binary


@pytest.mark.usefixtures("nvrtc", "cache_dir")
def test_verbose_logs_a_line_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # As in a process that configures no logging; pytest does.
    logger = logging.getLogger("rnnt_op.jit")
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    source = write_kernel(tmp_path)
    build.build(source, CudaCompiler("sm_75"))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RNNT_OP_JIT_VERBOSE", "1")
    build.build(source, CudaCompiler("sm_80"))
    build.build(source, CudaCompiler("sm_80"))
    compiled, found = capsys.readouterr().err.splitlines()
    line = r"rnnt_op\.jit: {} scale\.cu for sm_80 in [\d.]+ ms \([0-9a-f]{{16}}\)"
    assert re.fullmatch(line.format("compiled"), compiled)
    assert re.fullmatch(line.format("found"), found)


def test_default_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNT_OP_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")

    def directory(xdg: str) -> environment.CacheDirectory:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        return environment.cache_directory()

    default = environment.CacheDirectory(Path("/home/somebody/.cache/rnnt_op"), private=True)
    assert directory("") == directory("relative") == default
    assert directory("/var/x") == environment.CacheDirectory(Path("/var/x/rnnt_op"), private=True)
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", "~/kernels")
    named = environment.CacheDirectory(Path("/home/somebody/kernels"), private=False)
    assert environment.cache_directory() == named
