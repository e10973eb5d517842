"""Native kernels compiled in other ways: for narrower vectors, and under sanitizers."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from places import ROOT, TESTS
from tested_backends import NEEDS_CXX

from rnnt_op.jit import KernelSource, load_host_module
from rnnt_op.jit.host_compiler import HostCompiler

pytestmark = NEEDS_CXX

CSRC = ROOT / "csrc" / "cpu"

NEEDS_X86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="flags of x86-64"
)
NARROWER = {"-mno-avx512f": 32, "-mno-avx -O1": 16}
"""The bytes of their vectors. Those of 32 bytes are a machine's own where it has no AVX-512."""

SANITIZERS = ("asan", "ubsan")
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O0"


def run(*command: str, timeout: int = 570, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
            "OMP_WAIT_POLICY": "passive",  # other tests want the cores
            **environment,
        },
    )


def run_tests(*selection: str, without: Sequence[str] = (), **environment: str) -> None:
    """Tests of the native backend, in another process, without some of them."""
    # These lattices are made of what the others have, and float64 has float32's code.
    left_out = ("constrained", "multi-blank", "modified", "dtype0", "float64", *without)
    done = run(
        # A sanitizer's report would die with what pytest captures.
        *("-m", "pytest", "-qsx", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"),
        *("-k", " and not ".join(("native", *left_out))),
        *("tests/kernels/test_kernels.py", "tests/kernels/test_native_functions.py", *selection),
        **environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


# ---- vectors


@NEEDS_X86
@pytest.mark.parametrize("flag", NARROWER)
def test_width_of_vectors(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the flags of the next test make of the kernels."""
    (tmp_path / "vectors.h").write_text((CSRC / "vectors.h").read_text())
    (tmp_path / "width.cpp").write_text("""#include "vectors.h"
extern "C" void width(long long, long long* bytes) { *bytes = vector_bytes; }
""")
    monkeypatch.setenv("CXXFLAGS", flag)
    bytes_of_vector = torch.zeros(1, dtype=torch.int64)
    module = load_host_module(KernelSource("width", root=tmp_path, suffix=".cpp"))
    module.call("width", [bytes_of_vector])
    assert bytes_of_vector == NARROWER[flag]


@pytest.mark.slow
@NEEDS_X86
def test_kernels_of_narrower_vectors() -> None:
    reach = "tests/kernels/test_native_reach.py::test_a_smaller_tolerance_loses_less"
    hidden = "tests/kernels/test_dropout.py::test_hidden"
    run_tests(hidden, reach, without=("star", "hat"), CXXFLAGS="-mno-avx -O1")


# ---- sanitizers


@functools.cache
def sanitizer_libraries() -> tuple[str, ...]:
    """Of the compiler that builds the kernels; none where it has none."""
    compiler = HostCompiler.from_environment()
    command = [compiler.path, *compiler.arguments]
    libraries = [
        subprocess.run(
            [*command, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in SANITIZERS
    ]
    return tuple(libraries) if all(map(os.path.isabs, libraries)) else ()


@pytest.fixture
def sanitized() -> dict[str, str]:
    """Environment in which kernels run under sanitizers."""
    libraries = sanitizer_libraries()
    if not libraries:
        pytest.skip("the compiler comes without shared libraries of its sanitizers")
    return {
        "CXXFLAGS": SANITIZED,
        "LD_PRELOAD": " ".join(libraries),
        # The interpreter's own leaks are not these tests' matter.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


WRONG = """
extern "C" void write_behind(long long, double* values, long long count) { values[count] = 1.0; }
extern "C" void write_before(long long, double* values, long long) { values[-1] = 1.0; }
extern "C" void overflow(long long threads, double* values, long long count) {
  const int large = 2147483647 - static_cast<int>(threads) + 1;
  values[0] = large + static_cast<int>(count);
}
extern "C" void right(long long, double* values, long long count) { values[count - 1] = 1.0; }
"""

CALL = """
import sys, torch
from pathlib import Path
from rnnt_op.jit import KernelSource, load_host_module
torch.set_num_threads(1)
values = torch.zeros(21, dtype=torch.float64)
source = KernelSource("wrong", root=Path(sys.argv[1]), suffix=".cpp")
module = load_host_module(source)
module.call("right", [values, len(values)])
print("right", flush=True)
module.call(sys.argv[2], [values, len(values)])
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "report"),
    [
        ("write_behind", "heap-buffer-overflow"),
        ("write_before", "heap-buffer-overflow"),
        ("overflow", "signed integer overflow"),
    ],
)
def test_sanitizers_see(
    kernel: str, report: str, sanitized: dict[str, str], tmp_path: Path
) -> None:
    """Kernels that are wrong on purpose, in tensors of torch, after one that is not."""
    (tmp_path / "wrong.cpp").write_text(WRONG)
    done = run("-c", CALL, str(tmp_path), kernel, **sanitized)
    assert done.returncode != 0
    assert done.stdout == "right\n", done.stderr
    assert report in done.stderr


@pytest.mark.slow
def test_kernels_under_sanitizers(sanitized: dict[str, str]) -> None:
    run_tests(
        "tests/kernels/test_best_paths.py",
        "tests/kernels/test_dropout.py",
        "tests/kernels/test_native.py::test_kernels_are_the_same_on_any_threads",
        *(
            f"tests/kernels/test_native_reach.py::test_what_is_lost_is_within_its_bound[{case}]"
            for case in (
                "aligned-regular-whole",
                "hidden-hat-whole",
                "aligned-long-blank-restricted",
            )
        ),
        **sanitized,
    )
