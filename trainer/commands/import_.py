"""`import`: weights that were trained elsewhere become a run."""

from __future__ import annotations

from typing import Any

import click

from trainer.commands.answer import answer, json_option
from trainer.commands.console import import_framework, open_project, runs_option, settings
from trainer.commands.help import PATH, command
from trainer.commands.printed import print_metrics
from trainer.commands.showing import show_of


@command("import")
@click.argument("file", type=PATH)
@click.option("--as", "name", required=True, help="Name of the run.")
@click.option(
    "--labels",
    help="Positive class of the file: entailment=1 or contradiction=1; of three classes its logits"
    " in their order.  [default: entailment=1; contradiction,entailment,neutral]",
)
@click.option(
    "--threshold", type=float, help="The run's τ.  [default: the export's own, or swept on val]"
)
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

    Without --k-txt and --k-vit, the layers that are not the presets' are the trained ones.
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
        k_vit=flags["train__k_vit"],
        threshold=threshold,
        show=show_of(as_json),
    )
    imported = run.manifest["imported"]
    if as_json:
        answer({"run": str(run.folder), "imported": imported, **run.metrics})
        return
    click.echo(f"{run.folder}: {', '.join(imported['layers'])} ({imported['labels']})")
    print_metrics(run.metrics)
