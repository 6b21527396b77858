"""What is in a store, and which of it a configuration asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import SPLITS
from featstore.data.views import View
from featstore.encoders.spec import TextSpec, VisionSpec
from featstore.errors import Advice, Command, CorruptShardError, FeatstoreError, StoreError
from featstore.extract.lengths import find_cut
from featstore.extract.plan import KINDS, UNITS
from featstore.project import Project
from featstore.publish import TEMPORARY
from featstore.store.folder import listed, read_names, read_quarantine, read_spec, shard_paths
from featstore.store.store import TextStore, VisionStore, store_of

FINGERPRINT = re.compile("[0-9a-f]{32}")


def feature_folders(root: Path, kinds: Sequence[str] = KINDS) -> list[Path]:
    """Return the feature folders of a store, images first.

    Raises:
        StoreError: There is no such store, or it may not be listed.
    """
    if not root.is_dir():
        raise StoreError(
            f"{root}: no store there",
            Advice("name it with --root or [store] root, or run ", Command("extract-vit")),
        )
    return [
        path
        for kind in kinds
        for path in listed(root / kind)
        if FINGERPRINT.fullmatch(path.name) and path.is_dir()
    ]


def open_folder(folder: Path) -> VisionStore | TextStore:
    """Open a feature folder whatever its spec.

    Raises:
        CorruptShardError: It is damaged, or lies below another kind's name.
    """
    spec = read_spec(folder)
    if spec.get("kind") != folder.parent.name:
        raise CorruptShardError(
            f"{folder}: holds {spec.get('kind')!r} features, expected {folder.parent.name!r}"
        )
    return store_of(folder, spec)


def disk_bytes(paths: Sequence[Path]) -> int:
    """Return the size of files, those in folders included."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe_folder(folder: Path, asked: Collection[str]) -> dict[str, Any]:
    """Return what one feature folder holds, JSON-able.

    Args:
        folder: The folder.
        asked: Fingerprints that the configuration asks for.

    Returns:
        `damaged` is None, or why the folder cannot be opened; the counts are
        None then, that of the shards where the folder may not even be listed.
        `view`: of a photometric view, its number, seed and ranges; else None.
        `cut`: of text, the sentences cut at `sequence_length`, see `Cut.to_dict`.
    """
    found: dict[str, Any] = {
        "kind": folder.parent.name,
        "fingerprint": folder.name,
        "folder": str(folder),
        "names": read_names(folder),
        "asked_for": folder.name in asked,
        "shards": None,
        "bytes": disk_bytes([folder]),
        "leftover_files": len(list(folder.glob(f"{TEMPORARY}*"))),
        "boundary": None,
        "view": None,
        "layers": None,
        "dtype": None,
        "tokens": None,
        "width": None,
        "rows": None,
        "superseded_rows": None,
        "stale_rows": None,
        "quarantined": None,
        "cut": None,
        "damaged": None,
    }
    try:
        found["shards"] = len(shard_paths(folder))
        spec = read_spec(folder)
        found |= {
            "boundary": spec["boundary"],
            "view": spec.get("view"),
            "layers": spec["architecture"].get("num_layers"),
            "dtype": spec["dtype"],
        }
        opened = open_folder(folder)
        newest, live = opened.newest(), opened.live()
        found |= {
            "rows": len(live),
            "superseded_rows": opened.rows - len(newest),
            "stale_rows": len(newest) - len(live),
            "quarantined": len(read_quarantine(folder)),
        }
        if isinstance(opened, TextStore):
            found["tokens"] = int(opened.lengths(live).sum())
            found["width"] = opened.width if opened.rows else None
            found["cut"] = find_cut(opened, opened.keys()).to_dict()
        elif opened.rows:
            found["tokens"], found["width"] = opened.row_shape
    except StoreError as error:
        found["damaged"] = str(error)
    return found


def _coverage(project: Project) -> dict[str, dict[str, int]]:
    """Count, for each split, the inputs that have features."""
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for kind, what in UNITS.items():
        folder = project.spec(kind).folder(project.root)
        try:
            opened = open_folder(folder) if shard_paths(folder) else None
        except StoreError:
            continue
        for split in SPLITS:
            keys = project.keys(kind, split)
            stored = 0 if opened is None else int((opened.lookup(keys) >= 0).sum())
            counts[split] |= {what: len(keys), f"{what}_with_features": stored}
    if project.views > 1:
        for split, found in counts.items():
            found["images_under_all_views"] = _under_all_views(project, split)
    return counts


def _under_all_views(project: Project, split: str) -> int:
    """Count the photos of a split that have features under each view that is asked for."""
    keys = project.keys("vit", split)
    every = np.ones(len(keys), bool)
    for view in range(project.views):
        folder = project.view_spec(view).folder(project.root)
        try:
            every &= open_folder(folder).lookup(keys) >= 0 if shard_paths(folder) else False
        except StoreError:
            # What is wrong with it stands with the folder itself.
            return 0
    return int(every.sum())


def describe_store(project: Project) -> dict[str, Any]:
    """Return what a store holds and what of it the configuration asks for, JSON-able.

    Reads every shard's index, no features. TensorFlow is not needed where the
    encoders are local folders.

    Returns:
        `features`: one entry a folder, see `describe_folder`; `coverage`:
        split to counts, None where there are no rows; `problems`: why a part
        could not be told; `splits`, `reports`: files and bytes.

    Raises:
        StoreError: There is no store.
    """
    folders = feature_folders(project.root)
    problems: list[str] = []
    asked: dict[str, str] = {}
    wanted = set[str]()
    coverage = None
    try:
        asked = {kind: spec.fingerprint for kind, spec in project.asked.items()}
        wanted = project.fingerprints
        coverage = _coverage(project) if project.has_dataset else None
    except FeatstoreError as error:
        problems.append(str(error))
    result: dict[str, Any] = {
        "root": str(project.root),
        "asked_for": asked,
        "features": [describe_folder(folder, wanted) for folder in folders],
        "coverage": coverage,
        "problems": problems,
    }
    for name in ("splits", "reports"):
        files = sorted((project.root / name).glob("*"))
        result[name] = {"files": len(files), "bytes": disk_bytes(files)}
    return result


def matching_spec(project: Project, folder: Path) -> VisionSpec | TextSpec | None:
    """Return the spec of a folder where the configuration's encoders can make its features.

    Number format, arithmetic, tokens, boundary and photometric view need no other files, so
    the features of another `--dtype`, `--k-txt`, `--k-vit` or view can be made too. Where the
    folder's spec is lost, only what the configuration asks for can be told from its name.
    """
    own = project.spec(folder.parent.name)
    for asked in project.asked_views:
        if asked.fingerprint == folder.name:
            return asked
    free: tuple[str, ...] = ("dtype", "precision", "boundary")
    if own.kind == "vit":
        free = (*free, "tokens", "final_norm", "view")
    found: dict[str, Any] = {}
    with contextlib.suppress(StoreError):
        found = read_spec(folder)
    # A plain photo's spec has no such field, whatever the configuration asks for.
    if view := found.get("view"):
        try:
            View.of(view)
        except StoreError:
            return None
    spec = dataclasses.replace(own, **{name: found[name] for name in free if name in found})
    return spec if spec.fingerprint == folder.name else None
