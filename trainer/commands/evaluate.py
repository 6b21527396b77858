"""`evaluate`: a run on a split."""

from __future__ import annotations

import json

import click

from trainer.commands.console import (
    json_option,
    open_run,
    print_metrics,
    runs_option,
    split_option,
)
from trainer.config import CONTROLS


@click.command()
@click.argument("run")
@split_option("test", "val", "train")
@click.option(
    "--control", type=click.Choice(CONTROLS), help="What to show it.  [default: as in training]"
)
@runs_option
@json_option
def evaluate(run: str, split: str, control: str | None, runs: str, as_json: bool) -> None:
    """Measure a run on a split, at its own threshold."""
    found = open_run(run, runs)
    result = found.evaluate(split, control)
    control = result["control"]
    if as_json:
        click.echo(json.dumps(result))
        return
    if control != "none":
        click.echo(f"control: {control}")
    print_metrics(result)
    if result["quarantined_photos"]:
        left = result["rows_of_split"] - result["rows"]
        click.echo(f"{left} rows left out: their photos could not be read", err=True)
