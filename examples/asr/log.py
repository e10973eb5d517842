"""What was measured: metrics.jsonl, the same for TensorBoard, and training.png."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from .folder import write_whole
from .plot import plot_training


class Log:
    """The records of a run, in memory and in its folder.

    folder: Where they are written.
    count:  How many of the records already there to go on from; later ones are dropped.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        kept = self._path.read_text().splitlines(keepends=True)[:count] if count else []
        write_whole(self._path, "".join(kept).encode())
        self.records: list[dict[str, Any]] = [json.loads(line) for line in kept]
        first_step = self.records[-1]["step"] + 1 if kept else 0
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, step: int, seconds: float, values: dict[str, float]) -> None:
        """Append a record."""
        record = {"step": step, "seconds": round(seconds, 2), **values}
        self.records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def plot(self) -> None:
        """Draw training.png anew."""
        plot_training(self.records, self._folder / "training.png")
