"""Memory that a process of its own holds; this file alone is imported there."""

from __future__ import annotations

import numpy as np

from benchmarks.measuring import memory_bytes


def hold(mebibytes: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return what a process holds before and after so many mebibytes more."""
    before = memory_bytes()
    held = np.ones(mebibytes << 20, np.uint8)
    after = memory_bytes()
    assert held[-1] == 1
    return before, after
