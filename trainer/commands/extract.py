"""`extract-vit` and `extract-text`: the frozen encoders, once for each input."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from featstore.config import SPLITS
from featstore.errors import DataError, UsageError, counted
from featstore.quantities import duration, rate, size
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    Function,
    import_framework,
    open_project,
    settings,
    split_option,
)
from trainer.commands.help import command, setting_option
from trainer.commands.showing import show_of
from trainer.config import TrainConfig

# Of several views the sum of each view's; the rest is the plain photos'.
SUMS = ("requested", "cached", "changed", "quarantined", "todo", "todo_bytes")
SUMS_PLANNED = (*SUMS, "planned_shards", "estimated_seconds")


def _planned(plan: Any, rate: float) -> dict[str, Any]:
    """Return what a plan says, JSON-able."""
    found = plan.to_dict()
    found["planned_shards"] = -(-len(plan.keys) // plan.job.shard_rows)
    seconds = found["todo"] / rate if found["todo"] else 0.0
    return found | {"rows_per_second": round(rate, 2), "estimated_seconds": round(seconds, 1)}


def _of_views(each: list[dict[str, Any]], sums: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of one view; of several their sums, and each view's in `views`."""
    if len(each) == 1:
        return each[0]
    found = each[0] | {name: round(sum(one[name] for one in each), 3) for name in sums}
    return found | {"views": [{"view": view} | one for view, one in enumerate(each)]}


def _print_plans(plans: list[tuple[Any, float]], as_json: bool) -> None:
    """Print what there is to do, of each view, and of several what it is in all."""
    each = [_planned(*found) for found in plans]
    whole = _of_views(each, SUMS_PLANNED)
    if as_json:
        answer(whole)
        return
    for view, found in enumerate(each):
        if len(each) > 1:
            click.echo(f"view {view}")
        _print_plan(found)
    if len(each) > 1:
        click.echo(
            f"{len(each)} views: {counted(whole['todo'], 'row')} to do,"
            f" {size(whole['todo_bytes'])} of {size(whole['free_bytes'])} free"
            + (f", about {duration(whole['estimated_seconds'])}" if whole["todo"] else "")
        )


def _print_plan(found: dict[str, Any]) -> None:
    click.echo(f"features     {found['folder']}")
    click.echo(f"asked for    {found['requested']}")
    changed = f" ({found['changed']} because the photo changed)" if found["changed"] else ""
    click.echo(f"stored       {found['cached']}")
    click.echo(f"quarantined  {found['quarantined']}")
    click.echo(
        f"to do        {found['todo']}, {counted(found['planned_shards'], 'shard')}{changed}"
    )
    click.echo(f"disk         {size(found['todo_bytes'])} of {size(found['free_bytes'])} free")
    if found["todo"]:
        seconds, speed = found["estimated_seconds"], rate(found["rows_per_second"], "rows")
        click.echo(f"time         about {duration(seconds)} at {speed}")


def _print_summaries(made: list[tuple[Any, Any]], as_json: bool) -> None:
    """Print what was done, of each view."""
    each = [_done(plan, summary) for plan, summary in made]
    for plan, summary in made:
        _refuse_nothing(plan, summary)
    if as_json:
        whole = _of_views(each, (*SUMS, "extracted", "seconds"))
        failed = {key: reason for one in each for key, reason in one["failed"].items()}
        seconds = whole["seconds"]
        speed = round(whole["extracted"] / seconds, 2) if seconds else 0.0
        if len(each) > 1:
            whole |= {"failed": failed, "rows_per_second": speed}
        answer(whole)
    known: dict[str, str] = {}
    for view, (plan, summary) in enumerate(made):
        if not as_json:
            click.echo(f"view {view}: " if len(made) > 1 else "", nl=False)
            _print_extracted(plan, summary)
        # What fails under one view mostly fails under all: said once.
        news = {key: reason for key, reason in summary.failed.items() if key not in known}
        if news or not view:
            _warn_of(plan, summary, news)
        known |= news


def _refuse_nothing(plan: Any, summary: Any) -> None:
    """End with an error where no input has features.

    Raises:
        DataError: None has.
    """
    unit, quarantine = plan.job.unit, plan.folder / "quarantine.json"
    unread = len(summary.failed) + plan.quarantined
    if unread and unread == plan.requested:
        reason = next(iter(summary.failed.values()), "they failed before")
        raise DataError(
            f"{plan.folder}: no features of any of {counted(unread, unit.removesuffix('s'))}"
            f" ({reason}); reasons in {quarantine}: mend the inputs, then run the command again"
        )


def _done(plan: Any, summary: Any) -> dict[str, Any]:
    """Return what an extraction found and did, JSON-able."""
    return {
        **plan.to_dict(),
        "extracted": summary.extracted,
        "failed": summary.failed,
        "seconds": round(summary.seconds, 3),
        "rows_per_second": round(summary.rows_per_second, 2),
        "batch_size": summary.batch_size,
        "cut_sentences": summary.cut and summary.cut.to_dict(),
    }


def _warn_of(plan: Any, summary: Any, failed: dict[str, str]) -> None:
    for key, reason in list(failed.items())[:5]:
        warn(f"quarantined {key}: {reason}")
    if unread := len(summary.failed) + plan.quarantined:
        warn(f"{unread} quarantined; reasons in {plan.folder / 'quarantine.json'}")


def _print_extracted(plan: Any, summary: Any) -> None:
    unit = plan.job.unit
    done = counted(summary.extracted, unit.removesuffix("s"))
    done = f"{done} extracted" if plan.keys else f"nothing to do: {unit}"
    speed = ""
    if plan.keys:
        speed = f" in {duration(summary.seconds)} ({rate(summary.rows_per_second, unit)})"
    click.echo(f"{done}{speed}, {plan.cached} were stored already; {plan.folder}")
    if summary.cut and (line := summary.cut.line()):
        warn(line)


def _shard_range(value: str | None) -> range:
    """Read A:B, the planned shards A to B - 1; a side may be left out."""
    first, colon, end = (value or ":").partition(":")
    try:
        found = range(int(first or 0), int(end) if end else sys.maxsize)
        if not colon or found.start < 0 or not found:
            raise ValueError
    except ValueError as error:
        raise UsageError(
            f"--shard-range {value!r}: expected A:B with 0 <= A < B, such as 0:8"
        ) from error
    return found


def _extraction(command: Function) -> Function:
    """Give a command what both kinds of extraction take."""
    for option in (
        settings("data", "encoders", "store"),
        json_option,
        click.option(
            "--return-shards",
            is_flag=True,
            help="With --ray, send shards here, not to the shared folder.",
        ),
        click.option(
            "--num-cpus",
            type=click.FloatRange(0),
            help="CPUs of an actor of --ray.  [default: 2; all without GPU]",
        ),
        click.option(
            "--num-gpus",
            type=click.FloatRange(0),
            help="GPUs of an actor of --ray.  [default: 1 if there are any]",
        ),
        click.option(
            "--actors",
            type=click.IntRange(1),
            help="Actors of --ray, an encoder each.  [default: all that fit]",
        ),
        click.option(
            "--ray",
            metavar="ADDRESS",
            help="Extract on a Ray cluster: host:port, auto, or local.",
        ),
        click.option("--shard-range", metavar="A:B", help="Make planned shards A to B - 1 only."),
        click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing."),
        split_option("all", *SPLITS),
    ):
        command = option(command)
    return command


def _extract(
    kind: str,
    split: str,
    dry_run: bool,
    shard_range: str | None,
    ray: str | None,
    actors: int | None,
    num_gpus: float | None,
    num_cpus: float | None,
    return_shards: bool,
    as_json: bool,
    config_file: str | None,
    source: str = "times",
    **flags: Any,
) -> None:
    shards = _shard_range(shard_range)
    if ray is None and (actors, num_gpus, num_cpus, return_shards) != (None, None, None, False):
        raise UsageError(
            "--actors, --num-gpus, --num-cpus and --return-shards are for a Ray cluster;"
            " add --ray ADDRESS"
        )
    if dry_run and shard_range is not None:
        raise UsageError(
            "--shard-range and --dry-run exclude each other: what there is to do is said of all"
            " shards"
        )
    project = open_project(config_file, flags, save=not dry_run)
    if dry_run:
        plans: list[tuple[Any, float]] = []
        for view in range(project.views if kind == "vit" else 1):
            speed = next((rate for _, rate in plans if rate), None)
            plan = project.estimate(kind, split, source=source, view=view, speed=speed)
            plans.append(plan)
        _print_plans(plans, as_json)
        return
    from featstore.ray_cluster import Actors

    if ray is None and kind == "text":
        # Its tokenizer counts the sentences that were cut.
        import_framework()
    wanted = Actors(actors, num_gpus, num_cpus, return_shards)
    # Seconds, which nothing to do does not need.
    show = dataclasses.replace(show_of(as_json), loading=import_framework)
    found = project.extract(
        kind, split, shards=shards, source=source, ray=ray, actors=wanted, show=show
    )
    _print_summaries(list(found[1].views) or [found], as_json)


@command("extract-vit")
@click.option(
    "--source",
    type=click.Choice(["times", "bytes"]),
    default="times",
    show_default=True,
    help="Of stored photos, read those whose size or times differ, or all bytes.",
)
@setting_option("train", TrainConfig, "views")
@setting_option("train", TrainConfig, "k_vit")
@_extraction
def extract_vit(**options: Any) -> None:
    """Run the frozen vision blocks once for each photo of a split, and each view of it."""
    _extract("vit", **options)


@command("extract-text")
@setting_option("train", TrainConfig, "k_txt")
@_extraction
def extract_text(**options: Any) -> None:
    """Run the frozen text layers once for each sentence of a split."""
    _extract("text", **options)
