"""Kernel sources as shared libraries, made by g++ and kept on disk."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from rnnt_op.jit import KernelSource

FOLDER = Path(__file__).parent
LIBRARY = "kernels.so"
PRECOMPILED = "precompiled.h"

_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-pthread"),
    # CUDA's indices are unsigned and usually compared with signed counts.
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-sign-compare"),
    # longjmp from stack to stack is what its hardened version refuses.
    *("-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"),
)
_KERNEL_FLAGS = (
    *("-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Each call of the emulator tells its line by its return address.
    *("-fno-optimize-sibling-calls", "-fno-crossjumping", "-fno-tree-tail-merge"),
)
# Failed checks call functions of faults.cpp.
_CHECKS = (
    "-fsanitize=alignment,bounds,integer-divide-by-zero,signed-integer-overflow,shift-exponent,"
    "float-cast-overflow,unreachable,return",
    "-fno-sanitize-recover=all",
)
# Before each access calls a function of watch.cpp.
_WATCHED = ("-fsanitize=thread",)
# What sanitizers call is here: their libraries must not be linked.
_WITHOUT_THEIRS = ("-nodefaultlibs", "-lm", "-lc", "-lgcc")


class EmulatorError(RuntimeError):
    """A source does not compile, a launch is not allowed, or a kernel did what it must not."""


def build_scheduler() -> Path:
    """The library that runs launches, for all kernels of a process."""
    sources = map(str, sorted(FOLDER.glob("*.cpp")))
    command = [_compiler(), *_FLAGS, *sources, "-ldl", "-o", LIBRARY]
    parts = [*command, _compiler_version(), *_own_sources()]
    return _entry(parts, lambda folder: _compile(command, folder)) / LIBRARY


def build_kernels(source: KernelSource, *, checked: bool, watched: bool = False) -> Path:
    """The library of a source's kernels, whose ``emulator_kernels`` lists them.

    Args:
        checked: stop at misaligned accesses, indices outside of arrays, overflows of signed
            integers, divisions by zero, and conversions of floats that do not fit an integer.
        watched: tell the scheduler of each access to memory.
    """
    macros = [f"-D{name}={value}" for name, value in source.macros]
    # The replacement of csrc/ptx.cuh is included before the source, so here it is not wanted.
    listing = [_compiler(), "-E", "-P", "-x", "c++", "-DRNNT_OP_PTX_CUH", *macros, source.filename]
    checks = (*(_CHECKS if checked else ()), *(_WATCHED if watched else ()))
    checks = (*checks, *(_WITHOUT_THEIRS if checks else ()))
    header = _precompiled_header((*_FLAGS, *_KERNEL_FLAGS, *checks))
    command = [
        *(_compiler(), *_FLAGS, *_KERNEL_FLAGS, *macros),
        *("-include", str(header), "unit.cpp", "-o", LIBRARY),
        *checks,
    ]
    files = {source.filename: source.text, **source.headers}

    def make(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)
        kernels = find_kernels(_compile(listing, folder))
        if not kernels:
            raise EmulatorError(f'{source.filename}: no extern "C" __global__ function')
        (folder / "unit.cpp").write_text(_unit(source.filename, kernels))
        # Paths in the debug information: the folder is renamed when it is complete.
        _compile([*command, f"-fdebug-prefix-map={folder}=."], folder)

    named = (part for file in files.items() for part in file)
    return _entry([*command, _compiler_version(), *_own_sources(), *named], make) / LIBRARY


def _precompiled_header(flags: tuple[str, ...]) -> Path:
    """A header that includes the emulator's, beside what g++ makes of it for these flags.

    It halves a kernel's compilation. A compiler that cannot use it reads the header itself.
    """
    compiled = ["-x", "c++-header", PRECOMPILED, "-o", f"{PRECOMPILED}.gch"]
    command = [_compiler(), *(flag for flag in flags if not flag.startswith("-l")), *compiled]

    def make(folder: Path) -> None:
        # Not compiled itself, since "#pragma once" in a main file is warned of.
        (folder / PRECOMPILED).write_text(f'#include "{FOLDER / "cuda_emulator.h"}"\n')
        _compile(command, folder)

    return _entry([*command, str(FOLDER), _compiler_version(), *_own_sources()], make) / PRECOMPILED


def find_kernels(text: str) -> dict[str, str]:
    """Name and ``__launch_bounds__`` arguments of each kernel in preprocessed CUDA C++."""
    parentheses = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
    kernels = {}
    for header in re.split("[;{}]", text):
        if not re.search(r'\bextern\s*"C"', header) or "__global__" not in header:
            continue
        bounds = re.search(rf"__launch_bounds__\s*({parentheses})", header)
        plain = re.sub(rf"\b(__launch_bounds__|__attribute__|alignas)\s*{parentheses}", "", header)
        if name := re.search(r"(\w+)\s*\(", plain):
            kernels[name[1]] = bounds[1][1:-1] if bounds else "1024"
    return kernels


def _unit(filename: str, kernels: dict[str, str]) -> str:
    # Renamed, since a kernel may be called like a function of the C library, such as select.
    renamed = "\n".join(f"#define {name} kernel_{name}" for name in kernels)
    original = "\n".join(f"#undef {name}" for name in kernels)
    entries = "\n".join(
        f'      {{"{name}", emulator::Entry<kernel_{name}>::parameters, launch_bounds({bounds}),\n'
        f"       emulator::Entry<kernel_{name}>::invoke, touch_shared_memory}},"
        for name, bounds in kernels.items()
    )
    return f"""\
{renamed}
#include "{filename}"
{original}

static constexpr int launch_bounds(int threads, int = 0, int = 0) {{ return threads; }}

static thread_local volatile char in_shared_memory;
__attribute__((no_sanitize("thread"))) static void touch_shared_memory() {{
  in_shared_memory = 0;
}}

extern "C" __attribute__((visibility("default"))) const emulator::Kernel* emulator_kernels() {{
  static const emulator::Kernel kernels[] = {{
{entries}
      {{}},
  }};
  return kernels;
}}
"""


def _compile(command: list[str], folder: Path) -> str:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise EmulatorError(f"{' '.join(command)}\n{result.stderr}")
    if result.stderr:
        warnings.warn(result.stderr, stacklevel=2)
    return result.stdout


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _compiler_version() -> str:
    try:
        return subprocess.check_output([_compiler(), "--version"], text=True)
    except OSError as error:
        raise EmulatorError(f"the emulator needs g++ (or CXX): {error}") from error


@cache
def _own_sources() -> tuple[str, ...]:
    paths = sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp"), Path(__file__)))
    return tuple(path.read_text() for path in paths)


def _root() -> Path:
    """Folder of all entries: code is loaded from it, so it must be this user's alone."""
    default = Path(tempfile.gettempdir()) / f"rnnt_op_emulator-{os.getuid()}"
    root = Path(os.environ.get("RNNT_OP_EMULATOR_CACHE", default))
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    if root.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise EmulatorError(f"{root}: expected a folder that only this user can write to")
    return root


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _entry(parts: Iterable[str], make: Callable[[Path], object]) -> Path:
    """Folder with what ``make`` wrote for these parts.

    Others see no folder or a complete one; one process at a time makes it.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    entry = _root() / digest.hexdigest()
    if entry.is_dir():
        return entry
    with _locked(entry.with_suffix(".lock")):
        if entry.is_dir():
            return entry
        folder = Path(tempfile.mkdtemp(prefix="build-", dir=entry.parent))
        try:
            make(folder)
            folder.rename(entry)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return entry
