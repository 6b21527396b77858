"""A command on a terminal of its own: what it shows there, and how long it shows nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLUMNS, LINES = 120, 40


@dataclass(frozen=True)
class Seen:
    """What a command showed.

    Attributes:
        exit_code: Of the command.
        text: All that it wrote, carriage returns included.
        silences: Seconds without any output, the longest first, each with the text that
            stood there.
    """

    exit_code: int
    text: str
    silences: tuple[tuple[float, str], ...]


def on_terminal(command: Sequence[str], folder: str, environment: Mapping[str, str] = {}) -> Seen:
    """Run a program with a pseudo-terminal as its streams."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(command[0], list(command), {**os.environ, **environment})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    text, last, silences = "", time.monotonic(), []
    while True:
        try:
            found = os.read(terminal, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            found = b""
        now = time.monotonic()
        silences.append((round(now - last, 1), text[-80:]))
        if not found:
            break
        last, text = now, text + found.decode("utf-8", "replace")
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    return Seen(os.waitstatus_to_exitcode(status), text, tuple(sorted(silences, reverse=True)))


def screen(text: str) -> list[str]:
    """Return the lines that stand on a screen after a text, without those that are blank."""
    lines = [""]
    column = 0
    for character in text.replace("\r\n", "\n"):
        if character == "\n":
            lines.append("")
            column = 0
        elif character == "\r":
            column = 0
        else:
            row = lines[-1].ljust(column)
            lines[-1] = row[:column] + character + row[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


if __name__ == "__main__":
    seen = on_terminal(sys.argv[1:], os.getcwd())
    print("\n".join(screen(seen.text)))
    for seconds, after in seen.silences[:5]:
        print(f"{seconds:5.1f} s of silence after {after!r}", file=sys.stderr)
