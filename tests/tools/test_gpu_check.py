"""What a short stay on a GPU leaves: steps that hang, crash or are cut take nothing from others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from places import ROOT

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigtimedwait"), reason="needs process groups, and to wait for signals"
)

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Modules of the benchmarks."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import check_setup
    import check_steps
    import gpu_check
    import records
    import sanitize
    import step_runner

    monkeypatch.setattr(step_runner, "GRACE", 1.0)
    return SimpleNamespace(
        setup=check_setup,
        steps=check_steps,
        check=gpu_check,
        records=records,
        sanitize=sanitize,
        runner=step_runner,
    )


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def statuses(out: Path) -> dict[str, str]:
    return {step["name"]: step["status"] for step in summary(out)["steps"]}


# The runner.

WAITS = "import time; print('waits', flush=True); time.sleep(300)"
DEAF = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {WAITS}"
WRITES_AT_ITS_END = """
import pathlib, time
try:
    print("measuring", flush=True)
    time.sleep(300)
except KeyboardInterrupt:
    pathlib.Path({!r}).write_text("what was measured")
    raise
"""


def test_a_step_that_fails_takes_nothing_from_others(
    scripts: SimpleNamespace, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # As in a shell's job in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    Step, left = scripts.runner.Step, tmp_path / "left"

    def unwanted() -> tuple[str, ...]:
        raise scripts.runner.Skip("not wanted")

    runner = scripts.runner.Runner(tmp_path / "out", 60)
    steps = [
        Step("first", 20, python("print('well'); print()")),
        Step("hangs", 1.5, python(WRITES_AT_ITS_END.format(str(left))), essential=True),
        Step("deaf", 1.5, python(DEAF)),
        Step("crashes", 20, python("import os; os.abort()")),
        Step("wrong", 20, python("raise SystemExit('differs')")),
        Step("cannot", 20, python("print('no tool'); raise SystemExit(77)")),
        Step("unwanted", 20, unwanted),
        Step("missing", 20, (str(tmp_path / "no program"),)),
        Step("last", None, python("import os; print(os.environ['WORD'])"), {"WORD": "a word"}),
    ]
    for step in steps:
        runner.run(step)
    found = {step["name"]: step for step in summary(tmp_path / "out")["steps"]}
    assert statuses(tmp_path / "out") == {
        "first": "passed",
        "hangs": "timed out",
        "deaf": "timed out",
        "crashes": "failed",
        "wrong": "failed",
        "cannot": "skipped",
        "unwanted": "skipped",
        "missing": "failed",
        "last": "passed",
    }
    assert left.read_text() == "what was measured"
    details = {name: step["detail"] for name, step in found.items()}
    assert details["first"] == "well"
    assert details["hangs"].startswith("cut after 2 s: KeyboardInterrupt")
    assert details["deaf"] == "cut after 2 s: waits"
    assert "SIGABRT" in details["crashes"]
    assert (details["wrong"], details["cannot"]) == ("differs", "no tool")
    assert (details["unwanted"], details["last"]) == ("not wanted", "a word")
    assert runner.failed
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("== ")] == [
        f"== {step.name}" for step in steps if step.name != "unwanted"
    ]


def test_time_that_is_spent_cuts_all_that_follows(scripts: SimpleNamespace, tmp_path: Path) -> None:
    Step = scripts.runner.Step
    start = time.monotonic()
    runner = scripts.runner.Runner(tmp_path, 6, about={"part": "none"})
    for name in ("measured", "cut", "late", "later"):
        runner.run(Step(name, 100, python("print(1)" if name == "measured" else DEAF)))
    assert time.monotonic() - start < 12  # of which some is a busy machine's
    assert list(statuses(tmp_path).values()) == ["passed", *["timed out"] * 3]
    assert summary(tmp_path)["steps"][-1]["detail"] == "no time was left for it"
    assert summary(tmp_path)["part"] == "none"
    assert not runner.failed


def test_what_a_step_starts_ends_with_it(scripts: SimpleNamespace, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import pathlib, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {DEAF!r}])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))"
    )
    scripts.runner.Runner(tmp_path, 60).run(scripts.runner.Step("leaves", 20, python(code)))
    assert has_ended(int(child.read_text()))


def has_ended(process: int) -> bool:
    for _ in range(100):
        state = Path(f"/proc/{process}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_check_itself_is_ended(tmp_path: Path, sent: signal.Signals) -> None:
    pid = tmp_path / "pid"
    waits = f"import os, pathlib; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); {WAITS}"
    code = (
        "import pathlib, signal, sys\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from step_runner import Runner, Step\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"runner = Runner(pathlib.Path({str(tmp_path)!r}), 100)\n"
        "runner.run(Step('measured', 50, [sys.executable, '-c', 'print(7)']))\n"
        f"runner.run(Step('hangs', 50, [sys.executable, '-c', {waits!r}]))\n"
    )
    process = subprocess.Popen(python(code), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    process.wait()
    step = int(pid.read_text())
    if sent == signal.SIGKILL:
        os.killpg(step, signal.SIGKILL)  # nobody was there to end it
    expected = "running" if sent == signal.SIGKILL else "timed out"
    assert statuses(tmp_path) == {"measured": "passed", "hangs": expected}
    assert summary(tmp_path)["steps"][0]["detail"] == "7"
    assert has_ended(step)


def test_much_output_is_shortened(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripts.runner, "_HEAD", 2000)
    monkeypatch.setattr(scripts.runner, "_TAIL", 3000)
    runner = scripts.runner.Runner(tmp_path, 60)
    runner.run(scripts.runner.Step("speaks", 20, python("for i in range(9999): print(i)")))
    runner.run(scripts.runner.Step("next", 20, python("print('done')")))
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 6000
    assert "bytes left out" in log
    assert "\n9998\n" in log
    assert "\n0\n" in log
    assert [step["detail"] for step in summary(tmp_path)["steps"]] == ["9998", "done"]


# Steps.


@pytest.mark.parametrize(("part", "least_for_tests"), [("first", 0), ("second", 100)])
def test_limits_fit(
    scripts: SimpleNamespace, tmp_path: Path, part: str, least_for_tests: int
) -> None:
    asked = scripts.steps.Asked(tmp_path, "cuda", tmp_path / "a", tmp_path / "b")
    steps = scripts.steps.PARTS[part](asked)
    setting_up = 8 + 12  # wheels and installation
    spent = setting_up + sum(step.limit or least_for_tests for step in steps)
    assert spent + scripts.runner.GRACE <= scripts.check.BUDGETS[part]
    assert all(step.limit is not None for step in steps[:-1])


def test_failures_of_the_first_call_come_first(scripts: SimpleNamespace, tmp_path: Path) -> None:
    record = tmp_path / "tests.jsonl"
    asked = scripts.steps.Asked(tmp_path, "cuda", tmp_path / "own.jsonl", record)
    failures, *_ = scripts.steps.second(asked)
    with pytest.raises(scripts.runner.Skip, match="no record"):
        failures.command()
    lines = [
        {"test": "a", "outcome": "passed"},
        {"test": "b[1::2]", "outcome": "failed", "text": "worker 'gw0' crashed while running"},
        {"test": "c", "outcome": "failed", "text": "differs"},
        {"test": "d", "outcome": "failed", "text": "differs"},
        {"test": "d", "outcome": "passed"},
    ]
    record.write_text("\n".join(map(json.dumps, lines)) + '\n{"test": "cut sh')
    command = failures.command()
    # What failed once and passed alone is worth another try.
    assert [word for word in command if word in "abcd"] == ["c", "d"]
    assert command.index("b[1::2]") > command.index("c")
    first = replace(asked, record=record)
    [alone] = [step for step in scripts.steps.first(first) if step.name == "alone"]
    assert [word for word in alone.command() if word in "abcd"] == ["c"]
    assert alone.environment == {"CUDA_LAUNCH_BLOCKING": "1"}
    others = scripts.steps.second(asked)[-1].command()
    assert others[others.index("--without") + 1] == str(record)
    record.write_text(json.dumps(lines[0]) + "\n")
    with pytest.raises(scripts.runner.Skip, match="no test failed"):
        failures.command()


def test_tests_that_lack_a_package_are_left_out(scripts: SimpleNamespace, tmp_path: Path) -> None:
    files = {
        "helper.py": "import nowhere_to_be_found.deep\nimport other",
        "other.py": "import helper",
        "a/test_direct.py": "from not_here import name",
        "a/test_indirect.py": "import os\nfrom helper import thing",
        "b/test_well.py": "import json, rnnt_op.no_such_part\ndef f():\n    import not_here\n",
        "b/test_again.py": "import not_here",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert scripts.setup.tests_left_out(tmp_path) == {
        tmp_path / "a/test_direct.py": "not_here",
        tmp_path / "a/test_indirect.py": "nowhere_to_be_found",
        tmp_path / "b/test_again.py": "not_here",
    }


CLEAN = "the run is done\n========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "the run is done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n"
WRITE = "========= Invalid __global__ write of size 4 bytes\n========= ERROR SUMMARY: 1 error\n"
REFUSED = (
    "========= Error: Device not supported. Please refer to the documentation\n"
    "========= Program hit unknown error (error 999) on CUDA API call to cudaMalloc.\n"
    "========= ERROR SUMMARY: 2 errors\n"
)
BROKEN = "Traceback\nRuntimeError: bad\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, CLEAN, (0, "0 errors")),
        (0, NO_RACE, (0, "0 hazards displayed (0 errors)")),
        (9, WRITE, (1, "1 error")),
        (9, REFUSED, (77, "Device not supported")),
        (1, "cannot open shared object", (77, "without a summary")),
        (1, BROKEN, (1, "did not end well")),
    ],
)
def test_sanitizer_that_cannot_run_is_no_failure(
    scripts: SimpleNamespace, status: int, output: str, expected: tuple[int, str]
) -> None:
    code, why = scripts.sanitize.verdict(status, output)
    assert code == expected[0]
    assert expected[1] in why


# All of it, at toy sizes.


def start(out: Path, *parts: str) -> subprocess.Popen[str]:
    """A call on the CPU, with more time than it gets."""
    environment = {
        "RNNT_OP_CHECK_DEVICE": "cpu",
        "RNNT_OP_CHECK_SECONDS": "3000",
        "PYTHON": sys.executable,
    }
    return subprocess.Popen(
        [str(BENCHMARKS / "gpu_check.sh"), out.name, *parts],
        cwd=out.parent,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_usage(tmp_path: Path) -> None:
    call = start(tmp_path, "third")
    said, _ = call.communicate()
    assert call.returncode == 2
    assert "gpu_check.sh OUT second" in said
    assert not any(tmp_path.iterdir())


def doctor_has_passed(out: Path) -> bool:
    return (out / "summary.json").exists() and statuses(out).get("doctor") == "passed"


def speed_is_measured(out: Path) -> bool:
    report = out / "speed-toy-cpu.json"
    return report.exists() and bool(json.loads(report.read_text())["results"][0]["seconds"])


@pytest.mark.slow  # until something has been measured
@pytest.mark.parametrize(
    ("part", "measured"), [("first", doctor_has_passed), ("second", speed_is_measured)]
)
def test_a_call_that_is_ended_leaves_what_it_measured(
    part: str, measured: Callable[[Path], bool], tmp_path: Path
) -> None:
    """It waits for a result, however slow the machine is. Left alone, all steps pass or skip."""
    call = start(tmp_path, part)
    deadline = time.monotonic() + 400
    while not measured(tmp_path) and call.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    call.terminate()
    said, _ = call.communicate()
    assert measured(tmp_path), said
    assert call.returncode == 143, said
    assert not {"failed", "running"} & set(statuses(tmp_path).values()), said
    files = list(tmp_path.iterdir())
    assert len(files) <= 8
    assert all(file.stat().st_size < 2**24 for file in files)
    assert summary(tmp_path)["commit"]
    if part == "second":
        [case] = json.loads((tmp_path / "speed-toy-cpu.json").read_text())["results"]
        assert len(case["seconds"]["one GEMM"]) >= 1
        assert len({len(times) for times in case["seconds"].values()}) == 1
