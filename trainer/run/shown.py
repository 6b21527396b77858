"""How a training is shown: a bar for each epoch, a line after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from featstore.progress import (
    Progress,
    Show,
    bar_columns,
    bars,
    clock,
    logged_bar,
    print_line,
    redrawn,
)
from featstore.quantities import both_shares, duration, share
from trainer.run.training import Reporter


class _Logged:
    """The steps of an epoch in a log."""

    def __init__(self) -> None:
        self._advance: Progress = lambda rows: None
        self._figures: dict[str, Any] = {}

    def goes_to(self, advance: Progress) -> None:
        """Give what is called with each step."""
        self._advance = advance

    def update(self, n: int = 1) -> None:
        """Count steps."""
        self._advance(n)

    def set_postfix(self, **figures: Any) -> None:
        """Keep what the next line ends with."""
        self._figures = figures

    def figures(self) -> str:
        """Return it."""
        return ", ".join(f"{name} {value}" for name, value in self._figures.items())


@contextlib.contextmanager
def epoch_bar(epoch: int, steps: int) -> Iterator[Any]:
    """Show the steps of an epoch: a bar in a terminal or a notebook, lines in a log."""
    if not redrawn():
        logged = _Logged()
        with logged_bar(steps, "steps", f"epoch {epoch}", last=False, more=logged.figures) as step:
            logged.goes_to(step)
            yield logged
        return
    with (
        bars()(
            total=steps, desc=f"epoch {epoch}", unit=" steps", leave=False, ncols=bar_columns()
        ) as bar,
        clock(bar),
    ):
        yield bar


def print_epoch(record: dict[str, Any]) -> None:
    """Print the figures of an epoch on stderr."""
    figures = both_shares(record, "val_")
    if record["threshold"] is not None:
        half = [share(record[f"val_{key}_at_half"], 2) for key in ("accuracy", "macro_f1")]
        figures += f" at τ {record['threshold']:.2f} ({', '.join(half)} at 0.50)"
    print_line(
        f"epoch {record['epoch']}: loss {record['loss']:.4f}, val loss {record['val_loss']:.4f},"
        f" {figures}; {duration(record['seconds'])}"
    )


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


SHOWN_REPORTER = Reporter(epoch_bar, print_epoch, note=print_line)


def reporter_of(show: Show) -> Reporter:
    """Return how the epochs are shown where the rest is shown so."""
    return Reporter() if show.silent else SHOWN_REPORTER
