"""``rnnt-op memory``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from rnnt_op.tools.cli.parameters import (
    POSITIVE,
    LengthsFile,
    OutputFile,
    batch_fields,
    batch_options,
    refuse_with_lengths,
)


@click.command()
@batch_options
@click.option("--lengths", type=LengthsFile(), help="Draw (T, U) from [n, 2] lengths.")
@click.option("--gpu-memory", type=POSITIVE, default=80.0, show_default=True, metavar="GB")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda", show_default=True)
@click.option("--plot", type=OutputFile(".svg", ".png"), help="Draw peaks against batch size.")
@click.option("--tensors", is_flag=True, help="List the tensors of every method.")
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
def memory(
    gpu_memory: float, plot: Path | None, tensors: bool, print_json: bool, **asked: Any
) -> None:
    """Say what each method needs for loss and gradients, from shapes alone."""
    refuse_with_lengths("seconds", "frames", "labels", "frame_ms")
    from rnnt_op.tools.study.estimate import Question, as_json, estimates, method_rows, tensor_rows

    question = Question(**batch_fields(**asked), limit_gb=gpu_memory)
    found = estimates(question)
    if plot is not None:
        from rnnt_op.tools.study.plots import plot_estimates

        plot_estimates(question, found, plot)
    if print_json:
        click.echo(json.dumps(as_json(question, found), indent=2))
        return
    from rnnt_op.tools.cli.tables import show_table

    show_table(
        method_rows(question, found),
        "Loss and gradients; work of rnnt_op as if every node had gradient",
    )
    own = [each for each in found if each.method == "rnnt_op"]
    whose = "each method" if tensors else "rnnt_op"
    show_table(tensor_rows(found if tensors else own), f"What {whose} holds at the peak")
