"""What the terminal shows while something is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import track
from rich.progress_bar import ProgressBar
from rich.table import Table

from rnnt_op.tools.study.headline import Progress

T = TypeVar("T")

# Not where the results go.
_console = Console(stderr=True)


@contextmanager
def live(progress: Progress) -> Iterator[None]:
    """Shows a batch on its way: nodes, memory and time."""
    with Live(get_renderable=lambda: _read_out(progress), console=_console, refresh_per_second=4):
        yield
    if not _console.is_terminal:
        _console.line()  # rich leaves its one and only frame without


def _read_out(progress: Progress) -> Table:
    counts = progress.counts
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row("nodes scored", f"{counts.scored:,} of {progress.nodes:,}")
    table.add_row("", ProgressBar(total=progress.nodes, completed=counts.scored, width=40))
    table.add_row("nodes kept", f"{100 * counts.kept_fraction:.1f} %")
    table.add_row("memory", f"{progress.held_gb:.2f} GB now, {progress.peak_gb:.2f} GB at most")
    table.add_row("elapsed", f"{progress.seconds:.0f} s")
    return table


def bar(items: Iterable[T], total: int, description: str) -> Iterable[T]:
    """The items, with a progress bar on a terminal."""
    return track(
        items, description, total=total, console=_console, disable=not _console.is_terminal
    )
