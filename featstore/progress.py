"""How work is shown while it goes: bars, and lines for people."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Called with the number of rows just dealt with.
Progress = Callable[[int], None]
Bar = Callable[[int, str], contextlib.AbstractContextManager[Progress]]

BAR_SECONDS, LOGGED_BAR_SECONDS, SLOW_SECONDS = 0.1, 30.0, 2.0


@contextlib.contextmanager
def no_bar(total: int, unit: str) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda rows: None


def bars() -> Any:
    """Return the class of the bars that suit where they are shown."""
    with warnings.catch_warnings():
        # Where a notebook lacks widgets, the bar is text.
        warnings.simplefilter("ignore")
        from tqdm.auto import tqdm
    return tqdm


@contextlib.contextmanager
def bar(total: int, unit: str, delay: float = 0) -> Iterator[Progress]:
    """Show rows done, rows a second and the time that is left: in a terminal, a notebook or a log.

    Args:
        total: Rows to be done.
        unit: What they are, such as "images".
        delay: Seconds that the work must take before anything is shown.
    """
    with bars()(
        total=total, unit=f" {unit}", smoothing=0.1, mininterval=bar_seconds(), delay=delay
    ) as shown:

        def advance(rows: int) -> None:
            shown.update(rows)

        yield advance


def bar_seconds() -> float:
    """Return how often a bar is drawn: rarely where it becomes lines of a log."""
    return BAR_SECONDS if sys.stderr.isatty() or "ipykernel" in sys.modules else LOGGED_BAR_SECONDS


def duration(seconds: float) -> str:
    """Return a time for people: "40 s", "3.5 min", "2.1 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Show:
    """What is shown while work goes; nothing by default.

    Attributes:
        bar: Makes a progress display from a number of rows and what they are.
        halved: Called with the new batch size after memory ran out.
        note: Called with lines for people.
        slow_bar: As `bar`, for work that is often done at once.
        loading: Called before an encoder is loaded, and the framework for it.
    """

    bar: Bar = no_bar
    halved: Callable[[int], None] = lambda size: None
    note: Callable[[str], None] = lambda line: None
    slow_bar: Bar = no_bar
    loading: Callable[[], None] = lambda: None


SILENT = Show()


def _print(line: str) -> None:
    print(line, file=sys.stderr)


def _print_halved(size: int) -> None:
    _print(f"out of memory: going on with batches of {size}")


SHOWN = Show(bar, _print_halved, _print, functools.partial(bar, delay=SLOW_SECONDS))
"""What the Python interface and the commands show: bars and lines on stderr."""
