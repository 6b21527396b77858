"""`extract-vit` and `extract-text`: the frozen encoders, once for each input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from featstore.config import SPLITS
from featstore.errors import DataError, UsageError
from trainer.commands.console import (
    import_framework,
    json_option,
    print_halved,
    print_note,
    print_rows,
    read_config,
    row_bar,
    settings,
    split_option,
)


def _print_plan(plan: dict[str, Any], rate: float, as_json: bool) -> None:
    seconds = plan["todo"] / rate if plan["todo"] else 0.0
    plan = {**plan, "rows_per_second": round(rate, 2), "estimated_seconds": round(seconds, 1)}
    if as_json:
        click.echo(json.dumps(plan))
        return
    click.echo(f"features     {plan['folder']}")
    click.echo(f"asked for    {plan['requested']}")
    changed = f" ({plan['changed']} because the photo changed)" if plan["changed"] else ""
    click.echo(f"stored       {plan['cached']}")
    click.echo(f"quarantined  {plan['quarantined']}")
    planned = f", {plan['planned_shards']} shards" if "planned_shards" in plan else ""
    click.echo(f"to do        {plan['todo']}{planned}{changed}")
    click.echo(
        f"disk         {plan['todo_bytes'] / 1e6:.1f} MB of {plan['free_bytes'] / 1e9:.1f} GB free"
    )
    if plan["todo"]:
        click.echo(f"time         about {seconds / 60:.1f} min at {rate:.1f} rows/s")


def _print_summary(plan: Any, summary: Any, as_json: bool, unit: str) -> None:
    result = {
        **plan.to_dict(),
        "extracted": summary.extracted,
        "failed": summary.failed,
        "seconds": round(summary.seconds, 3),
        "rows_per_second": round(summary.rows_per_second, 2),
        "batch_size": summary.batch_size,
    }
    unread = len(summary.failed) + plan.quarantined
    if unread and unread == plan.requested:
        reason = next(iter(summary.failed.values()), "they failed before")
        raise DataError(
            f"{plan.folder}: none of the {unread} {unit} has features ({reason}); reasons in"
            f" {plan.folder / 'quarantine.json'}: mend the inputs, then run the command again"
        )
    if as_json:
        click.echo(json.dumps(result))
        return
    done = f"{summary.extracted} {unit} extracted" if plan.keys else f"nothing to do: {unit}"
    speed = f" in {summary.seconds:.1f} s ({summary.rows_per_second:.1f}/s)" if plan.keys else ""
    click.echo(f"{done}{speed}, {plan.cached} were stored already; {plan.folder}")
    for key, reason in list(summary.failed.items())[:5]:
        click.echo(f"quarantined {key}: {reason}", err=True)
    if unread:
        click.echo(f"{unread} quarantined; reasons in {plan.folder / 'quarantine.json'}", err=True)


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


@click.command("extract-vit")
@split_option("all", *SPLITS)
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@click.option("--shard-range", metavar="A:B", help="Make planned shards A to B - 1 only.")
@click.option(
    "--ray", metavar="ADDRESS", help="Extract on a Ray cluster: host:port, auto, or local."
)
@click.option("--actors", type=click.IntRange(1), help="Ray: encoders at work.  [all that fit]")
@click.option(
    "--num-gpus", type=click.FloatRange(0), help="Ray: GPUs of an actor.  [1 if there are any]"
)
@click.option(
    "--num-cpus", type=click.FloatRange(0), help="Ray: CPUs of an actor.  [2; all without GPU]"
)
@click.option(
    "--return-shards", is_flag=True, help="Ray: send shards here, not to the shared folder."
)
@json_option
@settings("data", "encoders", "store")
def extract_vit(
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
    **flags: Any,
) -> None:
    """Run the frozen vision encoder once for each photo of a split."""
    shards = _shard_range(shard_range)
    if ray is None and (actors, num_gpus, num_cpus, return_shards) != (None, None, None, False):
        raise UsageError(
            "--actors, --num-gpus, --num-cpus and --return-shards are for a Ray cluster;"
            " add --ray ADDRESS"
        )
    config = read_config(config_file, flags)
    from featstore.data.dataset import load_dataset
    from featstore.extract.extract import bring_images

    dataset = load_dataset(config.data, Path(config.store.root), save=not dry_run)
    print_rows(dataset)
    ids = dataset.examples.image_ids[dataset.rows(split)].tolist()
    inputs = (config.encoders, config.store, ids, dataset.images)

    def bar(total: int) -> Any:
        return row_bar(total, " images")

    if ray is not None and not dry_run:
        from featstore.extract.ray import Actors, bring_images_on_ray

        wanted = Actors(actors, num_gpus, num_cpus, return_shards)
        plan, summary = bring_images_on_ray(
            ray, *inputs, wanted, bar, print_halved, shards, print_note
        )
        _print_summary(plan, summary, as_json, "images")
        return
    import_framework()
    if dry_run:
        from featstore.extract.extract import estimate_images

        plan, rate = estimate_images(*inputs)
        planned = -(-len(plan.keys) // config.store.shard_rows)
        _print_plan({**plan.to_dict(), "planned_shards": planned}, rate, as_json)
        return
    plan, summary = bring_images(*inputs, bar, print_halved, shards)
    _print_summary(plan, summary, as_json, "images")


@click.command("extract-text")
@split_option("all", *SPLITS)
@click.option("--k-txt", "train__k_txt", type=int, help="last text layers that will train")
@click.option("--dry-run", is_flag=True, help="Print what there is to do; change nothing.")
@json_option
@settings("data", "encoders", "store")
def extract_text(
    split: str, dry_run: bool, as_json: bool, config_file: str | None, **flags: Any
) -> None:
    """Run the frozen text layers once for each sentence of a split."""
    config = read_config(config_file, flags)
    from featstore.data.dataset import load_dataset
    from featstore.extract.extract import bring_text

    dataset = load_dataset(config.data, Path(config.store.root), save=not dry_run)
    print_rows(dataset)
    sentences = dataset.examples.hypotheses[dataset.rows(split)].tolist()
    k_txt = config.train.k_txt
    import_framework()
    if dry_run:
        from featstore.extract.extract import estimate_text

        plan, rate = estimate_text(config.encoders, config.store, sentences, k_txt)
        _print_plan(plan.to_dict(), rate, as_json)
        return
    plan, summary = bring_text(
        config.encoders,
        config.store,
        sentences,
        k_txt,
        lambda total: row_bar(total, " sentences"),
        print_halved,
    )
    _print_summary(plan, summary, as_json, "sentences")
