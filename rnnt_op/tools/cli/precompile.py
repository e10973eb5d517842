"""``rnnt-op precompile``."""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch

from rnnt_op import validation
from rnnt_op.activations import ACTIVATIONS
from rnnt_op.tools.cli.parameters import comma_list

_DTYPES = [str(dtype).removeprefix("torch.") for dtype in validation.FLOAT_DTYPES]


@click.command()
@click.option(
    "--arch",
    type=comma_list(click.STRING),
    help="cpu, sm_90a, ...  [default: those of the CUDA devices, cpu if there is none]",
)
@click.option("--dtype", type=comma_list(click.Choice(_DTYPES)), help="[default: all]")
@click.option("--activation", type=comma_list(click.Choice(ACTIVATIONS)), help="[default: all]")
def precompile(
    arch: Sequence[str] | None, dtype: Sequence[str] | None, activation: Sequence[str] | None
) -> None:
    """Compile kernels into the cache; needs no GPU if --arch is given."""
    from rnnt_op.precompile import precompile
    from rnnt_op.tools.cli.tables import show_table

    kernels = precompile(
        dtypes=None if dtype is None else [getattr(torch, name) for name in dtype],
        activations=activation,
        architectures=arch,
    )
    show_table(
        [
            {
                "source": kernel.name,
                "macros": " ".join(f"{name}={value}" for name, value in kernel.macros) or None,
                "architecture": kernel.architecture,
                "from": "cache" if kernel.cached else "compiler",
                "seconds": kernel.seconds,
                "registers": kernel.registers,
                "spill bytes": kernel.spill_bytes,
            }
            for kernel in kernels
        ]
    )
