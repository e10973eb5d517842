"""A plugin for short stays on a GPU: some of the tests, and a record of each as it ends.

    python -m pytest -p gpu_subset -m gpu --subset 150 --record record.jsonl
    python -m pytest -p gpu_subset -m gpu --without record.jsonl --record others.jsonl

This folder must be on PYTHONPATH. A record has a line of JSON a test, so it is complete up to the
moment at which pytest is stopped, however.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from records import DONE, read_record

LONGEST = 6000  # characters of a failure's text that are kept


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("short stays on a GPU")
    group.addoption("--subset", type=int, help="run this many tests: one of each function first")
    group.addoption("--without", type=Path, help="leave out what a record says passed or skipped")
    group.addoption("--record", type=Path, help="append a line of JSON a test to this file")


def chosen(tests: Sequence[str], most: int) -> set[str]:
    """Up to ``most`` tests, the same ones on every machine.

    A case of each function comes before a second one of any.
    """
    order = sorted(tests, key=lambda test: hashlib.sha256(test.encode()).digest())
    times: dict[str, int] = {}
    ranks = {}
    for place, test in enumerate(order):
        function = test.partition("[")[0]
        times[function] = times.get(function, 0) + 1
        ranks[test] = (times[function], place)
    return set(sorted(tests, key=ranks.__getitem__)[:most])


@pytest.hookimpl(trylast=True)  # after marks have been chosen by
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {item.nodeid for item in items}
    if config.option.without is not None:
        record = read_record(config.option.without)
        wanted -= {name for name, entry in record.items() if entry["outcome"] in DONE}
    if config.option.subset is not None:
        wanted = chosen(sorted(wanted), config.option.subset)
    left_out = [item for item in items if item.nodeid not in wanted]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    # The longest last: they are what a limit may cut.
    items[:] = sorted(
        (item for item in items if item.nodeid in wanted),
        key=lambda item: item.get_closest_marker("slow") is not None,
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # All that were asked for have run before.
    nothing = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and session.config.option.without is not None:
        session.exitstatus = pytest.ExitCode.OK


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(LostGpu())
    elif config.option.record is not None:
        config.pluginmanager.register(Record(config.option.record))


class Record:
    """Writes what is known of each test once it is known; not in xdist's workers."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        if report.nodeid in self._failed:  # the end of its worker tells less than the first report
            return
        if report.failed:
            self._failed.add(report.nodeid)
        entry: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
        }
        if not report.passed:
            entry["text"] = report.longreprtext[-LONGEST:]
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            entry = {"test": report.nodeid, "outcome": "failed", "seconds": 0.0}
            with self._path.open("a") as file:
                file.write(json.dumps({**entry, "text": report.longreprtext[-LONGEST:]}) + "\n")


class LostGpu:
    """Ends a worker of xdist whose GPU context an error has broken.

    Every later test of that process would fail, too. xdist reports the crash as that of the test
    that failed, and starts another worker.
    """

    def __init__(self) -> None:
        self._failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._failed |= report.failed

    @pytest.hookimpl(trylast=True)  # the report has been sent
    def pytest_runtest_logfinish(self) -> None:
        if self._failed and gpu_is_lost():
            os._exit(1)
        self._failed = False


def gpu_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
