"""The ``rnnt-op`` command: ``doctor`` and ``precompile``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from rnnt_op import validation
from rnnt_op.doctor import diagnose
from rnnt_op.jit import JitError
from rnnt_op.precompile import precompile


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="rnnt-op", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "doctor",
        help="print what kernels find here; status 1 if a GPU is there but unusable",
    )
    warm = commands.add_parser(
        "precompile", help="compile kernels into the cache; needs no GPU if --arch is given"
    )
    warm.add_argument(
        "--arch",
        nargs="+",
        metavar="ARCH",
        help="cpu, sm_90a, ...; default: those of the visible CUDA devices, or cpu if none is",
    )
    names = [str(dtype).removeprefix("torch.") for dtype in validation.FLOAT_DTYPES]
    warm.add_argument("--dtype", nargs="+", choices=names, help="default: all")
    warm.add_argument(
        "--activation", nargs="+", choices=validation.ACTIVATIONS, help="default: all"
    )
    options = parser.parse_args(arguments)
    try:
        return _doctor() if options.command == "doctor" else _precompile(options)
    except JitError as error:
        print(f"rnnt-op: {error}", file=sys.stderr)
        return 1


def _doctor() -> int:
    found = diagnose()
    _print_columns(found.facts)
    print()
    print(found.verdict)
    for obstacle in found.obstacles:
        print(f"- {obstacle}")
    return 1 if found.obstacles else 0


def _precompile(options: argparse.Namespace) -> int:
    kernels = precompile(
        dtypes=None if options.dtype is None else [getattr(torch, name) for name in options.dtype],
        activations=options.activation,
        architectures=options.arch,
    )
    rows = [("source", "macros", "architecture", "from", "seconds", "registers", "spill bytes")]
    rows += [
        (
            kernel.name,
            " ".join(f"{name}={value}" for name, value in kernel.macros) or "-",
            kernel.architecture,
            "cache" if kernel.cached else "compiler",
            f"{kernel.seconds:.3f}",
            "-" if kernel.registers is None else str(kernel.registers),
            "-" if kernel.spill_bytes is None else str(kernel.spill_bytes),
        )
        for kernel in kernels
    ]
    _print_columns(rows)
    return 0


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
