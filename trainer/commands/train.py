"""`train`: one run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featstore.errors import FeatstoreError
from trainer.commands.answer import answer, json_option
from trainer.commands.console import (
    import_framework,
    open_project,
    remember_settings,
    runs_option,
    settings,
    stop_request,
)
from trainer.commands.help import command
from trainer.commands.printed import print_metrics
from trainer.commands.showing import show_of, shown_reporter

if TYPE_CHECKING:
    from featstore.project import Project
    from trainer.run import folder

FEW_SENTENCES = 1000
"""Sentences that are missing, up to which one thread may encode them."""
# Settings that say where a run's data are, by their names in `places`.
PLACES = {
    "data__rows": "rows",
    "data__images": "images",
    "data__split_file": "split_file",
    "store__root": "root",
}


@command()
@click.option(
    "--name",
    help="Name of the run. With no other settings a run of that name goes on with its own; a"
    " finished one goes on with more --epochs or a larger --early-stop-patience.",
)
@click.option("--init-from", help="Run to take the head and shared layers of the encoders from.")
@click.option("--extract", is_flag=True, help="Extract missing features first.")
@click.option(
    "--plain", is_flag=True, help="Train as --no-fast-path does: slowly, to the same numbers."
)
@runs_option
@json_option
@settings("data", "encoders", "store", "train", "track")
def train(
    name: str | None,
    init_from: str | None,
    extract: bool,
    plain: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Train the fusion head and the last layers of the encoders on cached features."""
    if plain:
        flags["train__fast_path"] = False
    from trainer.run import folder
    from trainer.run.resume import LENGTHS

    given = {key: value for key, value in flags.items() if value is not None}
    lengths = {key: given.pop(f"train__{key}") for key in LENGTHS if f"train__{key}" in given}
    places = {PLACES[key]: given.pop(key) for key in PLACES if key in given}
    # With nothing else said, a run goes on with its own settings.
    alone = (config_file, init_from, given) == (None, None, {})
    project: Project | folder.Run
    known = None
    if name is not None:
        known = folder.Run(folder.run_folder(Path(runs), name), folder.places(**places))
    begun = known is not None and known.exists
    if known is not None and begun and alone:
        # What a message says to type next has them too.
        remember_settings(("--config", known.config_path))
        project = known
    else:
        project, lengths = open_project(config_file, flags, check=not begun), {}
    import_framework()
    from featstore.encoders.framework import limit_threads
    from trainer import api

    limit_threads(_threads(project, extract, known if begun else None))
    show = show_of(as_json)
    with stop_request() as stopping:
        run = api.train(
            project,
            name=name,
            runs=runs,
            init_from=init_from,
            extract=extract,
            reporter=shown_reporter(stopping),
            show=show,
            **lengths,
        )
    metrics, control = run.metrics, run.config.train.control
    if as_json:
        data = run.manifest["data"]
        read = {name: data[name] for name in ("counts", "rows_left_out", "cut_sentences")}
        ran = {"epochs": len(run.history), "ended": run.manifest["ended"]}
        answer({"run": str(run.folder), **metrics, **read, **ran})
        return
    click.echo(f"best epoch {metrics['epoch']} by {metrics['monitor']}; {run.folder}")
    print_metrics(metrics)
    if control != "none":
        click.echo(f"control: {control}")


def _threads(project: Project | folder.Run, extract: bool, begun: folder.Run | None) -> int:
    """Return what `limit_threads` is told: encoders have use for every core.

    Without AVX-512 the last digits depend on it, so a run that goes on has what it had.
    """
    from trainer.config import config_of
    from trainer.model.sizes import step_threads
    from trainer.run import folder

    if begun is not None and "threads" in begun.manifest:
        return int(begun.manifest["threads"])
    if extract:
        return 0
    if isinstance(project, folder.Run):
        # Its sentences were encoded when it was begun.
        return step_threads(project.config)
    own = config_of(project)
    threads = step_threads(own)
    if not threads:
        return 0
    # What is wrong is said where it matters.
    with contextlib.suppress(FeatstoreError):
        if len(project.plan("text", k_txt=own.train.k_txt).keys) <= FEW_SENTENCES:
            return threads
    return 0
