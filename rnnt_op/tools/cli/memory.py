"""``rnnt-op memory``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rnnt_op.tools.cli.parameters import (
    POSITIVE,
    LengthsFile,
    OutputFile,
    frames_and_labels,
    model_options,
    refuse_with_lengths,
    shape_options,
)
from rnnt_op.tools.study.problems import DtypeName


@click.command()
@shape_options
@model_options(vocab_size=1024, joint_dim=640, dtype="bfloat16")
@click.option("--lengths", type=LengthsFile(), help="Draw (T, U) from [n, 2] lengths.")
@click.option("--workspace", type=POSITIVE, metavar="MIB", help="rnnt_op's workspace_bytes.")
@click.option("--gpu-memory", type=POSITIVE, default=80.0, show_default=True, metavar="GB")
@click.option("--device", type=click.Choice(("cpu", "cuda")), default="cuda", show_default=True)
@click.option("--plot", type=OutputFile(".svg", ".png"), help="Draw peaks against batch size.")
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
def memory(
    batch: int,
    seconds: float | None,
    frames: int | None,
    labels: int | None,
    frame_ms: float,
    vocab_size: int,
    joint_dim: int,
    dtype: DtypeName,
    lengths: Path | None,
    workspace: float | None,
    gpu_memory: float,
    device: str,
    plot: Path | None,
    print_json: bool,
) -> None:
    """Say what each method needs for loss and gradients, from shapes alone."""
    refuse_with_lengths("seconds", "frames", "labels", "frame_ms")
    from rnnt_op.tools.study.estimate import Question, as_json, estimates, method_rows, tensor_rows

    frames, labels = frames_and_labels(seconds, frames, labels, frame_ms)
    question = Question(
        batch=batch,
        frames=frames,
        labels=labels,
        lengths=lengths,
        vocab_size=vocab_size,
        joint_dim=joint_dim,
        dtype=dtype,
        workspace_bytes=None if workspace is None else round(workspace * 2**20),
        limit_gb=gpu_memory,
        device=device,
    )
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
    show_table(tensor_rows(found), "What is held at the peak")
