"""The study of all methods: what it measures, and that no method can spoil it."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import rnnt_op
from rnnt_op.memory import Workload, batched_bytes
from rnnt_op.tools import cli
from rnnt_op.tools.study import bench, cell
from rnnt_op.tools.study.bench import Study, points, run, tables, wrong_methods
from rnnt_op.tools.study.cell import FAILED, MEASURED, MODES, OUT_OF_MEMORY, Cell, Measured, measure
from rnnt_op.tools.study.methods import METHODS, Method
from rnnt_op.tools.study.problems import Problem

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

STUDY = Study(
    methods=("batched", "rnnt_op"), batches=(2, 1), seconds=2.0, durations=(4.0, 2.0), batch=1
)
CELL = Cell(
    method="batched",
    # malloc gives memory of this size back when it is freed
    workload=Workload(((200, 50),), 1024, 32, torch.float32),
    device="cpu",
    memory_limit=4 * 10**9,
    time_limit=60.0,
    repeats=2,
    seed=0,
)


def test_points_grow() -> None:
    assert [(point.sweep, point.x, point.workload.lengths) for point in points(STUDY)] == [
        ("batch size", 1, ((50, 10),)),
        ("batch size", 2, ((50, 10),) * 2),
        ("audio length", 2.0, ((50, 10),)),
        ("audio length", 4.0, ((100, 20),)),
    ]


def test_ragged_points_reach_the_full_length() -> None:
    for point in points(replace(STUDY, ragged=True, batches=(40,), batch=40)):
        frames, labels = (max(column) for column in zip(*point.workload.lengths, strict=True))
        seconds = 2.0 if point.sweep == "batch size" else point.x
        assert (frames, labels) == (25 * seconds, 5 * seconds)
        assert len({t for t, _ in point.workload.lengths}) > 10
        assert all(2 * t >= frames and 2 * u >= labels for t, u in point.workload.lengths)


def test_recorded_lengths(tmp_path: Path) -> None:
    recorded = [(10, 1), (49, 5), (52, 6), (99, 20), (300, 50)]
    np.save(tmp_path / "lengths.npy", np.array(recorded))
    one, seven, short, long = points(
        replace(STUDY, lengths=tmp_path / "lengths.npy", batches=(1, 7), batch=2)
    )
    assert one.workload.lengths[0] in recorded
    assert set(seven.workload.lengths) == set(recorded)  # all of them before any comes again
    assert len(seven.workload.lengths) == 7
    assert short.workload.lengths == ((49, 5), (52, 6))
    assert long.workload.lengths == ((99, 20), (52, 6))


@linux
@pytest.mark.slow
def test_measured_peak_is_that_of_the_tensors() -> None:
    """Beside the formula of the batched way, which counts neither inputs nor their gradients."""
    forward, both = measure(CELL)
    assert [(m.mode, m.outcome, m.runs) for m in (forward, both)] == [
        (mode, MEASURED, 2) for mode in MODES
    ]
    expected = batched_bytes(CELL.workload)
    assert forward.peak_bytes is not None
    assert both.peak_bytes is not None
    assert expected < both.peak_bytes < 1.5 * expected
    assert 0.4 * expected < forward.peak_bytes < both.peak_bytes
    assert forward.seconds is not None
    assert both.seconds is not None
    assert 0 < forward.seconds < both.seconds


@linux
@pytest.mark.slow
@pytest.mark.parametrize("method", ["batched", "rnnt_op"])
def test_memory_limit_is_kept(method: str) -> None:
    """These logits do not fit, nor does rnnt_op's workspace have room to keep them."""
    workload = Workload(((1000, 50),), 1024, 32, torch.float32)
    limited = replace(CELL, method=method, workload=workload, memory_limit=2 * 10**8)
    outcomes = [measured.outcome for measured in measure(limited)]
    assert outcomes == [OUT_OF_MEMORY if method == "batched" else MEASURED] * 2


@linux
@pytest.mark.slow
def test_memory_limit_below_all_that_is_there() -> None:
    nothing = measure(replace(CELL, memory_limit=10**4))
    assert [measured.outcome for measured in nothing] == [OUT_OF_MEMORY] * 2


@linux
@pytest.mark.slow
def test_time_limit_is_kept() -> None:
    assert measure(replace(CELL, time_limit=0.001)) == [
        Measured(mode, "> 0.001 s") for mode in MODES
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cell_on_a_gpu() -> None:
    on_gpu = replace(CELL, device="cuda")
    forward, both = measure(on_gpu)
    assert (forward.outcome, both.outcome) == (MEASURED, MEASURED)
    expected = batched_bytes(CELL.workload)
    assert both.peak_bytes is not None
    assert expected < both.peak_bytes < 1.5 * expected
    limited = measure(replace(on_gpu, memory_limit=5 * 10**7))
    assert [measured.outcome for measured in limited] == [OUT_OF_MEMORY] * 2


MEASURED_LINE = f"print({json.dumps(vars(Measured(MODES[0], MEASURED, 5, 0.5, 1)))!r}, flush=True)"


@pytest.mark.parametrize(
    ("code", "outcomes", "detail"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", [OUT_OF_MEMORY] * 2, None),
        ("sys.exit('terminate called: std::bad_alloc')", [OUT_OF_MEMORY] * 2, None),
        ("os.kill(os.getpid(), signal.SIGSEGV)", [FAILED] * 2, "SIGSEGV "),
        ("sys.exit('first line\\nno such method')", [FAILED] * 2, "no such method"),
        ("print('running', flush=True); time.sleep(60)", ["> 0.5 s"] * 2, None),
        (
            f"{MEASURED_LINE}; os.kill(os.getpid(), signal.SIGKILL)",
            [MEASURED, OUT_OF_MEMORY],
            None,
        ),
        ("time.sleep(60)", [FAILED] * 2, "no inputs after 0.5 s"),
    ],
)
def test_every_end_is_an_outcome(
    code: str, outcomes: list[str], detail: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell, "_START_SECONDS", 0.5 if code == "time.sleep(60)" else 60.0)
    command = [sys.executable, "-S", "-c", f"import os, signal, sys, time; {code}"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, bufsize=0) as process,
    ):
        results = cell._follow(process, 0.5, errors)
        process.kill()
    assert [(measured.mode, measured.outcome) for measured in results] == list(
        zip(MODES, outcomes, strict=True)
    )
    assert results[-1].detail == detail


def twice_the_loss(*arguments: Any, **options: Any) -> Tensor:
    return 2 * rnnt_op.joint_rnnt_loss(*arguments, **options)


class WrongForward(Method):
    def loss(self, problem: Problem) -> Tensor:
        return super().loss(problem) + 1


def no_method(*arguments: Any, **options: Any) -> Tensor:
    raise RuntimeError("no method\nand why")


def test_wrong_methods_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = [
        METHODS["rnnt_op"],
        Method("twice", twice_the_loss),
        WrongForward("wrong forward", rnnt_op.joint_rnnt_loss),
        Method("none", no_method),
    ]
    monkeypatch.setattr(cell, "METHODS", {method.name: method for method in methods})
    monkeypatch.setattr(bench, "measure", lambda _: [Measured(m, MEASURED, 1, 1.0) for m in MODES])
    study = replace(STUDY, methods=tuple(method.name for method in methods), durations=())
    wrong = wrong_methods(study)
    assert list(wrong) == ["twice", "wrong forward", "none"]
    assert wrong["twice"].startswith("relative error of the gradients 1.0e+00 (bar 2.0e-05), of")
    assert wrong["none"] == "RuntimeError: no method"
    rows = [row for rows in run(study, wrong) for row in rows]
    assert {row["method"] for row in rows if row["outcome"] == MEASURED} == {"rnnt_op"}
    assert all(row["peak GB"] is row["seconds"] is None for row in rows if row["method"] in wrong)


def test_a_problem_of_both_sweeps_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = []

    def remember(measured: Cell) -> list[Measured]:
        cells.append((measured.method, measured.workload))
        return [Measured(mode, MEASURED, 10**9, 1.0, 1) for mode in MODES]

    monkeypatch.setattr(bench, "measure", remember)
    rows = [row for rows in run(STUDY, {}) for row in rows]
    assert len(rows) == 4 * 2 * 2
    assert len(cells) == len(set(cells)) == 3 * 2


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcomes = {
        ("batched", 1): [Measured(mode, MEASURED, 2 * 10**9, 0.25, 3) for mode in MODES],
        ("batched", 2): [
            Measured(MODES[0], MEASURED, 4 * 10**9, 12.5, 0),
            Measured(MODES[1], OUT_OF_MEMORY),
        ],
        ("rnnt_op", 1): [Measured(mode, MEASURED, 10**7, 0.5, 3) for mode in MODES],
        ("rnnt_op", 2): [Measured(mode, "> 30 s") for mode in MODES],
    }
    monkeypatch.setattr(bench, "measure", lambda c: outcomes[c.method, c.workload.batch])
    monkeypatch.setattr(bench, "describe_machine", lambda device: "a machine")
    study = replace(STUDY, durations=(2.0,))
    rows = [row for rows in run(study, {}) for row in rows]
    markdown, record = bench.write(study, rows, {"torchaudio": "no bfloat16"}, tmp_path)
    assert_expected_inline(
        markdown.read_text(),
        """\
# Methods to train a transducer, measured

a machine. float32, V=1024 H=256, frames of 40 ms, 5 labels a second; batches of 2 s against batch size, B=1 against audio length. Peaks are of inputs, gradients and all between, limited to 8 GB; times are medians of the timed runs, at most 3, none longer than 30 s.

torchaudio is not measured: no bfloat16.

## Peak memory in GB against batch size, forward

| method | B=1 | B=2 |
| --- | --- | --- |
| batched | 2 | 4 |
| rnnt_op | 0.01 | > 30 s |

## Peak memory in GB against batch size, forward + backward

| method | B=1 | B=2 |
| --- | --- | --- |
| batched | 2 | out of memory |
| rnnt_op | 0.01 | > 30 s |

## Peak memory in GB against audio length, forward

| method | 2 s |
| --- | --- |
| batched | 2 |
| rnnt_op | 0.01 |

## Peak memory in GB against audio length, forward + backward

| method | 2 s |
| --- | --- |
| batched | 2 |
| rnnt_op | 0.01 |

## Time in seconds against batch size, forward

| method | B=1 | B=2 |
| --- | --- | --- |
| batched | 0.25 | 12.5 |
| rnnt_op | 0.5 | > 30 s |

## Time in seconds against batch size, forward + backward

| method | B=1 | B=2 |
| --- | --- | --- |
| batched | 0.25 | out of memory |
| rnnt_op | 0.5 | > 30 s |

## Time in seconds against audio length, forward

| method | 2 s |
| --- | --- |
| batched | 0.25 |
| rnnt_op | 0.5 |

## Time in seconds against audio length, forward + backward

| method | 2 s |
| --- | --- |
| batched | 0.25 |
| rnnt_op | 0.5 |
""",
    )
    written = json.loads(record.read_text())
    assert written["results"] == rows
    assert written["parameters"]["methods"] == ["batched", "rnnt_op"]
    assert len(tables(rows)) == 8


@linux
@pytest.mark.slow
def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "study"
    options = "--methods batched,rnnt_op --vocab 4000 --joint-dim 8 --repeats 1 --frame-ms 40"
    sizes = "--batches 1 --seconds 1 --durations 8 --memory-limit 0.2"
    status = cli.main(["bench", *options.split(), *sizes.split(), "--out", str(out)])
    printed = capsys.readouterr().out
    assert status == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "memory.png",
        "memory.svg",
        "study.json",
        "study.md",
        "time.png",
        "time.svg",
    ]
    rows = json.loads((out / "study.json").read_text())["results"]
    assert len(rows) == 2 * 2 * 2
    outcomes = {(r["method"], r["x"], r["mode"]): r["outcome"] for r in rows}
    # 200 · 41 nodes of 4000 float32 logits take 0.13 GB.
    assert {key for key, outcome in outcomes.items() if outcome == OUT_OF_MEMORY} == {
        ("batched", 8.0, mode) for mode in MODES
    }
    measured = [row for row in rows if row["outcome"] == MEASURED]
    assert len(measured) == len(rows) - 2
    assert all(0 < row["peak GB"] <= 0.2 and row["seconds"] > 0 for row in measured)
    for name in ("memory", "time"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ">out of memory<" in (out / f"{name}.svg").read_text()
    assert "Peak memory in GB against audio length, forward + backward" in printed
    assert printed.count("out of memory") == 4
