"""``rnnt-op doctor``."""

from __future__ import annotations

import json

import click


@click.command()
@click.option(
    "--variables", is_flag=True, help="Explain environment variables that are unset, too."
)
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
def doctor(variables: bool, print_json: bool) -> int:
    """Say what kernels find here and what will be used; status 1 if a GPU cannot be."""
    from rnnt_op.doctor import diagnose

    found = diagnose(all_variables=variables)
    click.echo(json.dumps(found.as_json(), indent=2) if print_json else found.report())
    return found.status
