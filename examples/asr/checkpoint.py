"""Checkpoints that survive a kill at any moment and continue on any number of processes."""

import os
import shutil
from pathlib import Path

from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful

from .parallel import World

KEPT = 2


class Checkpoints:
    """The folders `step-N` in a folder, each whole: it gets its name when it is complete.

    The processes must share the file system.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self._world = world

    def all(self) -> list[Path]:
        """What can be loaded, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name[5:]))

    def save(self, step: int, state: Stateful) -> None:
        """Write a state, each process its part; then drop the oldest checkpoints."""
        partial = self.folder / "partial"
        if self._world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self._world.wait()
        save({"run": state}, checkpoint_id=partial)
        if self._world.rank == 0:
            os.replace(partial, self.folder / f"step-{step}")
            for path in self.all()[:-KEPT]:
                shutil.rmtree(path)

    def load(self, path: Path, state: Stateful) -> None:
        """Set `state` to what was saved, divided among the processes as it is now."""
        load({"run": state}, checkpoint_id=path)
