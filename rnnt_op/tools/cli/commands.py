"""The group of commands, and what becomes of their errors: one line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import rnnt_op
from rnnt_op.jit import JitError
from rnnt_op.tools.cli.bench import bench
from rnnt_op.tools.cli.doctor import doctor
from rnnt_op.tools.cli.headline import headline
from rnnt_op.tools.cli.memory import memory
from rnnt_op.tools.cli.precompile import precompile


# Without a command: an error in a line, not the whole help.
@click.group(no_args_is_help=False)
@click.version_option(rnnt_op.__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Transducer (RNN-T) loss without the (B, T, U, V) tensor."""


for _command in (doctor, precompile, memory, bench, headline):
    commands.add_command(_command)


def run(arguments: Sequence[str] | None) -> int:
    """Runs the command that the arguments ask for; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        # Commands return their status, None for 0.
        return commands.main(arguments, prog_name="rnnt-op", standalone_mode=False) or 0
    except click.UsageError as error:
        # An option that lacks its value is refused without a context.
        named = [name for name in arguments[:1] if name in commands.commands]
        return _say(" ".join(["rnnt-op", *named]), error.format_message(), 2)
    except click.Abort:
        return _say("rnnt-op", "interrupted", 130)
    except OSError as error:
        return _say("rnnt-op", f"{error.filename}: {error.strerror}", 2)
    except JitError as error:
        return _say("rnnt-op", str(error), 1)


def _say(command: str, message: str, status: int) -> int:
    print(f"{command}: {message}", file=sys.stderr)
    return status
