"""Random batches of feature rows: the store against memcpy and against other formats.

Speeds of one machine differ from minute to minute, so nothing is compared with
an earlier figure. Each peer is written, then measured in rounds: memcpy, the
store and the peer read each batch of a round before the next one is read, in an
order that changes, and every ratio is taken inside its round. Then the peer's
files are deleted, so that the disk holds the store and one peer at a time.

Peers without random access stream one whole epoch a round through a shuffle
buffer, as their users do. Every batch of every way is compared with the rows
that were written, before anything is timed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loader_cold import (
    COLD_HEADER,
    Array,
    Batches,
    cold_figures,
    median_ratio,
)
from benchmarks.loader_peers import PEERS, Peer, StreamReader
from benchmarks.synthetic import write_store
from benchmarks.tables import table
from featstore.store.numbers import aligned_empty
from featstore.store.store import VisionStore, open_features_of

Read = Callable[[NDArray[np.int64]], Array]

MEMCPY = "memcpy, random rows"
SEQUENTIAL = "memcpy, one block"
OURS = "featstore gather(out=)"
OURS_ALLOCATING = "featstore gather()"
OURS_FIRST = "featstore gather(), first reading: checksums"
WARM_HEADER = (
    "way",
    "access",
    "ms a batch",
    "min–max",
    "GB/s",
    "speed to memcpy",
    "featstore's speed to this",
)
INSTALL = "pip install 'featstore[bench]'"


@dataclass
class Timing:
    """Seconds a batch of one way, and of memcpy and the store in the same rounds."""

    access: str
    seconds: list[float] = field(default_factory=list)
    memcpy: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    def figures(self, batch_bytes: int) -> dict[str, Any]:
        middle = statistics.median(self.seconds)
        return {
            "access": self.access,
            "milliseconds_a_batch": round(middle * 1e3, 3),
            "spread_milliseconds": [
                round(min(self.seconds) * 1e3, 3),
                round(max(self.seconds) * 1e3, 3),
            ],
            "gigabytes_a_second": round(batch_bytes / middle / 1e9, 2),
            "speed_to_memcpy": median_ratio(self.memcpy, self.seconds),
            "featstore_speed_to_this": median_ratio(self.seconds, self.ours),
        }


def _random_features(rows: int, row_shape: tuple[int, int]) -> Array:
    """Return distinct float16 rows, none of them NaN."""
    generator = np.random.default_rng(0)
    features = aligned_empty((rows, *row_shape), np.float16, mmap.PAGESIZE)
    for row in features:
        row[...] = generator.standard_normal(row_shape, np.float32)
    return features


def _interleaved_seconds(
    reads: dict[str, Read], batches: Batches, generator: np.random.Generator
) -> dict[str, float]:
    """Let all ways read each batch before the next; return each way's median seconds a batch.

    Another process's burst lasts longer than a batch and so slows all ways.
    """
    found: dict[str, list[float]] = {name: [] for name in reads}
    for positions in batches:
        for name in generator.permutation(list(reads)).tolist():
            started = time.perf_counter()
            reads[name](positions)
            found[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _epoch_seconds(read: StreamReader, batch_size: int) -> float:
    started = time.perf_counter()
    count = sum(1 for _ in read(batch_size))
    return (time.perf_counter() - started) / count


def _check(name: str, read: Read, features: Array, batch_size: int) -> None:
    """Read every row; raise ValueError where a byte differs from what was written."""
    order = np.random.default_rng(1).permutation(len(features))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        positions = order[start : start + batch_size]
        if read(positions).tobytes() != features[positions].tobytes():
            raise ValueError(f"{name}: a batch differs from the rows that were written")


def _check_stream(name: str, read: StreamReader, features: Array, batch_size: int) -> None:
    """Read one epoch; raise ValueError unless it is every row once."""
    expected = {row.tobytes()[:16]: row for row in features}
    for batch in read(batch_size):
        for row in batch:
            wanted = expected.pop(row.tobytes()[:16], None)
            if wanted is None or wanted.tobytes() != row.tobytes():
                raise ValueError(f"{name}: a row differs from those that were written")
    if expected:
        raise ValueError(f"{name}: {len(expected)} rows are missing from an epoch")


class _Warm:
    """The ways that are in every round, and what all rounds found."""

    def __init__(
        self, features: Array, store: VisionStore, batch_size: int, batches: int, rounds: int
    ) -> None:
        self.features, self.batch_size = features, batch_size
        self.batches, self.rounds = batches, rounds
        # All ways fill one batch, so that none finds its own gone from the processor's caches.
        shape = (batch_size, *features.shape[1:])
        self.out = aligned_empty(shape, features.dtype, mmap.PAGESIZE)
        self.generator = np.random.default_rng(2)
        self.own: dict[str, Read] = {
            MEMCPY: self._memcpy,
            SEQUENTIAL: self._memcpy_block,
            OURS: lambda positions: store.gather(positions, self.out),
            OURS_ALLOCATING: store.gather,
        }
        for name in (MEMCPY, OURS, OURS_ALLOCATING):
            _check(name, self.own[name], features, batch_size)
        self.timings = {name: Timing("random") for name in self.own}
        self.timings[SEQUENTIAL].access = "sequential"

    def _memcpy(self, positions: NDArray[np.int64]) -> Array:
        for i, position in enumerate(positions.tolist()):
            np.copyto(self.out[i], self.features[position])
        return self.out

    def _memcpy_block(self, positions: NDArray[np.int64]) -> Array:
        start = int(positions[0]) % (len(self.features) - self.batch_size + 1)
        np.copyto(self.out, self.features[start : start + self.batch_size])
        return self.out

    def some_batches(self) -> Batches:
        """Return a round's batches: no row twice in one batch."""
        rows, size = len(self.features), self.batch_size
        return [self.generator.permutation(rows)[:size] for _ in range(self.batches)]

    def measure(
        self,
        name: str,
        access: str,
        opened: Callable[[], Read] | None = None,
        epoch: Callable[[], float] | None = None,
    ) -> None:
        """Time one more way in rounds with the others.

        Args:
            name: As the table calls it.
            access: "random" or "stream".
            opened: Gives the reader of a round, for random access.
            epoch: Streams one epoch and returns the seconds a batch.
        """
        self.timings[name] = Timing(access)
        for _ in range(self.rounds):
            reads = self.own | ({name: opened()} if opened else {})
            found = _interleaved_seconds(reads, self.some_batches(), self.generator)
            if epoch:
                found[name] = epoch()
            for way, seconds in found.items():
                timing = self.timings[way]
                timing.seconds.append(seconds)
                timing.memcpy.append(found[MEMCPY])
                timing.ours.append(found[OURS])

    def measure_peer(self, peer: Peer, folder: Path) -> None:
        """Write, check and time one peer.

        Raises:
            ImportError: Its package is not installed.
        """
        with peer.open(self.features, folder) as read:
            os.sync()  # else the peer's own write-back runs while it is timed
            if peer.streams:
                _check_stream(peer.name, read, self.features, self.batch_size)
                self.measure(
                    peer.name, "stream", epoch=lambda: _epoch_seconds(read, self.batch_size)
                )
                return

            def gather(positions: NDArray[np.int64]) -> Array:
                return read(positions, self.out)

            _check(peer.name, gather, self.features, self.batch_size)
            self.measure(peer.name, "random", opened=lambda: gather)


@contextlib.contextmanager
def _folder(scratch: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


def measure(
    rows: int = 4096,
    row_shape: tuple[int, int] = (196, 768),
    batch_size: int = 32,
    batches: int = 12,
    rounds: int = 7,
    scratch: str | None = None,
    peers: Sequence[Peer] = PEERS,
) -> dict[str, Any]:
    """Measure every way that is installed.

    Args:
        rows: Rows of the store. Take a store larger than the processor's
            last-level cache, and batches × rounds that fit the time.
        row_shape: (tokens, width) of float16.
        batch_size: Rows of a batch.
        batches: Batches that a way reads in a round; at most rows // batch_size.
        rounds: Rounds with each peer.
        scratch: Folder for the files; None takes the system's temporary one.
        peers: Other formats to compare with.

    Returns:
        Figures of all ways warm and cold, and the peers that are absent.

    Raises:
        ValueError: Fewer rows than the batches of a round need, or a way
            returned other bytes than were written.
    """
    if rows < batch_size * batches:
        raise ValueError(f"{batches} batches of {batch_size} need more than {rows} rows")
    features = _random_features(rows, row_shape)
    absent = {}
    with _folder(scratch) as folder:
        # With a store of its own: pages that were read row by row lie scattered in
        # memory, and are slower to copy than those of the peers' fresh files.
        cold = cold_figures(features, folder, batches, rounds, batch_size)
    with _folder(scratch) as root:
        spec = write_store(root, features)
        warm = _Warm(features, open_features_of(root, spec), batch_size, batches, rounds)

        warm.measure(OURS_FIRST, "random", opened=lambda: open_features_of(root, spec).gather)
        for peer in peers:
            with _folder(scratch) as folder:
                try:
                    warm.measure_peer(peer, folder)
                except ImportError as error:
                    absent[peer.name] = f"{error.name or error}; {INSTALL}"
    batch_bytes = features[:1].nbytes * batch_size
    return {
        "rows": rows,
        "row_shape": list(row_shape),
        "dtype": "float16",
        "batch_size": batch_size,
        "batches_a_round": batches,
        "rounds": rounds,
        "batch_bytes": batch_bytes,
        "warm": {name: timing.figures(batch_bytes) for name, timing in warm.timings.items()},
        "cold": cold,
        "absent": absent,
    }


def best_peer(figures: dict[str, Any]) -> str | None:
    """Return the fastest way that is another format's, or None where none was measured."""
    own = {MEMCPY, SEQUENTIAL, OURS, OURS_ALLOCATING, OURS_FIRST}
    peers = {name: way for name, way in figures["warm"].items() if name not in own}
    # The ratio was taken inside each round, so peers of different minutes compare.
    return min(peers, key=lambda name: peers[name]["featstore_speed_to_this"], default=None)


def _verdict(figures: dict[str, Any]) -> str:
    name = best_peer(figures)
    if name is None:
        return "No other format was measured."
    ratio = figures["warm"][name]["featstore_speed_to_this"]
    return (
        f"The best of the other formats is {name}; featstore's {OURS.split()[1]} runs at"
        f" {ratio:.2f}× its speed, and at"
        f" {figures['warm'][OURS]['speed_to_memcpy']:.2f}× that of memcpy."
    )


def report(figures: dict[str, Any]) -> str:
    """Return the tables of what `measure` found."""

    def spread(way: dict[str, Any]) -> str:
        return "–".join(f"{value:.2f}" for value in way["spread_milliseconds"])

    warm = [
        [
            name,
            way["access"],
            f"{way['milliseconds_a_batch']:.2f}",
            spread(way),
            f"{way['gigabytes_a_second']:.2f}",
            f"{way['speed_to_memcpy']:.3f}",
            f"{way['featstore_speed_to_this']:.2f}",
        ]
        for name, way in sorted(
            figures["warm"].items(), key=lambda item: -item[1]["speed_to_memcpy"]
        )
    ]
    warm += [[name, "absent", *5 * ["–"]] for name in figures["absent"]]
    cold = [
        [
            name,
            f"{way['milliseconds_a_batch']:.1f}",
            spread(way),
            f"{way['gigabytes_a_second']:.2f}",
            f"{way['speed_to_raw_read']:.2f}",
        ]
        for name, way in figures["cold"].items()
    ]
    shape = "×".join(map(str, figures["row_shape"]))
    parts = [
        f"{figures['batch_size']} rows of {shape} {figures['dtype']} a batch, from"
        f" {figures['rows']} rows in the page cache. A stream reads an epoch through a shuffle"
        " buffer; the others read any row.",
        table(WARM_HEADER, warm),
        _verdict(figures),
        "Rows that are on the disk alone"
        + (":" if cold else ": not measured, the files cannot be dropped from memory."),
        *([table(COLD_HEADER, cold)] if cold else []),
        *(f"{name} is absent: needs {needs}" for name, needs in figures["absent"].items()),
    ]
    return "\n\n".join(parts)
