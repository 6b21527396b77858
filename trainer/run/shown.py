"""How a training is shown: a bar for each epoch, a line after it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from featstore.progress import bar_seconds, bars
from trainer.run.training import Reporter


@contextlib.contextmanager
def epoch_bar(epoch: int, steps: int) -> Iterator[Any]:
    """Show the steps of an epoch, in a terminal or a notebook only."""
    with bars()(
        total=steps,
        desc=f"epoch {epoch}",
        unit=" steps",
        leave=False,
        mininterval=bar_seconds(),
        disable=None,
    ) as bar:
        yield bar


def print_epoch(record: dict[str, Any]) -> None:
    """Print the figures of an epoch on stderr."""
    at = (
        ""
        if record["threshold"] is None
        else f" at τ {record['threshold']:.2f} ({record['val_accuracy_at_half']:.2%},"
        f" {record['val_macro_f1_at_half']:.2%} at 0.50)"
    )
    print(
        f"epoch {record['epoch']}: loss {record['loss']:.4f}, val loss {record['val_loss']:.4f},"
        f" accuracy {record['val_accuracy']:.2%}, macro-F1 {record['val_macro_f1']:.2%}{at};"
        f" {record['seconds']:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def print_note(line: str) -> None:
    """Print a line for people on stderr."""
    print(line, file=sys.stderr, flush=True)


def threshold_line(metrics: dict[str, Any]) -> str:
    """Say how sure τ is, in one line; "" where enough rows decided it.

    Args:
        metrics: As a run's `metrics.json` has them.
    """
    if "threshold_interval" not in metrics:
        return ""
    interval, rows = metrics["threshold_interval"], metrics["rows"]
    found = (
        "cannot be told" if interval is None else f"{interval['low']:.2f}–{interval['high']:.2f}"
    )
    return (
        f"τ {metrics['threshold']:.2f} comes from {rows} val rows: 95 % interval {found}"
        " (bootstrap over images); the figures at 0.50 do not depend on it"
    )


SHOWN_REPORTER = Reporter(epoch_bar, print_epoch, note=print_note)
