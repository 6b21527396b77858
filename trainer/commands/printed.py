"""What several commands print: rows read, figures, and that a report could not be kept."""

from __future__ import annotations

from typing import Any

import click

from featstore.errors import counted
from featstore.quantities import both_shares, share
from trainer.commands.answer import warn
from trainer.commands.showing import note

KEPT = "the figures are not kept: "
"""How the error starts where the report of figures that were printed could not be written."""


def print_rows(dataset: Any, named: bool = True) -> None:
    """Print how many rows each split has, and which rows were left out.

    Args:
        dataset: The rows.
        named: Whether its report was written.
    """
    counts = dataset.counts()
    rows = ", ".join(f"{split} {n}" for split, n in counts["rows"].items())
    note(f"rows: {rows}")
    for title, reasons in (
        ("left out", counts["dropped"]),
        ("kept with a warning", counts["kept_with_warning"]),
    ):
        if reasons:
            found = ", ".join(f"{n} {reason}" for reason, n in reasons.items())
            where = f" (named in {dataset.report})" if named else ""
            warn(f"rows {title}: {found}{where}")
    for line in dataset.notes():
        warn(line)


def print_confusion(at: dict[str, Any]) -> None:
    """Print what rows of each class are called, and how well it is told; see `class_metrics`."""
    names = list(at["confusion"])
    head = " ".join(f"{name:>14}" for name in names)
    click.echo(f"{'truth':>16} {head}  called so; {'precision':>9} {'recall':>8} {'F1':>8}")
    for name in names:
        cells = " ".join(f"{at['confusion'][name][other]:14d}" for other in names)
        figures = at[name]
        click.echo(
            f"{name:>16} {cells} {share(figures['precision'], 2):>10}"
            f" {share(figures['recall'], 2):>8} {share(figures['f1'], 2):>8}"
        )


def print_metrics(result: dict[str, Any]) -> None:
    from trainer.results.summary import class_line

    auc = "undefined" if result["auc"] is None else f"{result['auc']:.4f}"
    click.echo(
        f"{result['split']}: {counted(result['rows'], 'row')} ({class_line(result)}),"
        f" loss {result['loss']:.4f}, AUC {auc}"
    )
    if result["threshold"] is None:
        at = result["at_argmax"]
        click.echo(both_shares(at))
        print_confusion(at)
        return
    at, half = result["at_threshold"], result["at_half"]
    click.echo(f"{'threshold':>16} {'accuracy':>9} {'macro-F1':>9}   tp    fp    fn    tn")
    for name, found in ((f"τ = {result['threshold']:.2f}", at), ("0.50", half)):
        counts = " ".join(f"{found[key]:5d}" for key in ("tp", "fp", "fn", "tn"))
        accuracy, macro_f1 = (share(found[key], 2) for key in ("accuracy", "macro_f1"))
        click.echo(f"{name:>16} {accuracy:>9} {macro_f1:>9} {counts}")
