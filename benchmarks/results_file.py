"""Where results are kept: one JSON file a machine, one entry a benchmark."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from featstore.config import usable_cores
from featstore.publish import package_versions, write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, memory, system."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        processor = processor_of(cpu_info.read_text()) or processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": usable_cores(),
        "memory_gb": round(memory / 2**30, 1),
        "system": platform.platform(terse=True),
    }


def processor_of(cpu_info: str) -> str:
    """Return a processor's name from the text of `/proc/cpuinfo`; "" where it has none.

    A virtual machine may say no more than "AMD EPYC" of processors of which one is twice as fast as
    another. Their family and model tell them apart.
    """
    fields = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", cpu_info, re.MULTILINE))
    name = str(fields.get("model name", ""))
    if name and not re.search(r"\d", name) and fields.keys() >= {"cpu family", "model"}:
        return f"{name}, family {fields['cpu family']}, model {fields['model']}"
    return name


def file_of(about: dict[str, Any], device: str = "", results: Path = RESULTS) -> Path:
    """Return the file of a machine.

    Args:
        about: What `machine` returns.
        device: An accelerator's name; its figures have a file of their own.
        results: Folder of the files.
    """
    name = device or f"{about['processor']} {about['cores']} cores"
    return results / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def kept(path: Path) -> dict[str, Any]:
    """Return a results file's content, empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(name: str, figures: dict[str, Any], results: Path = RESULTS) -> Path:
    """Put a benchmark's figures into this machine's file, or into that of `figures["device"]`.

    Args:
        name: The benchmark.
        figures: What it measured.
        results: Folder of the files.

    Returns:
        The file.
    """
    about = machine()
    path = file_of(about, str(figures.get("device", "")), results)
    content = kept(path)
    content["machine"] = about
    arguments = shlex.join(sys.argv[1:])
    command = f"python -m benchmarks {arguments}"
    content[name] = {"command": command, "versions": package_versions(), **figures}
    write_json(path, content)
    return path
