"""What opening a store costs, in a process that has imported nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring import memory_bytes
from featstore.encoders.spec import VisionSpec
from featstore.store.store import open_features_of


def open_and_look_up(root: Path, spec: VisionSpec, keys: Sequence[str]) -> dict[str, float]:
    """Return seconds and peak bytes of opening a store and of finding rows in it."""
    before = memory_bytes()["anonymous"]
    started = time.perf_counter()
    store = open_features_of(root, spec)
    opened = time.perf_counter()
    found = store.lookup(keys)
    ended = time.perf_counter()
    if (found < 0).any():
        raise ValueError(f"{root}: {(found < 0).sum()} of {len(keys)} rows were not found")
    after = memory_bytes()
    return {
        "open_seconds": opened - started,
        "lookup_seconds": ended - opened,
        "anonymous_bytes": after["anonymous"] - before,
        "peak_bytes": after["peak"],
    }
