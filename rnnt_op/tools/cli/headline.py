"""``rnnt-op headline``."""

from __future__ import annotations

from pathlib import Path

import click

from rnnt_op.tools.cli.parameters import (
    POSITIVE,
    Count,
    OutputFile,
    device_option,
    frames_and_labels,
    model_options,
    shape_options,
)
from rnnt_op.tools.study.problems import DtypeName


@click.command()
@shape_options
@model_options(vocab_size=1024, joint_dim=640, dtype="bfloat16")
@click.option("--workspace", type=POSITIVE, metavar="MIB", help="rnnt_op's workspace_bytes.")
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
def headline(
    batch: int,
    seconds: float | None,
    frames: int | None,
    labels: int | None,
    frame_ms: float,
    vocab_size: int,
    joint_dim: int,
    dtype: DtypeName,
    workspace: float | None,
    limit: float,
    repeats: int,
    device: str,
    record: Path | None,
) -> int:
    """Measure one batch, 1024 × 40 s by default; status 1 if its peak exceeds the limit."""
    from rnnt_op.tools.cli.read_out import live
    from rnnt_op.tools.cli.tables import show_table
    from rnnt_op.tools.study.headline import Headline, failures, measure, verdict
    from rnnt_op.tools.study.report import write_record

    frames, labels = frames_and_labels(seconds, frames, labels, frame_ms)
    asked = Headline(
        batch=batch,
        frames=frames,
        labels=labels,
        vocab_size=vocab_size,
        joint_dim=joint_dim,
        dtype=dtype,
        device=device,
        limit_gb=limit,
        workspace_bytes=None if workspace is None else round(workspace * 2**20),
        repeats=repeats,
    )
    row = measure(asked, live)
    show_table([{"": name, "value": value} for name, value in row.items()])
    click.echo(f"\n{verdict(asked, row)}")
    if record is not None:
        write_record(record, asked, [row], device=device)
    return 1 if failures(row) else 0
