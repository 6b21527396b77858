"""`compare`: runs on the same rows."""

from __future__ import annotations

from pathlib import Path

import click

from featstore.errors import Advice, UsageError
from featstore.publish import check_may_write, write_json, write_text
from trainer.commands.answer import answer, json_option
from trainer.commands.console import (
    draws_option,
    encoding_option,
    open_run,
    run_options,
    seed_option,
    split_option,
    was_given,
)
from trainer.commands.help import PATH, command
from trainer.commands.showing import note, show_of

SUFFIXES = (".md", ".json")


@command()
@click.argument("run", nargs=-1, required=True)
@split_option("test", "val", "train")
@click.option("--rows", type=PATH, help="Labelled rows to compare on, not a split.")
@click.option("--images", type=PATH, help="Folder of their photos.  [default: each run's]")
@encoding_option()
@click.option("--buckets", type=PATH, help="Bucket file.  [default: the one that ships]")
@draws_option
@seed_option()
@click.option("--out", type=PATH, help="Write a page (.md) or the figures (.json).")
@run_options
@json_option
def compare(
    run: tuple[str, ...],
    split: str,
    rows: str | None,
    images: str | None,
    encoding: str,
    buckets: str | None,
    draws: int,
    seed: int,
    out: str | None,
    runs: str,
    as_json: bool,
) -> None:
    """Compare runs on the same rows; the first is the base.

    Each is measured at its own threshold and at 0.5, with intervals by image, and
    tested against the base row by row: is the difference more than chance?
    """
    target = None if out is None else Path(out)
    if target is not None and target.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: expected a name that ends with .md or .json")
    if rows is not None and was_given("split"):
        raise UsageError("--split and --rows exclude each other: a split, or the rows of a file")
    if (images is not None or encoding) and rows is None:
        raise UsageError(
            "--images and --encoding belong to --rows; the runs' own photos are --data-images"
        )
    if target is not None:
        check_may_write(target, Advice("name a file elsewhere with --out"))
    base, *others = [open_run(name, runs) for name in run]
    from trainer.results.compare_tables import as_markdown, as_text

    result = base.compare(
        *others,
        split=split,
        rows=rows,
        images=images,
        encoding=encoding,
        buckets=buckets,
        draws=draws,
        seed=seed,
        show=show_of(as_json),
    )
    if as_json:
        answer(result)
    else:
        click.echo(as_text(result))
    if target is None:
        return
    if target.suffix == ".json":
        write_json(target, result)
    else:
        write_text(target, as_markdown(result))
    note(f"written: {target}")
