"""`extract-vit` and `extract-text`: the frozen encoders, once for each input."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from featstore.config import SPLITS
from featstore.errors import DataError, UsageError, counted
from featstore.progress import SHOWN, duration
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    Function,
    import_framework,
    open_project,
    settings,
    split_option,
)
from trainer.commands.help import command, setting_option
from trainer.config import TrainConfig


def _print_plan(plan: Any, rate: float, as_json: bool) -> None:
    found = plan.to_dict()
    found["planned_shards"] = -(-len(plan.keys) // plan.job.shard_rows)
    seconds = found["todo"] / rate if found["todo"] else 0.0
    found |= {"rows_per_second": round(rate, 2), "estimated_seconds": round(seconds, 1)}
    if as_json:
        answer(found)
        return
    click.echo(f"features     {found['folder']}")
    click.echo(f"asked for    {found['requested']}")
    changed = f" ({found['changed']} because the photo changed)" if found["changed"] else ""
    click.echo(f"stored       {found['cached']}")
    click.echo(f"quarantined  {found['quarantined']}")
    click.echo(
        f"to do        {found['todo']}, {counted(found['planned_shards'], 'shard')}{changed}"
    )
    free = found["free_bytes"] / 1e9
    click.echo(f"disk         {found['todo_bytes'] / 1e6:.1f} MB of {free:.1f} GB free")
    if found["todo"]:
        click.echo(f"time         about {duration(seconds)} at {rate:.1f} rows/s")


def _print_summary(plan: Any, summary: Any, as_json: bool) -> None:
    unit, quarantine = plan.job.unit, plan.folder / "quarantine.json"
    unread = len(summary.failed) + plan.quarantined
    if unread and unread == plan.requested:
        reason = next(iter(summary.failed.values()), "they failed before")
        raise DataError(
            f"{plan.folder}: no features of any of {counted(unread, unit.removesuffix('s'))}"
            f" ({reason}); reasons in {quarantine}: mend the inputs, then run the command again"
        )
    if as_json:
        result = {
            **plan.to_dict(),
            "extracted": summary.extracted,
            "failed": summary.failed,
            "seconds": round(summary.seconds, 3),
            "rows_per_second": round(summary.rows_per_second, 2),
            "batch_size": summary.batch_size,
            "cut_sentences": summary.cut and summary.cut.to_dict(),
        }
        answer(result)
    else:
        _print_extracted(plan, summary)
    for key, reason in list(summary.failed.items())[:5]:
        warn(f"quarantined {key}: {reason}")
    if unread:
        warn(f"{unread} quarantined; reasons in {quarantine}")


def _print_extracted(plan: Any, summary: Any) -> None:
    unit = plan.job.unit
    done = counted(summary.extracted, unit.removesuffix("s"))
    done = f"{done} extracted" if plan.keys else f"nothing to do: {unit}"
    speed = f" in {summary.seconds:.1f} s ({summary.rows_per_second:.1f}/s)" if plan.keys else ""
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
    project = open_project(config_file, flags, save=not dry_run)
    if dry_run:
        _print_plan(*project.estimate(kind, split, source=source), as_json)
        return
    from featstore.ray_cluster import Actors

    if ray is None and kind == "text":
        # Its tokenizer counts the sentences that were cut.
        import_framework()
    wanted = Actors(actors, num_gpus, num_cpus, return_shards)
    # Seconds, which nothing to do does not need.
    show = dataclasses.replace(SHOWN, loading=import_framework)
    found = project.extract(
        kind, split, shards=shards, source=source, ray=ray, actors=wanted, show=show
    )
    _print_summary(*found, as_json)


@command("extract-vit")
@click.option(
    "--source",
    type=click.Choice(["times", "bytes"]),
    default="times",
    show_default=True,
    help="Of stored photos, read those whose size or times differ, or all bytes.",
)
@setting_option("train", TrainConfig, "k_vit")
@_extraction
def extract_vit(**options: Any) -> None:
    """Run the frozen vision blocks once for each photo of a split."""
    _extract("vit", **options)


@command("extract-text")
@setting_option("train", TrainConfig, "k_txt")
@_extraction
def extract_text(**options: Any) -> None:
    """Run the frozen text layers once for each sentence of a split."""
    _extract("text", **options)
