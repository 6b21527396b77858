"""`search`: many runs over one store."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path
from typing import Any

import click

from featstore.errors import Command, RunError, UsageError
from featstore.settings import hints
from trainer.commands.console import (
    Function,
    epoch_bar,
    import_framework,
    json_option,
    print_epoch,
    print_halved,
    print_note,
    print_rows,
    quoted,
    read_config,
    row_bar,
    runs_option,
    settings,
    split_option,
    stop_request,
)
from trainer.tuning.space import SearchConfig
from trainer.tuning.space_file import read_space


def _search_options(command: Function) -> Function:
    """Give a command one flag for each setting of `[search]`."""
    types = hints(SearchConfig)
    for field in reversed(dataclasses.fields(SearchConfig)):
        meta = field.metadata
        kind: Any = click.Choice(meta["choices"]) if meta["choices"] else types[field.name]
        # `--seed` is a run's.
        name = "search-seed" if field.name == "seed" else field.name
        flag = f"--{name}"
        option = click.option(flag, f"search__{field.name}", type=kind, help=meta["help"])
        command = option(command)
    return command


def _flag_sections(flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flags.items():
        if value is not None:
            section, _, name = key.partition("__")
            sections.setdefault(section, {})[name] = value
    return sections


RAY_HELP = "Run the trials on a Ray cluster: host:port, auto, or local."


@click.group("search", invoke_without_command=True)
@click.option("--space", "space_file", type=click.Path(), help="What to vary (TOML).")
@click.option("--name", help="Name of the search; one of that name goes on.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Trials at once; default: 1, with --ray as many as fit.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    help="Seconds after which no trial starts; extraction counts.",
)
@click.option("--init-from", help="Run that every trial starts from.")
@click.option("--storage", help="Database URL for many machines, such as postgresql://….")
@click.option("--ray", "ray_address", metavar="ADDRESS", help=RAY_HELP)
@click.option("--num-gpus", type=click.FloatRange(min=0), help="GPUs of a Ray worker.")
@click.option("--num-cpus", type=click.FloatRange(min=1), help="CPUs of a Ray worker.")
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@runs_option
@json_option
@_search_options
@settings("data", "encoders", "store", "train")
@click.pass_context
def search_group(
    context: click.Context,
    space_file: str | None,
    name: str | None,
    workers: int | None,
    timeout: float | None,
    init_from: str | None,
    storage: str | None,
    ray_address: str | None,
    num_gpus: float | None,
    num_cpus: float | None,
    dry_run: bool,
    runs: str,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Search settings: many trials over one store, drawn by Optuna.

    Without --space, the reference study's own space. A search goes on by its
    name, with no other settings.
    """
    if context.invoked_subcommand is not None:
        return
    if ray_address is None and (num_gpus, num_cpus) != (None, None):
        raise UsageError("--num-gpus and --num-cpus are of the workers on Ray; give --ray ADDRESS")
    from trainer.run.folder import find_run, run_folder
    from trainer.tuning.study import exists

    started = time.time()
    name = name or f"search-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = run_folder(Path(runs), name)
    search_flags = {
        key.removeprefix("search__"): flags.pop(key)
        for key in list(flags)
        if key.startswith("search__")
    }
    search_flags = {key: value for key, value in search_flags.items() if value is not None}
    given = _flag_sections(flags)
    goes_on = space_file is None and config_file is None and init_from is None and not given
    source: Any
    if exists(folder) and goes_on:
        from trainer.tuning.study import known_search

        base, space, source = known_search(folder, search_flags)
    else:
        config = read_config(config_file, flags)
        file = None if space_file is None else Path(space_file)
        space = read_space(file, search_flags, given, config.is_demo)
        base = space.base(config)
        source = find_run(Path(runs), init_from) if init_from else None
    if ray_address is not None:
        from featstore.ray_cluster import check_address

        check_address(ray_address)
    from featstore.data.dataset import load_dataset
    from trainer.tuning.storage import driver_url, masked
    from trainer.tuning.study import start_search
    from trainer.tuning.table import best_row, trial_rows, write_leaderboard

    dataset = load_dataset(base.data, Path(base.store.root), save=not dry_run)
    print_rows(dataset)
    configs = space.feature_configs(base)
    if dry_run:
        _extract_for_search(dataset, configs, dry_run)
        click.echo(f"{space.trials} trials of {', '.join(p.name for p in space.parameters)}")
        return
    # Before the extraction, so that a wrong name or storage does not wait for its end.
    search = start_search(folder, base, space, source, storage, dataset)
    _extract_for_search(dataset, configs, dry_run)
    deadline = float("inf") if timeout is None else started + timeout
    with stop_request() as stopping:
        from trainer.tuning.live import live_view

        with live_view(search) as watch:
            if ray_address is None:
                from trainer.tuning.workers import run_workers

                watched = run_workers(search, workers or 1, deadline, stopping, watch)
            else:
                from featstore.ray_cluster import Actors
                from trainer.tuning.ray import run_on_ray

                wanted = Actors(workers, num_gpus, num_cpus)
                watched = run_on_ray(
                    ray_address, search, wanted, deadline, stopping, watch, print_note
                )
    files = write_leaderboard(search)
    rows = trial_rows(search)
    if as_json:
        found = {
            "search": str(folder),
            "best": best_row(search, rows),
            "trials": rows,
            "seconds": round(time.time() - started, 3),
            "workers": watched.workers,
            "peak_memory_bytes": watched.peak_bytes,
            "worker_deaths": watched.deaths,
        }
        click.echo(json.dumps(found))
    else:
        _print_leaderboard(search, rows)
        click.echo(f"{', '.join(str(path) for path in files)}")
        click.echo(f"workers' memory at most {watched.peak_bytes / 1e9:.1f} GB", err=True)
        place = masked(driver_url(storage)) if storage else search.folder / "study.journal"
        click.echo(f"see it: optuna-dashboard {place}", err=True)
        click.echo(f"        tensorboard --logdir {search.folder}", err=True)
        if search.unfinished:
            ended = sum(row["state"] != "running" for row in rows)
            click.echo(
                f"{ended} of {space.trials} trials ended;"
                f" {quoted(Command('search', name=name, bare=True))} goes on with the rest",
                err=True,
            )
    if best_row(search, rows) is None and rows:
        reasons = {row["reason"] for row in rows if row["reason"]}
        raise RunError(f"{folder}: no trial ended well ({'; '.join(sorted(reasons)[:3])})")


def _extract_for_search(dataset: Any, configs: list[Any], dry_run: bool) -> None:
    """Extract what the trials will read, with an estimate of all of it first."""
    from trainer.tuning.study import missing_features

    found = missing_features(dataset, configs)
    if not found:
        return
    import_framework()
    from featstore.extract import extract

    # Each boundary has a graph of its own, which TensorFlow would warn of as one traced again.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    work: list[tuple[Any, Any, Any]] = []
    total = 0.0
    for missing in found:
        config, k_txt = missing.config, missing.config.train.k_txt
        estimate: Any
        bring: Any
        inputs: Any
        if missing.kind == "images":
            what, bar = "images", lambda total: row_bar(total, " images")
            inputs = (config.encoders, config.store, missing.inputs, dataset.images)
            estimate, bring = extract.estimate_images, extract.bring_images
        else:
            what, bar = f"sentences at k_txt {k_txt}", lambda total: row_bar(total, " sentences")
            inputs = (config.encoders, config.store, missing.inputs, k_txt)
            estimate, bring = extract.estimate_text, extract.bring_text
        plan, rate = estimate(*inputs)
        seconds = len(plan.keys) / rate
        total += seconds
        click.echo(
            f"to extract: {len(plan.keys)} {what}, about {seconds / 60:.1f} min,"
            f" {plan.to_dict()['todo_bytes'] / 1e6:.1f} MB in {plan.folder}",
            err=True,
        )
        work.append((bring, inputs, bar))
    if len(work) > 1:
        click.echo(f"to extract in all: about {total / 60:.1f} min", err=True)
    for bring, inputs, bar in [] if dry_run else work:
        bring(*inputs, bar, print_halved)


def _print_leaderboard(search: Any, rows: list[dict[str, Any]]) -> None:
    from trainer.tuning.space import shown
    from trainer.tuning.table import ranked

    names = [parameter.name for parameter in search.space.parameters]
    metric = search.space.search.metric
    header = ["trial", "state", metric, "epoch", "seconds", *names]
    lines = [header]
    for row in ranked(search, rows):
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        epoch = str(row["best_epoch"] or row["epoch"])
        params = [shown(row["params"].get(name, "")) for name in names]
        lines.append([row["run"], row["state"], value, epoch, seconds, *params])
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        cells = [cell.ljust(w) for cell, w in zip(line, widths, strict=True)]
        click.echo("  ".join(cells).rstrip())
    for row in rows:
        if row["reason"]:
            click.echo(f"{row['run']}: {row['reason']}", err=True)


def _known_search(runs: str, name: str, storage: str | None) -> Any:
    from trainer.run.folder import run_folder
    from trainer.tuning.study import open_search

    return open_search(run_folder(Path(runs), name), storage)


@search_group.command("show")
@click.argument("name")
@click.option("--storage", help="Database URL, where the search has one.")
@runs_option
@json_option
def search_show(name: str, storage: str | None, runs: str, as_json: bool) -> None:
    """Print a search's leaderboard, also while it runs; write its plots."""
    from trainer.tuning.table import ranked, trial_rows, write_leaderboard

    search = _known_search(runs, name, storage)
    rows = trial_rows(search)
    idle = search.idle()
    for row in rows:
        if row["trial"] in idle:
            row["state"] = "stopped"
    files = write_leaderboard(search)
    if as_json:
        click.echo(json.dumps({"search": name, "trials": ranked(search, rows)}))
        return
    _print_leaderboard(search, rows)
    click.echo(", ".join(str(path) for path in files))


@search_group.command("best")
@click.argument("name")
@click.option("--epochs", type=click.IntRange(min=1), help="Train it again for so many epochs.")
@click.option("--seeds", type=click.IntRange(min=1), help="Train it again with so many seeds.")
@click.option("--storage", help="Database URL, where the search has one.")
@split_option("val", "test")
@runs_option
@json_option
def search_best(
    name: str,
    epochs: int | None,
    seeds: int | None,
    storage: str | None,
    split: str,
    runs: str,
    as_json: bool,
) -> None:
    """Show the best trial; train it again with more epochs or seeds."""
    search = _known_search(runs, name, storage)
    from trainer.tuning.space import shown
    from trainer.tuning.table import best_row, trial_rows

    best = best_row(search, trial_rows(search))
    if best is None:
        raise RunError(f"{search.folder}: no trial is complete yet")
    if epochs is None and seeds is None:
        if as_json:
            click.echo(json.dumps(best))
            return
        params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
        click.echo(f"{search.run_of(best['trial']).folder}: {params}")
        click.echo(
            f"{search.space.search.metric} {best['value']:.4f} in epoch {best['best_epoch']},"
            f" accuracy {best['val_accuracy']:.2%}, τ {best['threshold']:.2f}"
        )
        return
    import_framework()
    from trainer.run.training import Reporter
    from trainer.tuning.again import retrain

    with stop_request() as stopping:
        found = retrain(
            search, best, epochs, seeds or 1, split, Reporter(epoch_bar, print_epoch, stopping)
        )
    if as_json:
        click.echo(json.dumps(found))
        return
    for run in found["runs"]:
        click.echo(f"{run['run']}: accuracy {run['accuracy']:.2%}, macro-F1 {run['macro_f1']:.2%}")
    for figure in ("accuracy", "macro_f1"):
        mean, deviation = found[figure]["mean"], found[figure]["deviation"]
        spread = "" if deviation is None else f" ± {deviation:.2%}"
        click.echo(f"{split} {figure.replace('_', '-')}: {mean:.2%}{spread}")
