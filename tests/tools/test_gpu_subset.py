"""The plugin for short stays on a GPU: which tests it chooses, and what it records of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import gpu_subset

    return gpu_subset


def start(folder: Path, *options: str, **files: str) -> subprocess.Popen[str]:
    """Pytest with the plugin, over these files alone."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    paths = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_subset", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [*command, "-c", os.devnull, "--rootdir", str(folder), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *options: str, **files: str) -> tuple[int, str]:
    process = start(folder, *options, **files)
    output, _ = process.communicate()
    return process.returncode, output


def outcomes(record: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    return {line["test"].partition("::")[2]: line["outcome"] for line in lines}


def test_one_of_each_function_first(plugin: Any) -> None:
    tests = [f"f.py::test_{name}[{i}]" for name in "abcde" for i in range(10)] + ["f.py::test_f"]
    for most in (3, 6, 20, 100):
        found = plugin.chosen(tests, most)
        assert len(found) == min(most, len(tests))
        assert found == plugin.chosen(tests[::-1], most)
        assert len({test.partition("[")[0] for test in found}) == min(most, 6)
    assert plugin.chosen(tests, 6) < plugin.chosen(tests, 20)


SUITE = """
import pytest
@pytest.mark.parametrize("i", range(4))
def test_many(i): assert i != 2
def test_skips(): pytest.skip("not here")
@pytest.fixture
def broken(): raise ValueError("broken")
def test_set_up(broken): pass
"""


@pytest.mark.slow  # starts pytest several times
def test_record_and_what_it_leaves_out(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    code, output = run(tmp_path, "--record", str(record), test_suite=SUITE)
    assert code == 1, output
    many = {f"test_many[{i}]": "failed" if i == 2 else "passed" for i in range(4)}
    assert outcomes(record) == {**many, "test_skips": "skipped", "test_set_up": "failed"}
    lines = {each["test"]: each for each in map(json.loads, record.read_text().splitlines())}
    assert "assert 2 != 2" in lines["test_suite.py::test_many[2]"]["text"]

    code, output = run(tmp_path, "--without", str(record), "--record", str(tmp_path / "again"))
    assert code == 1, output
    assert outcomes(tmp_path / "again") == {"test_many[2]": "failed", "test_set_up": "failed"}

    record.write_text("".join(re.sub("failed", "passed", record.read_text())))
    code, output = run(tmp_path, "--without", str(record))
    assert (code, "6 deselected" in output) == (0, True), output


def test_interpreter_that_crashes_leaves_what_ran_before(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    suite = "import os\ndef test_a(): pass\ndef test_b(): os.abort()\ndef test_c(): pass\n"
    code, _ = run(tmp_path, "-p", "no:faulthandler", "--record", str(record), test_suite=suite)
    assert code == -signal.SIGABRT
    assert outcomes(record) == {"test_a": "passed"}


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_pytest_that_is_cut_leaves_what_ran_before(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    if options:
        pytest.importorskip("xdist")
    record = tmp_path / "record.jsonl"
    suite = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(300)\n"
    process = start(tmp_path, *options, "--record", str(record), test_suite=suite)
    deadline = time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert outcomes(record) == {"test_a": "passed"}


LOST = """
import sys, types, pytest
def lose():
    def synchronize(): raise RuntimeError("an illegal memory access was encountered")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
@pytest.mark.parametrize("i", range(9))
def test_uses_gpu(i):
    if i == 1:
        lose()
        assert False, "the first error"
    assert "torch" not in sys.modules, "another error of the same context"
"""


@pytest.mark.slow  # starts pytest several times
def test_worker_whose_gpu_is_lost_ends(tmp_path: Path) -> None:
    """An error that outlives its test fails no other."""
    pytest.importorskip("xdist")
    record = tmp_path / "record.jsonl"
    code, output = run(tmp_path, "-n", "1", "--record", str(record), test_suite=LOST)
    assert code == 1, output
    found = outcomes(record)
    assert len(found) == 9
    assert [name for name, each in found.items() if each == "failed"] == ["test_uses_gpu[1]"]
    assert "the first error" in record.read_text()
    assert "crashed while running" in output
