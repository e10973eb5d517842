"""``rnnt-op headline``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rnnt_op.tools.cli.parameters import (
    POSITIVE,
    Count,
    OutputFile,
    batch_fields,
    batch_options,
    device_option,
)


@click.command()
@batch_options
@click.option("--limit", type=POSITIVE, default=6.0, show_default=True, metavar="GB")
@click.option(
    "--repeats",
    type=Count(0),
    default=0,
    show_default=True,
    help="Runs that are timed after the first.",
)
@device_option
@click.option("--json", "record", type=OutputFile(".json"), help="Write the result.")
def headline(limit: float, record: Path | None, **options: Any) -> int:
    """Measure one batch, 1024 × 40 s by default; status 1 if its peak exceeds the limit."""
    from rnnt_op.tools.cli.read_out import live
    from rnnt_op.tools.cli.tables import show_table
    from rnnt_op.tools.study.headline import Headline, failures, measure, verdict
    from rnnt_op.tools.study.report import write_record

    asked = Headline(**batch_fields(**options), limit_gb=limit)
    row = measure(asked, live)
    show_table([{"": name, "value": value} for name, value in row.items()])
    click.echo(f"\n{verdict(asked, row)}")
    if record is not None:
        write_record(record, asked, [row], device=asked.device)
    return 1 if failures(row) else 0
