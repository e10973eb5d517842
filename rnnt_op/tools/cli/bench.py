"""``rnnt-op bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rnnt_op.tools.cli.parameters import (
    POSITIVE,
    Count,
    LengthsFile,
    comma_list,
    device_option,
    model_options,
    refusal,
    refuse_with_lengths,
)

# What the system and a child process itself may need.
_AVAILABLE_SHARE = 0.8


@click.command()
@click.option("--methods", type=comma_list(click.STRING), help="[default: all that are here]")
@click.option(
    "--batches",
    type=comma_list(Count()),
    default=(1, 2, 4, 8),
    help="B, varied.  [default: 1,2,4,8]",
)
@click.option(
    "--durations",
    type=comma_list(POSITIVE),
    default=(5, 10, 20),
    help="Of audio, s, varied.  [default: 5,10,20]",
)
@click.option(
    "--seconds", type=POSITIVE, default=5.0, show_default=True, help="Of audio, where B varies."
)
@click.option("--batch", type=Count(), default=1, show_default=True, help="B, where audio varies.")
@click.option("--frame-ms", type=POSITIVE, default=40.0, show_default=True)
@click.option("--labels-per-second", type=POSITIVE, default=5.0, show_default=True)
@click.option("--ragged", is_flag=True, help="Lengths from the upper half of the range.")
@click.option("--lengths", type=LengthsFile(), help="Draw (T, U) from [n, 2] lengths.")
@model_options(vocab_size=1024, joint_dim=256, dtype="float32")
@device_option
@click.option(
    "--memory-limit",
    type=POSITIVE,
    metavar="GB",
    help="Of one process.  [default: what is available]",
)
@click.option(
    "--time-limit", type=POSITIVE, default=30.0, show_default=True, metavar="S", help="Of one run."
)
@click.option("--repeats", type=Count(), default=3, show_default=True, help="Timed runs.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, writable=True, path_type=Path),
    default="study",
    show_default=True,
)
def bench(
    methods: tuple[str, ...] | None,
    device: str,
    memory_limit: float | None,
    time_limit: float,
    out: Path,
    **options: Any,
) -> int:
    """Measure memory and time of every method against batch size and audio length."""
    from rnnt_op.tools.cli.read_out import bar
    from rnnt_op.tools.cli.tables import show_table
    from rnnt_op.tools.study.bench import Study, describe, points, run, tables, write, wrong_methods
    from rnnt_op.tools.study.cell import available_methods
    from rnnt_op.tools.study.measure import available_bytes
    from rnnt_op.tools.study.plots import plot_study
    from rnnt_op.tools.study.report import GB

    refuse_with_lengths("seconds", "labels_per_second", "ragged")
    known = available_methods()
    for name in methods or ():
        if name not in known:
            raise refusal(f"--methods: no '{name}' here; there are {', '.join(known)}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(f"--out: '{out}' cannot be made: {error.strerror}.") from error
    if memory_limit is None:
        memory_limit = _AVAILABLE_SHARE * available_bytes(device) / GB
    study = Study(
        methods=methods or tuple(known),
        device=device,
        memory_limit_gb=memory_limit,
        time_limit_s=time_limit,
        **options,
    )
    wrong = wrong_methods(study)
    cells = len(points(study)) * len(study.methods)
    rows = [row for cell in bar(run(study, wrong), cells, "measuring") for row in cell]
    click.echo(describe(study))
    for name, reason in wrong.items():
        click.echo(f"{name} is not measured: {reason}")
    for title, table in tables(rows).items():
        show_table(table, title)
    written = [*write(study, rows, wrong, out), *plot_study(study, rows, out)]
    click.echo(f"\nwrote {', '.join(map(str, written))}")
    return 1 if wrong else 0
