"""Draws method.svg: how the loss and its gradients are computed, a chunk of node rows at a time.

The heat map and the selected nodes come from a real computation with the backend's own primitives.
Run from anywhere: ``python docs/scripts/make_method_figure.py``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
import tyro
from figures import HEAT, INK, KEPT, MUTED, PALE, Lattice, compute_lattice, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FRAMES, LABELS, VOCAB_SIZE = 32, 15, 24
HIGHLIGHT = "#f2c6a0"


def diagonal_lattice(gradient_tolerance: float) -> Lattice:
    """The lattice of random logits that favour a path near the diagonal."""
    torch.manual_seed(0)
    states = LABELS + 1
    targets = torch.randint(1, VOCAB_SIZE, (LABELS,))
    t, u = torch.arange(FRAMES).unsqueeze(1), torch.arange(states)
    behind = t * LABELS / (FRAMES - 1) - u  # labels that are due, positive below the diagonal
    logits = torch.randn(FRAMES, states, VOCAB_SIZE, dtype=torch.float64)
    logits[:, :, 0] += 3.0 - 1.2 * behind
    emitting = torch.arange(LABELS)
    logits[:, emitting, targets] += (3.0 + 1.2 * behind)[:, :LABELS]
    return compute_lattice(logits, targets, gradient_tolerance)


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=0.9)
    )


def draw_score(axes: Axes) -> None:
    """Rows of nodes on the left; one chunk of them passes through logits to arc scores."""
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    chunks, current = 8, 3
    for k in range(chunks):
        box(axes, 0.3, 8.6 - k, 1.3, 1.0, HIGHLIGHT if k == current else PALE)
        box(axes, 8.6, 8.6 - k, 0.6, 1.0, HIGHLIGHT if k <= current else "white")
    y = 8.6 - current
    box(axes, 3.2, y, 3.6, 1.0, HIGHLIGHT)
    arrow(axes, (1.7, y + 0.5), (3.1, y + 0.5))
    arrow(axes, (6.9, y + 0.5), (8.5, y + 0.5))
    axes.text(5.0, y + 0.5, "logits", ha="center", va="center")
    axes.text(5.0, y + 1.25, "hidden · Wᵀ + bias", ha="center", va="bottom")
    axes.text(
        5.0,
        y - 0.3,
        "[chunk, V]\noverwritten by\nthe next chunk",
        ha="center",
        va="top",
        color=MUTED,
    )
    axes.text(0.95, 1.25, "node rows\n(t, u)", ha="center", va="top")
    axes.text(8.9, 1.25, "arc scores\n[nodes, 2]", ha="center", va="top")


def draw_lattice(axes: Axes, utterance: Lattice) -> None:
    image = axes.imshow(
        utterance.occupancy, origin="lower", aspect="auto", cmap=HEAT, interpolation="nearest"
    )
    label_axes(axes)
    colorbar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    colorbar.ax.tick_params(length=0)
    colorbar.outline.set_visible(False)


def draw_selected(axes: Axes, utterance: Lattice) -> None:
    axes.imshow(
        utterance.kept,
        origin="lower",
        aspect="auto",
        cmap=matplotlib.colors.ListedColormap([PALE, KEPT]),
        interpolation="nearest",
    )
    label_axes(axes)


def label_axes(axes: Axes) -> None:
    axes.set(xlabel="encoder frame t", ylabel="labels emitted u")
    axes.set_xticks([0, FRAMES - 1], ["0", "T−1"])
    axes.set_yticks([0, LABELS], ["0", "U"])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw(utterance: Lattice, gradient_tolerance: float) -> Figure:
    figure = Figure(figsize=(11, 4.2), facecolor="white")
    score, lattice, selected = figure.subplots(
        1,
        3,
        gridspec_kw={
            "width_ratios": [1.0, 1.1, 1.0],
            "left": 0.015,
            "right": 0.98,
            "top": 0.79,
            "bottom": 0.27,
            "wspace": 0.21,
        },
    )
    draw_score(score)
    draw_lattice(lattice, utterance)
    draw_selected(selected, utterance)
    share = utterance.kept.mean()
    titles = {
        score: (
            "1  Score",
            "logits exist a chunk at a time;\nonly the scores of blank and next label stay",
        ),
        lattice: ("2  Lattice", "forward-backward in float64:\nposterior occupancy γ of each node"),
        selected: (
            "3  Backward",
            f"logits and gradients of {share:.0%} of the nodes:\n"
            f"the others carry ≤ {100 * gradient_tolerance:g}% of the gradient",
        ),
    }
    for axes, (title, subtitle) in titles.items():
        left = axes.get_position().x0
        figure.text(left, 0.95, title, weight="bold", size=12, va="center")
        figure.text(left, 0.905, subtitle, va="top", color=INK)
    figure.text(
        0.5,
        0.03,
        "workspace: a chunk of logits and the lattices of a few utterances, "
        "whatever batch size, length and vocabulary",
        ha="center",
        color=MUTED,
    )
    figure.text(
        0.5,
        0.09,
        "peak memory  =  inputs  +  gradients  +  workspace",
        ha="center",
        size=12,
        weight="bold",
    )
    return figure


def main(
    out: Path = Path(__file__).parent.parent / "method.svg", gradient_tolerance: float = 1e-3
) -> None:
    """Writes the figure; the file name's ending chooses the format."""
    write(lambda: draw(diagonal_lattice(gradient_tolerance), gradient_tolerance), out)


if __name__ == "__main__":
    tyro.cli(main)
