"""What tests of the speech recognition example share: tiny data, tiny models, short runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

REASON = "needs pip install 'rnnt-op[examples]'"
np = pytest.importorskip("numpy", reason=REASON)
soundfile = pytest.importorskip("soundfile", reason=REASON)
for extra in (
    "espeakng_loader",
    "jiwer",
    "kaldi_native_fbank",
    "matplotlib",
    "psutil",
    "sentencepiece",
    "tensorboard",
    "tyro",
):
    pytest.importorskip(extra, reason=REASON)

sys.path.insert(0, str(ROOT))

TINY = {"dim": 16, "joint_dim": 16, "dilations": (1, 2), "batch_size": 4, "workers": 0}
WORDS = [
    "THE",
    "CAT",
    "SAT",
    "ON",
    "A",
    "MAT",
    "AND",
    "SAW",
    "DOGS",
    "RUN",
    "HOME",
    "WHERE",
    "BIRDS",
    "SING",
    "LOUD",
    "SONGS",
]


SECONDS = 300
"""How long a run may take before it counts as hanging."""


def write_corpus(folder: Path, subset: str, speaker: int, count: int, rate: int = 8_000) -> None:
    """A chapter of one speaker in LibriSpeech's layout: tones and noise of 0.3 to 1.5 s."""
    chapter = folder / subset / str(speaker) / "7"
    chapter.mkdir(parents=True)
    rng = np.random.default_rng(speaker)
    lines = []
    for index in range(count):
        time = np.arange(int(rate * rng.uniform(0.3, 1.5))) / rate
        tone = 0.1 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time)
        audio = tone + 0.01 * rng.standard_normal(len(time))
        name = f"{speaker}-7-{index:04d}"
        soundfile.write(chapter / f"{name}.flac", audio, rate)
        lines.append(f"{name} {' '.join(rng.choice(WORDS, rng.integers(1, 6)))}\n")
    (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))


def start(
    options: dict[str, object],
    processes: int = 0,
    program: tuple[str, str] = ("-m", "examples.asr"),
) -> subprocess.Popen[str]:
    """A run in a process of its own, or by torchrun in that many, of one thread each."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += program
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{flag}", *map(str, values)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(options: dict[str, object], processes: int = 0) -> str:
    """A whole run of that kind. Returns its output."""
    process = start(options, processes)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def measured(out: Path, *names: str) -> list[list[float]]:
    """What metrics.jsonl says of these, a row for each line that has one of them."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [[r.get(name) for name in ("step", *names)] for r in records if {*names} & r.keys()]
