"""The ``rnnt-op`` command: what is here, what fits, and how the methods compare."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rnnt_op.tools.cli.encoding import print_anything

_EXTRAS = ("click", "matplotlib", "numpy", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 2 if it was asked wrongly."""
    print_anything()
    try:
        from rnnt_op.tools.cli.commands import run

        return run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(
            f"rnnt-op: {error.name} is not installed: pip install 'rnnt-op[tools]'", file=sys.stderr
        )
        return 2
