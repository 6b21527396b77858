"""What `--json` prints: one object on stdout, however the command ends; see docs/JSON.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from featstore.errors import Advice, Command, FeatstoreError
from featstore.progress import print_line
from featstore.publish import command_line


@dataclass
class Answer:
    """What is known of one command's end; the context of the command line holds it.

    Attributes:
        asked: Whether `--json` was given.
        found: What the command found, None before it has.
        warnings: Lines that do not stop it, in the order they came.
        error: Why the exit code is not 0, JSON-able.
    """

    asked: bool = False
    found: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None

    def fail(self, error: FeatstoreError, show: Callable[[Command], str]) -> None:
        """Keep an error; of several the first one, which the exit code belongs to."""
        if self.error is not None:
            return
        parts = error.mend.parts if isinstance(error.mend, Advice) else ()
        self.error = {
            "kind": type(error).__name__,
            "message": error.message,
            "mend": None if error.mend is None else error.mend.shown(lambda c: f"`{show(c)}`"),
            "commands": [show(part) for part in parts if isinstance(part, Command)],
            "exit_code": error.exit_code,
        }

    def print(self) -> None:
        """Print the object, if it was asked for and there is one."""
        if not self.asked or self.found is self.error is None:
            return
        whole = {
            "ok": self.error is None,
            "command": command_line(),
            "warnings": self.warnings,
            "error": self.error,
            **(self.found or {}),
        }
        try:
            text = json.dumps(whole, allow_nan=False)
        except ValueError:
            # NaN and infinity are no JSON: null, as a program in any language reads it.
            plain = json.loads(json.dumps(whole), parse_constant=lambda name: None)
            text = json.dumps(plain)
        click.echo(text)


def _current() -> Answer:
    context = click.get_current_context(silent=True)
    return context.obj if context is not None and isinstance(context.obj, Answer) else Answer()


def answer(found: dict[str, Any]) -> None:
    """Give what the command found; it is printed when the command ends."""
    _current().found = found


def fail(error: FeatstoreError, show: Callable[[Command], str]) -> None:
    """Give the error that the command ends with, its commands written by `show`."""
    _current().fail(error, show)


def warn(line: str, title: str = "") -> None:
    """Print a line on stderr, after a title; with --json the object has it among `warnings`."""
    print_line(f"{title}{line}")
    _current().warnings.append(line)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON object (docs/JSON.md)."
    )(command)
