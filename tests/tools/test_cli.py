"""The ``rnnt-op`` command: what it says, and one line and status 2 for every wrong argument."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from expecttest import assert_expected_inline

import rnnt_op
from rnnt_op.tools import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Status, output and errors."""
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong argument gets."""
    status, out, error = run(capsys, *arguments)
    assert (status, out) == (2, ""), error
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.strip()


def test_wrong_arguments_get_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    cases = """

guess
--guess
doctor --jsn
doctor now
precompile --dtype int8
precompile --dtype float32,int8
precompile --activation
memory --batch
memory --batch 0
memory --batch -3
memory --batch 2.5
memory --seconds 0
memory --seconds nan
memory --seconds inf
memory --seconds 10 --frames 100
memory --labels -1
memory --vocab 0
memory --joint-dim many
memory --dtype float8
memory --gpu-memory -1
memory --workspace 0
memory --frame-ms 0
memory --device tpu
memory --lengths /nowhere/lengths.npy
memory --plot peaks.txt
memory --plot /nowhere/peaks.svg
bench --batches 1,0
bench --batches 1,,2
bench --durations 1,x
bench --methods batched,guess
bench --memory-limit 0
bench --time-limit -1
bench --repeats 0
bench --out /dev/null/study
headline --batch 0
headline --limit nan
headline --repeats -1
headline --seconds 1 --frames 2
headline --json result.txt
headline --json /nowhere/result.json"""
    lines = [refused(capsys, *case.split()) for case in cases.splitlines()[1:]]
    assert_expected_inline(
        "\n".join(lines),
        """\
rnnt-op: Missing command.
rnnt-op: No such command 'guess'.
rnnt-op: No such option '--guess'.
rnnt-op doctor: No such option '--jsn'. Did you mean '--json'?
rnnt-op doctor: Got unexpected extra argument (now)
rnnt-op precompile: Invalid value for '--dtype': 'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'.
rnnt-op precompile: Invalid value for '--dtype': 'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'.
rnnt-op precompile: Option '--activation' requires an argument.
rnnt-op memory: Option '--batch' requires an argument.
rnnt-op memory: Invalid value for '--batch': 0 is not in the range x>=1.
rnnt-op memory: Invalid value for '--batch': -3 is not in the range x>=1.
rnnt-op memory: Invalid value for '--batch': '2.5' is not a valid integer.
rnnt-op memory: Invalid value for '--seconds': 0.0 is not in the range x>0.
rnnt-op memory: Invalid value for '--seconds': nan is not a finite number.
rnnt-op memory: Invalid value for '--seconds': inf is not a finite number.
rnnt-op memory: --seconds and --frames contradict each other; give one of them.
rnnt-op memory: Invalid value for '--labels': -1 is not in the range x>=0.
rnnt-op memory: Invalid value for '--vocab': 0 is not in the range x>=1.
rnnt-op memory: Invalid value for '--joint-dim': 'many' is not a valid integer.
rnnt-op memory: Invalid value for '--dtype': 'float8' is not one of 'float64', 'float32', 'bfloat16'.
rnnt-op memory: Invalid value for '--gpu-memory': -1.0 is not in the range x>0.
rnnt-op memory: Invalid value for '--workspace': 0.0 is not in the range x>0.
rnnt-op memory: Invalid value for '--frame-ms': 0.0 is not in the range x>0.
rnnt-op memory: Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'.
rnnt-op memory: Invalid value for '--lengths': File '/nowhere/lengths.npy' does not exist.
rnnt-op memory: Invalid value for '--plot': 'peaks.txt' must end in .svg or .png.
rnnt-op memory: Invalid value for '--plot': '/nowhere' is no folder that can be written to.
rnnt-op bench: Invalid value for '--batches': 0 is not in the range x>=1.
rnnt-op bench: Invalid value for '--batches': '' is not a valid integer.
rnnt-op bench: Invalid value for '--durations': 'x' is not a valid number.
rnnt-op bench: --methods: no 'guess' here; there are batched, function-merged, padding-free, in-place, batch-split, one at a time, rnnt_op.
rnnt-op bench: Invalid value for '--memory-limit': 0.0 is not in the range x>0.
rnnt-op bench: Invalid value for '--time-limit': -1.0 is not in the range x>0.
rnnt-op bench: Invalid value for '--repeats': 0 is not in the range x>=1.
rnnt-op bench: --out: '/dev/null/study' cannot be made: Not a directory.
rnnt-op headline: Invalid value for '--batch': 0 is not in the range x>=1.
rnnt-op headline: Invalid value for '--limit': nan is not a finite number.
rnnt-op headline: Invalid value for '--repeats': -1 is not in the range x>=0.
rnnt-op headline: --seconds and --frames contradict each other; give one of them.
rnnt-op headline: Invalid value for '--json': 'result.txt' must end in .json.
rnnt-op headline: Invalid value for '--json': '/nowhere' is no folder that can be written to.""",
    )


def test_lengths_that_cannot_be_used(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arrays = {
        "text": np.array([["a", "b"]]),
        "flat": np.arange(4),
        "real": np.ones((3, 2)),
        "empty": np.ones((0, 2), dtype=int),
        "no_frames": np.array([[5, 1], [0, 2]]),
        "negative": np.array([[5, -1]]),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "other.npy").write_text("T, U\n10, 3\n")
    (tmp_path / "nothing.npy").write_text("")
    for file in sorted(tmp_path.iterdir()):
        line = refused(capsys, "memory", "--lengths", str(file))
        assert line.startswith(f"rnnt-op memory: Invalid value for '--lengths': {file}")
        reason = "cannot be read" if file.stem in ("other", "nothing") else "expected [n, 2] integ"
        assert reason in line
    np.save(tmp_path / "good.npy", np.array([[5, 1]]))
    options = ("--lengths", str(tmp_path / "good.npy"))
    assert_expected_inline(
        "\n".join(
            (
                refused(capsys, "memory", *options, "--labels", "3"),
                refused(capsys, "bench", *options, "--ragged"),
                refused(capsys, "bench", *options, "--labels-per-second", "5"),
            )
        ),
        """\
rnnt-op memory: --lengths contradicts --labels.
rnnt-op bench: --lengths contradicts --ragged.
rnnt-op bench: --lengths contradicts --labels-per-second.""",
    )


def test_a_gpu_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in ("bench", "headline"):
        assert refused(capsys, command, "--device", "cuda") == (
            f"rnnt-op {command}: Invalid value for '--device': torch finds no CUDA device; see "
            "rnnt-op doctor."
        )


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_an_extra_that_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    for module in [name for name in sys.modules if name.startswith("rnnt_op.tools.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Without(missing), *sys.meta_path])
    command = ("precompile", "--arch", "cpu", "--dtype", "float32", "--activation", "tanh")
    assert refused(capsys, *command) == (
        f"rnnt-op: {missing} is not installed: pip install 'rnnt-op[tools]'"
    )


class _Without:
    """Finds no module of a package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"rnnt-op {rnnt_op.__version__}\n", "")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in ("doctor", "precompile", "memory", "bench", "headline"):
        assert f"\n  {command} " in out
        assert run(capsys, command, "--help")[0] == 0


@pytest.mark.slow
def test_module_is_the_command() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "rnnt_op", "--version"], capture_output=True, text=True
    )
    assert (process.returncode, process.stdout) == (0, f"rnnt-op {rnnt_op.__version__}\n")


def test_interruption_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rnnt_op.doctor.diagnose", interrupt)
    status, _, error = run(capsys, "doctor")
    assert (status, error.strip()) == (130, "rnnt-op: interrupted")


def test_tables_are_whole_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    from rnnt_op.tools.cli.tables import show_table

    rows = [
        {"name": "x" * 300, "a number": 1234567.0, "[or] none": None},
        {"name": "y", "a number": 0.00012345, "[or] none": 3},
    ]
    show_table(rows, "A title")
    assert_expected_inline(
        capsys.readouterr().out.replace("x" * 300, "x...x").replace(" " * 295, ""),
        """\

A title

name    a number  [or] none
x...x  1,234,567          –
y       0.000123          3
""",
    )


IN_ONE_PROCESS = """
import runpy, sys
for command in sys.argv[1:]:
    module, *sys.argv[1:] = command.split("\\n")
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        sys.stderr.flush()
        print("status", end.code or 0, flush=True)
    else:
        print("status", 0, flush=True)
"""


def test_a_terminal_without_some_characters(tmp_path: Path) -> None:
    """They are replaced, in what is printed and in names of files."""
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "CXX": "/nowhere/é",  # nothing compiles
        "RNNT_OP_CACHE_DIR": str(tmp_path / "é"),
    }
    batch = ["--batch=64", "--seconds=20", "--labels=80", "--vocab=1024", "--joint-dim=640"]
    cases = (
        (["rnnt_op", "memory", *batch], "B*(U+1)*H", 0),
        (["rnnt_op", "doctor"], "cache ", 0),
        (["rnnt_op.doctor"], f"{tmp_path / '?'} (writable)", 0),
        (["rnnt_op", "memory", "--lengths", str(tmp_path / "ü")], "'--lengths'", 2),
    )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IN_ONE_PROCESS]
        + ["\n".join(arguments) for arguments, *_ in cases],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=environment,
    )
    assert process.returncode == 0, process.stdout
    assert "Traceback" not in process.stdout
    *pieces, end = re.split(r"^status (\d+)$", process.stdout, flags=re.MULTILINE)
    assert not end.strip()
    assert pieces[1::2] == [str(status) for *_, status in cases]
    for (_, words, _), output in zip(cases, pieces[::2], strict=True):
        assert words in output
