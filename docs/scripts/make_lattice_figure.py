"""Draws lattice.svg: occupancies and selected nodes of a recorded utterance of the test split.

In the root of the repository, with recorded digits in DIR:

    python -m examples.asr --data DIR
    PYTHONPATH=. python docs/scripts/make_lattice_figure.py --data DIR --run runs/asr
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import tyro
from figures import HEAT, INK, KEPT, MUTED, PALE, Lattice, compute_lattice, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

import rnnt_op
from examples.asr.config import Config
from examples.asr.features import SHIFT_MS, LogMel, Normalisation, log_mel
from examples.asr.model import SUBSAMPLING, Transducer
from examples.asr.recordings import RecordedStrings

KEPT_BY_DEFAULT = "#e9a795"
FRAME_SECONDS = SUBSAMPLING * SHIFT_MS / 1000
DEFAULT, COARSE = torch.finfo(torch.float32).eps / 128, 1e-3
"""Tolerances: float32's own, and one for comparison."""


@dataclass(frozen=True)
class Spoken:
    """A recorded utterance and what the model makes of it."""

    words: list[str]
    features: LogMel  # [feature frames, mel bins]
    lattice: Lattice  # at the default tolerance
    coarse: Lattice
    emitted: list[int]  # frame on which the most probable path emits each word


@torch.no_grad()
def compute(data: Path, run: Path, index: int) -> Spoken:
    options = json.loads((run / "config.json").read_text())
    config = Config(
        dim=options["dim"],
        joint_dim=options["joint_dim"],
        dilations=tuple(options["dilations"]),
        lookahead=options["lookahead"],
    )
    source = RecordedStrings(data, options["seed"])
    saved = torch.load(run / "model.pt", weights_only=True)
    model = Transducer(config, source.vocabulary.size).eval()
    model.load_state_dict(saved["model"])
    normalisation = Normalisation(saved["feature_mean"].numpy(), saved["feature_std"].numpy())

    utterance = source.test(index)
    features = normalisation(log_mel(utterance.audio, source.sample_rate))
    labels = torch.tensor(source.vocabulary.encode(utterance.text))
    encoder = model.encoder(torch.from_numpy(features).unsqueeze(0))  # [1, T, H]
    predictor = model.predictor(labels.unsqueeze(0))  # [1, U + 1, H]
    logits: Tensor = model.joint.logits(encoder.unsqueeze(2), predictor.unsqueeze(1))[0]
    lengths = torch.tensor([encoder.shape[1]]), torch.tensor([len(labels)])
    alignment: rnnt_op.Alignment = model.joint.align(
        encoder, predictor, labels.unsqueeze(0), *lengths
    )
    return Spoken(
        words=utterance.text.split(),
        features=features,
        lattice=compute_lattice(logits.double(), labels, DEFAULT),
        coarse=compute_lattice(logits.double(), labels, COARSE),
        emitted=alignment.frames[0].tolist(),
    )


def draw(spoken: Spoken) -> Figure:
    seconds = spoken.lattice.kept.shape[1] * FRAME_SECONDS
    figure = Figure(figsize=(8, 6.6), facecolor="white")
    sound, occupancy, selected = figure.subplots(
        3,
        1,
        sharex=True,
        gridspec_kw={
            "height_ratios": [0.7, 1.0, 1.0],
            "left": 0.085,
            "right": 0.985,
            "top": 0.92,
            "bottom": 0.075,
            "hspace": 0.3,
        },
    )
    bins = spoken.features.shape[1]
    extent = (0.0, len(spoken.features) * SHIFT_MS / 1000, 0.0, float(bins))
    sound.imshow(
        spoken.features.T,
        origin="lower",
        aspect="auto",
        cmap="Greys",
        extent=extent,
        interpolation="none",  # as many pixels as there are features, which the viewer scales
    )
    sound.set_yticks([])
    title(sound, "Sound", "log-mel features; a mark where the most probable path emits each word")
    for word, frame in zip(spoken.words, spoken.emitted, strict=True):
        # Frame t is known a look-ahead later; here it stands where it starts.
        sound.axvline(frame * FRAME_SECONDS, color=KEPT, linewidth=1)
        sound.text(
            frame * FRAME_SECONDS + 0.035,
            bins - 4,
            word,
            color=KEPT,
            va="top",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )

    heat = np.log10(np.maximum(spoken.lattice.occupancy, 1e-12))
    image = draw_nodes(occupancy, heat, spoken, matplotlib.colormaps[HEAT])
    image.set_clim(-9, 0)
    title(occupancy, "Lattice", "log₁₀ of each node's occupancy, from −9 (white) to 0")
    kept, coarse = spoken.lattice.kept, spoken.coarse.kept
    colors = matplotlib.colors.ListedColormap([PALE, KEPT_BY_DEFAULT, KEPT])
    draw_nodes(selected, kept.astype(int) + coarse, spoken, colors)
    title(
        selected,
        "Backward",
        f"{kept.mean():.0%} of the nodes carry all but 9 · 10⁻¹⁰ of the gradient (float32's "
        f"default);\ndark, {coarse.mean():.0%} carry all but 10⁻³",
    )
    selected.set(xlabel="seconds", xlim=(0, seconds))
    return figure


def draw_nodes(
    axes: Axes, values: NDArray[Any], spoken: Spoken, colors: matplotlib.colors.Colormap
) -> matplotlib.image.AxesImage:
    states, frames = values.shape
    image = axes.imshow(
        values,
        origin="lower",
        aspect="auto",
        cmap=colors,
        interpolation="nearest",
        extent=(0.0, frames * FRAME_SECONDS, -0.5, states - 0.5),
    )
    axes.set_yticks(range(states), ["–", *spoken.words])
    axes.set_ylabel("emitted last")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def title(axes: Axes, text: str, subtitle: str) -> None:
    axes.text(0, 1.04, text, transform=axes.transAxes, weight="bold", size=11, color=INK)
    axes.text(0.13, 1.04, subtitle, transform=axes.transAxes, color=MUTED)


def main(
    data: Path, run: Path, index: int = 13, out: Path = Path(__file__).parent.parent / "lattice.svg"
) -> None:
    """Writes the figure.

    Args:
        data: Folder of recorded digits.
        run: Folder of a finished run of examples.asr.
        index: Utterance of the test split.
        out: Its ending chooses the format.
    """
    write(lambda: draw(compute(data, run, index)), out)


if __name__ == "__main__":
    tyro.cli(main)
