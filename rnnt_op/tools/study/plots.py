"""Plots of memory and time, measured or estimated: SVG and small PNG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rnnt_op.tools.study.bench import SWEEPS, Study
from rnnt_op.tools.study.cell import MEASURED, MODES, OUT_OF_MEMORY
from rnnt_op.tools.study.estimate import Estimate, Question
from rnnt_op.tools.study.report import GB, Row, describe_machine

# Okabe and Ito's colours, which colour-blind readers tell apart, and markers besides.
_STYLES = {
    "batched": ("#000000", "s"),
    "function-merged": ("#E69F00", "v"),
    "padding-free": ("#56B4E9", "^"),
    "in-place": ("#CC79A7", "D"),
    "batch-split": ("#0072B2", "<"),
    "one at a time": ("#009E73", ">"),
    "rnnt_op": ("#D55E00", "o"),
}
_OTHER_STYLE = ("#7F7F7F", "P")

# In place of a number that was not measured, at the top of its panel.
_OUT_OF_MEMORY_MARK = "x"
_TOO_SLOW_MARK = "$>$"
_FAILED_MARK = "$?$"
_MARKS_SHARE = 0.3  # of a panel's height

_X_LABELS = {"batch size": "batch size", "audio length": "audio length, s"}

_SAVED: dict[Any, str] = {"svg.hashsalt": "rnnt_op", "svg.fonttype": "none"}  # same bytes each time


def plot_study(study: Study, rows: Sequence[Row], out: Path) -> list[Path]:
    """Writes memory and time against both sweeps to a folder; returns the files."""
    return [
        *_plot_quantity(study, rows, "peak GB", "peak memory, GB", out / "memory"),
        *_plot_quantity(study, rows, "seconds", "time, s", out / "time"),
    ]


def plot_estimates(question: Question, found: Sequence[Estimate], path: Path) -> None:
    """Writes the peak against the batch size, a line a method, and the limit."""
    largest = max(question.batch, *(each.largest_batch for each in found))
    batches = [2**power for power in range(min(largest.bit_length() + 1, 15))]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for each in found:
        peaks = [peak / GB for peak in question.peaks(each.method, batches)]
        _draw_line(axes, each.method, batches, peaks)
    _set_log_axes(axes, batches[::2])
    axes.set_xlabel("batch size")
    axes.set_ylabel("peak memory of loss and gradients, GB")
    lengths = (
        f"T={question.frames} U={question.labels}"
        if question.lengths is None
        else f"lengths of {question.lengths.name}"
    )
    axes.set_title(
        f"{lengths}, V={question.vocab_size} H={question.joint_dim} {question.dtype}", fontsize=10
    )
    limit = _draw_limit(axes, question.limit_gb)
    figure.legend(handles=[*axes.lines[: len(found)], limit], loc="outside right upper")
    _save(figure, path)


def _plot_quantity(
    study: Study, rows: Sequence[Row], quantity: str, label: str, path: Path
) -> list[Path]:
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey=True, squeeze=False)
    for line, mode in zip(panels, MODES, strict=True):
        for axes, sweep in zip(line, SWEEPS, strict=True):
            shown = [row for row in rows if (row["mode"], row["sweep"]) == (mode, sweep)]
            for method in study.methods:
                points = [row for row in shown if row["method"] == method]
                # Not a number where there is none: the line has a gap.
                values = [row[quantity] if row["outcome"] == MEASURED else nan for row in points]
                _draw_line(axes, method, [row["x"] for row in points], values)
            _set_log_axes(axes, sorted({row["x"] for row in shown}))
            axes.set_title(mode, fontsize=10)
            if mode == MODES[-1]:
                axes.set_xlabel(_X_LABELS[sweep])
            if sweep == SWEEPS[0]:
                axes.set_ylabel(label)
    handles: list[Artist] = list(panels[0][0].lines)
    if quantity == "peak GB":
        handles += [_draw_limit(axes, study.memory_limit_gb) for axes in panels.flat][:1]
    handles += _mark_what_was_not_measured(study, rows, panels.flat)
    figure.legend(handles=handles, loc="outside right upper")
    model = f"{study.dtype}, V={study.vocab_size} H={study.joint_dim}"
    figure.suptitle(f"{model}\n{describe_machine(study.device)}", fontsize=10)
    files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in files:
        _save(figure, file)
    return files


def _draw_line(axes: Axes, method: str, x: Sequence[float], y: Sequence[float]) -> None:
    color, marker = _STYLES.get(method, _OTHER_STYLE)
    is_ours = method == "rnnt_op"
    axes.plot(
        x,
        y,
        label=method,
        color=color,
        marker=marker,
        markersize=5,
        linewidth=2.5 if is_ours else 1.5,
        zorder=3 if is_ours else 2,
    )


def _set_log_axes(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    as_number = FuncFormatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_major_formatter(as_number)
    axes.yaxis.set_major_formatter(as_number)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_limit(axes: Axes, limit_gb: float) -> Line2D:
    return axes.axhline(
        limit_gb, color="#555555", linestyle="--", linewidth=1, label=f"limit, {limit_gb:.3g} GB"
    )


def _mark_what_was_not_measured(
    study: Study, rows: Sequence[Row], panels: Iterable[Axes]
) -> list[Line2D]:
    """Marks the outcomes in the panels, a line of marks a method; returns the marks' legend."""
    missing = [row for row in rows if row["outcome"] != MEASURED]
    if not missing:
        return []
    panels = list(panels)
    bottom, top = panels[0].get_ylim()
    panels[0].set_ylim(bottom, bottom * (top / bottom) ** (1 / (1 - _MARKS_SHARE)))
    for axes in panels:
        corner = (0, 1 - _MARKS_SHARE)
        axes.add_patch(
            Rectangle(corner, 1, _MARKS_SHARE, transform=axes.transAxes, facecolor="#F2F2F2")
        )
    step = _MARKS_SHARE / (len(study.methods) + 1)
    kinds = [(mode, sweep) for mode in MODES for sweep in SWEEPS]
    for row in missing:
        axes = panels[kinds.index((row["mode"], row["sweep"]))]
        axes.plot(
            row["x"],
            1 - step * (study.methods.index(row["method"]) + 1),
            transform=axes.get_xaxis_transform(),
            color=_STYLES.get(row["method"], _OTHER_STYLE)[0],
            marker=_mark(row["outcome"]),
            markersize=6,
        )
    return [
        Line2D([], [], linestyle="", color="#555555", marker=_mark(outcome), label=outcome)
        for outcome in sorted({row["outcome"] for row in missing})
    ]


def _mark(outcome: str) -> str:
    if outcome == OUT_OF_MEMORY:
        return _OUT_OF_MEMORY_MARK
    return _TOO_SLOW_MARK if outcome.startswith(">") else _FAILED_MARK


def _save(figure: Figure, path: Path) -> None:
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context(_SAVED):
        figure.savefig(path, dpi=100, facecolor="white", metadata=metadata)
