"""What is in a store, and which of it a configuration asks for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featstore.config import SPLITS, DataConfig, EncodersConfig, StoreConfig
from featstore.data.dataset import Dataset, load_dataset
from featstore.encoders.spec import TextSpec, VisionSpec, text_spec, vision_spec
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import Advice, Command, CorruptShardError, FeatstoreError, StoreError
from featstore.publish import TEMPORARY
from featstore.store.folder import listed, read_names, read_quarantine, read_spec, shard_paths
from featstore.store.store import TextStore, VisionStore, store_of

KINDS = ("vit", "text")
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


class Source:
    """What a configuration can make features of, read when it is first needed.

    Args:
        data, encoders, store: The configuration.
        k_txt: Text layers that it trains.
    """

    def __init__(
        self, data: DataConfig, encoders: EncodersConfig, store: StoreConfig, k_txt: int
    ) -> None:
        self.data, self.encoders, self.store, self.k_txt = data, encoders, store, k_txt
        self.root = Path(store.root)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The configuration's rows and photos; its split is not written."""
        return load_dataset(self.data, self.root, save=False)

    @property
    def has_dataset(self) -> bool:
        """Whether rows are named, or the demo's are there already."""
        return bool(self.data.rows) or (self.root / "demo").is_dir()

    @functools.cached_property
    def vision(self) -> VisionSpec:
        """The spec of the image features that the configuration asks for."""
        return vision_spec(self.encoders, self.store)

    @functools.cached_property
    def text(self) -> TextSpec:
        """The spec of the sentence features that the configuration asks for."""
        return text_spec(self.encoders, self.store, self.k_txt)

    @property
    def asked(self) -> dict[str, VisionSpec | TextSpec]:
        """Kind to the spec that the configuration asks for.

        Raises:
            PresetError: An encoder cannot be found.
        """
        return {"vit": self.vision, "text": self.text}

    def keys(self, kind: str, split: str = "all") -> list[str]:
        """Return the distinct image ids or sentences of a split, in the order of the rows."""
        examples, rows = self.dataset.examples, self.dataset.rows(split)
        column = examples.image_ids if kind == "vit" else examples.hypotheses
        return list(dict.fromkeys(column[rows].tolist()))

    @functools.cached_property
    def possible(self) -> dict[str, VisionSpec | TextSpec]:
        """Fingerprint to every spec that the two encoders can be run for.

        Stored dtype, arithmetic, tokens and boundary do not need other files,
        so the features of another `--dtype` or `--k-txt` can be made too.
        """
        choices = {
            field.name: field.metadata["choices"] for field in dataclasses.fields(StoreConfig)
        }
        found: dict[str, VisionSpec | TextSpec] = {}
        layers = int(self.text.architecture["num_layers"])
        for dtype, precision in itertools.product(choices["dtype"], choices["precision"]):
            vision = dataclasses.replace(self.vision, dtype=dtype, precision=precision)
            text = dataclasses.replace(self.text, dtype=dtype, precision=precision)
            variants: list[VisionSpec | TextSpec] = [
                *(dataclasses.replace(vision, tokens=tokens) for tokens in choices["tokens"]),
                *(dataclasses.replace(text, boundary=layer) for layer in range(layers + 1)),
            ]
            found |= {spec.fingerprint: spec for spec in variants}
        return found

    @functools.cache  # noqa: B019
    def vision_encoder(self, tokens: str, precision: str) -> VisionEncoder:
        """Load the vision encoder."""
        return VisionEncoder(self.encoders.vit, tokens, precision)

    @functools.cache  # noqa: B019
    def text_encoder(self, precision: str) -> TextEncoder:
        """Load the text encoder."""
        return TextEncoder(self.encoders.text, self.encoders.sequence_length, precision)


def disk_bytes(paths: Sequence[Path]) -> int:
    """Return the size of files, those in folders included."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())


def describe_folder(folder: Path, asked: Sequence[str]) -> dict[str, Any]:
    """Return what one feature folder holds, JSON-able.

    Args:
        folder: The folder.
        asked: Fingerprints that the configuration asks for.

    Returns:
        `damaged` is None, or why the folder cannot be opened; the counts are
        None then, that of the shards where the folder may not even be listed.
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
        "layers": None,
        "dtype": None,
        "tokens": None,
        "width": None,
        "rows": None,
        "superseded_rows": None,
        "stale_rows": None,
        "quarantined": None,
        "damaged": None,
    }
    try:
        found["shards"] = len(shard_paths(folder))
        spec = read_spec(folder)
        found |= {
            "boundary": spec["boundary"],
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
        elif opened.rows:
            found["tokens"], found["width"] = opened.row_shape
    except StoreError as error:
        found["damaged"] = str(error)
    return found


def _coverage(source: Source) -> dict[str, dict[str, int]]:
    """Count, for each split, the inputs that have features."""
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for kind, what in (("vit", "images"), ("text", "sentences")):
        folder = source.asked[kind].folder(source.root)
        try:
            opened = open_folder(folder) if shard_paths(folder) else None
        except StoreError:
            continue
        for split in SPLITS:
            keys = source.keys(kind, split)
            stored = 0 if opened is None else int((opened.lookup(keys) >= 0).sum())
            counts[split] |= {what: len(keys), f"{what}_with_features": stored}
    return counts


def describe_store(source: Source) -> dict[str, Any]:
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
    folders = feature_folders(source.root)
    problems: list[str] = []
    asked: dict[str, str] = {}
    coverage = None
    try:
        asked = {kind: spec.fingerprint for kind, spec in source.asked.items()}
        coverage = _coverage(source) if source.has_dataset else None
    except FeatstoreError as error:
        problems.append(str(error))
    result: dict[str, Any] = {
        "root": str(source.root),
        "asked_for": asked,
        "features": [describe_folder(folder, list(asked.values())) for folder in folders],
        "coverage": coverage,
        "problems": problems,
    }
    for name in ("splits", "reports"):
        files = sorted((source.root / name).glob("*"))
        result[name] = {"files": len(files), "bytes": disk_bytes(files)}
    return result


def matching_spec(source: Source, folder: Path) -> VisionSpec | TextSpec | None:
    """Return the spec of a folder where the configuration's encoders can make it."""
    spec = source.possible.get(folder.name)
    return spec if spec is not None and spec.kind == folder.parent.name else None
