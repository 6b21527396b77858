"""Random batches of rows that no cache holds: the store, and other ways to read a disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic import write_store
from featstore.store.numbers import aligned_empty
from featstore.store.store import VisionStore, open_features_of

Array = NDArray[Any]
Batches = list[NDArray[np.int64]]

COLD_HEADER = ("way", "ms a batch", "min–max", "GB/s", "speed to raw read")
AHEAD = 4


def median_ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 4)


def _is_in_memory(path: Path) -> bool:
    """Tell whether the system holds any page of a file, without reading one."""
    file = np.memmap(path, np.uint8, "r")
    held = np.zeros(-(-file.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    arguments = (ctypes.c_void_p(file.ctypes.data), ctypes.c_size_t(file.size))
    if mincore(*arguments, ctypes.c_void_p(held.ctypes.data)):
        raise OSError(ctypes.get_errno(), f"{path}: mincore failed")
    return bool((held & 1).any())


def drop_page_cache(paths: Sequence[Path]) -> bool:
    """Make the system forget files' pages.

    Returns:
        Whether it did: a file in memory, or one that is still mapped, stays.
    """
    for _ in range(20):
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        if not any(_is_in_memory(path) for path in paths):
            return True
        time.sleep(0.1)  # pages that are still being read ahead cannot be dropped
    return False


def _read_ahead(store: VisionStore, batches: Batches, out: Array) -> None:
    for positions in batches[:AHEAD]:
        store.will_need(positions)
    for i, positions in enumerate(batches):
        for coming in batches[i + AHEAD : i + AHEAD + 1]:
            store.will_need(coming)
        store.gather(positions, out)


def cold_figures(
    features: Array, folder: Path, batches: int, rounds: int, size: int
) -> dict[str, Any]:
    """Time batches of rows that are on the disk alone.

    Args:
        features: float16 of shape (rows, tokens, width).
        folder: For the files: the rows three times.
        batches: Batches of a round.
        rounds: In each, every way reads the same batches.
        size: Rows of a batch.

    Returns:
        Figures by way; none where the files cannot be dropped from memory.
        Disks below a virtual machine keep caches of their own, so the ratios
        say more than the speeds.
    """
    import h5py

    spec = write_store(folder, features)
    shards = sorted(spec.folder(folder).glob("shard-*.h5"))
    plain, contiguous = folder / "rows.npy", folder / "rows.h5"
    np.save(plain, features)
    with h5py.File(contiguous, "w") as file:
        file.create_dataset("rows", data=features)
    out = aligned_empty((size, *features.shape[1:]), features.dtype, mmap.PAGESIZE)
    block = memoryview(bytearray(out.nbytes))

    def sequential(chosen: Batches) -> float:
        with plain.open("rb", buffering=0) as file:
            started = time.perf_counter()
            for _ in chosen:
                file.readinto(block)
            return time.perf_counter() - started

    def ours(chosen: Batches) -> float:
        store = open_features_of(folder, spec)
        started = time.perf_counter()
        for positions in chosen:
            store.gather(positions, out)
        return time.perf_counter() - started

    def ours_ahead(chosen: Batches) -> float:
        store = open_features_of(folder, spec)
        started = time.perf_counter()
        _read_ahead(store, chosen, out)
        return time.perf_counter() - started

    def memmap(chosen: Batches) -> float:
        rows = np.load(plain, mmap_mode="r")
        started = time.perf_counter()
        for positions in chosen:
            np.take(rows, positions, axis=0, out=out, mode="clip")
        return time.perf_counter() - started

    def hdf5(chosen: Batches) -> float:
        with h5py.File(contiguous, "r") as file:
            rows = file["rows"]
            started = time.perf_counter()
            for positions in chosen:
                for i, position in enumerate(positions.tolist()):
                    rows.read_direct(out, np.s_[position], np.s_[i])
            return time.perf_counter() - started

    ways = {
        "raw sequential read": sequential,
        "featstore, read ahead": ours_ahead,
        "featstore": ours,
        "NumPy memmap, take": memmap,
        "h5py contiguous, read_direct a row": hdf5,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    generator = np.random.default_rng(3)
    for _ in range(rounds):
        order = generator.permutation(len(features))
        chosen = [order[i * size : (i + 1) * size] for i in range(batches)]
        for way in generator.permutation(len(ways)):
            name = list(ways)[way]
            if not drop_page_cache([*shards, plain, contiguous]):
                return {}
            found[name].append(ways[name](chosen) / len(chosen))
    return {
        name: {
            "milliseconds_a_batch": round(statistics.median(seconds) * 1e3, 2),
            "spread_milliseconds": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
            "gigabytes_a_second": round(out.nbytes / statistics.median(seconds) / 1e9, 2),
            "speed_to_raw_read": median_ratio(found["raw sequential read"], seconds),
        }
        for name, seconds in found.items()
    }
