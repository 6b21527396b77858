"""`train`, `evaluate` and `parity`: one run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featstore.progress import SHOWN
from trainer.commands.console import (
    import_framework,
    json_option,
    open_project,
    remember_settings,
    runs_option,
    settings,
    split_option,
    stop_request,
)
from trainer.config import CONTROLS

if TYPE_CHECKING:
    from trainer.api import Run


def _print_metrics(result: dict[str, Any]) -> None:
    at, half = result["at_threshold"], result["at_half"]
    auc = "undefined" if result["auc"] is None else f"{result['auc']:.4f}"
    click.echo(
        f"{result['split']}: {result['rows']} rows ({result['entailment']} entailment,"
        f" {result['contradiction']} contradiction), loss {result['loss']:.4f}, AUC {auc}"
    )
    click.echo(f"{'threshold':>16} {'accuracy':>9} {'macro-F1':>9}   tp    fp    fn    tn")
    for name, found in ((f"τ = {result['threshold']:.2f}", at), ("0.50", half)):
        counts = " ".join(f"{found[key]:5d}" for key in ("tp", "fp", "fn", "tn"))
        click.echo(f"{name:>16} {found['accuracy']:9.2%} {found['macro_f1']:9.2%} {counts}")


@click.command()
@click.option("--name", help="Name of the run; an unfinished run of that name goes on.")
@click.option("--init-from", help="Run to take the head and shared text layers from.")
@click.option("--plain", is_flag=True, help="As --no-fast-path: slow, same numbers.")
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
        click.echo(json.dumps({"run": str(run.folder), **metrics}))
        return
    click.echo(f"best epoch {metrics['epoch']} by {metrics['monitor']}; {run.folder}")
    _print_metrics(metrics)
    if control != "none":
        click.echo(f"control: {control}")


def _load_run(name: str, runs: str) -> Run:
    """Open a run; what is typed next is typed with its settings."""
    from trainer.run.folder import find_run

    remember_settings(("--config", find_run(Path(runs), name).config_path))
    import_framework()
    from trainer.api import load_run

    return load_run(name, runs)


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
    found = _load_run(run, runs)
    result = found.evaluate(split, control)
    control = result["control"]
    if as_json:
        click.echo(json.dumps(result))
        return
    if control != "none":
        click.echo(f"control: {control}")
    _print_metrics(result)
    if result["quarantined_photos"]:
        left = result["rows_of_split"] - result["rows"]
        click.echo(f"{left} rows left out: their photos could not be read", err=True)


def _print_parity(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['split']}: {result['rows']} of {result['rows_of_split']} rows, stored in"
        f" {result['stored_dtype']}"
    )

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.2e}"

    click.echo(f"{'':>20} {'largest':>10} {'mean':>10} {'largest/tol.':>12}  met  tolerance")
    for found in result["quantities"].values():
        largest, mean = shown(found["largest"]), shown(found["mean"])
        over, met = shown(found["largest_over_tolerance"]), "yes" if found["met"] else "NO"
        click.echo(
            f"{found['name']:>20} {largest:>10} {mean:>10} {over:>12}  {met:>3}"
            f"  {found['tolerance']}"
        )
    recorded, differing = result["recorded_loss"], result["predictions"]
    loss = "not finite" if recorded["found"] is None else f"{recorded['found']:.6f}"
    click.echo(
        f"{recorded['name']:>20} {recorded['expected']:.6f}, now {loss}"
        f" over {recorded['rows']} rows; {'met' if recorded['met'] else 'NOT met'}"
        f" ({recorded['tolerance']:.1e})"
    )
    click.echo(f"{'predictions':>20} {len(differing)} differ at τ = {result['threshold']:.2f}")
    for row in differing:
        click.echo(
            f"{row['image_id']!r}, {row['hypothesis']!r}: logit {row['cached_logit']:.4f} cached,"
            f" {row['end_to_end_logit']:.4f} end to end, threshold {row['threshold_logit']:.4f}"
        )
    for path, found in result["metrics"].items():
        figures = "not finite"
        if found is not None:
            figures = f"accuracy {found['accuracy']:.2%}, macro-F1 {found['macro_f1']:.2%}"
        click.echo(f"{path.replace('_', ' '):>20} {figures}")
    for note in result["notes"]:
        click.echo(f"note: {note}")


@click.command()
@click.argument("run")
@click.option(
    "--rows",
    "count",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Rows drawn from the split.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides which rows."
)
@split_option("test", "val", "train")
@runs_option
@json_option
def parity(run: str, count: int, seed: int, split: str, runs: str, as_json: bool) -> None:
    """Prove that a run equals the end-to-end model, from the photos' bytes on."""
    found = _load_run(run, runs)
    from trainer.results.parity import check_parity

    result, failure = check_parity(found, split, count, seed, SHOWN)
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_parity(result)
    if failure is not None:
        raise failure
