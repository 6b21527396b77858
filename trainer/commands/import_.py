"""`import`: weights that were trained elsewhere become a run."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click

from featstore.progress import SHOWN
from trainer.commands.console import (
    import_framework,
    json_option,
    open_project,
    print_metrics,
    runs_option,
    settings,
)


@click.command("import")
@click.argument("file")
@click.option("--as", "name", required=True, help="Name of the run.")
@click.option(
    "--labels",
    help="contradiction=1: the file's positive class is contradiction.  [default: entailment=1]",
)
@click.option("--threshold", type=float, help="τ.  [default: the export's own, or swept on val]")
@runs_option
@json_option
@settings("data", "encoders", "store", "train")
def import_weights(
    file: str,
    name: str,
    labels: str | None,
    threshold: float | None,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Make a run of a .weights.h5, .keras or .safetensors FILE, to evaluate or to start from.

    Without --k-txt, the text layers that are not the preset's are the trained ones.
    """
    project = open_project(config_file, flags)
    import_framework()
    from trainer import api

    run = api.import_weights(
        file,
        project,
        name=name,
        runs=runs,
        labels=labels,
        k_txt=flags["train__k_txt"],
        threshold=threshold,
        show=dataclasses.replace(SHOWN, note=lambda line: None) if as_json else SHOWN,
    )
    imported = run.manifest["imported"]
    if as_json:
        click.echo(json.dumps({"run": str(run.folder), "imported": imported, **run.metrics}))
        return
    click.echo(f"{run.folder}: {', '.join(imported['layers'])} ({imported['labels']})")
    print_metrics(run.metrics)
