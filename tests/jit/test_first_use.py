"""The first loss in a process, on machines that lack something: it is right, and says what it lacks."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import write_host_kernel
from places import ROOT, TESTS

from rnnt_op import backends
from rnnt_op.backends import eager, serving
from rnnt_op.backends.kernels import USUAL, Kernels, variants
from rnnt_op.backends.sources import CPU, CUDA
from rnnt_op.jit import (
    CompilerNotFound,
    build,
    concurrency,
    cpu,
    cuda_compiler,
    cuda_module,
    host_module,
    load_host_module,
    log,
)
from rnnt_op.jit.concurrency import Once
from rnnt_op.jit.host_compiler import HostCompiler
from rnnt_op.topology import RNNT
from rnnt_op.validation import FLOAT_DTYPES

compiler = jit_support.cxx
cache_dir = jit_support.cache_dir
nvrtc = jit_support.nvrtc


LOSS = """
import os, sys, warnings
import torch
warnings.simplefilter("ignore", FutureWarning)
warnings.formatwarning = lambda message, *_: f"warning: {message}\\n"
import rnnt_op
from rnnt_op.backends import backend_for, eager
from rnnt_op.jit import log
log.PATIENCE = 600  # what a test waits for is its own business
torch.manual_seed(0)
head = rnnt_op.JointRNNTLoss(8, 11)
states = torch.randn(2, 9, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
labels = torch.ones(2, 4).long(), torch.tensor([9, 7]), torch.tensor([4, 2])
loss = head(*states, *labels)
loss.backward()
expected = rnnt_op.reference.joint_rnnt_loss(*states, *head.parameters(), *labels)
assert abs(loss - expected) < 1e-5, (loss, expected)
served = backend_for(torch.device("cpu"))
print("torch operations" if served is eager else "kernels")
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Commands by which a compiler, whose path is ``$cxx``, compiles nothing twice."""
    folder = tmp_path_factory.mktemp("compiled")
    return f"""
case "$*" in *" -o "*) ;; *) exec "$cxx" "$@";; esac
for made do :; done
kept={folder}/$( (echo "$*"; cat *.cpp *.h 2>/dev/null) | sha256sum | cut -c1-64)
[ -f "$kept" ] || {{ "$cxx" "$@" || exit $?; cp "$made" "$kept.$$"; mv "$kept.$$" "$kept"; }}
cp "$kept" "$made"
"""


@pytest.fixture
def cxx(compiler: str, remembering: str, tmp_path: Path) -> str:
    """Path of a compiler that remembers what other tests have had compiled."""
    path = tmp_path / "remembers" / "c++"
    path.parent.mkdir()
    return script(path, f"#!/bin/sh\ncxx={compiler}\n{remembering}")


LossIn = Callable[..., tuple[str, str]]


@pytest.fixture
def loss_in(request: pytest.FixtureRequest) -> LossIn:
    """What a process with these variables, None: unset, prints; and what it says on stderr."""

    def run(variables: dict[str, str | None], code: str = LOSS) -> tuple[str, str]:
        kept = ("RNNT_OP_CACHE_DIR", "XDG_CACHE_HOME", "CXX", "CXXFLAGS", "RNNT_OP_JIT_VERBOSE")
        environment = {k: v for k, v in os.environ.items() if k not in kept}
        environment["PYTHONPATH"] = f"{TESTS}{os.pathsep}{ROOT}"
        environment["CXXFLAGS"] = "-O0"  # half the time of -O3
        if not {"PATH", "CXX"} & variables.keys():
            environment["CXX"] = request.getfixturevalue("cxx")
        for name, value in variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


def script(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


NO_USER = """
import os, pwd
def unknown(*_):
    raise KeyError
pwd.getpwuid = pwd.getpwnam = unknown
"""
"""A user id without an entry in the password file, as containers are started with."""


def test_without_a_home_directory(loss_in: LossIn) -> None:
    printed, said = loss_in({"HOME": None}, NO_USER + LOSS)
    assert printed == "kernels\n"
    assert_expected_inline(
        said,
        """\
warning: rnnt_op: the kernel cache has no place, since this user has no home directory; name one in RNNT_OP_CACHE_DIR; kernels compiled now are kept in this process's memory only
""",
    )


@pytest.mark.slow
def test_without_a_home_directory_but_with_a_cache(loss_in: LossIn, tmp_path: Path) -> None:
    for name in ("RNNT_OP_CACHE_DIR", "XDG_CACHE_HOME"):
        printed, said = loss_in({"HOME": None, name: str(tmp_path / name)}, NO_USER + LOSS)
        assert (printed, said) == ("kernels\n", "")
        assert list((tmp_path / name).rglob("*.kernel"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RNNT_OP_CACHE_DIR", "RNNT_OP_JIT_DUMP"])
def test_paths_in_a_home_that_is_not_there(loss_in: LossIn, name: str, tmp_path: Path) -> None:
    variables = {"HOME": None, "RNNT_OP_CACHE_DIR": str(tmp_path / "cache"), name: "~/somewhere"}
    printed, said = loss_in(variables, NO_USER + LOSS)
    assert printed == "kernels\n"
    assert said.count("\n") == (name == "RNNT_OP_CACHE_DIR")
    assert not Path("~").exists()


@pytest.mark.slow
def test_doctor_without_a_home_directory(loss_in: LossIn) -> None:
    code = NO_USER + "import runpy; runpy.run_module('rnnt_op.doctor', run_name='__main__')"
    printed, _ = loss_in({"HOME": None, "PYTHONWARNINGS": "ignore"}, code)
    assert re.search(r"^cache +\(not used\)$", printed, re.MULTILINE)
    assert "- the cache has no place, since this user has no home directory; name one in" in printed


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions of POSIX")
def test_read_only_home(loss_in: LossIn, home: Path) -> None:
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    # Root writes everywhere, so that a file stands where the directory would be.
    if os.getuid() == 0:
        home.chmod(0o755)
        (home / ".cache").write_text("")
    printed, said = loss_in({"HOME": str(home)})
    assert printed == "kernels\n"
    assert said.startswith(f"warning: rnnt_op: the kernel cache {home}/.cache/rnnt_op cannot be")
    assert said.count("\n") == 1


def test_without_a_compiler(loss_in: LossIn, tmp_path: Path, home: Path) -> None:
    printed, said = loss_in({"HOME": str(home), "PATH": str(tmp_path)})
    assert printed == "torch operations\n"
    assert_expected_inline(
        said,
        """\
warning: rnnt_op: torch operations serve the CPU instead of compiled kernels, more slowly: no C++ compiler: none of c++, g++, clang++ is an executable file on PATH; install a C++17 compiler (apt-get install g++), or name one in CXX
""",
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_c_compiler(loss_in: LossIn, home: Path) -> None:
    """It compiles C++, but links none of its library, which some kernels need and some do not."""
    printed, said = loss_in({"HOME": str(home), "CXX": "gcc"})
    if printed == "kernels\n":  # this process has that library for everybody
        assert said == ""
        return
    assert printed == "torch operations\n"
    assert said.endswith(
        "; a C compiler links no C++ library: name the C++ compiler in CXX, such as g++ for gcc\n"
    )
    assert "noexec" not in said


@pytest.mark.slow
def test_flags_of_an_older_standard(loss_in: LossIn, home: Path) -> None:
    printed, said = loss_in({"HOME": str(home), "CXXFLAGS": "-std=c++14"})
    assert printed == "torch operations\n"
    assert said.startswith("warning: rnnt_op: torch operations serve the CPU instead of compiled")
    assert "does not compile for cpu" in said
    assert "noexec" not in said


def killed_on(folder: Path, cxx: str, name: str) -> str:
    """A compiler that is killed when it compiles a file of that name, as for want of memory."""
    return script(
        folder / "killed",
        f'#!/bin/sh\nfor a do case "$a" in {name}.cpp) kill -9 $$;; esac; done\nexec {cxx} "$@"\n',
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["node_rows", "lattice", "joint_gradient"])
def test_a_compiler_that_is_killed(
    loss_in: LossIn, name: str, cxx: str, tmp_path: Path, home: Path
) -> None:
    """On whichever file: the loss is torch operations' from the beginning."""
    printed, said = loss_in({"HOME": str(home), "CXX": killed_on(tmp_path, cxx, name)})
    assert printed == "torch operations\n"
    assert f"more slowly: {name}.cpp " in said
    assert "does not compile for cpu" in said
    assert "exits with status -9" in said


@pytest.mark.slow
def test_a_compiler_that_is_killed_later(
    loss_in: LossIn, cxx: str, tmp_path: Path, home: Path
) -> None:
    """Kernels serve what compiled, torch operations what did not; it is not tried again."""
    later = """
for _ in range(2):
    head(*states, *labels)
    print(head.align(*states, *labels).frames.shape)
"""
    count = tmp_path / "count"
    compiler = script(
        tmp_path / "killed",
        f"""#!/bin/sh
for a do case "$a" in best_paths.cpp) echo x >> {count}; kill -9 $$;; esac; done
exec {cxx} "$@"
""",
    )
    printed, said = loss_in(
        {"HOME": str(home), "CXX": compiler},
        LOSS + later,
    )
    assert printed == "kernels\n" + 2 * "torch.Size([2, 4])\n"
    assert said.count("warning: ") == 1
    assert "best_paths.cpp" in said
    assert count.read_text() == "x\n"


@pytest.mark.slow
def test_temporary_folder_mounted_noexec(loss_in: LossIn, home: Path) -> None:
    """Its dynamic linker refuses libraries from there."""
    noexec = """
import ctypes
Real = ctypes.CDLL
def refuse(name, *arguments, **options):
    if str(name).endswith(".so") and "rnnt_op-" in str(name):
        raise OSError(f"{name}: failed to map segment from shared object")
    return Real(name, *arguments, **options)
ctypes.CDLL = refuse
"""
    printed, said = loss_in({"HOME": str(home)}, "import torch" + noexec + LOSS)
    assert printed == "torch operations\n"
    assert "failed to map segment" in said
    assert "mounted noexec, name a folder elsewhere in TMPDIR" in said


@pytest.mark.slow
@pytest.mark.skipif(cpu.instruction_sets() is None, reason="the system does not tell its CPU")
def test_warm_cache_without_a_compiler(loss_in: LossIn, home: Path, tmp_path: Path) -> None:
    """As an image has it whose build had a compiler."""
    warm = """
import rnnt_op, torch
rnnt_op.precompile(dtypes=[torch.float32], activations=["tanh"], architectures=["cpu"])
"""
    loss_in({"HOME": str(home)}, warm)
    for variables in ({"PATH": str(tmp_path)}, {"CXX": "/nowhere/c++"}):
        printed, said = loss_in({"HOME": str(home), **variables})
        assert (printed, said) == ("kernels\n", "")
    cached = home / ".cache" / "rnnt_op"
    cached.chmod(0o555)
    printed, said = loss_in({"HOME": str(home), "PATH": str(tmp_path)})
    assert (printed, said) == ("kernels\n", "")
    cached.chmod(0o755)


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "_modules", Once())
    monkeypatch.setattr(cuda_module, "_modules", Once())


@pytest.mark.usefixtures("forgetful", "cache_dir")
def test_a_cache_of_another_cpu_is_not_taken(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_host_kernel(tmp_path)
    monkeypatch.setattr(build, "instruction_sets", lambda: "x86_64 avx2")
    build.build(source, HostCompiler.from_environment())
    monkeypatch.setenv("CXX", "/nowhere/c++")
    for other in ("x86_64 avx2 avx512f", "x86_64", "aarch64 asimd", None):
        monkeypatch.setattr(build, "instruction_sets", lambda other=other: other)
        with pytest.raises(CompilerNotFound):
            load_host_module(source)
    monkeypatch.setattr(build, "instruction_sets", lambda: "x86_64 avx2")
    load_host_module(source)


def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    def sets(text: str, machine: str) -> str | None:
        monkeypatch.setattr(cpu, "_cpuinfo", lambda: text)
        monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
        return cpu.instruction_sets.__wrapped__()

    intel = "model name : some CPU\nflags\t\t: fpu avx2 sse4_2 ibrs avx512f cpuid bmi2 abm\n" * 2
    assert sets(intel, "x86_64") == "x86_64 abm avx2 avx512f bmi2 sse4_2"
    assert sets("Features\t: fp asimd sve\n", "aarch64") == "aarch64 asimd fp sve"
    assert sets("processor : 0\n", "riscv64") is None

    def missing() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(cpu, "_cpuinfo", missing)
    assert cpu.instruction_sets.__wrapped__() is None


@pytest.mark.usefixtures("nvrtc", "cache_dir", "forgetful")
def test_a_gpus_warm_cache_without_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a GPU: images of a run-time toolkit lack NVRTC."""
    source = jit_support.write_kernel(tmp_path)
    made = build.build(source, cuda_compiler.CudaCompiler("sm_90a")).compiled
    older = build.build(source, cuda_compiler.CudaCompiler("sm_100")).compiled

    def missing() -> None:
        raise CompilerNotFound("no NVRTC")

    monkeypatch.setattr(cuda_compiler, "nvrtc_library", missing)
    assert cuda_module._binary(source, (9, 0))[:2] == (made, "sm_90a")
    assert cuda_module._binary(source, (10, 3))[:2] == (older, "sm_100")
    for capability in ((8, 0), (9, 1), (12, 0)):
        with pytest.raises(CompilerNotFound):
            cuda_module._binary(source, capability)


# ---- side by side, and not in silence


def test_kernels_compile_side_by_side(
    tmp_path: Path, cxx: str, cache_dir: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each compiler waits until the others have begun."""
    monkeypatch.setattr(concurrency.os, "cpu_count", lambda: 3)
    begun = tmp_path / "begun"
    begun.mkdir()
    source = write_host_kernel(tmp_path)
    sources = [replace(source, macros=(("N", n),)) for n in "123"]
    waits = script(
        tmp_path / "waits",
        f"""#!/bin/sh
case "$*" in *-dM*) exec {cxx} "$@";; esac
touch {begun}/$$
for i in $(seq 2400); do [ $(ls {begun} | wc -l) -ge 3 ] && exec {cxx} "$@"; sleep 0.05; done
exit 1
""",
    )
    monkeypatch.setenv("CXX", waits)
    host_module.load_host_modules(sources)
    assert all(host_module._modules.get(source) is not None for source in sources)


def test_what_takes_long_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def timers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]

    monkeypatch.setattr(log, "PATIENCE", 3600)
    monkeypatch.setattr(log, "_announcements", iter(range(9)))
    with log.announced(1):
        pass
    for timer in timers():
        timer.join(120)
    assert not timers()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(log, "PATIENCE", 0.05)
    for _ in range(2):
        with log.announced(7):
            for timer in timers():
                timer.join()
    assert_expected_inline(
        capsys.readouterr().err,
        """\
rnnt_op: compiling 7 kernels for this machine, which rnnt-op precompile does beforehand
""",
    )


@pytest.mark.slow
def test_every_kernel_of_an_op_is_loaded_before_it_begins(loss_in: LossIn) -> None:
    """Nothing compiles in the middle of an op, where it could fail or keep other ranks waiting."""
    code = """
import itertools
from rnnt_op import backends
from rnnt_op.backends import cpu_device, native
from rnnt_op.jit import host_module

native._LEAST_WORK = 0
loaded = set()
real = cpu_device.load_host_module
def recorded(source):
    assert host_module._modules.get(source) is not None, source
    loaded.add(source.name)
    return real(source)
cpu_device.load_host_module = recorded

ranges = torch.tensor([0, 5]).expand(2, 9, 2)
for dtype, none in itertools.product((torch.float64, torch.float32, torch.bfloat16), (False, True)):
    e, p = (s.detach().to(dtype).requires_grad_() for s in states)
    w, b = (t.detach().to(dtype).requires_grad_() for t in head.parameters())
    if none:
        e, p, w, b = e.detach(), p.detach(), None, None
        e, p = (torch.randn(*s.shape[:2], 11).to(dtype).requires_grad_() for s in (e, p))
    for label_ranges, dropout in itertools.product((None, ranges), (0.0, 0.3)):
        if none and dropout: continue
        options = {"label_ranges": label_ranges, "activation": "identity" if none else "tanh"}
        rnnt_op.joint_rnnt_loss(e, p, w, b, *labels, dropout=dropout, **options).backward()
        with torch.no_grad():
            rnnt_op.joint_rnnt_loss(e, p, w, b, *labels, dropout=dropout, **options)
        rnnt_op.posteriors(e, p, w, b, *labels, **options)
        rnnt_op.align(e, p, w, b, *labels, **options)
    logits = torch.randn(2, 9, 5, 11).to(dtype).requires_grad_()
    rnnt_op.rnnt_loss(logits, *labels, blank=0).backward()
    with torch.no_grad():
        rnnt_op.rnnt_loss(logits, *labels, blank=0)
        with torch.autocast("cpu", torch.bfloat16):
            rnnt_op.joint_rnnt_loss(*states, *head.parameters(), *labels)
print(sorted(loaded))
"""
    printed, _ = loss_in({"HOME": str(Path.home()), "CXXFLAGS": None}, LOSS + code)
    names = sorted(path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    assert printed.splitlines()[-1] == str(names)


# ---- other devices


@pytest.fixture
def fresh_devices() -> None:
    backends._other.cache_clear()
    backends._cuda.cache_clear()


@pytest.mark.usefixtures("fresh_devices")
@pytest.mark.parametrize("name", ["xpu", "hpu", "cuda:1"])
def test_torch_operations_serve_other_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they compute there is torch's; no such device has been at hand."""
    if name.startswith("cuda"):
        monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's GPUs, which torch calls cuda
    device = torch.device(name)
    with pytest.warns(RuntimeWarning) as warned, serving(device, USUAL) as backend:
        assert backend is eager
    assert [str(w.message) for w in warned] == [
        f"rnnt_op: torch operations serve {name}, more slowly than kernels; they have not been run "
        "on such a device so far"
    ]
    assert backends.backend_for(device) is eager  # without a second warning


@pytest.mark.usefixtures("fresh_devices")
def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64") as error, serving(torch.device("mps"), USUAL):
        pass
    assert_expected_inline(
        str(error.value),
        """rnnt_op: mps computes in no float64, which the recursions take; move the tensors to the CPU""",
    )


def test_what_precompile_lists_holds_what_ops_take() -> None:
    for dtype in FLOAT_DTYPES:
        for language in (CUDA, CPU):
            listed = {s for k in variants(dtype, "tanh", RNNT) for s in language.needed(k)}
            for result in ("gradients", "losses", "posteriors", "paths"):
                kernels = Kernels(dtype, input_dtype=dtype, activation="tanh", result=result)
                assert listed >= set(language.needed(kernels))
                mixed = replace(kernels, input_dtype=None, has_dropout=True, is_restricted=True)
                assert listed >= set(language.needed(mixed))
                assert listed >= set(language.needed(Kernels(dtype, logits="given", result=result)))
