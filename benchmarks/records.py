"""Records of tests, which ``gpu_subset`` writes: a line of JSON a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DONE = ("passed", "skipped")
"""Outcomes of tests that need not run again."""


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each test by its name: its failure if it ever failed.

    A line that was cut short is none.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        known = found.get(entry["test"])
        if known is None or known["outcome"] in DONE:
            found[entry["test"]] = entry
    return found
