"""`search`: many runs over one store."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from featstore.errors import Command, RunError, UsageError, counted
from featstore.progress import working
from featstore.quantities import both_shares, share, size
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    Function,
    elsewhere,
    flag_sections,
    import_framework,
    quoted,
    read_config,
    run_options,
    runs_option,
    settings,
    split_option,
    stop_request,
    was_given,
)
from trainer.commands.help import PATH, SectionedGroup, setting_option
from trainer.commands.printed import print_rows
from trainer.commands.showing import note, show_of, shown_reporter
from trainer.tuning.space import SearchConfig


def _search_options(command: Function) -> Function:
    """Give a command one flag for each setting of `[search]`."""
    for field in reversed(dataclasses.fields(SearchConfig)):
        # `--seed` is a run's.
        flag = "--search-seed" if field.name == "seed" else None
        command = setting_option("search", SearchConfig, field.name, flag)(command)
    return command


RAY_HELP = "Run the trials on a Ray cluster: host:port, auto, or local."


@click.group("search", cls=SectionedGroup, invoke_without_command=True)
@click.option("--space", "space_file", type=PATH, help="TOML file of what to vary.")
@click.option("--name", help="Name of the search; one of that name goes on.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Trials at once.  [default: 1; with --ray as many as fit]",
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
@settings("data", "encoders", "store", "train", "track")
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
        _refuse_given(context)
        return
    if ray_address is None and (num_gpus, num_cpus) != (None, None):
        raise UsageError("--num-gpus and --num-cpus are of the workers on Ray; give --ray ADDRESS")
    from trainer.run.folder import free_name, run_folder
    from trainer.tuning import drive
    from trainer.tuning.search_file import exists, start_search
    from trainer.tuning.storage import driver_url, masked
    from trainer.tuning.table import best_row, is_open, without_folder

    started, show = time.time(), show_of(as_json)
    name = free_name(Path(runs), "search") if name is None else name
    folder = run_folder(Path(runs), name)
    sections = flag_sections(flags)
    searched = sections.pop("search", {})
    goes_on = (space_file, config_file, init_from) == (None, None, None) and not sections
    goes_on = goes_on and exists(folder)
    # `[search]` is of the space file, not of the settings'.
    own = {key: value for key, value in flags.items() if not key.startswith("search__")}
    config = None if goes_on else read_config(config_file, own, check=False)
    if ray_address is not None:
        from featstore.ray_cluster import check_address

        check_address(ray_address)
    what = drive.meant(config, space_file, folder, init_from, searched, sections, dry_run)
    project, space = what.project, what.space
    for line in what.notes:
        note(line)
    if dry_run:
        print_rows(project.dataset, named=False)
        plans = drive.plan_features(project, space.feature_configs(what.base), show)
        names = [parameter.name for parameter in space.parameters]
        kept = drive.kept_bytes(project, space, what.base)
        if as_json:
            missing = [plan.to_dict() for plan in plans]
            found = {"trials": space.trials, "parameters": names, "to_extract": missing}
            answer({**found, "kept_bytes": kept})
        else:
            click.echo(f"{counted(space.trials, 'trial')} of {', '.join(names)}")
            best = counted(min(space.search.kept, space.trials), "trial")
            click.echo(
                f"kept: about {size(kept)}, the weights of the best {best}; of each other"
                " trial less than 0.2 MB"
            )
        return
    # Before the extraction, so that a wrong name or storage does not wait for its end.
    with working("preparing the search"):
        search = start_search(folder, what.base, space, what.init_from, storage, project)
    project.save_dataset(folder)
    print_rows(project.dataset)
    deadline = float("inf") if timeout is None else started + timeout
    places = drive.Places(workers, ray_address, num_gpus, num_cpus)
    with stop_request() as stopping:
        outcome = drive.run_search(search, project, places, deadline, stopping, show)
    watched, files, rows = outcome.watched, outcome.files, outcome.rows
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
        answer(found)
    else:
        _print_leaderboard(search, rows)
        click.echo(f"{', '.join(str(path) for path in files)}")
        if watched.peak_bytes:
            note(f"workers' memory at most {size(watched.peak_bytes)}")
        place = masked(driver_url(storage)) if storage else search.folder / "study.journal"
        note(f"see it: optuna-dashboard {place}")
        note(f"        tensorboard --logdir {search.folder}")
        if search.unfinished:
            ended = sum(not is_open(row) for row in rows)
            note(
                f"{ended} of {counted(space.trials, 'trial')} ended;"
                f" {quoted(Command('search', name=name, bare=True))} goes on with the rest"
            )
    if gone := without_folder(search, rows):
        warn(gone)
    if best_row(search, rows) is None and rows:
        reasons = {row["reason"] for row in rows if row["reason"]}
        raise RunError(f"{folder}: no trial ended well ({'; '.join(sorted(reasons)[:3])})")


def _refuse_given(context: click.Context) -> None:
    """Refuse options before `show` and `best`, which do not see them; `--quiet` is for all.

    Raises:
        UsageError: There is one.
    """
    options = [option for option in context.command.params if was_given(str(option.name))]
    flags = [option.opts[0] for option in options if option.name != "quiet"]
    if flags:
        word = context.invoked_subcommand
        raise UsageError(
            f"{', '.join(flags)}: before {word!r}, which does not see what is given there; give"
            f" what `search {word}` takes after it"
        )


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


@search_group.command("show")
@click.argument("name")
@click.option("--storage", help="Database URL, where the search has one.")
@run_options
@json_option
def search_show(name: str, storage: str | None, runs: str, as_json: bool) -> None:
    """Print a search's leaderboard, also while it runs; write its plots."""
    from trainer.tuning.drive import load_search
    from trainer.tuning.plots import no_importance
    from trainer.tuning.table import ranked, rows_now, without_folder, write_leaderboard

    search = load_search(name, runs, storage, **elsewhere()).search
    rows = rows_now(search)
    if as_json:
        answer({"search": name, "trials": ranked(search, rows)})
    else:
        _print_leaderboard(search, rows)
    if gone := without_folder(search, rows):
        warn(gone)
    with working("drawing the plots"):
        files = write_leaderboard(search, rows)
    if as_json:
        return
    click.echo(", ".join(str(path) for path in files))
    if why := no_importance(search, rows):
        note(why)


@search_group.command("best")
@click.argument("name")
@click.option("--epochs", type=click.IntRange(min=1), help="Train it again for so many epochs.")
@click.option("--seeds", type=click.IntRange(min=1), help="Train it again with so many seeds.")
@click.option("--storage", help="Database URL, where the search has one.")
@split_option("val", "test")
@run_options
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
    if epochs is None and seeds is None and was_given("split"):
        raise UsageError(
            "--split belongs to --epochs and --seeds: a trial's own figures are of val, and"
            " `evaluate` measures its run on test"
        )
    from trainer.tuning.drive import load_search
    from trainer.tuning.space import shown
    from trainer.tuning.table import without_folder

    results = load_search(name, runs, storage, **elsewhere())
    search, best = results.search, results.best
    if best is None:
        raise RunError(f"{search.folder}: no trial is complete yet")
    if epochs is None and seeds is None:
        if gone := without_folder(search, [best]):
            again = Command("search", "best", name, seeds=1)
            warn(f"{gone}; {quoted(again)} trains it again")
        if as_json:
            answer(best)
            return
        params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
        click.echo(f"{search.run_of(best['trial']).folder}: {params}")
        tau = "" if best["threshold"] is None else f", τ {best['threshold']:.2f}"
        click.echo(
            f"{search.space.search.metric} {best['value']:.4f} in epoch {best['best_epoch']},"
            f" accuracy {share(best['val_accuracy'], 2)}{tau}"
        )
        return
    import_framework()
    with stop_request() as stopping:
        reporter = shown_reporter(stopping)
        found = results.retrain(epochs, seeds or 1, split, reporter, show_of(as_json))
    if as_json:
        answer(found)
        return
    for run in found["runs"]:
        click.echo(f"{run['run']}: {both_shares(run)}")
    for figure in ("accuracy", "macro_f1"):
        mean, deviation = found[figure]["mean"], found[figure]["deviation"]
        spread = "" if deviation is None else f" ± {share(deviation, 2)}"
        click.echo(f"{split} {figure.replace('_', '-')}: {share(mean, 2)}{spread}")
