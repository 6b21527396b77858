"""What a command shows while it works: bars and notes on stderr; with `--quiet` neither."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from featstore.progress import SHOWN, SILENT, Show, print_line

if TYPE_CHECKING:
    from trainer.run.training import Reporter

_QUIET = "featstore.quiet"


def quiet_option() -> click.Option:
    """Return `--quiet`, which every command has; `is_quiet` tells whether it was given."""
    return click.Option(
        ["-q", "--quiet"],
        is_flag=True,
        expose_value=False,
        callback=_remember,
        help="Show no progress and no notes: results, warnings and errors only.",
    )


def _remember(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        # Shared with the commands of a group: `search -q show NAME` is quiet too.
        context.meta[_QUIET] = True


def is_quiet() -> bool:
    """Tell whether the command that runs was asked to be quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_QUIET))


def note(line: str) -> None:
    """Print a line on stderr that people may do without; none with `--quiet`."""
    if not is_quiet():
        print_line(line)


def show_of(as_json: bool) -> Show:
    """Return how work is shown.

    Args:
        as_json: The object has what the notes say, so there are none.
    """
    if is_quiet():
        return SILENT
    return dataclasses.replace(SHOWN, note=lambda line: None) if as_json else SHOWN


def shown_reporter(stopping: Callable[[], bool]) -> Reporter:
    """Return how a training is shown, and what may stop it."""
    from trainer.run.shown import reporter_of

    return dataclasses.replace(reporter_of(show_of(False)), stopping=stopping)


def shows(context: click.Context) -> Show:
    """Return what work deep inside a command shows; see `featstore.progress.working`."""
    asked: Any = context.obj
    return show_of(bool(getattr(asked, "asked", False)))
