"""Whether a step's time or a process's own memory grows with the store.

Times are taken in one process that has all stores open and goes from one to
the next. Memory is that of a process of its own for each store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import in_child, memory_bytes, ratios, spread, written
from benchmarks.opening import open_and_look_up
from benchmarks.sizes import Size
from benchmarks.synthetic import (
    image_key,
    random_parts,
    random_sentences,
    write_parts,
    write_sentences,
)
from benchmarks.tables import table
from featstore.encoders.spec import TextSpec, VisionSpec
from featstore.store.store import open_features_of
from trainer.batches import CachedRows
from trainer.prefetch import Prefetcher
from trainer.run.step import Stepper

# 49 tokens of 192: 64k rows at the study's 196×768 would be 19 GB, and leave the page cache.
SMALL_ROWS = Size("growth", 112, 16, 192, 3, 1, 6, 1000, 24, 128, 32)
STORES = (1024, 4096, 16384, 65536)
MANY_ROWS = 1_000_000
TINY_ROW = (1, 4)


def _rows(root: Path, vision: VisionSpec, text: TextSpec, size: Size) -> CachedRows:
    images = open_features_of(root, vision)
    sentences = open_features_of(root, text)
    generator = np.random.default_rng(0)
    return CachedRows(
        images,
        sentences,
        np.arange(images.rows),
        generator.integers(0, sentences.rows, images.rows),
        generator.integers(0, 2, images.rows).astype(np.int8),
        whole=False,
    )


def _stepper(size: Size) -> Stepper:
    from benchmarks.steps import cached_stepper

    return cached_stepper(size.train(0), size)[1]


def _read_all(rows: CachedRows, size: Size) -> None:
    """Read every row once, as the first epoch does: pages and checksums."""
    for part in rows.in_order(size.rows):
        rows.batch(part, size.rows)


def _chosen(rows: CachedRows, size: Size, steps: int, epoch: int) -> list[Any]:
    """Return the rows of so many steps, of one epoch after another."""
    chosen: list[Any] = []
    while len(chosen) < steps:
        chosen += rows.epoch(size.rows, epoch, len(chosen))
    return chosen[:steps]


def step_seconds(
    root: Path, stores: Sequence[VisionSpec], text: TextSpec, size: Size, rounds: int, steps: int
) -> list[list[float]]:
    """Return the seconds a step of each store in each round, reading included."""
    stepper = _stepper(size)
    opened = [_rows(root, vision, text, size) for vision in stores]
    for rows in opened:
        _read_all(rows, size)
    stepper.train(opened[0].batch(np.arange(size.rows), size.rows))
    generator = np.random.default_rng(1)
    found: list[list[float]] = [[] for _ in stores]
    for number in range(rounds):
        for i in generator.permutation(len(stores)).tolist():
            chosen = _chosen(opened[i], size, steps, number)
            started = time.perf_counter()
            with Prefetcher(opened[i], chosen, size.rows) as batches:
                for batch in batches:
                    loss = stepper.train(batch)[0]
            float(np.asarray(loss))
            found[i].append((time.perf_counter() - started) / steps)
    return found


def peak_memory(
    root: Path, vision: VisionSpec, text: TextSpec, size: Size, steps: int
) -> dict[str, int]:
    """Return the most memory that training over a store held, every row read.

    Returns:
        Bytes: `peak` of everything, `anonymous` and `mapped` each at their most.
    """
    stepper = _stepper(size)
    rows = _rows(root, vision, text, size)
    _read_all(rows, size)
    found = memory_bytes()
    with Prefetcher(rows, _chosen(rows, size, steps, 0), size.rows) as batches:
        for batch in batches:
            float(np.asarray(stepper.train(batch)[0]))
            found = {name: max(found[name], value) for name, value in memory_bytes().items()}
    return found


def measure(
    stores: Sequence[int] = STORES,
    many: int = MANY_ROWS,
    rounds: int = 5,
    steps: int = 200,
    size: Size = SMALL_ROWS,
    shard_rows: int = 1024,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Train over stores of several sizes, and open a large one.

    Args:
        stores: Rows of each store, ascending.
        many: Rows of the store that is opened and looked up.
        rounds: In each, every store gives `steps` steps; the large store is
            opened as often.
        steps: Steps of a round.
        size: Of a row and of the head.
        shard_rows: Rows of a shard of every store.
        scratch: Folder for the stores; None takes the system's temporary one.

    Returns:
        For each store the seconds a step, their ratio to the smallest store's,
        and peak memory; for the large one seconds and memory.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        shape = (size.tokens, size.width)
        specs = [
            write_parts(root, random_parts(rows, shape, shard_rows), f"{rows} rows")
            for rows in stores
        ]
        text = in_child(write_sentences, root, size, 0, random_sentences(size))
        seconds = in_child(step_seconds, root, specs, text, size, rounds, steps)
        memory = [in_child(peak_memory, root, spec, text, size, steps) for spec in specs]
        tiny = write_parts(root, random_parts(many, TINY_ROW, shard_rows), f"{many} tiny rows")
        generator = np.random.default_rng(2)
        keys = [image_key(i) for i in generator.integers(0, many, min(many, 100_000)).tolist()]
        opened = [in_child(open_and_look_up, root, tiny, keys) for _ in range(rounds)]
    return {
        "row_shape": list(shape),
        "dtype": "float16",
        "batch_size": size.rows,
        "rounds": rounds,
        "steps": steps,
        "shard_rows": shard_rows,
        "stores": {
            str(rows): {
                "features_bytes": rows * shape[0] * shape[1] * np.dtype(np.float16).itemsize,
                "seconds": spread(taken, 6),
                "ratio_to_smallest": ratios(taken, seconds[0], 3),
                **{f"{name}_bytes": value for name, value in held.items()},
            }
            for rows, taken, held in zip(stores, seconds, memory, strict=True)
        },
        "many": {
            "rows": many,
            "row_shape": list(TINY_ROW),
            "lookups": len(keys),
            **{name: spread([one[name] for one in opened], 4) for name in opened[0]},
        },
    }


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    rows = [
        [
            f"{int(count):,}",
            f"{found['features_bytes'] / 1e6:.0f} MB",
            written(found["seconds"], " ms", 2, 1e3),
            written(found["ratio_to_smallest"], "×", 3),
            f"{found['peak_bytes'] / 1e6:.0f} MB",
            f"{found['anonymous_bytes'] / 1e6:.0f} MB",
            f"{found['mapped_bytes'] / 1e6:.0f} MB",
        ]
        for count, found in figures["stores"].items()
    ]
    header = [
        "rows",
        "features",
        "a step",
        "to the smallest",
        "peak memory",
        "its own",
        "mapped files",
    ]
    many = figures["many"]
    opened = [
        [
            f"{many['rows']:,}",
            written(many["open_seconds"], " s", 2),
            written(many["lookup_seconds"], " s", 2),
            written(many["peak_bytes"], " MB", 0, 1e-6),
            written(many["anonymous_bytes"], " MB", 0, 1e-6),
        ]
    ]
    shape = "×".join(map(str, figures["row_shape"]))
    parts = [
        f"Training with k_txt 0, {figures['batch_size']} rows of {shape} {figures['dtype']} a step,"
        " every row read before. The system takes mapped pages back when it needs them.",
        table(header, rows),
        f"Opening a store in a fresh process, and finding {many['lookups']:,} of its rows by key;"
        f" shards of {figures['shard_rows']:,} rows.",
        table(["rows", "open", "look up", "peak memory", "of which for the store"], opened),
    ]
    return "\n\n".join(parts)
