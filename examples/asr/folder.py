"""A run's folder: starting a run in it, or going on with the one that it holds."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from .config import Config
from .errors import ExampleError
from .parallel import World

# What weights, optimizer and the place in the data of a checkpoint depend on.
FIXED = (
    "data",
    "librispeech",
    "held_out",
    "vocab_size",
    "seed",
    "batch_size",
    "batch_seconds",
    "weight_decay",
    "dim",
    "joint_dim",
    "dilations",
    "lookahead",
)


def open_folder(config: Config, world: World) -> None:
    """Make `config.out` ready for this run, or raise an error that says why it is not."""
    record = config.out / "config.json"
    options = json.loads(json.dumps(asdict(config), default=str))
    if not config.resume and any(config.out.glob("checkpoints/step-*")):
        raise ExampleError(
            f"--out {config.out} holds a run: --resume continues it, another --out starts anew"
        )
    if config.resume and record.exists():
        earlier = json.loads(record.read_text())
        for name in FIXED:
            if earlier[name] != options[name]:
                raise ExampleError(
                    f"--resume: {config.out} was started with --{name.replace('_', '-')} "
                    f"{earlier[name]}, not {options[name]}"
                )
    if world.rank == 0:
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            if not config.resume:
                (config.out / "vocabulary.model").unlink(missing_ok=True)
                shutil.rmtree(config.out / "tensorboard", ignore_errors=True)
            write_whole(record, json.dumps(options, indent=2).encode())
        except OSError as error:
            raise ExampleError(f"--out {config.out} cannot be written: {error}") from error
    world.wait()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that, whatever happens, is never seen in part."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
