"""Draws memory.svg, selection.svg and trajectory.svg from the committed results of the benchmarks.

Run from anywhere: ``python docs/scripts/make_result_figures.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from figures import INK, KEPT, MUTED, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent.parent
RESULTS = HERE.parent / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """A benchmark's parameters and rows, and a line on where they were measured."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    machine, versions = record["machine"], record["versions"]
    record["where"] = (
        f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}, "
        f"{record['date'][:10]}, benchmarks/results/{name}.json"
    )
    return record


def draw_memory() -> Figure:
    record = read("memory-cpu")
    parameters, rows = record["parameters"], record["results"]
    figure, axes = axes_below(
        "Peak memory above inputs and gradients",
        "float32, T={frames}, U={labels}, V={vocab_size}, H={joint_dim}".format(**parameters),
        record["where"],
    )
    whole = [row for row in rows if row["T"] == parameters["frames"]]
    ours = [row for row in whole if row["method"] == "rnnt_op"]
    torch_measured = [
        row for row in whole if row["method"] != "rnnt_op" and row["measured MiB"] is not None
    ]
    batches = [row["B"] for row in ours]
    axes.plot(batches, [row["batched_bytes MiB"] for row in ours], "--", color=MUTED)
    axes.plot(
        [row["B"] for row in torch_measured],
        [row["measured MiB"] for row in torch_measured],
        "s",
        color=INK,
    )
    axes.plot(batches, [row["measured MiB"] for row in ours], "o-", color=KEPT)
    last = ours[-1]
    say(axes, last["B"], last["batched_bytes MiB"], "plain torch,\ncomputed", MUTED)
    say(axes, last["B"], last["measured MiB"], "rnnt_op", KEPT)
    for row in torch_measured:
        say(axes, row["B"], row["measured MiB"], "measured", INK, above=True)
    for row in ours:
        say(axes, row["B"], row["measured MiB"], f"{row['measured MiB']} MiB", KEPT, above=True)
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="MiB", ylim=(10, 100_000))
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlim(batches[0] / 1.3, batches[-1] * 1.9)
    axes.minorticks_off()
    return figure


def draw_selection() -> Figure:
    record = read("selection-cpu")
    figure, axes = axes_below(
        "Nodes that the backward pass takes",
        "T={frames}, U={labels}, V={vocab_size}; by posterior".format(**record["parameters"]),
        record["where"],
    )
    rows = [row for row in record["results"] if float(row["tolerance"]) > 0]
    colors = matplotlib.colormaps["Oranges"]
    posteriors = list(dict.fromkeys(row["posterior"] for row in rows))
    for number, posterior in enumerate(posteriors):
        mine = [row for row in rows if row["posterior"] == posterior]
        color = colors(0.35 + 0.6 * number / (len(posteriors) - 1))
        tolerances = [float(row["tolerance"]) for row in mine]
        axes.plot(tolerances, [row["nodes kept %"] for row in mine], "o-", color=color)
        say(axes, tolerances[-1], mine[-1]["nodes kept %"], posterior, INK)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="gradient_tolerance: share of the gradient's L1 norm that may be skipped",
        ylabel="% of nodes",
        xlim=(2e-3, 1e-12),
    )
    axes.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.set_xticks([1e-3, 1e-6, 1e-9], ["10⁻³", "10⁻⁶", "10⁻⁹, float32's default"])
    axes.minorticks_off()
    return figure


def draw_trajectory() -> Figure:
    record = read("trajectory-float32-cpu")
    rows = [row for row in record["results"] if row["steps"] is not None]
    figure, axes = axes_below(
        "What a model that learns leaves to compute",
        "spoken digits, V={vocab_size}, H={joint_dim}; ".format(**record["parameters"])
        + ", then ".join(dict.fromkeys(f"T={row['T']}" for row in rows))
        + "; dashed: bfloat16's tolerance",
        record["where"],
    )
    axes.set_position((0.09, 0.2, 0.32, 0.64))
    times = figure.add_axes((0.59, 0.2, 0.27, 0.64))
    times.spines[["top", "right"]].set_visible(False)
    for dtype, style in (("float32", "o-"), ("bfloat16", "o--")):
        for source in dict.fromkeys(row["states"] for row in rows):
            mine = [r for r in rows if (r["states"], r["tolerance of"]) == (source, dtype)]
            steps = [row["steps"] for row in mine]
            axes.plot(steps, [row["scored %"] for row in mine], style, color=INK)
            axes.plot(steps, [row["kept %"] for row in mine], style, color=KEPT)
            times.plot(steps, [row["GEMMs"] for row in mine], style, color=KEPT)
            if dtype == "float32":
                times.plot(steps, [r["GEMMs, all scored"] for r in mine], style, color=MUTED)
                last = mine[-1]
    say(axes, last["steps"], last["scored %"], "scored", INK)
    say(axes, last["steps"], last["kept %"], "kept", KEPT)
    say(times, last["steps"], last["GEMMs"], "loss and\ngradients", KEPT)
    say(times, last["steps"], last["GEMMs, all scored"], "all scored", MUTED)
    axes.set(xlabel="steps", ylabel="% of nodes", ylim=(0, 105))
    times.set(xlabel="steps", ylabel="time in forward GEMMs", ylim=(0, None))
    return figure


def axes_below(title: str, subtitle: str, where: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.6, 4), facecolor="white")
    axes = figure.add_axes((0.1, 0.2, 0.87, 0.66))
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.1, 0.945, title, weight="bold", size=11, color=INK)
    figure.text(0.1, 0.895, subtitle, color=MUTED)
    figure.text(0.1, 0.02, where, color=MUTED, size=7.5)
    return figure, axes


def say(axes: Axes, x: float, y: float, text: str, color: str, above: bool = False) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(0, 7) if above else (8, 0),
        textcoords="offset points",
        ha="center" if above else "left",
        va="bottom" if above else "center",
        color=color,
    )


def main(out: Path = HERE) -> None:
    """Writes the figures to a folder."""
    write(draw_memory, out / "memory.svg")
    write(draw_selection, out / "selection.svg")
    write(draw_trajectory, out / "trajectory.svg")


if __name__ == "__main__":
    tyro.cli(main)
