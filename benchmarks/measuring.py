"""What the benchmarks share: spreads, memory of a process, work in a child process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def spread(values: Sequence[float], digits: int = 5) -> dict[str, Any]:
    """Return the median of some measurements, and the least and the greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "spread": [round(min(values), digits), round(max(values), digits)],
    }


def ratios(above: Sequence[float], below: Sequence[float], digits: int = 2) -> dict[str, Any]:
    """Return the spread of the ratios of two sides, each taken inside its round."""
    return spread([a / b for a, b in zip(above, below, strict=True)], digits)


def written(found: dict[str, Any], unit: str = "", digits: int = 1, scale: float = 1.0) -> str:
    """Return `median (least–greatest)` of what `spread` found, with its unit."""
    low, high = found["spread"]
    median = scale * found["median"]
    return f"{median:.{digits}f}{unit} ({scale * low:.{digits}f}–{scale * high:.{digits}f})"


def in_child(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function of a module in a fresh process and return its result."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def memory_bytes() -> dict[str, int]:
    """Return what this process holds in memory. Linux only.

    Returns:
        `peak`: the most that was ever held. `anonymous` and `mapped`: what is
        held now, of its own and of files' pages; the system takes the latter
        back when it needs them.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        line.partition(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")
    }
    fields = {"peak": "VmHWM", "anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: 1024 * kilobytes[field] for name, field in fields.items()}
