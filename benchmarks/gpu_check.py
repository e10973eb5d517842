"""Everything that needs a GPU, from a fresh checkout, in two calls that fit into ten minutes:

    benchmarks/gpu_check.sh OUT first     within 200 s: does it run at all, and how fast?
    benchmarks/gpu_check.sh OUT second    within 400 s: everything else, failures of the first ahead
    benchmarks/gpu_check.sh OUT           both, in OUT/first and OUT/second

Each call fills its folder with at most 8 files: summary.json and log.txt of all steps, tests.jsonl
(a line a test), doctor.txt, and the benchmarks' JSON. All are written as results come in, so what
was measured before a step hung, crashed or was cut is there. The second call looks for the first
one's folder beside its own. The status is 1 if tests, sanitizers or the step on one rank failed, 2
if there is no GPU; benchmarks that fail or miss a bar are in the summary.

  RNNT_OP_CHECK_DEVICE=cpu    try this script without a GPU: GPU tests skip, toy sizes
  RNNT_OP_CHECK_INSTALL=link  do not install the package; put a tree of links on PYTHONPATH
  RNNT_OP_CHECK_SECONDS       time for a call; default 200 for the first, 400 for the second
  RNNT_OP_CHECK_FIRST         folder that the first call filled; default first, beside OUT
  RNNT_OP_CACHE_DIR           cache of kernels; default a folder that both calls find
  RNNT_OP_LENGTHS             LibriSpeech lengths, an .npy file of [n, 2]
  WHEELS                      folder of wheels from which missing Python packages are installed
  PYTHON                      interpreter; default python3
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_steps
from check_setup import REPO, set_up
from records import read_record
from step_runner import Runner

BUDGETS = {"first": 200.0, "second": 400.0}


def check(part: str, out: Path, device: str, first: Path) -> int:
    """One call: sets up and runs the steps of a part.

    Args:
        out: the folder that it fills.
        first: the folder that the first call has filled, or nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    record = out / "tests.jsonl"
    record.write_text("")

    def results() -> dict[str, Any]:
        found = read_record(record)
        counted = Counter(entry["outcome"] for entry in found.values())
        failed = [name for name, entry in found.items() if entry["outcome"] == "failed"]
        return {"tests": dict(counted), "failed tests": failed}

    seconds = float(os.environ.get("RNNT_OP_CHECK_SECONDS") or BUDGETS[part])
    about = {"part": part, "device": device, "commit": _commit()}
    runner = Runner(out, seconds, about=about, results=results)
    runner.environment |= {
        "PATH": os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin")),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TQDM_DISABLE": "1",
        "RNNT_OP_CACHE_DIR": os.environ.get("RNNT_OP_CACHE_DIR") or _shared_cache(),
    }
    os.environ["PATH"] = runner.environment["PATH"]  # where programs are looked for
    lengths = REPO.parent / "shared/data/librispeech_lengths.npy"
    if not os.environ.get("RNNT_OP_LENGTHS") and lengths.exists():
        runner.environment["RNNT_OP_LENGTHS"] = str(lengths)
    with tempfile.TemporaryDirectory() as work:
        set_up(runner, Path(work))
        asked = check_steps.Asked(out, device, record, first.resolve() / "tests.jsonl")
        # Who gives more time gives it to every step.
        scale = max(1.0, seconds / BUDGETS[part])
        steps = [
            step if step.limit is None else replace(step, limit=step.limit * scale)
            for step in check_steps.PARTS[part](asked)
        ]
        # Where pytest finds the plugin that chooses and records tests.
        paths = runner.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        plugins = str(REPO / "benchmarks")
        runner.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (paths, plugins)))
        for step in steps:
            runner.run(step)
    return int(runner.failed)


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = (git, "-C", str(REPO), "rev-parse", "HEAD")
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _shared_cache() -> str:
    return str(Path(tempfile.gettempdir()) / f"rnnt_op_gpu_check_{os.getuid()}")


def _has_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run((sys.executable, "-c", code)).returncode == 0


def main(arguments: Sequence[str]) -> int:
    if not 1 <= len(arguments) <= 2 or (len(arguments) == 2 and arguments[1] not in BUDGETS):
        print(__doc__, file=sys.stderr)
        return 2
    device = os.environ.get("RNNT_OP_CHECK_DEVICE") or "cuda"
    if device != "cpu" and not _has_gpu():
        print(
            "torch sees no GPU here; RNNT_OP_CHECK_DEVICE=cpu tries this script without one",
            file=sys.stderr,
        )
        return 2
    # Steps are ended, and the summary is written, where something else ends this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out = Path(arguments[0])
    if len(arguments) == 1:
        found = [check(part, out / part, device, out / "first") for part in BUDGETS]
        return max(found)
    first = os.environ.get("RNNT_OP_CHECK_FIRST")
    return check(
        arguments[1], out, device, Path(first) if first else out.resolve().parent / "first"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
