"""Where a page goes, and how what it names is typed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from featstore.errors import PROGRAM, Advice, Command, UsageError
from featstore.publish import check_may_write, program
from trainer.run.folder import SEARCH_FILE, Run

SUFFIXES = (".html", ".htm")


def page_path(path: str | os.PathLike[str] | None, default: Path) -> Path:
    """Return where a page goes, before it takes long to make it.

    Raises:
        UsageError: It has another suffix than a page.
        WriteError: Its folder cannot be written.
    """
    target = default if path is None else Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--out {target}: expected a name that ends with .html")
    check_may_write(target, Advice("write it elsewhere with --out FILE.html"))
    return target


def typed(command: Command) -> str:
    """Return a command as it is typed here; from Python as the installed program has it."""
    called = program()
    return command.line(called if called.endswith(("cli.py", PROGRAM)) else PROGRAM)


def trained_by(run: Run) -> str:
    """Return what made a run, as it was typed or called; of a trial the command that repeats it.

    A search's trials are drawn in its workers, whose own command says nothing.
    """
    if not (run.folder.parent / SEARCH_FILE).exists():
        return str(run.manifest.get("command", ""))
    start = {} if run.source is None else {"init_from": run.source}
    name = f"{run.folder.parent.name}-{run.name}"
    options: dict[str, Any] = {"config": run.config_path, "name": name, **start}
    return typed(Command("train", **options))
