"""What an extraction is asked for, and what of it is missing."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import StoreConfig
from featstore.data.images import ImageIndex, Photo
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec, vision_row_shape
from featstore.errors import (
    ConfigError,
    StaleFeaturesError,
    StoreError,
    UsageError,
    counted,
)
from featstore.extract.photos import PhotoDigests
from featstore.progress import SILENT, Show, says
from featstore.quantities import size
from featstore.store.folder import read_quarantine, shard_paths
from featstore.store.numbers import token_bytes
from featstore.store.store import Store, VisionStore, open_store

MAX_SHARD_BYTES = 4 << 30
TEXT_SHARD_TOKENS = 1 << 18
# [CLS], a word, [SEP].
SHORTEST_SENTENCE = 3
UNITS = {"vit": "images", "text": "sentences"}
KINDS = tuple(UNITS)
SOURCES = ("times", "bytes")


@dataclass(frozen=True, repr=False)
class Job:
    """Inputs whose features by one spec the store is to hold.

    Attributes:
        spec: Of the features.
        preset: The encoder's preset, as the user named it.
        store: Root of the store, rows of a shard, rows of a batch, threads.
        keys: Image ids or sentences, in order; repeats count once.
        images: Where the photos are; None for sentences.
        load: Loads the spec's encoder; None: from the preset, each time.
        source: How photos that are stored are compared: "times" reads those whose size or
            times differ from what they were, "bytes" all of them.
    """

    spec: FeatureSpec
    preset: str
    store: StoreConfig
    keys: Sequence[str]
    images: ImageIndex | None = None
    load: Callable[[], Any] | None = None
    source: str = "times"

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise UsageError(f"source {self.source!r}: expected one of {', '.join(SOURCES)}")
        object.__setattr__(self, "keys", list(dict.fromkeys(self.keys)))

    def __repr__(self) -> str:
        return f"<Job: {len(self.keys)} {self.unit} by {self.preset} into {self.folder}>"

    @property
    def folder(self) -> Path:
        """Where the features go."""
        return self.spec.folder(Path(self.store.root))

    @property
    def unit(self) -> str:
        """What the inputs are called."""
        return UNITS[self.spec.kind]

    @property
    def shard_rows(self) -> int:
        """Rows of a shard; of sentences, at most so many that its tokens fit into memory."""
        if not isinstance(self.spec, TextSpec):
            return self.store.shard_rows
        return min(self.store.shard_rows, max(1, TEXT_SHARD_TOKENS // self.spec.sequence_length))

    @functools.cached_property
    def photos(self) -> PhotoDigests | None:
        """What is known of the photos' bytes; None for sentences."""
        if self.images is None:
            return None
        return PhotoDigests(Path(self.store.root), self.images.folder)

    def digests_of(
        self, paths: Sequence[Photo], show: Show = SILENT
    ) -> list[tuple[int, int] | None]:
        """Return the digests of photos, those that changed or are not known read for it."""
        assert self.photos is not None
        every = self.source == "bytes"
        return self.photos.of(paths, self.store.threads, show, every)

    def paths_of(self, keys: Sequence[str]) -> list[Photo]:
        """Return the photos of image ids; none for sentences.

        Raises:
            StoreError: An id has no photo.
        """
        if self.images is None:
            return []
        found = [self.images.lookup(key) for key in keys]
        for key, path in zip(keys, found, strict=True):
            if path is None:
                raise StoreError(f"{self.images.folder}: no photo for image id {key!r}")
        return [path for path in found if path is not None]


@dataclass(repr=False)
class Plan:
    """What an extraction has to do.

    Attributes:
        job: What was asked for.
        keys: Image ids or sentences to encode, in order.
        changed: How many of `keys` are stored from a photo that has changed.
        quarantined: Inputs passed over because they failed before.
        least_bytes, todo_bytes: Size of the features of `keys` on disk, at
            least and at most; they differ for sentences.
        free_bytes: Free space where they go.
        state: What `folder_state` was before anything was looked for.
    """

    job: Job
    keys: list[str]
    changed: int
    quarantined: int
    least_bytes: int
    todo_bytes: int
    free_bytes: int
    state: tuple[Any, ...]

    def __repr__(self) -> str:
        return (
            f"<Plan: {len(self.keys)} of {self.requested} {self.job.unit} to do,"
            f" {size(self.todo_bytes)}, into {self.folder}>"
        )

    @property
    def folder(self) -> Path:
        """Where the features go."""
        return self.job.folder

    @property
    def requested(self) -> int:
        """Distinct inputs asked for."""
        return len(self.job.keys)

    @property
    def cached(self) -> int:
        """Inputs whose features are there already."""
        return self.requested - len(self.keys) - self.quarantined

    def check_space(self) -> None:
        """Refuse to start what cannot end.

        Raises:
            StoreError: The disk has less free space than the features need at
                the least.
        """
        check_space([self])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's figures, JSON-able."""
        return {
            "kind": self.job.spec.kind,
            "fingerprint": self.job.spec.fingerprint,
            "folder": str(self.folder),
            "requested": self.requested,
            "cached": self.cached,
            "changed": self.changed,
            "quarantined": self.quarantined,
            "todo": len(self.keys),
            "todo_bytes": self.todo_bytes,
            "free_bytes": self.free_bytes,
        }


def check_space(plans: Sequence[Plan]) -> None:
    """Refuse to start what cannot end: plans for one disk; see `Plan.check_space`."""
    needed = sum(plan.least_bytes for plan in plans)
    if needed > plans[0].free_bytes:
        raise StoreError(
            f"{plans[0].folder}: the features need {size(needed)} and"
            f" {size(plans[0].free_bytes)} are free; free some space, or set"
            " [store] root to another disk"
        )


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is, or will be, on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_state(folder: Path) -> tuple[Any, ...]:
    """Return what a plan depends on in a features folder, to see whether it is still true."""
    quarantine = folder / "quarantine.json"
    status = quarantine.stat() if quarantine.exists() else None
    names = tuple(path.name for path in shard_paths(folder))
    return names, status and (status.st_mtime_ns, status.st_size)


@says("looking for what is missing")
def make_plan(job: Job, show: Show = SILENT) -> Plan:
    """Find which inputs have no features, or features of a photo that has changed since.

    Args:
        job: What is asked for.
        show: Shows the reading of photos where it takes long.

    Returns:
        The plan. Nothing is changed.

    Raises:
        StoreError: An image id has no photo; the store cannot be read.
        ConfigError: A shard would be larger than `MAX_SHARD_BYTES`.

    Cost: asks the file system for the size and times of every photo that is stored already,
    and reads those that differ, to compare their digests.
    """
    keys, spec, state = job.keys, job.spec, folder_state(job.folder)
    paths = job.paths_of(keys)
    known = read_quarantine(job.folder)
    opened = open_store(job.folder) if shard_paths(job.folder) else None
    positions = np.full(len(keys), -1, np.int64) if opened is None else opened.lookup(keys)
    stored = positions >= 0
    if isinstance(spec, VisionSpec):
        looked_at = [i for i, key in enumerate(keys) if stored[i] or key in known]
        found = job.digests_of([paths[i] for i in looked_at], show)
        same = _unchanged(opened, positions, keys, known, dict(zip(looked_at, found, strict=True)))
    else:
        # A sentence never changes: one that failed under this spec always fails.
        same = [bool(there) or key in known for there, key in zip(stored, keys, strict=True)]
    todo = [i for i, unchanged in enumerate(same) if not unchanged]
    least_bytes, most_bytes = _bytes_of(job, len(todo))
    return Plan(
        job=job,
        keys=[keys[i] for i in todo],
        changed=sum(bool(stored[i]) for i in todo),
        quarantined=sum(unchanged and not stored[i] for i, unchanged in enumerate(same)),
        least_bytes=least_bytes,
        todo_bytes=most_bytes,
        free_bytes=free_space(job.folder),
        state=state,
    )


def _unchanged(
    opened: Store | None,
    positions: Any,
    keys: Sequence[str],
    known: dict[str, dict[str, Any]],
    found: dict[int, tuple[int, int] | None],
) -> list[bool]:
    """Tell of each image whether it is stored, or failed, with the bytes that its photo has now."""
    expected: dict[int, Any] = {
        i: known[key]["source_digest"] for i, key in enumerate(keys) if key in known
    }
    if isinstance(opened, VisionStore):
        there = np.flatnonzero(positions >= 0)
        digests = opened.source_digests(positions[there]).tolist()
        expected |= dict(zip(there.tolist(), digests, strict=True))
    return [
        (digest := found.get(i)) is not None and list(digest) == expected[i]
        for i in range(len(keys))
    ]


def refuse_replaced(job: Job, opened: VisionStore, split: str, show: Show = SILENT) -> None:
    """Refuse features of photos that have other bytes by now.

    A photo that is gone, or cannot be read, tells nothing, and is passed over.

    Args:
        job: Of a split's photos.
        opened: Their features.
        split: What to call it.
        show: Shows the reading of photos where it takes long.

    Raises:
        StaleFeaturesError: A photo was replaced.
    """
    positions = opened.lookup(job.keys)
    there = {
        key: at
        for key, at in zip(job.keys, positions.tolist(), strict=True)
        if at >= 0 and (job.images is None or job.images.lookup(key) is not None)
    }
    keys = list(there)
    stored = opened.source_digests(np.array(list(there.values()), np.int64)).tolist()
    paths = job.paths_of(keys)
    replaced = [
        (key, path)
        for key, path, now, then in zip(
            keys, paths, job.digests_of(paths, show), stored, strict=True
        )
        if now is not None and list(now) != then
    ]
    if replaced:
        key, path = replaced[0]
        photos = counted(len(replaced), "photo")
        first = "" if len(replaced) == 1 else "first: "
        raise StaleFeaturesError(
            f"{opened.folder}: {photos} of split {split!r} changed since the features were"
            f" extracted ({first}{key!r}, {path})",
            job.spec.command(split=split),
        )


def _bytes_of(job: Job, rows: int) -> tuple[int, int]:
    """Return the bytes that the features of so many inputs take, at least and at most.

    Only the tokenizer could tell how long a sentence is, and not cheaply: one
    character may be several tokens.
    """
    spec, store = job.spec, job.store
    if isinstance(spec, TextSpec):
        tokens = rows * token_bytes(spec.dtype, int(spec.architecture["hidden_dim"]))
        return tokens * SHORTEST_SENTENCE, tokens * spec.sequence_length
    assert isinstance(spec, VisionSpec)
    tokens, width = vision_row_shape(spec)
    row_bytes = spec.views * tokens * token_bytes(spec.dtype, width)
    if min(store.shard_rows, rows) * row_bytes > MAX_SHARD_BYTES:
        raise ConfigError(
            f"[store] shard_rows = {store.shard_rows}: one shard would take"
            f" {size(store.shard_rows * row_bytes)} of memory; choose at most"
            f" {MAX_SHARD_BYTES // row_bytes}"
        )
    return rows * row_bytes, rows * row_bytes
