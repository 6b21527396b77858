"""`train`: one run."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from featstore.progress import SHOWN
from trainer.commands.answer import answer, json_option
from trainer.commands.console import (
    import_framework,
    open_project,
    print_metrics,
    runs_option,
    settings,
    stop_request,
)
from trainer.commands.help import command


@command()
@click.option("--name", help="Name of the run; an unfinished run of that name goes on.")
@click.option("--init-from", help="Run to take the head and shared text layers from.")
@click.option(
    "--plain", is_flag=True, help="Train as --no-fast-path does: slowly, to the same numbers."
)
@runs_option
@json_option
@settings("data", "encoders", "store", "train")
def train(
    name: str | None,
    init_from: str | None,
    plain: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Train the fusion head and the last text layers on cached features."""
    if plain:
        flags["train__fast_path"] = False
    project = open_project(config_file, flags)
    import_framework()
    from trainer import api
    from trainer.run.shown import epoch_bar, print_epoch
    from trainer.run.training import Reporter

    show = dataclasses.replace(SHOWN, note=lambda line: None) if as_json else SHOWN
    with stop_request() as stopping:
        run = api.train(
            project,
            name=name,
            runs=runs,
            init_from=init_from,
            reporter=Reporter(epoch_bar, print_epoch, stopping),
            show=show,
        )
    metrics, control = run.metrics, run.config.train.control
    if as_json:
        answer({"run": str(run.folder), **metrics})
        return
    click.echo(f"best epoch {metrics['epoch']} by {metrics['monitor']}; {run.folder}")
    print_metrics(metrics)
    if control != "none":
        click.echo(f"control: {control}")
