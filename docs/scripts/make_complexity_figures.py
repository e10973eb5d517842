"""Draws complexity-methods.svg and complexity-batch.svg: the planner's peaks.

Measured points come from the committed results of ``benchmarks/memory_model.py``, predictions from
:mod:`rnnt_op.memory`. Run from anywhere: ``python docs/scripts/make_complexity_figures.py``.
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

from rnnt_op.memory import METHODS, Workload, peak_bytes
from rnnt_op.tools.study.problems import dtype_of

HERE = Path(__file__).parent.parent
RESULTS = HERE.parent / "benchmarks" / "results" / "memory-model-cpu.json"
GIB = 2**30

BATCHES = [2**k for k in range(11)]
SIZES: dict[str, Any] = {"vocab_size": 1024, "joint_dim": 640, "dtype": dtype_of("bfloat16")}
FRAMES, LABELS = 1000, 200

COLORS = dict(
    zip(METHODS, [*(matplotlib.colormaps["viridis"](k / 6) for k in range(6)), KEPT], strict=True)
)


def draw_methods() -> Figure:
    """Every measured peak as a multiple of its prediction."""
    record = json.loads(RESULTS.read_text())
    machine, versions, bar = record["machine"], record["versions"], record["parameters"]["bar"]
    figure, axes = _axes("Measured peaks of loss and gradients")
    axes.axhspan(1 - bar, 1 + bar, color="#f2f2f2")
    axes.axhline(1, color=MUTED, linewidth=0.8)
    for name in METHODS:
        mine = [row for row in record["results"] if row["method"] == name]
        axes.plot(
            [row["predicted MiB"] for row in mine],
            [row["measured / predicted"] for row in mine],
            "o",
            color=COLORS[name],
            markersize=5,
            label=name,
        )
    axes.set(xscale="log", xlabel="predicted, MiB", ylabel="measured / predicted")
    axes.set(ylim=(1 - 2 * bar, 1 + 3.5 * bar))
    axes.minorticks_off()
    axes.set_xticks([100, 200, 500, 1000, 2000], ["100", "200", "500", "1000", "2000"])
    axes.legend(frameon=False, loc="upper center", ncols=3)
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {versions['torch']}"
    _note(figure, f"{where}; a point is a process; grey: ±{bar:.0%}")
    return figure


def draw_batches() -> Figure:
    """What each method needs as the batch grows."""
    figure, axes = _axes("Predicted peak over the batch size")
    for name in METHODS:
        peaks = [
            peak_bytes(name, Workload.uniform(batch, FRAMES, LABELS, **SIZES), device="cuda") / GIB
            for batch in BATCHES
        ]
        # Without padding to remove, these two are one curve.
        style = "--" if name == "padding-free" else "-"
        axes.plot(BATCHES, peaks, style, color=COLORS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size B", ylabel="GiB")
    axes.minorticks_off()
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.legend(frameon=False, loc="upper left")
    shape = f"T={FRAMES}, U={LABELS}, V={SIZES['vocab_size']}, H={SIZES['joint_dim']}, bfloat16"
    _note(figure, f"{shape}, uniform lengths; rnnt_op with a GPU's default workspace")
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.4), facecolor="white")
    axes = figure.add_axes((0.11, 0.19, 0.86, 0.7))
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.11, 0.94, title, weight="bold", size=11, color=INK)
    return figure, axes


def _note(figure: Figure, text: str) -> None:
    figure.text(0.11, 0.02, text, color=MUTED, size=7.5)


def main(out: Path = HERE) -> None:
    """Writes the figures to a folder."""
    write(draw_methods, out / "complexity-methods.svg")
    write(draw_batches, out / "complexity-batch.svg")


if __name__ == "__main__":
    tyro.cli(main)
