"""The repository's folders."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
