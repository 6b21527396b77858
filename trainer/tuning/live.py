"""The table of a search while it runs: redrawn on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from featstore.errors import counted
from featstore.quantities import duration, size
from trainer.tuning.space import shown
from trainer.tuning.study import Search
from trainer.tuning.table import best_row, epochs_of, is_open, rows_now, seconds_left, trial_rows
from trainer.tuning.workers import Watched

REDRAW_SECONDS = 2.0
SHOWN_ROWS = 20
# Lines of a terminal that the frame, the titles and the summary take.
FRAME_LINES = 10


def _summary(search: Search, rows: list[dict[str, Any]], watched: Watched, started: float) -> str:
    best = best_row(search, rows)
    ended = sum(not is_open(row) for row in rows)
    parts = [f"{ended} of {counted(search.space.trials, 'trial')} ended"]
    if best is not None:
        parts.append(f"best {search.space.search.metric} {best['value']:.4f} ({best['run']})")
    parts.append(f"{duration(round(time.time() - started))} gone")
    left = seconds_left(search, rows, watched.workers)
    if left is not None:
        parts.append(f"about {duration(round(left))} left")
    if now := sum(watched.own_bytes.values()):
        parts.append(f"workers' memory {size(now)}")
    elif watched.peak_bytes:
        parts.append(f"workers' memory at most {size(watched.peak_bytes)}")
    return ", ".join(parts)


def _chosen(
    rows: list[dict[str, Any]], best: dict[str, Any] | None, most: int
) -> list[dict[str, Any]]:
    """Return the rows that fit: the running trials, the best one, then the latest."""
    first = [row for row in rows if row["state"] == "running"][-most:]
    if best is not None and len(first) < most:
        first.append(best)
    taken = {row["trial"] for row in first}
    rest = [row for row in rows if row["trial"] not in taken]
    first += rest[max(0, len(rest) - (most - len(first))) :]
    return sorted(first, key=lambda row: int(row["trial"]))


def _table(search: Search, rows: list[dict[str, Any]], caption: str, most: int) -> Any:
    from rich.table import Table

    best = best_row(search, rows)
    names = [parameter.name for parameter in search.space.parameters]
    table = Table(caption=caption, caption_justify="left")
    for title in ("trial", "state", *names, "epoch", search.space.search.metric, "time"):
        table.add_column(title)
    chosen = _chosen(rows, best, most)
    if len(chosen) < len(rows):
        table.add_row("…", f"{len(rows) - len(chosen)} more")
    for row in chosen:
        table.add_row(
            str(row["trial"]),
            row["state"],
            *(shown(row["params"].get(name, "")) for name in names),
            f"{row['epoch']}/{epochs_of(search, row)}",
            "" if row["value"] is None else f"{row['value']:.4f}",
            duration(row["seconds"]),
            style="bold" if best is not None and row["trial"] == best["trial"] else None,
        )
    return table


def _line(search: Search, row: dict[str, Any]) -> str:
    params = ", ".join(f"{key} {shown(value)}" for key, value in row["params"].items())
    text = f"{row['run']} {row['state']}: {params}"
    if row["value"] is not None:
        text += f"; {search.space.search.metric} {row['value']:.4f} after epoch {row['epoch']}"
    return text + (f"; {row['reason']}" if row["reason"] else "")


@contextlib.contextmanager
def no_view(search: Search) -> Iterator[Callable[[Watched], None]]:
    """Show nothing of a search."""
    yield lambda watched: None


@contextlib.contextmanager
def live_view(search: Search) -> Iterator[Callable[[Watched], None]]:
    """Show a search on stderr while it runs.

    Args:
        search: The search.

    Yields:
        What `run_workers` or `run_on_ray` calls again and again.
    """
    from rich.console import Console
    from rich.live import Live

    started, drawn = time.time(), 0.0
    seen: dict[int, tuple[str, int]] = {}
    warned = False
    console = Console(file=sys.stderr)
    live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def lines(rows: list[dict[str, Any]], watched: Watched) -> None:
        changed = False
        for row in rows:
            now = (row["state"], row["epoch"])
            if seen.get(row["trial"]) != now:
                seen[row["trial"]] = now
                changed |= row["state"] != "running"
                print(_line(search, row), file=sys.stderr, flush=True)
        if changed:
            print(_summary(search, rows, watched, started), file=sys.stderr, flush=True)

    def show(watched: Watched, last: bool = False) -> None:
        nonlocal drawn, warned
        if not last and time.time() - drawn < REDRAW_SECONDS:
            return
        drawn = time.time()
        if watched.low_memory and watched.workers > 1 and not warned:
            warned = True
            console.print("memory is nearly used up: fewer --workers would be safer")
        # At the end those that were stopped are told from those that others are at.
        rows = rows_now(search) if last else trial_rows(search)
        if live is None:
            lines(rows, watched)
        else:
            caption = _summary(search, rows, watched, started)
            # A table that is too high would lose its end, where the summary is.
            most = max(1, min(SHOWN_ROWS, console.height - FRAME_LINES))
            live.update(_table(search, rows, caption, most), refresh=True)

    latest = Watched()

    def watch(watched: Watched) -> None:
        nonlocal latest
        latest = watched
        show(watched)

    with live if live is not None else contextlib.nullcontext():
        try:
            yield watch
        except BaseException:
            # It is the one to be read, whatever keeps the table from being shown.
            with contextlib.suppress(Exception):
                show(latest, last=True)
            raise
        show(latest, last=True)
