"""The processes of actors on this machine."""

from __future__ import annotations

import contextlib
import time

import psutil

# An actor that was told to end is there for a moment longer.
ENDING_SECONDS = 20.0


def ray_processes(actor: str) -> list[psutil.Process]:
    """Return the processes of an actor's class."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{actor}"):
                found.append(process)
    return found


def none_left(actor: str) -> bool:
    """Tell whether no actor of a class remains, once those that are ending have ended."""
    until = time.monotonic() + ENDING_SECONDS
    while ray_processes(actor) and time.monotonic() < until:
        time.sleep(0.05)
    return not ray_processes(actor)
