"""Memory of processes and of the machine, as Linux tells it."""

from __future__ import annotations

import contextlib
from pathlib import Path


def anonymous_bytes(pid: int | str = "self") -> int:
    """Return the memory of a process that is its own, without mapped files; 0 where unknown."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def machine_bytes() -> tuple[int, int]:
    """Return the machine's memory, and what of it is available; zeros where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)
