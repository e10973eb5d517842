"""Kernels for the CPU: their compiler, its place in the key, their libraries and calls."""

import functools
import logging
import math
import operator
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jit_support
import pytest
import torch
from expecttest import assert_expected_inline
from jit_support import HOST_FACTOR, in_threads, run_script, write_host_kernel

from rnnt_op.jit import (
    ArgumentError,
    CompileError,
    CompilerNotFound,
    HostModule,
    JitError,
    KernelSource,
    LibraryError,
    SourceNotFound,
    build,
    host_compiler,
    host_module,
    key,
    load_host_module,
)
from rnnt_op.jit.compiler import Compiled
from rnnt_op.jit.concurrency import Once
from rnnt_op.jit.host_compiler import HostCompiler

cache_dir = jit_support.cache_dir
cxx = jit_support.cxx

pytestmark = pytest.mark.usefixtures("cxx", "cache_dir", "forgetful")

CALLS = """
extern "C" void arguments(long long threads, double* tensor, void* null, long long least,
                          double real, long long truth, double other, long long* integers,
                          double* reals) {
  integers[0] = threads;
  integers[1] = null == nullptr;
  integers[2] = least;
  integers[3] = truth;
  reals[0] = tensor[0];
  reals[1] = real;
  reals[2] = other;
}
extern "C" void nothing(long long) {}
"""

# The first kernel ends when the second has been called, or after a minute of waiting for it.
HANDSHAKE = """
#include <ctime>
extern "C" void await_flag(long long, long long* flag) {
  const time_t start = time(nullptr);
  while (!__atomic_load_n(flag, __ATOMIC_ACQUIRE) && time(nullptr) < start + 60) {}
  flag[1] = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}
extern "C" void set_flag(long long, long long* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELEASE); }
"""

# Each of `threads` threads adds 1, and the threads of a team wait for each other, so that none can
# do the work of two.
PARALLEL = """
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
static Parallel parallel;
struct Team { long long size, arrived; };
static void arrive(void* data) {
  Team* team = static_cast<Team*>(data);
  __atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL);
  while (__atomic_load_n(&team->arrived, __ATOMIC_ACQUIRE) < team->size) {}
}
extern "C" void use_parallel(void* gomp_parallel) { parallel = (Parallel)gomp_parallel; }
extern "C" void count(long long threads, long long* result) {
  Team team = {parallel ? threads : 1, 0};
  if (parallel) parallel(arrive, &team, threads, 0); else arrive(&team);
  result[0] = team.arrived;
  result[1] = (long long)parallel;
}
"""


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing loaded or learnt of a compiler outlives the test."""
    monkeypatch.setattr(host_module, "_modules", Once())
    monkeypatch.setattr(host_compiler, "_targets", Once())


def write(root: Path, text: str, name: str = "kernels") -> KernelSource:
    (root / f"{name}.cpp").write_text(text)
    return KernelSource(name, root=root, suffix=".cpp")


def counting_compiler(folder: Path, cxx: str) -> Path:
    """A compiler that writes a line of its arguments to ``calls`` each time that it runs."""
    script = folder / "counting"
    script.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\nexec {cxx} "$@"\n')
    script.chmod(0o755)
    return script


def key_of(source: KernelSource) -> str:
    compiler = HostCompiler.from_environment()
    return key.cache_key(source, compiler.architecture, compiler.flags(source), compiler.identity())


def message(error: type[JitError], function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(error) as caught:
        function(*arguments)
    return str(caught.value)


def test_each_kind_of_argument(tmp_path: Path) -> None:
    integers = torch.zeros(4, dtype=torch.int64)
    reals = torch.zeros(3, dtype=torch.float64)
    tensor = torch.tensor([1.0, 0.25], dtype=torch.float64)[1:]
    load_host_module(write(tmp_path, CALLS)).call(
        "arguments", [tensor, None, -(2**63), 0.1, True, -math.inf, integers, reals]
    )
    assert integers.tolist() == [torch.get_num_threads(), 1, -(2**63), 1]
    assert reals.tolist() == [0.25, 0.1, -math.inf]


def test_wrong_arguments(tmp_path: Path) -> None:
    call = load_host_module(write(tmp_path, CALLS)).call
    assert_expected_inline(
        message(ArgumentError, call, "nothing", [1]),
        """nothing in kernels.cpp: expected 0 arguments (), got 1""",
    )
    flag = torch.zeros(1, dtype=torch.float64)
    assert_expected_inline(
        message(ArgumentError, call, "arguments", [flag, None, 0, 0.5, 1, 0.5, flag, flag]),
        """arguments in kernels.cpp: expected integers as a tensor of torch.int64, got a tensor of torch.float64""",
    )
    assert_expected_inline(
        message(ArgumentError, call, "anything"), """no kernel anything in kernels.cpp"""
    )


def test_module_is_loaded_once_for_a_source(tmp_path: Path) -> None:
    source = write_host_kernel(tmp_path)
    loaded = load_host_module(source)
    assert load_host_module(KernelSource("scale", root=tmp_path, suffix=".cpp")) is loaded
    assert load_host_module(replace(source, macros=(("A", "1"),))) is not loaded
    values = torch.ones(3, dtype=torch.float64)
    loaded.call("scale", [values, 2])
    assert values.tolist() == [0.5, 0.5, 1.0]


def test_threads_compile_once(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path, cxx)))
    source = write_host_kernel(tmp_path)
    modules = in_threads(8, lambda: load_host_module(source))
    assert isinstance(modules[0], HostModule)
    assert len(set(map(id, modules))) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # for its macros, and to compile


def test_second_process_compiles_nothing(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path, cxx)))
    write_host_kernel(tmp_path)
    for compilations in (1, 0):
        output = run_script(
            """
from pathlib import Path
import torch
from jit_support import write_host_kernel
from rnnt_op.jit import load_host_module
values = torch.ones(1, dtype=torch.float64)
load_host_module(write_host_kernel(Path(sys.argv[1]))).call("scale", [values, 1])
print(values.item())
""",
            tmp_path,
        )
        assert output == "0.5\n"
        calls = (tmp_path / "calls").read_text().splitlines()
        assert ["-dM" in call for call in calls] == [True] + [False] * compilations
        (tmp_path / "calls").unlink()


def test_damaged_entry_is_compiled_again(tmp_path: Path, cache_dir: Path) -> None:
    source = write_host_kernel(tmp_path)
    whole = build.build(source, HostCompiler.from_environment())
    for entry in cache_dir.iterdir():
        entry.write_bytes(entry.read_bytes()[:-1])
    again = build.build(source, HostCompiler.from_environment())
    assert not whole.cached
    assert not again.cached
    assert build.build(source, HostCompiler.from_environment()).cached
    load_host_module(source).call("scale", [None, 0])


def test_flags(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"'{cxx}' -pipe")
    monkeypatch.setenv("CXXFLAGS", "-O1 -DNAME='\"a name\"'")
    source = KernelSource("scale", (("N", "1"),), root=tmp_path, suffix=".cpp")
    compiler = HostCompiler.from_environment()
    assert compiler.path == cxx
    first, *_, macro, level, name = compiler.flags(source)[: -len(host_compiler._LAST_FLAGS)]
    assert (first, macro, level, name) == ("-pipe", "-DN=1", "-O1", '-DNAME="a name"')


# A compiler that may assume there is no NaN, or reorder sums, gives other results, and one that
# may flush denormal numbers does so in every thread that loads a library.
EXACT = """
extern "C" void compute(long long, const double* x, double* results) {
  results[0] = x[0] != x[0];
  results[1] = (x[1] + x[2]) - x[2];
  results[2] = x[3] + 0.0;
  double sum = 0;
  for (int i = 0; i < 64; ++i) sum += x[i + 4];
  results[3] = sum;
}
"""
UNSAFE = (
    "-ffast-math",
    "-Ofast",
    "-funsafe-math-optimizations",
    "-fassociative-math -fno-signed-zeros -fno-trapping-math",
    "-ffinite-math-only",
    "-freciprocal-math",
    "-fvisibility=hidden",
)


@pytest.mark.parametrize("variable", ["CXX", "CXXFLAGS"])
@pytest.mark.parametrize("flags", UNSAFE)
def test_flags_that_would_change_results(
    flags: str, variable: str, tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"{cxx} {flags}" if variable == "CXX" else flags)
    terms = torch.tensor([2.0**53, 1.0, -(2.0**53), 1.0] * 16, dtype=torch.float64)
    x = torch.cat([torch.tensor([math.nan, 1.0, 2.0**53, -0.0], dtype=torch.float64), terms])
    results = torch.empty(4, dtype=torch.float64)
    load_host_module(write(tmp_path, EXACT)).call("compute", [x, results])
    in_order = functools.reduce(operator.add, terms.tolist())  # sum() is exact from Python 3.12 on
    assert results.tolist() == [1.0, 0.0, 0.0, in_order]
    assert math.copysign(1.0, float(results[2])) == 1.0
    assert 5e-324 * torch.ones((), dtype=torch.float64) > 0


def test_unsafe_flags_change_results_without_ours(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    monkeypatch.setattr(host_compiler, "_LAST_FLAGS", ())
    monkeypatch.setenv("CXXFLAGS", "-ffast-math")
    x = torch.full((68,), math.nan, dtype=torch.float64)
    results = torch.empty(4, dtype=torch.float64)
    load_host_module(write(tmp_path, EXACT)).call("compute", [x, results])
    assert results[0] == 0
    torch.set_flush_denormal(False)


def test_key_changes_with_all_that_decides(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_host_kernel(tmp_path)
    keys = [key_of(source), key_of(replace(source, macros=(("N", "1"),)))]
    for name, value in (("CXX", f"{cxx} -O1"), ("CXXFLAGS", "-O1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            keys.append(key_of(source))
    (tmp_path / "factor.h").write_text(HOST_FACTOR + "\n")
    keys.append(key_of(replace(source)))
    assert len(set(keys)) == len(keys)


def test_key_does_not_change_with_the_compilers_path(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_host_kernel(tmp_path)
    before = key_of(source)
    monkeypatch.setenv("CXX", str(counting_compiler(tmp_path, cxx)))
    assert key_of(source) == before


def test_identity_is_the_cpus(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler with the same flags, on a machine whose CPU lacks something."""
    identities = []
    for feature in ("1", "0"):
        script = tmp_path / feature
        script.write_text(f'#!/bin/sh\nexec {cxx} -D__SOME_FEATURE__={feature} "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        compiler = HostCompiler.from_environment()
        identities.append((compiler.flags(write_host_kernel(tmp_path)), compiler.identity()))
    (flags, with_feature), (same_flags, without_feature) = identities
    assert flags == same_flags
    assert with_feature != without_feature


@pytest.mark.parametrize(
    ("refused", "native"),
    [("-march=native", ["-mcpu=native"]), ("-m*=native", [])],
)
def test_compilers_that_do_not_know_march(
    refused: str, native: list[str], tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some for ARM have only -mcpu=native; this one takes it, and ignores it."""
    script = tmp_path / "other"
    script.write_text(
        f"""#!/bin/sh
for argument do
  shift
  case "$argument" in
    {refused}) echo "no such option: $argument" >&2; exit 1;;
    -mcpu=native) ;;
    *) set -- "$@" "$argument";;
  esac
done
exec {cxx} "$@"
"""
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    flags = HostCompiler.from_environment().flags(write_host_kernel(tmp_path))
    assert [flag for flag in flags if "native" in flag] == native
    load_host_module(write_host_kernel(tmp_path))


def test_flags_that_the_compiler_refuses(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-fno-such-flag")
    text = message(CompileError, load_host_module, write_host_kernel(tmp_path))
    assert text.startswith(f"the C++ compiler refuses its flags: {cxx} -std=c++17")
    assert text.count("-fno-such-flag") > 1  # in the compiler's own words, too


def test_compile_error_shows_the_compilers_message(tmp_path: Path, cxx: str) -> None:
    source = replace(
        write(tmp_path, "\nvoid k() { undeclared = N; }\n", "broken"), macros=(("N", "1"),)
    )
    first, second, *_ = message(CompileError, load_host_module, source).splitlines()
    assert first == f"broken.cpp -DN=1 does not compile for cpu: {cxx} exits with status 1"
    assert second.startswith("broken.cpp:")  # without the folder that it was compiled in
    with pytest.raises(SourceNotFound):
        load_host_module(KernelSource("missing", root=tmp_path, suffix=".cpp"))


def test_missing_compiler_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_host_kernel(tmp_path)
    monkeypatch.setenv("CXX", "/nowhere/c++ -O2")
    assert_expected_inline(
        message(CompilerNotFound, load_host_module, source),
        """no C++ compiler: CXX names /nowhere/c++, which is not an executable file on PATH; install a C++17 compiler (apt-get install g++), or name one in CXX""",
    )
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", "")
    assert_expected_inline(
        message(CompilerNotFound, load_host_module, source),
        """no C++ compiler: none of c++, g++, clang++ is an executable file on PATH; install a C++17 compiler (apt-get install g++), or name one in CXX""",
    )
    script = tmp_path / "script"
    script.write_text("#!/nowhere/sh\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    text = message(CompilerNotFound, load_host_module, source)
    assert text.startswith(f"no C++ compiler: {script} does not run (")
    monkeypatch.setenv("CXX", "'c++")
    assert_expected_inline(
        message(JitError, load_host_module, source), """CXX is "'c++": No closing quotation"""
    )


def test_warnings_go_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path, 'extern "C" void kernel(long long threads) {}\n')
    load_host_module(source)
    assert capfd.readouterr() == ("", "")
    compiled = build.build(source, HostCompiler.from_environment()).compiled
    assert "unused parameter" in compiled.log
    monkeypatch.setenv("RNNT_OP_JIT_DUMP", str(tmp_path / "dump"))
    build.build(source, HostCompiler.from_environment())
    (folder,) = (tmp_path / "dump").iterdir()
    assert folder.name.startswith("kernels-cpu-")
    assert {path.name for path in folder.iterdir()} == {
        "kernels.cpp",
        "kernels.log",
        "kernels.so",
        "flags.txt",
    }
    assert (folder / "kernels.so").read_bytes() == compiled.binary


def test_verbose_logs_a_line_a_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNT_OP_JIT_VERBOSE", "1")
    with caplog.at_level(logging.INFO):
        load_host_module(write_host_kernel(tmp_path))
    compiled, loaded = (record.getMessage() for record in caplog.records)
    assert compiled.startswith("compiled scale.cpp for cpu in ")
    assert loaded.startswith("loaded scale.cpp in ")


def test_compiler_is_started_without_preloaded_libraries(
    tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\n[ -z "$LD_PRELOAD" ] || exit 1\nexec {cxx} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LD_PRELOAD", "libnowhere.so")
    load_host_module(write_host_kernel(tmp_path))


def test_library_that_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    source = write_host_kernel(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HostCompiler, "compile", lambda self, source: Compiled(b"no library", ""))
        text = message(LibraryError, load_host_module, source)
    assert text.startswith("could not load scale.cpp: ")
    assert text.endswith(
        "; if the temporary folder's file system is full or mounted noexec, name a folder "
        "elsewhere in TMPDIR"
    )
    assert not list(temporary.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert "No such file or directory" in message(LibraryError, load_host_module, source)
    other = replace(source, macros=(("A", "1"),))
    assert "No such file or directory" in message(CompileError, load_host_module, other)


def test_nothing_is_left_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    load_host_module(write_host_kernel(tmp_path)).call("scale", [None, 0])
    assert not list(temporary.iterdir())


def test_interpreter_is_free_during_a_call(tmp_path: Path) -> None:
    module = load_host_module(write(tmp_path, HANDSHAKE))
    flag = torch.zeros(2, dtype=torch.int64)
    waiting = threading.Thread(target=module.call, args=("await_flag", [flag]))
    waiting.start()
    module.call("set_flag", [flag])
    waiting.join()
    assert flag.tolist() == [1, 1]


def test_torchs_threads_compute(tmp_path: Path) -> None:
    output = run_script(
        """
import ctypes, faulthandler, os, threading
from pathlib import Path
import torch
from rnnt_op.jit import KernelSource, load_host_module

os.environ["RNNT_OP_CACHE_DIR"] = sys.argv[1] + "/cache"
torch.set_num_threads(2)
torch.ones(1 << 20).add(1.0).sum()  # torch's threads are there
before = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else None
module = load_host_module(KernelSource("kernels", root=Path(sys.argv[1]), suffix=".cpp"))

def count():
    result = torch.zeros(2, dtype=torch.int64)
    module.call("count", [result])
    return result.tolist()

def expected():
    return torch.get_num_threads() if parallel else 1

arrived, parallel = count()
assert arrived == expected()
torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
if torch_cpu.exists() and hasattr(ctypes.CDLL(str(torch_cpu)), "GOMP_parallel"):
    assert parallel
    if before is not None:
        assert len(os.listdir("/proc/self/task")) == before

def in_thread():
    arrived_in_thread.append(count()[0])
arrived_in_thread = []
thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
assert arrived_in_thread == [expected()]

if hasattr(os, "fork"):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(120, exit=True)
        torch.set_num_threads(1)
        os._exit(0 if count()[0] == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
print(arrived)
""",
        write(tmp_path, PARALLEL).root,
    )
    assert output in ("2\n", "1\n")


def test_libraries_get_null_where_torch_has_no_gomp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "_gomp_parallel", lambda: None)
    result = torch.ones(2, dtype=torch.int64)
    load_host_module(write(tmp_path, PARALLEL)).call("count", [result])
    assert result.tolist() == [1, 0]


def test_gomp_is_found_only_where_torch_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = host_module._gomp_parallel.__wrapped__
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert find() is None
