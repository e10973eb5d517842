"""training.png: loss and word error rate over the steps."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def plot_training(records: list[dict[str, Any]], path: Path) -> None:
    """Draw the records of metrics.jsonl: those with "loss" and those with "wer"."""
    losses = [record for record in records if "loss" in record]
    rates = [record for record in records if "wer" in record]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([r["step"] for r in losses], [r["loss"] for r in losses], color="tab:blue")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("transducer loss (nats per utterance)", color="tab:blue")
    axis.grid(alpha=0.3)
    percent = axis.twinx()
    wer = [100 * record["wer"] for record in rates]
    percent.plot([r["step"] for r in rates], wer, color="tab:red", marker="o")
    percent.axhline(10.0, color="tab:red", linestyle=":", linewidth=1)
    # The last percents are the interesting ones, once they are reached.
    percent.set_ylim(0, 20 if wer and wer[-1] <= 10 else 100)
    percent.set_ylabel("held-out word error rate (%)", color="tab:red")
    if wer:
        axis.set_title(f"word error rate {wer[-1]:.1f} % after {rates[-1]['step']} steps")
    figure.savefig(path, dpi=120)
