"""`explain`: what a run looks at in some rows, on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featstore.errors import Advice, UsageError, counted
from featstore.progress import working
from featstore.publish import check_kept, check_may_write, why_not_kept
from featstore.quantities import share
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    encoding_option,
    open_run,
    run_options,
    seed_option,
    split_option,
    was_given,
)
from trainer.commands.help import PATH, command
from trainer.commands.printed import KEPT
from trainer.commands.showing import note, show_of

COUNT = click.IntRange(min=1)


@command()
@click.argument("run")
@click.option(
    "--rows", type=COUNT, help="So many rows, as many right as wrong.  [default: 12, if no choice]"
)
@click.option(
    "--id", "--ids", "ids", multiple=True, help="All rows of these photos: a,b or repeated."
)
@click.option("--errors", type=COUNT, help="So many errors, the most confident first.")
@split_option("test", "val", "train")
@click.option("--file", type=PATH, help="Rows of a file, labelled or not, in place of a split's.")
@click.option("--images", type=PATH, help="Folder of the photos of --file.  [default: the run's]")
@encoding_option("--file")
@click.option(
    "--sample",
    type=COUNT,
    default=64,
    show_default=True,
    help="Rows over which the maps are held against hiding patches.",
)
@seed_option("Of both.")
@click.option("--out", type=PATH, help="Page to write.  [default: explain.html of the run]")
@click.option("--png", type=PATH, help="Folder for a PNG of each row.")
@click.option("--npz", type=PATH, help="File (.npz) for all arrays.")
@run_options
@json_option
def explain(
    run: str,
    rows: int | None,
    ids: tuple[str, ...],
    errors: int | None,
    split: str,
    file: str | None,
    images: str | None,
    encoding: str,
    sample: int,
    seed: int,
    out: str | None,
    png: str | None,
    npz: str | None,
    runs: str,
    as_json: bool,
) -> None:
    """Show where a run's cross-attention looks, and whether that is what counts.

    Beside it stand gradient × input of patches and words, and what happens when patches are
    hidden. No photo is encoded again. docs/EXPLAIN.md says what each map is.
    """
    if file is not None and was_given("split"):
        raise UsageError("--split and --file exclude each other: a split, or the rows of a file")
    if file is None and (images is not None or encoding):
        raise UsageError(
            "--images and --encoding belong to --file; the run's own photos are --data-images"
        )
    chosen = [name for name, x in (("--rows", rows), ("--id", ids), ("--errors", errors)) if x]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other: choose rows in one way")
    if npz is not None and not npz.endswith(".npz"):
        raise UsageError(f"--npz {npz}: expected a name that ends with .npz")
    for asked in (out, npz, png and str(Path(png, "row.png"))):
        if asked is not None:
            check_may_write(Path(asked), Advice("name a place elsewhere"))
    found = open_run(run, runs)
    explanation = found.explain(
        split,
        rows=rows,
        ids=[part.strip() for one in ids for part in one.split(",") if part.strip()],
        errors=errors,
        file=file,
        images=images,
        encoding=encoding,
        sample=sample,
        seed=seed,
        show=show_of(as_json),
    )
    page = Path(out) if out is not None else found.folder / "explain.html"
    result: dict[str, Any] = {**explanation.summary(), "page": str(page)}
    with working("drawing the page"):
        result["not_kept"] = why_not_kept(lambda: explanation.page(page))
    if as_json:
        answer(result)
    else:
        _print(result)
    for row in result["rows"]:
        if row["without_photo"]:
            warn(f"{row['Image_ID']}: shown without its photo: {row['without_photo']}")
    # After the figures, which a place that may not be written does not cost.
    if npz is not None:
        explanation.save(npz)
    if png is not None:
        with working("drawing the rows"):
            explanation.pngs(png)
    check_kept(KEPT, result["not_kept"], Advice("write the page elsewhere with --out FILE"))
    if not as_json:
        for path in filter(None, (str(page), npz, png)):
            note(path)


def _print(result: dict[str, Any]) -> None:
    """Print how well the maps predict what hiding patches does."""
    found = result["agreement"]
    shown = counted(len(result["rows"]), "row")
    click.echo(f"{result['run']}: {shown} of {result['source']}, {result['choice']}")
    click.echo(
        f"rank correlation with hiding patches, over {counted(found['rows'], 'row')} of"
        f" {counted(found['images'], 'photo')} ({share(found['level'], 0)} interval)"
    )
    sizes = [f"{w['patches']} × {w['patches']}" for w in found["windows"]]
    click.echo(" ".join([f"{'windows of patches':>26}", *(f"{size:>24}" for size in sizes)]))
    for name in found["windows"][0]["maps"]:
        cells = [_cell(window["maps"][name]) for window in found["windows"]]
        click.echo(" ".join([f"{name:>26}", *(f"{cell:>24}" for cell in cells)]))


def _cell(figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        return "–"
    interval = figure["interval"]
    between = "" if interval is None else f" ({interval['low']:.2f} to {interval['high']:.2f})"
    return f"{figure['mean']:.2f}{between}"
