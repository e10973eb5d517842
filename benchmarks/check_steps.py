"""The steps of the two calls of ``gpu_check.sh``: what runs, in which order, and for how long.

Standard library alone. The limits of a part sum to less than its time, so that a step that hangs
takes nothing from the next; what others leave over goes to the last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from check_setup import REPO, find_program, missing, tests_left_out
from records import DONE, read_record
from step_runner import Skip, Step

HERE = Path(__file__).resolve().parent
SMOKE_TESTS = 150
MOST_FAILURES = 15  # of the first call; more would say the same
PYTHON = (sys.executable, "-P")  # the package is what is installed, not what lies in a folder
SANITIZERS = ("memcheck", "racecheck")
HEADLINE = "rnnt_op.tools.study.headline"


@dataclass(frozen=True)
class Asked:
    """What a call is about.

    Args:
        out: the folder of its results.
        device: ``"cuda"``, or ``"cpu"`` for a try at toy sizes.
        record: its record of tests.
        first: that of the first call.
    """

    out: Path
    device: str
    record: Path
    first: Path

    @property
    def toy(self) -> bool:
        return self.device == "cpu"

    def script(self, name: str, *options: str) -> tuple[str, ...]:
        """A script of this folder, on this device."""
        return (sys.executable, str(HERE / name), "--device", self.device, *options)

    def benchmark(self, name: str, *options: str) -> tuple[str, ...]:
        """The same, with its results in the call's folder."""
        return self.script(name, "--out", str(self.out), *options)

    def pytest(
        self, *options: str, workers: int = 0, seconds: int = 30, marks: str = "gpu"
    ) -> tuple[str, ...]:
        """The tests that need a GPU, recorded as they end."""
        command = [*PYTHON, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", "gpu_subset", "--record", str(self.record), "-m", marks]
        command += ["-k", "not compute_sanitizer"]  # steps of their own
        if workers and not self.toy and not missing(["xdist"]):
            command += ["-n", str(workers)]
        if not missing(["pytest_timeout"]):
            # A thread ends the process: no signal reaches one that waits for the GPU.
            command += ["--timeout", str(seconds), "--timeout-method", "thread"]
        left_out = tests_left_out(REPO / "tests")
        relative = {file.relative_to(REPO): name for file, name in left_out.items()}
        return (*command, *options, *(f"--ignore={file}" for file in relative))


def _doctor(asked: Asked) -> tuple[str, ...]:
    code = (
        "import contextlib, runpy, sys\n"
        "with open(sys.argv.pop(), 'w') as file, contextlib.redirect_stdout(file):\n"
        "    runpy.run_module('rnnt_op.doctor', run_name='__main__')"
    )
    return (*PYTHON, "-c", code, str(asked.out / "doctor.txt"))


def first(asked: Asked) -> list[Step]:
    """Does it run at all, and how fast?"""
    folders = ["tests/kernels/test_gpu.py"] if asked.toy else ["tests/kernels", "tests/loss"]
    quick = ("--repeats", "2" if asked.toy else "5", "--training-steps", "10")

    def gpus() -> tuple[str, ...]:
        return (find_program("nvidia-smi"),)

    def smoke() -> tuple[str, ...]:
        marks = "gpu and not slow"
        options = (f"--maxfail={MOST_FAILURES}", "--subset", str(SMOKE_TESTS), *folders)
        return asked.pytest(*options, workers=8, seconds=25, marks=marks)

    def alone() -> tuple[str, ...]:
        return asked.pytest(_failed(asked.record)[0], seconds=12)

    return [
        Step("nvidia-smi", 5, gpus),
        Step("doctor", 15, _doctor(asked)),
        Step("precompile", 30, asked.script("warm_cache.py")),
        Step("smoke", 50, smoke, essential=True),
        Step("alone", 12, alone, {"CUDA_LAUNCH_BLOCKING": "1"}),
        Step("profile", 25, asked.benchmark("profile_cuda.py")),
        Step("speed", 30, asked.benchmark("speed_cuda.py", "--cases", "i", *quick)),
        Step("one rank", 12, asked.script("one_rank.py"), essential=True),
    ]


def second(asked: Asked) -> list[Step]:
    """What failed in the first call, what has not run, and the longer measurements."""
    folders = ["tests/kernels/test_gpu.py"] if asked.toy else ["tests"]
    quick = ("--repeats", "2") if asked.toy else ()
    size = (
        {"batch": 4, "frames": 30, "labels": 9, "vocab_size": 40, "joint_dim": 24}
        if asked.toy
        else {}
    )
    once = ("--repeats", "1")
    headline = json.dumps({"device": asked.device, "repeats": 1, **size})
    chunks = ["--cases", "i", "--rivals", "none", "--training-steps", "0", "--name", "chunks"]
    chunks += ["--workspaces-mib", "32", "64", "128", "256", "512"]

    def failures() -> tuple[str, ...]:
        return asked.pytest(*_failed(asked.first), workers=4, seconds=20)

    def others() -> tuple[str, ...]:
        done = ("--without", str(asked.first)) if asked.first.exists() else ()
        return asked.pytest(*done, *folders, workers=8, seconds=60)

    def sanitizer(tool: str) -> Callable[[], tuple[str, ...]]:
        def command() -> tuple[str, ...]:
            if asked.toy:
                raise Skip("no GPU")
            return (sys.executable, str(HERE / "sanitize.py"), "--tool", tool)

        return command

    return [
        Step("failures", 25, failures, essential=True),
        Step("speed", 75, asked.benchmark("speed_cuda.py", "--cases", "i", "ii", *quick)),
        Step("chunks", 28, asked.benchmark("speed_cuda.py", *chunks, *quick)),
        Step("headline", 35, (*PYTHON, "-m", HEADLINE, headline, str(asked.out))),
        *(Step(tool, 30, sanitizer(tool), essential=True) for tool in SANITIZERS),
        Step("first call", 40, asked.benchmark("first_call.py", "--dtypes", "bfloat16", *once)),
        # A thousand tests take what is left.
        Step("tests", None, others, essential=True),
    ]


PARTS = {"first": first, "second": second}


def _failed(record: Path) -> list[str]:
    """Tests that failed, those first whose process did not crash."""
    found = read_record(record)
    failed = [entry for entry in found.values() if entry["outcome"] not in DONE]
    failed.sort(key=lambda entry: "crashed while running" in entry.get("text", ""))
    if not found:
        raise Skip(f"no record of tests at {record}")
    if not failed:
        raise Skip("no test failed")
    return [entry["test"] for entry in failed]
