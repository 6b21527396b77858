"""Where results are kept: one JSON file a machine, one entry a benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

from featstore.publish import command_line, package_versions, write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, memory, system."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        found = re.search(r"model name\s*: (.*)", cpu_info.read_text())
        processor = found.group(1) if found else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
    }


def keep(name: str, figures: dict[str, Any], results: Path = RESULTS) -> Path:
    """Put a benchmark's figures into this machine's file.

    Args:
        name: The benchmark.
        figures: What it measured.
        results: Folder of the files.

    Returns:
        The file.
    """
    about = machine()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower())
    path = results / f"{slug.strip('-')}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content["machine"] = about
    content[name] = {"command": command_line(), "versions": package_versions(), **figures}
    write_json(path, content)
    return path
