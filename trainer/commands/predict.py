"""`predict`: what a run says of rows that it has not seen, or of one photo and one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from featstore.errors import UsageError, counted
from featstore.quantities import both_shares, rate, share
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import encoding_option, open_run, run_options, was_given
from trainer.commands.help import PATH, command
from trainer.commands.showing import note, show_of

FORMATS = ("csv", "jsonl", "parquet")
STREAM = "-"
OF_ROWS = ("--images", "--encoding", "--out", "--format", "--cache/--no-cache")


@command()
@click.argument("run")
@click.option(
    "--rows",
    type=PATH,
    help="Row file, JSONL, CSV or Parquet, labelled or not; - is standard input.",
)
@click.option("--images", type=PATH, help="Folder of the photos.  [default: the run's own]")
@encoding_option()
@click.option(
    "--out",
    type=PATH,
    default=STREAM,
    show_default=True,
    help="File to write; - is standard output.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(FORMATS),
    help="Format of the file.  [default: by the name of --out; else csv]",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    help="Keep the features that were missing in the store, or write nothing there.  [--cache]",
)
@click.option("--image", type=PATH, help="One photo, in place of --rows.")
@click.option("--text", help="The sentence about --image.")
@run_options
@json_option
def predict(
    run: str,
    rows: str | None,
    images: str | None,
    encoding: str,
    out: str,
    format: str | None,
    cache: bool,
    image: str | None,
    text: str | None,
    runs: str,
    as_json: bool,
) -> None:
    """Say whether photos entail sentences, at the run's own threshold if it has one."""
    if (rows is None) == (image is None and text is None) or (image is None) != (text is None):
        raise UsageError("give --rows FILE, or --image PHOTO and --text SENTENCE")
    if image is not None and text is not None:
        if names := [flag for flag in OF_ROWS if was_given(flag.rpartition("-")[2])]:
            raise UsageError(
                f"{', '.join(names)}: of --rows; the answer about --image is printed, and nothing"
                " is kept"
            )
        _predict_pair(run, runs, image, text, as_json)
        return
    to_stream = out == STREAM
    if as_json and to_stream:
        raise UsageError("--json: standard output has the predictions; give --out FILE")
    found = open_run(run, runs)
    from trainer.results.predict import line_type
    from trainer.results.predictions_file import format_of, opened_for

    path = None if to_stream else Path(out)
    format_name = format_of(path, format)
    source: Any = sys.stdin.buffer if rows == STREAM else rows
    columns = line_type(found.config.data.classes)._fields
    with opened_for(path or sys.stdout.buffer, format_name, columns) as write:
        predictions = found.predictions(source, images, show_of(as_json), cache, encoding)
        write(predictions.lines())
    for line in predictions.dataset.notes():
        note(line)
    summary = {"run": found.name, "out": out, "format": format_name, **predictions.summary()}
    if as_json:
        answer(summary)
    else:
        _print_summary(summary, to_stream)
    for title, reasons in (
        ("without a prediction", summary["not_predicted"]),
        ("with a warning", summary["kept_with_warning"]),
    ):
        if reasons:
            listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            warn(f"rows {title}: {listed}")


def _predict_pair(run: str, runs: str, image: str, text: str, as_json: bool) -> None:
    result = open_run(run, runs).predict_pair(image, text, show_of(as_json))
    if as_json:
        answer(result)
        return
    if result["threshold"] is None:
        shares = [f"{name} {share(p, 2)}" for name, p in result["probabilities"].items()]
        click.echo(f"{result['label']} ({', '.join(shares)})")
        return
    click.echo(
        f"{result['label']} (confidence {share(result['confidence'], 2)}; probability of entailment"
        f" {result['probability_entailment']:.4f}, τ = {result['threshold']:.2f})"
    )


def _print_summary(summary: dict[str, Any], err: bool) -> None:
    """Print what was predicted, and the figures of labelled rows; `err`: as notes on stderr."""
    say = note if err else click.echo
    from trainer.metrics import decided
    from trainer.results.summary import class_line

    threshold = summary["threshold"]
    tau = "" if threshold is None else f" at τ = {threshold:.2f}"
    say(
        f"{summary['predicted']} of {counted(summary['rows'], 'row')} predicted{tau}"
        f" ({class_line(summary['labels'])}), {rate(summary['rows_per_second'], 'rows')}"
    )
    if metrics := summary["metrics"]:
        at = decided(metrics)
        auc = "undefined" if metrics["auc"] is None else f"{metrics['auc']:.4f}"
        counts = (
            ""
            if threshold is None
            else "; " + ", ".join(f"{key} {at[key]}" for key in ("tp", "fp", "fn", "tn"))
        )
        say(f"{counted(metrics['rows'], 'labelled row')}: {both_shares(at)}, AUC {auc}{counts}")
