"""Runs commands one after the other, each within its own time, and keeps what each of them left.

Standard library alone. Every step is a process group of its own: at its limit it gets SIGINT, at
which Python scripts and pytest write what they have, and SIGKILL a few seconds later. What it
prints goes straight into one log file, and ``summary.json`` is rewritten before and after every
step, so nothing is lost if this process is killed, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SKIPPED = 77
"""Exit status of a command that cannot run here; its last line says why."""

GRACE = 4.0  # seconds from SIGINT to SIGKILL
_LEAST = 2.0  # seconds below which a step is not started
_WATCHED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
_HEAD, _TAIL = 2**19, 2**20  # bytes of a step's output that are kept


class Skip(Exception):
    """Why a step is not run."""


@dataclass(frozen=True)
class Step:
    """A command and its time.

    Args:
        name: what the summary calls it.
        limit: seconds; None: all that are left.
        command: what runs, or a function that says so when the step's turn comes, and may raise
            ``Skip``.
        environment: variables that it gets beside this process's.
        essential: whether its failure is one of the whole check.
    """

    name: str
    limit: float | None
    command: Sequence[str] | Callable[[], Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    essential: bool = False


def write_json(path: Path, value: Any) -> None:
    """Writes a file that readers see whole, before and after."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(path)


class Runner:
    """Runs steps in one folder until the time for all of them is spent.

    Args:
        out: receives ``summary.json`` and ``log.txt``.
        seconds: for all steps together, counted from now.
        about: what else the summary says.
        results: what else it says, read anew each time that it is written.
    """

    def __init__(
        self,
        out: Path,
        seconds: float,
        *,
        about: Mapping[str, Any] | None = None,
        results: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.directory = Path.cwd()  # where commands run
        self.environment: dict[str, str] = {}
        self.steps: list[dict[str, Any]] = []
        self.failed = False
        self._out, self._seconds, self._start = out, seconds, time.monotonic()
        self._about, self._results = dict(about or {}), results
        out.mkdir(parents=True, exist_ok=True)
        self._log = out / "log.txt"
        self._log.write_bytes(b"")
        self._write()

    @property
    def left(self) -> float:
        """Seconds that are left for a step, and for its end."""
        return self._seconds - (time.monotonic() - self._start) - GRACE

    def run(self, step: Step) -> str:
        """Runs a step; returns its status: passed, failed, timed out or skipped."""
        limit = self.left if step.limit is None else min(step.limit, self.left)
        entry: dict[str, Any] = {
            "name": step.name,
            "status": "running",
            "seconds": 0.0,
            "limit": round(max(limit, 0.0), 1),
            "detail": "",
        }
        try:
            self.steps.append(entry)
            return self._end(step, *self._outcome(step, limit, entry))
        except BaseException:  # this process is to end
            if entry["status"] == "running":
                entry.update(status="timed out", detail="the check was ended")
            self._write()
            raise

    def note(self, name: str, status: str, detail: str) -> None:
        """Records something that no command did."""
        self.steps.append(
            {"name": name, "status": status, "seconds": 0.0, "limit": 0.0, "detail": detail}
        )
        self.failed |= status == "failed"
        self._write()

    def _outcome(self, step: Step, limit: float, entry: dict[str, Any]) -> tuple[str, str]:
        """Status and detail of a step, which runs if it can."""
        if self.left < _LEAST:
            return "timed out", "no time was left for it"
        try:
            command = step.command() if callable(step.command) else step.command
        except Skip as reason:
            return "skipped", str(reason)
        self._write()
        begin, offset = time.monotonic(), self._print(f"\n== {step.name}\n\n")
        try:
            status, detail = self._run(command, step.environment, limit)
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 1)
            self._shorten(offset)
        return status, ": ".join(filter(None, (detail, self._last_line(offset))))

    def _end(self, step: Step, status: str, detail: str) -> str:
        entry = self.steps[-1]
        entry["status"], entry["detail"] = status, detail[:400]
        self.failed |= step.essential and status in ("failed", "timed out")
        print(
            f"{step.name:14} {status:10} {entry['seconds']:7.1f} s  {entry['detail']}", flush=True
        )
        self._write()
        return status

    def _run(
        self, command: Sequence[str], environment: Mapping[str, str], limit: float
    ) -> tuple[str, str]:
        # No handler runs while there is a step: it could leave one that nobody knows, or a lock.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)

        def as_usual() -> None:
            # A shell's job in the background ignores it, and so would its children.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        try:
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                    env={**os.environ, **self.environment, **environment},
                    start_new_session=True,
                    preexec_fn=as_usual,
                )
            try:
                code = _wait(process, limit)
            except subprocess.TimeoutExpired:
                _stop(process)
                return "timed out", f"cut after {limit:.0f} s"
            except BaseException:  # the step must not outlive this process
                _stop(process)
                raise
        except OSError as error:
            return "failed", str(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _kill(process)  # what it left running would disturb the next
        if code < 0:
            return "failed", f"ended by {signal.Signals(-code).name}"
        return {0: "passed", SKIPPED: "skipped"}.get(code, "failed"), ""

    def _print(self, text: str) -> int:
        with self._log.open("ab") as log:
            log.write(text.encode())
            return log.tell()

    def _shorten(self, offset: int) -> None:
        """Leaves out the middle of what a step printed, where that is much."""
        with self._log.open("rb+") as log:
            size = log.seek(0, os.SEEK_END) - offset
            if size > _HEAD + _TAIL:
                log.seek(-_TAIL, os.SEEK_END)
                tail = log.read()
                log.seek(offset + _HEAD)
                log.write(f"\n[{size - _HEAD - _TAIL} bytes left out]\n".encode() + tail)
                log.truncate()

    def _last_line(self, offset: int) -> str:
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(offset, size - 2**16))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._start, 1)
        written = {
            **self._about,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "budget": self._seconds,
            **self._results(),
            "steps": self.steps,
        }
        write_json(self._out / "summary.json", written)


def _wait(process: subprocess.Popen[bytes], limit: float) -> int:
    """The status of a process that ends within a time; ends this one where it is told to."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise subprocess.TimeoutExpired(process.args, limit)
        found = signal.sigtimedwait(_WATCHED, left)
        if found is not None and found.si_signo != signal.SIGCHLD:
            raise SystemExit(128 + found.si_signo)
    return int(process.returncode)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
