"""`export`: a run as one model from pixels and token ids."""

from __future__ import annotations

from typing import Any

import click

from featstore.errors import counted
from featstore.quantities import duration, size
from trainer.commands.answer import answer, json_option
from trainer.commands.console import open_run, run_options, split_option
from trainer.commands.help import PATH, command
from trainer.commands.showing import show_of


def _print_export(result: dict[str, Any]) -> None:
    check, times = result["check"], result["times"]
    for name, num_bytes in result["files"].items():
        click.echo(f"{name}: {size(num_bytes)}")
    titles = {
        "cached": "from the stored features",
        "end_to_end": "from the end-to-end model",
        "serve_bytes": "of serve_bytes, from the photos' bytes",
    }
    click.echo(
        f"largest difference of a logit over {counted(check['rows'], check['split'] + ' row')}:"
    )
    for name, title in titles.items():
        if name in check:
            found = check[name]
            click.echo(
                f"  {found['largest_difference']:.1e} {title} (at most {found['tolerance']:.1e})"
            )
    if "single_seconds" in times:
        figures = [f"one row {times['single_seconds'] * 1e3:.0f} ms"]
        figures.append(f"32 rows {times['batch_seconds'] * 1e3:.0f} ms")
        if "raw_single_seconds" in times:
            figures.append(f"one from its bytes {times['raw_single_seconds'] * 1e3:.0f} ms")
        click.echo(
            f"loaded in {duration(times['load_seconds'])} by a fresh process; {', '.join(figures)}"
        )


@command()
@click.argument("run")
@click.argument("target", metavar="FILE", type=PATH)
@click.option(
    "--format",
    "format",
    type=click.Choice(["keras", "saved_model", "onnx", "weights"]),
    help="Format of the model.  [default: as FILE's name says]",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Real rows that the model is checked on.",
)
@split_option("test", "val", "train")
@click.option("--force", is_flag=True, help="Replace what is there.")
@run_options
@json_option
def export(
    run: str,
    target: str,
    format: str | None,
    rows: int,
    split: str,
    force: bool,
    runs: str,
    as_json: bool,
) -> None:
    """Write a run as one model, from pixels and words to the logit.

    FILE is model.keras, model.onnx, model.weights.h5, or with --format saved_model a folder. A
    fresh process without this project loads it and must compute the run's own logits on real
    rows; only then does it get its name.
    """
    found = open_run(run, runs)
    result = found.export(
        target, format, split=split, rows=rows, force=force, show=show_of(as_json)
    )
    answer(result) if as_json else _print_export(result)
