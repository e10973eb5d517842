"""Tables on the terminal, and complete and plain where there is none."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rnnt_op.tools.study.report import Row, cell

# No terminal cuts lines where there is none.
_NO_TERMINAL_COLUMNS = 10_000


def show_table(rows: Sequence[Row], title: str | None = None) -> None:
    """Prints a table whose columns are the keys of the first row, numbers at the right."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_NO_TERMINAL_COLUMNS, color_system=None)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in rows[0]:
        are_numbers = all(isinstance(row[column], int | float | None) for row in rows)
        table.add_column(Text(column), justify="right" if are_numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row[column])) for column in rows[0]))
    with console.capture() as captured:
        if title is not None:
            console.print(f"\n{title}\n", style="bold", markup=False, highlight=False)
        console.print(table)
    # Cells are padded, the last one of a line too.
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
