"""What people see of run-time compilation: precompiling, its command, dumps and log lines."""

import logging
import re
from pathlib import Path
from typing import Any

import jit_support
import pytest
import torch
from jit_support import write_host_kernel, write_kernel

from rnnt_op.backends.kernels import Kernels
from rnnt_op.backends.sources import CPU, CUDA
from rnnt_op.jit import (
    CompileError,
    KernelSource,
    build,
    environment,
)
from rnnt_op.jit.cuda_compiler import CudaCompiler
from rnnt_op.precompile import precompile, precompile_sources
from rnnt_op.tools import cli

nvrtc = jit_support.nvrtc
cxx = jit_support.cxx
cache_dir = jit_support.cache_dir


@pytest.fixture
def two_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stand for the backend's: one for each dtype, one that all share."""

    def sources(kernels: Kernels) -> list[KernelSource]:
        number = {torch.float32: "32.0", torch.bfloat16: "16.0"}[kernels.compute_dtype]
        shared = write_kernel(tmp_path / "csrc", "1.0")
        return [write_kernel(tmp_path / "csrc", number), shared]

    monkeypatch.setattr(CUDA, "needed", sources)


@pytest.fixture
def host_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stands for the CPU backend's."""
    source = write_host_kernel(tmp_path / "csrc")
    monkeypatch.setattr(CPU, "needed", lambda kernels: [source])


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
    with pytest.raises(ValueError, match=r"activations: expected one of tanh, .*, got 'mish'"):
        precompile(activations=["mish"], architectures=["sm_80"])


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
    assert first == ["scale", "–", "cpu", "compiler"]
    assert float(seconds) > 0
    assert (registers, spills) == ("–", "–")


def test_command_says_errors_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cli.main(["precompile", "--arch", "cpu"]) == 1
    assert capsys.readouterr().err.startswith("rnnt-op: no C++ compiler: CXX names /nowhere/c++")


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
