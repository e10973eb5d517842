"""Text on terminals that lack some characters: what stands for them, instead of an error."""

from __future__ import annotations

import codecs
import sys
from io import TextIOWrapper

_PLAIN = {"·": "*", "−": "-", "–": "-", "×": "x", "≤": "<=", "≥": ">=", "κ": "k", "Σ": "sum"}
_NAME = "rnnt_op.plain"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in missing), error.end


def print_anything() -> None:
    """Makes standard output and error take every text."""
    codecs.register_error(_NAME, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors=_NAME)
