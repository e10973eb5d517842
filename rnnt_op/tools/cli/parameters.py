"""Parameter types and options that commands share."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import click

from rnnt_op.tools.study.problems import DtypeName, read_lengths

F = TypeVar("F", bound=Callable[..., Any])


class Count(click.IntRange):
    """A whole number above zero, or another least one."""

    name = "integer"

    def __init__(self, least: int = 1) -> None:
        super().__init__(min=least)


class PositiveNumber(click.FloatRange):
    """A finite number above zero."""

    name = "number"

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE = PositiveNumber()


def comma_list(item: click.ParamType[Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A parameter type: values with commas between them."""

    def convert(value: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):  # a default
            return value
        return tuple(item.convert(part.strip(), None, None) for part in value.split(","))

    convert.__name__ = f"{item.name},..."
    return convert


class LengthsFile(click.Path):
    """A .npy file of [n, 2] lengths (T, U)."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            read_lengths(path)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return path


class OutputFile(click.Path):
    """A file that can be written, known before the work that fills it."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__(dir_okay=False, writable=True, path_type=Path)
        self.suffixes = suffixes

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if path.suffix not in self.suffixes:
            self.fail(f"'{path}' must end in {' or '.join(self.suffixes)}.", param, ctx)
        if not os.access(path.parent, os.W_OK):
            self.fail(f"'{path.parent}' is no folder that can be written to.", param, ctx)
        return path


def refusal(message: str) -> click.UsageError:
    """To be raised where options contradict each other."""
    return click.UsageError(message, click.get_current_context())


def refuse_with_lengths(*names: str) -> None:
    """Refuses parameters that were given beside a file of lengths."""
    context = click.get_current_context()
    if context.params["lengths"] is None:
        return
    for name in names:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise refusal(f"--lengths contradicts --{name.replace('_', '-')}.")


def model_options(*, vocab_size: int, joint_dim: int, dtype: str) -> Callable[[F], F]:
    """``--vocab``, ``--joint-dim`` and ``--dtype``."""

    def decorate(command: F) -> F:
        for option in (
            click.option(
                "--dtype", type=click.Choice(get_args(DtypeName)), default=dtype, show_default=True
            ),
            click.option(
                "--joint-dim", type=Count(), default=joint_dim, show_default=True, help="H."
            ),
            click.option(
                "--vocab",
                "vocab_size",
                type=Count(),
                default=vocab_size,
                show_default=True,
                help="V, blank included.",
            ),
        ):
            command = option(command)
        return command

    return decorate


def batch_options(command: F) -> F:
    """``--batch``, ``--seconds`` or ``--frames``, ``--labels``, ``--frame-ms``, those of the model,
    and ``--workspace``."""
    for option in (
        click.option(
            "--workspace", type=POSITIVE, metavar="MIB", help="rnnt_op's workspace_bytes."
        ),
        model_options(vocab_size=1024, joint_dim=640, dtype="bfloat16"),
        click.option(
            "--frame-ms", type=POSITIVE, default=40.0, show_default=True, help="Of audio, a frame."
        ),
        click.option("--labels", type=Count(0), help="U.  [default: 5 a second]"),
        click.option("--frames", type=Count(), help="T, instead of --seconds."),
        click.option("--seconds", type=POSITIVE, help="Of audio.  [default: 40]"),
        click.option("--batch", type=Count(), default=1024, show_default=True, help="B."),
    ):
        command = option(command)
    return command


def batch_fields(
    *,
    seconds: float | None,
    frames: int | None,
    labels: int | None,
    frame_ms: float,
    workspace: float | None,
    **others: Any,
) -> dict[str, Any]:
    """Fields of the ``Question`` that ``batch_options`` ask for."""
    if seconds is not None and frames is not None:
        raise refusal("--seconds and --frames contradict each other; give one of them.")
    if frames is None:
        frames = max(1, round((40.0 if seconds is None else seconds) * 1000 / frame_ms))
    return {
        **others,
        "frames": frames,
        "labels": round(5 * frames * frame_ms / 1000) if labels is None else labels,
        "workspace_bytes": None if workspace is None else round(workspace * 2**20),
    }


def _present_device(ctx: Any, param: Any, value: str | None) -> Literal["cpu", "cuda"]:
    import torch

    available = torch.cuda.is_available()
    if value == "cuda" and not available:
        raise click.BadParameter("torch finds no CUDA device; see rnnt-op doctor.", ctx, param)
    return "cuda" if value == "cuda" or (value is None and available) else "cpu"


def device_option(command: F) -> F:
    """``--device``: by default a GPU if there is one."""
    return click.option(
        "--device",
        type=click.Choice(("cpu", "cuda")),
        callback=_present_device,
        help="[default: cuda if there is a GPU]",
    )(command)
