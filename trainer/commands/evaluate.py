"""`evaluate`: a run on a split, or on labelled rows of a file, beside its controls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featstore.errors import Advice, UsageError, counted
from featstore.publish import check_kept
from featstore.quantities import number, share
from trainer.commands.answer import answer, json_option, warn
from trainer.commands.console import (
    encoding_option,
    open_run,
    quoted,
    run_options,
    split_option,
    stop_request,
    was_given,
)
from trainer.commands.help import PATH, command
from trainer.commands.printed import KEPT, print_confusion
from trainer.commands.showing import note, show_of, shown_reporter
from trainer.config import CONTROLS

SHOWN_BUCKET_ROWS = 20
"""A bucket of fewer rows is named neither the best nor the worst."""


def _print_result(result: dict[str, Any]) -> None:
    """Print a screenful: figures, controls, calibration, buckets, errors."""
    from trainer.results.summary import between, class_line, title

    if result["control"] != "none":
        click.echo(f"control: {result['control']}")
    click.echo(
        f"{result['run']} on {title(result)}: {counted(result['rows'], 'row')} of"
        f" {counted(result['images'], 'photo')}"
        f" ({class_line(result)})"
    )
    if result["threshold"] is None:
        _print_of_three(result)
    else:
        _print_at_thresholds(result)
    figures = [
        f"{name} {number(result[key], 4)} ({between(result['intervals'][key], 1, 3)})"
        for name, key in (("AUC", "auc"), ("average precision", "average_precision"))
    ]
    click.echo(f"{', '.join(figures)}, loss {result['loss']:.4f}, Brier {result['brier']:.4f}")
    calibration = result["calibration"]
    line = f"calibration error {calibration['before']['calibration_error']:.4f}"
    if calibration["temperature"] is not None:
        line += (
            f"; {calibration['after']['calibration_error']:.4f} with the temperature"
            f" {calibration['temperature']:.3f} of val"
        )
    elif result["without_val"]:
        tau = "" if result["threshold"] is None else " and no interval of τ"
        line += f"; no temperature{tau}: {result['without_val']}"
    click.echo(line)
    _print_controls(result)
    _print_extremes(result)


def _with_interval(result: dict[str, Any], value: float, name: str) -> str:
    from trainer.results.summary import between

    return f"{share(value, 2)} ({between(result['intervals'][name])})"


def _print_of_three(result: dict[str, Any]) -> None:
    """Print the shares and the confusion matrix of a run without threshold."""
    at = result["at_argmax"]
    accuracy, macro_f1 = (_with_interval(result, at[n], n) for n in ("accuracy", "macro_f1"))
    click.echo(f"accuracy {accuracy}, macro-F1 {macro_f1}")
    print_confusion(at)


def _print_at_thresholds(result: dict[str, Any]) -> None:
    from trainer.results.summary import between

    click.echo(
        f"{'threshold':>24} {'accuracy (95 %)':>23} {'macro-F1 (95 %)':>23}"
        f" {'tp':>5} {'fp':>5} {'fn':>5} {'tn':>5}"
    )
    tau = f"τ = {result['threshold']:.2f}"
    if result["threshold_interval"]:
        tau += f" ({between(result['threshold_interval'], 1, 2)})"
    for name, found, suffix in (
        (tau, result["at_threshold"], ""),
        ("0.50", result["at_half"], "_at_half"),
    ):
        accuracy = _with_interval(result, found["accuracy"], f"accuracy{suffix}")
        macro_f1 = _with_interval(result, found["macro_f1"], f"macro_f1{suffix}")
        counts = " ".join(f"{found[key]:5d}" for key in ("tp", "fp", "fn", "tn"))
        click.echo(f"{name:>24} {accuracy:>23} {macro_f1:>23} {counts}")


def _warn(result: dict[str, Any]) -> None:
    """Say what was not measured, and what the figures are not good for."""
    from trainer.results.controls import NO_BLIND
    from trainer.results.summary import seen_lines, train_controls

    for key, reason in result.get("controls_missing", {}).items():
        mend = f"; {quoted(train_controls(result))} trains it" if reason == NO_BLIND else ""
        warn(f"control {key}: {reason}{mend}")
    lost = result["rows_of_split"] - result["rows"]
    if lost and "rows_left_out" not in result:
        warn(f"{counted(lost, 'row')} left out: the photo could not be read")
    elif lost:
        reasons = [f"{count} {reason}" for reason, count in result["rows_left_out"].items()]
        unread = lost - sum(result["rows_left_out"].values())
        reasons += [f"{unread} photo could not be read"] if unread else []
        warn(f"{counted(lost, 'row')} left out: {', '.join(reasons)}")
    for line in seen_lines(result):
        warn(line, "warning: ")


def _print_controls(result: dict[str, Any]) -> None:
    from trainer.results.summary import CONTROL_NAMES, between, gained

    if not any(result.get("controls", {}).values()):
        return
    click.echo(f"{'control':>32} {'accuracy (95 %)':>23} {'AUC':>7}   this run above it, in points")
    for name, found in result["controls"].items():
        if found is not None:
            accuracy = f"{share(found['accuracy'], 2)} ({between(found['interval'])})"
            click.echo(
                f"{CONTROL_NAMES[name]:>32} {accuracy:>23} {number(found['auc'], 4):>7}  "
                f" {gained(found['difference'])}"
            )
    if blind := result["controls"]["hypothesis-only"]:
        tau = "" if blind["threshold"] is None else ", at its own τ"
        click.echo(f"trained on the sentence alone: {blind['run']}{tau}")
    click.echo(result["verdict"].replace(". ", ".\n"))


def _print_extremes(result: dict[str, Any]) -> None:
    named = [
        (found["accuracy"], name, found["rows"])
        for name, found in result["buckets"].items()
        if found["rows"] >= SHOWN_BUCKET_ROWS
    ]
    if len(named) > 1:
        worst, best = min(named), max(named)
        shown = [f"{name} {share(accuracy)} of {rows}" for accuracy, name, rows in (best, worst)]
        click.echo(f"buckets: best {shown[0]}, worst {shown[1]}")
    errors = result["errors"]
    if errors["rows"]:
        click.echo(
            f"errors: {errors['rows']}, {share(errors['share_above'])} of them with a confidence"
            f" above {errors['confident']}"
        )


@command()
@click.argument("run")
@split_option("test", "val", "train")
@click.option("--rows", type=PATH, help="Labelled rows in place of a split's.")
@click.option("--images", type=PATH, help="Folder of their photos.  [default: the run's]")
@encoding_option()
@click.option("--no-cache", is_flag=True, help="Do not keep the features of --rows in the store.")
@click.option(
    "--control",
    type=click.Choice(CONTROLS),
    help="Control that it is measured with.  [default: as in training]",
)
@click.option(
    "--with-controls", is_flag=True, help="Train the same run on the sentence alone, if missing."
)
@click.option("--buckets", type=PATH, help="Bucket file.  [default: the study's ten]")
@click.option("--out", type=PATH, help="Folder for the files that it leaves.  [default: the run's]")
@run_options
@json_option
def evaluate(
    run: str,
    split: str,
    rows: str | None,
    images: str | None,
    encoding: str,
    no_cache: bool,
    control: str | None,
    with_controls: bool,
    buckets: str | None,
    out: str | None,
    runs: str,
    as_json: bool,
) -> None:
    """Measure a run at its own threshold, with intervals, beside its controls.

    A run of three classes has none: the largest probability decides.

    Leaves evaluate-SPLIT.json, predictions-SPLIT.csv and summary.md in the run's folder;
    docs/EVALUATION.md says what each figure is.
    """
    if rows is not None and was_given("split"):
        raise UsageError("--split and --rows exclude each other: a split, or the rows of a file")
    if rows is None and (images is not None or no_cache or encoding):
        raise UsageError(
            "--images, --encoding and --no-cache belong to --rows; the run's own photos are"
            " --data-images"
        )
    if with_controls and control not in (None, "none"):
        raise UsageError("--with-controls and --control exclude each other: all of them, or one")
    found = open_run(run, runs)
    show = show_of(as_json)
    if with_controls:
        from featstore.encoders.framework import limit_threads
        from trainer.model.sizes import step_threads

        # Photos of other rows are encoded by every core.
        if rows is None:
            limit_threads(step_threads(found.config))
        with stop_request() as stopping:
            found.train_control(shown_reporter(stopping), show)
    result = found.evaluate(
        split,
        control,
        show,
        rows=rows,
        images=images,
        cache=not no_cache,
        buckets=buckets,
        encoding=encoding,
        out=out,
    )
    if as_json:
        answer(result)
    else:
        _print_result(result)
    _warn(result)
    check_kept(KEPT, result["not_kept"], Advice("keep them elsewhere with --out FOLDER"))
    if as_json:
        return
    for path in result["files"].values():
        note(f"{Path(result['folder'], path)}")
