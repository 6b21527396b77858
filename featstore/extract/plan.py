"""What an extraction has to do: the specs a configuration asks for, less what is stored."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import StoreConfig
from featstore.data.images import ImageIndex, read_bytes
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec, vision_row_shape
from featstore.errors import ConfigError, ImageError, StoreError
from featstore.store.folder import read_quarantine, shard_paths
from featstore.store.numbers import token_bytes
from featstore.store.shard import digest_bytes
from featstore.store.store import TextStore, VisionStore, read_spec

MAX_SHARD_BYTES = 4 << 30


@dataclass
class Plan:
    """What an extraction has to do.

    Attributes:
        spec: Of the features.
        folder: Where they go.
        keys: Image ids or sentences to encode, in order.
        paths: Photos of `keys`; empty for text.
        requested: Distinct inputs asked for.
        changed: How many of `keys` are stored from a photo that has changed.
        quarantined: Inputs passed over because they failed before.
        todo_bytes: Size of the features of `keys` on disk.
        free_bytes: Free space where they go.
    """

    spec: FeatureSpec
    folder: Path
    keys: list[str]
    paths: list[Path]
    requested: int
    changed: int
    quarantined: int
    todo_bytes: int
    free_bytes: int

    @property
    def cached(self) -> int:
        """Inputs whose features are there already."""
        return self.requested - len(self.keys) - self.quarantined

    def check_space(self) -> None:
        """Refuse to start what cannot end.

        Raises:
            StoreError: The disk has less free space than the features need.
        """
        if self.todo_bytes > self.free_bytes:
            raise StoreError(
                f"{self.folder}: the features need {self.todo_bytes / 1e9:.2f} GB and"
                f" {self.free_bytes / 1e9:.2f} GB are free; free some space, or set"
                " [store] root to another disk"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's figures, JSON-able."""
        return {
            "kind": self.spec.kind,
            "fingerprint": self.spec.fingerprint,
            "folder": str(self.folder),
            "requested": self.requested,
            "cached": self.cached,
            "changed": self.changed,
            "quarantined": self.quarantined,
            "todo": len(self.keys),
            "todo_bytes": self.todo_bytes,
            "free_bytes": self.free_bytes,
        }


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is, or will be, on."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _open_if_there(kind: type[Any], folder: Path) -> Any:
    return kind(folder, read_spec(folder)) if shard_paths(folder) else None


def photo_digest(path: Path) -> tuple[int, int] | None:
    """Return the digest of a photo's bytes, or None where it cannot be read."""
    try:
        return digest_bytes(read_bytes(path))
    except ImageError:
        return None


def plan_images(
    spec: VisionSpec, store: StoreConfig, image_ids: Sequence[str], index: ImageIndex
) -> Plan:
    """Find which photos have no features, or features of other bytes.

    Args:
        spec: Of the features.
        store: Root and threads.
        image_ids: Ids asked for; repeats are counted once. Each has a photo.
        index: Where the photos are.

    Returns:
        The plan. Nothing is changed.

    Cost: reads every photo that is stored already, to compare its digest.
    """
    folder = spec.folder(Path(store.root))
    ids = list(dict.fromkeys(image_ids))
    paths = [index.lookup(image_id) for image_id in ids]
    lost = [image_id for image_id, path in zip(ids, paths, strict=True) if path is None]
    if lost:
        raise StoreError(f"{index.folder}: no photo for image id {lost[0]!r}")
    known = read_quarantine(folder)
    opened = _open_if_there(VisionStore, folder)
    positions = np.full(len(ids), -1, np.int64) if opened is None else opened.lookup(ids)
    to_compare = [i for i, key in enumerate(ids) if positions[i] >= 0 or key in known]
    with ThreadPoolExecutor(max(4, store.decode_threads)) as pool:
        found = dict(
            zip(to_compare, pool.map(photo_digest, [paths[i] for i in to_compare]), strict=True)
        )
    todo, changed, quarantined = [], 0, 0
    for i, key in enumerate(ids):
        digest = found.get(i)
        if positions[i] >= 0:
            stored = tuple(opened.source_digests(positions[i : i + 1])[0].tolist())
            if digest == stored:
                continue
            changed += 1
        elif key in known and digest is not None and list(digest) == known[key]["source_digest"]:
            quarantined += 1
            continue
        todo.append(i)
    tokens, width = vision_row_shape(spec.architecture, spec.tokens)
    row_bytes = spec.views * tokens * token_bytes(spec.dtype, width)
    if min(store.shard_rows, len(todo)) * row_bytes > MAX_SHARD_BYTES:
        fitting = MAX_SHARD_BYTES // row_bytes
        raise ConfigError(
            f"[store] shard_rows = {store.shard_rows}: one shard would take"
            f" {store.shard_rows * row_bytes / 1e9:.1f} GB of memory; choose at most {fitting}"
        )
    return Plan(
        spec=spec,
        folder=folder,
        keys=[ids[i] for i in todo],
        paths=[path for i in todo if (path := paths[i]) is not None],
        requested=len(ids),
        changed=changed,
        quarantined=quarantined,
        todo_bytes=len(todo) * row_bytes,
        free_bytes=free_space(folder),
    )


def plan_text(spec: TextSpec, store: StoreConfig, sentences: Sequence[str]) -> Plan:
    """Find which sentences have no features yet.

    The size is an upper bound: each sentence is taken at its full length.
    """
    folder = spec.folder(Path(store.root))
    distinct = list(dict.fromkeys(sentences))
    known = read_quarantine(folder)
    opened = _open_if_there(TextStore, folder)
    positions = np.full(len(distinct), -1) if opened is None else opened.lookup(distinct)
    missing = [key for key, position in zip(distinct, positions, strict=True) if position < 0]
    # A sentence never changes: one that failed under this spec always fails.
    todo = [key for key in missing if key not in known]
    width = int(spec.architecture["hidden_dim"])
    words = sum(min(len(key.split()) * 2 + 2, spec.sequence_length) for key in todo)
    return Plan(
        spec=spec,
        folder=folder,
        keys=todo,
        paths=[],
        requested=len(distinct),
        changed=0,
        quarantined=len(missing) - len(todo),
        todo_bytes=words * token_bytes(spec.dtype, width),
        free_bytes=free_space(folder),
    )
