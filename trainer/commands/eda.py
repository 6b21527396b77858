"""`eda`: what the rows and photos show before anything is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from featstore.errors import counted
from featstore.progress import working
from featstore.quantities import share
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    LIBRARIES,
    draws_option,
    import_framework,
    open_project,
    seed_option,
    settings,
)
from trainer.commands.help import PATH, command
from trainer.commands.showing import show_of


def _print_found(found: dict[str, Any]) -> None:
    """Print a screenful."""
    classes = list(found["words"]["mean_of"])
    for split, at in found["labels"].items():
        if at["rows"]:
            parts = ", ".join(f"{at[name]:,} {name}" for name in classes)
            photos = counted(at["photos"], "photo", ",")
            click.echo(f"{split:>5}: {counted(at['rows'], 'row', ',')} of {photos} ({parts})")
    words, tokens = found["words"], found["tokens"]
    line = f"a sentence has {words['mean']:.1f} words (at most {words['max']})"
    if not tokens["reason"]:
        line += (
            f" and {tokens['mean']:.1f} tokens; {share(tokens['share'])} of them are cut at"
            f" {tokens['sequence_length']}"
        )
    click.echo(line)
    fit = [name for name, at in found["buckets"]["kinds"].items() if at["verdict"] == "fit"]
    fit = [name for name in fit if name != "any"]
    click.echo(f"buckets fit for oversampling: {', '.join(fit) or 'none'}")
    near = found["duplicates"]
    line = (
        f"{counted(near['pairs'], 'pair')} of {counted(near['photos'], 'photo', ',')} differ in up"
        f" to {near['distance']} bits of their hashes"
    )
    if near["pairs"]:
        line += (
            f"; across splits {near['across_splits']}, confirmed {near['confirmed']},"
            f" refuted {near['refuted']}"
        )
    click.echo(line)
    click.echo(found["hypothesis_only"]["meaning"].replace(". ", ".\n"))


def summary_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return what `--json` prints: what `eda.json` has but for distributions and long lists."""
    short = {name: value for name, value in found.items() if name not in ("command", "warnings")}
    for name in ("words", "tokens", "rows_a_photo", "duplicates"):
        short[name] = {k: v for k, v in short[name].items() if k not in ("histogram", "named")}
    short["photos"] = {k: v for k, v in short["photos"].items() if k != "sizes"}
    return short


@command()
@click.option(
    "--out", type=PATH, help="Folder for what it leaves.  [default: eda in the folder of the runs]"
)
@click.option("--buckets", type=PATH, help="Bucket file.  [default: the study's ten]")
@click.option(
    "--spatial", type=PATH, help="File of spatial keywords.  [default: the study's eleven]"
)
@click.option(
    "--distance",
    type=click.IntRange(0, 31),
    default=8,
    show_default=True,
    help="Most bits of 64 in which the hashes of two photos that are alike differ.",
)
@click.option(
    "--samples",
    type=click.IntRange(0, 60),
    default=8,
    show_default=True,
    help="Photos shown of each label.",
)
@draws_option
@seed_option("Seed of the draws, and of the photos shown.")
@json_option
@settings("data", "encoders", "store")
def eda(
    out: str | None,
    buckets: str | None,
    spatial: str | None,
    distance: int,
    samples: int,
    draws: int,
    seed: int,
    as_json: bool,
    config_file: str | None,
    **flags: Any,
) -> None:
    """Show what the rows and photos are like, and what warns of them, before training.

    Leaves eda.html, one page with every figure; eda.json; and the figures as PNG.
    docs/EDA.md says what each figure is.
    """
    project = open_project(config_file, flags)
    with working(LIBRARIES):
        from trainer.exploration.explore import eda as explore

    found = explore(
        project,
        out,
        buckets=buckets,
        spatial=spatial,
        distance=distance,
        samples=samples,
        draws=draws,
        seed=seed,
        show=dataclasses.replace(show_of(as_json), loading=import_framework),
    )
    if as_json:
        answer(summary_of(found))
    else:
        _print_found(found)
    for line in found["warnings"]:
        warn(line, "warning: ")
    if not as_json:
        click.echo(f"written: {Path(found['folder'], found['files']['page'])}")
