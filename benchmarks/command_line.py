"""Command lines from dataclasses: by tyro, or by argparse where tyro is not installed.

A GPU machine may have torch, numpy and the standard library alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


def parse(config: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """The configuration that the command line asks for.

    Args:
        config: a dataclass whose fields have defaults.
        description: head of ``--help``.
        arguments: in place of those of the process.
    """
    try:
        import tyro
    except ImportError:
        plain: C = _parse_plainly(config, description, arguments)
        return plain
    return tyro.cli(config, description=description, args=arguments)


def _parse_plainly(config: Any, description: str | None, arguments: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(description=description)
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, **_options(hints[field.name]))
    values = vars(parser.parse_args(arguments))
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _options(hint: Any) -> dict[str, Any]:
    """What argparse needs to know of a field's type."""
    parameters = get_args(hint)
    if get_origin(hint) is types.UnionType:
        (hint,) = (each for each in parameters if each is not type(None))
        return _options(hint)
    if get_origin(hint) is tuple:
        return {**_options(parameters[0]), "nargs": "*"}
    if get_origin(hint) is Literal:
        return {"choices": parameters}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": hint}
