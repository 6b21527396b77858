"""`train`, `evaluate` and `parity`: one run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from trainer.commands.console import (
    epoch_bar,
    import_framework,
    json_option,
    print_epoch,
    print_rows,
    read_config,
    remember_settings,
    row_bar,
    runs_option,
    settings,
    split_option,
    stop_request,
)
from trainer.config import CONTROLS


def _free_name(runs: Path, k_txt: int) -> str:
    stem = f"k{k_txt}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = stem, 1
    while (runs / name).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


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
    config = read_config(config_file, flags)
    from trainer.run.folder import Run, find_run, run_folder

    source = find_run(Path(runs), init_from) if init_from else None
    run = Run(
        run_folder(Path(runs), _free_name(Path(runs), config.train.k_txt) if name is None else name)
    )
    from featstore.data.dataset import load_dataset
    from trainer.features import open_features

    run.check_free_or_same(config)
    dataset = load_dataset(config.data, Path(config.store.root))
    print_rows(dataset)
    import_framework()
    features = open_features(config, dataset, lambda total: row_bar(total, " sentences"))
    from trainer.run.fit import fit
    from trainer.run.training import Reporter, Training

    with run.writing(), stop_request() as stopping:
        run.check_free_or_same(config)
        training = Training(run, features, source, Reporter(epoch_bar, print_epoch, stopping))
        if not as_json:
            count = training.manifest["parameters"]["trainable"]
            click.echo(f"run {run.folder}: {count:,} trainable parameters", err=True)
        metrics = fit(training)
    if as_json:
        click.echo(json.dumps({"run": str(run.folder), **metrics}))
        return
    click.echo(f"best epoch {metrics['epoch']} by {metrics['monitor']}; {run.folder}")
    _print_metrics(metrics)
    if config.train.control != "none":
        click.echo(f"control: {config.train.control}")


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
    from trainer.run.folder import find_run

    found = find_run(Path(runs), run)
    remember_settings(("--config", found.config_path))
    control = control or found.config().train.control
    import_framework()
    from trainer.results.evaluate import evaluate as measure
    from trainer.results.evaluate import open_run_features

    features = open_run_features(found, lambda total: row_bar(total, " sentences"))
    result = measure(found, features, split, control)
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
    from trainer.run.folder import find_run

    found = find_run(Path(runs), run)
    remember_settings(("--config", found.config_path))
    import_framework()
    from trainer.results.parity import check_parity

    result, failure = check_parity(
        found,
        split,
        count,
        seed,
        lambda total: row_bar(total, " sentences"),
        lambda total: row_bar(total, " rows"),
    )
    if as_json:
        click.echo(json.dumps(result))
    else:
        _print_parity(result)
    if failure is not None:
        raise failure
