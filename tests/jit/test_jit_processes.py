"""Processes that share a cache, killed writers and forks, each in a fresh interpreter."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jit_support
import pytest
from jit_support import run_script, write_kernel

from rnnt_op.jit import build, key
from rnnt_op.jit.cache import KernelCache
from rnnt_op.jit.compiler import Compiled
from rnnt_op.jit.cuda_compiler import CudaCompiler

nvrtc = jit_support.nvrtc

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# A forked child runs a function. If it hangs, it says where after ALARM seconds, and ends.
FORKS = """
import faulthandler, os, signal, sys, threading, time
from pathlib import Path
import torch
from jit_support import write_kernel
from rnnt_op.jit import KernelSource, build, cuda_module, driver, nvrtc
from rnnt_op.jit.cache import KernelCache
from rnnt_op.jit.cuda_compiler import CudaCompiler

compiler = CudaCompiler("sm_80")

ALARM = 120  # hundreds of times what a child takes on a quiet machine

def forked(function, *arguments):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(ALARM, exit=True)
        status = 1
        try:
            function(*arguments)
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(status)
    return pid

def wait(pid):
    status = os.waitpid(pid, 0)[1]
    assert status == 0, f"child: status {status}"
"""


@pytest.mark.usefixtures("nvrtc")
def test_eight_processes_share_a_cache(tmp_path: Path) -> None:
    run_script(
        FORKS
        + """
root = Path(sys.argv[1])

def work(name, factor, number, go):
    os.environ["RNNT_OP_CACHE_DIR"] = str(root / name)
    source = write_kernel(root / f"source{number}", factor)
    os.read(go, 1)  # until the parent closes the other end
    made = build.build(source, compiler)
    (root / f"{name}{number}.cubin").write_bytes(made.compiled.binary)

for name, factors in (("same", ["2.0"] * 8), ("different", [f"{n}.0" for n in range(8)])):
    go, start = os.pipe()
    def child(factor, number):
        os.close(start)
        work(name, factor, number, go)
    children = [forked(child, factor, number) for number, factor in enumerate(factors)]
    os.close(start)
    for pid in children:
        wait(pid)
""",
        tmp_path,
    )
    for name, factors in (("same", ["2.0"] * 8), ("different", [f"{n}.0" for n in range(8)])):
        entries = set()
        for number, factor in enumerate(factors):
            source = write_kernel(tmp_path / "here", factor)
            compiler = CudaCompiler("sm_80")
            flags = compiler.flags(source)
            digest = key.cache_key(source, "sm_80", flags, compiler.identity())
            bare = build._bare_key(source, "sm_80")
            entries |= {f"{digest}.kernel", f"{bare}.kernel"}
            cubin = (tmp_path / f"{name}{number}.cubin").read_bytes()
            entry = KernelCache(tmp_path / name).get(digest)
            assert entry is not None
            assert Compiled.from_bytes(entry).binary == cubin
            if number == 0:
                assert compiler.compile(source).binary == cubin
        assert {path.name for path in (tmp_path / name).iterdir()} == entries


def test_killed_writer_leaves_no_entry(tmp_path: Path) -> None:
    key_ = "a" * 64
    run_script(
        FORKS
        + """
directory = Path(sys.argv[1])

def write():
    os.replace = lambda *_: time.sleep(60)
    KernelCache(directory).put(sys.argv[2], b"payload")

directory.mkdir(mode=0o700)
pid = forked(write)
while not any(file.stat().st_size for file in directory.iterdir()):
    time.sleep(0.01)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
""",
        tmp_path / "cache",
        key_,
    )
    (leftover,) = (tmp_path / "cache").iterdir()
    assert leftover.suffix == ".tmp"
    cache = KernelCache(tmp_path / "cache")
    assert cache.get(key_) is None
    assert cache.state().entries == 0
    assert cache.get_or_build(key_, lambda: b"payload") == b"payload"
    os.utime(leftover, (0, 0))
    KernelCache(tmp_path / "cache").put(key_, b"payload")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{key_}.kernel"]


@pytest.mark.usefixtures("nvrtc")
def test_forks(tmp_path: Path) -> None:
    run_script(
        FORKS
        + """
root = Path(sys.argv[1])
os.environ["RNNT_OP_CACHE_DIR"] = str(root / "cache")

def compiles(name):
    made = build.build(write_kernel(root / name, name), compiler)
    assert made.compiled.binary.startswith(b"\\x7fELF") and not made.cached

# After import, with nothing loaded.
wait(forked(compiles, "1.0"))

# After a compile in the parent.
compiles("2.0")
wait(forked(compiles, "3.0"))

# While a thread holds a key in flight, and its lock.
cache = build.current_cache()
building, go_on = threading.Event(), threading.Event()
def slow():
    building.set()
    go_on.wait()
    return b"parent"
thread = threading.Thread(target=cache.get_or_build, args=("k" * 64, slow), daemon=True)
thread.start()
building.wait()
def builds_the_key_in_flight():
    assert cache.get_or_build("k" * 64, lambda: b"child") == b"child"
with cache._flight._lock:
    pid = forked(builds_the_key_in_flight)
wait(pid)
go_on.set()
thread.join()
assert cache.get("k" * 64) == b"parent"

# While a thread reads a source.
reading, read_on = threading.Event(), threading.Event()
class SlowFolder:
    def joinpath(self, name):
        return self
    def is_file(self):
        return True
    def read_text(self, encoding):
        reading.set()
        read_on.wait()
        return "read"
slow_source = KernelSource("slow", root=SlowFolder())
thread = threading.Thread(target=lambda: slow_source.headers, daemon=True)
thread.start()
reading.wait()
wait(forked(compiles, "3.5"))
read_on.set()
thread.join()
assert slow_source.text == "read"

# A child has none of its parent's CUDA state.
cuda_module._modules.get_or_make(("source", 0), object)
driver._api = driver._primary_contexts[0] = object()
def knows_nothing():
    assert cuda_module._modules.get(("source", 0)) is None
    assert driver._api is None and not driver._primary_contexts
wait(forked(knows_nothing))
cuda_module._modules.clear()

# A fork waits for the compiler's library to be left: its locks would stay locked in the child.
inside = threading.Event()
def use_library():
    with nvrtc.nvrtc_library():
        inside.set()
        time.sleep(0.3)
        left.append(time.perf_counter())
left = []
thread = threading.Thread(target=use_library)
thread.start()
inside.wait()
pid = forked(compiles, "4.0")
assert left and time.perf_counter() >= left[0]
wait(pid)

# Forks while threads compile.
stop = False
def compile_on():
    number = 0
    while not stop:
        number += 1
        compiles(f"{number}.5{threading.get_ident()}")
threads = [threading.Thread(target=compile_on) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for number in range(10):
        wait(forked(compiles, f"{number}.25"))
finally:
    stop = True
""",
        tmp_path,
        seconds=900,
    )


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="rnnt_op-"))
    folder.chmod(0o755)
    yield folder
    (folder / "cache").chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.usefixtures("nvrtc")
def test_directory_that_another_user_warmed(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNT_OP_CACHE_DIR", str(open_folder / "cache"))
    monkeypatch.setattr(build, "_caches", {})
    assert not build.build(write_kernel(open_folder / "warm"), CudaCompiler("sm_80")).cached
    (open_folder / "cache").chmod(0o555)
    before = {path: path.read_bytes() for path in (open_folder / "cache").iterdir()}
    write_kernel(open_folder / "cold")
    output = run_script(
        FORKS
        + """
import warnings
from dataclasses import replace
from rnnt_op.jit import KernelSource

os.environ["RNNT_OP_CACHE_DIR"] = sys.argv[1] + "/cache"
warm = KernelSource("scale", (("FACTOR_VALUE", "2.0"),), root=Path(sys.argv[1]) / "warm")
compiler.compile(warm)  # loads the compiler, which the other user may not read
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
with warnings.catch_warnings(record=True) as record:
    warnings.simplefilter("always")
    assert build.build(warm, compiler).cached
    assert not record
    for factor in ("3.0", "4.0"):
        cold = replace(warm, macros=(("FACTOR_VALUE", factor),))
        assert not build.build(cold, compiler).cached
        assert build.build(cold, compiler).cached
print([str(warning.message) for warning in record])
""",
        open_folder,
    )
    assert output.count("cannot be written to (Permission denied)") == 1
    assert {path: path.read_bytes() for path in (open_folder / "cache").iterdir()} == before
