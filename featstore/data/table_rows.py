"""Rows of Parquet files and of `datasets` folders, whose photos may be in the same file.

Columns are found by name, as those of a row file (`rows.ROLES`). Photos are a column of
bytes, or of structs of `bytes` and `path` as the `datasets` package writes them. A label that
is a class id has the name that the file's schema gives it (`huggingface` metadata), or
`label_names`; without either it is an error, for another file's ids mean something else.

Where photos are in the file, each is known by the file's own column of image ids; else by
`path`, where that names every photo and no two by one name; else by the digest of its bytes.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from featstore.data.collect import Raw, collect
from featstore.data.examples import ReadResult
from featstore.data.images import ImageIndex
from featstore.data.labels import named_class
from featstore.data.rows import column_error, columns_named, resolve
from featstore.data.tables import BLOCK_ROWS, PackedPhoto, TableFile, is_table, pyarrow
from featstore.data.values import read_image_id
from featstore.errors import DataError, FeatstoreError, RowError, short
from featstore.publish import publish, text_digest

DIGESTS = "photo-digests"
FORMAT = 1
RACY_NS = 2_000_000_000
_DICT, _STATE = "dataset_dict.json", "state.json"
_PHOTO_NAMES = (("image", "photo", "img"), ("imagebytes", "bytes", "jpg", "jpeg", "png"))
_ID = "image_id"


@dataclass(frozen=True)
class PackedImages(ImageIndex):
    """The photos of Parquet or Arrow files by image id, which is compared as it is written."""

    photos: Mapping[str, PackedPhoto] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.photos)

    def names(self) -> Iterator[str]:
        """Yield the image ids."""
        return iter(self.photos)

    def lookup(self, image_id: str) -> PackedPhoto | None:
        """Return where the photo of an image id is, or None where there is none."""
        return self.photos.get(image_id)


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files that rows are read from.

    Args:
        path: A file; a pattern such as `train-*.parquet`; a folder of Parquet files, or one
            that `datasets` saved, of one split or of several.

    Raises:
        RowError: There is none, or a folder is of another kind.
    """
    place = Path(path)
    if place.is_dir():
        return _files_below(place)
    if not place.exists() and glob.has_magic(os.fspath(path)):
        found = sorted(glob.glob(os.fspath(path)))
        if not found:
            raise RowError(f"{path}: no file fits the pattern; name a file of rows")
        return [Path(name) for name in found]
    return [place]


def saved_splits(path: str) -> dict[str, str]:
    """Return the folders of the splits that `DatasetDict.save_to_disk` wrote, by their names.

    Empty for any other path, and where there is but one.
    """
    listed = Path(path, _DICT)
    if not listed.is_file():
        return {}
    names = _json(listed).get("splits", [])
    return {name: str(Path(path, name)) for name in names} if len(names) > 1 else {}


def _files_below(folder: Path) -> list[Path]:
    if (folder / _DICT).is_file():
        names = _json(folder / _DICT).get("splits")
        if not names or not isinstance(names, list):
            raise RowError(f"{folder / _DICT}: names no splits; save the data set anew")
        return [file for name in names for file in _files_below(folder / str(name))]
    if (folder / _STATE).is_file():
        state = _json(folder / _STATE)
        if state.get("_indices_data_files"):
            raise RowError(
                f"{folder}: its rows are chosen by a list of indices beside them, which is not"
                " read; save it after `flatten_indices()`"
            )
        files = state.get("_data_files")
        if not files or not isinstance(files, list):
            raise RowError(f"{folder / _STATE}: names no data files; save the data set anew")
        return [folder / Path(str(line.get("filename"))).name for line in files]
    if found := sorted(folder.rglob("*.parquet")):
        return found
    raise RowError(
        f"{folder}: is a folder without Parquet files, and not one that `save_to_disk` wrote;"
        " name a JSONL, CSV or Parquet file of rows"
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RowError(f"{path}: cannot be read ({error}); save the data set anew") from error
    return content if isinstance(content, dict) else {}


def has_photos(path: str | os.PathLike[str]) -> bool:
    """Tell whether rows have their photos in the same file.

    Raises:
        RowError: They cannot be read, or pyarrow is missing.
    """
    file = files_of(path)[0]
    return is_table(file) and _photo_column(TableFile(file))[0] != ""


class TableRows:
    """The rows of one Parquet or Arrow file, read.

    Args:
        path: The file.
        labelled: As of `read_examples`.
        label_names: Of class ids, where the file has none of its own.
        packed: Photos are read from the file; else their names alone.
        root: The store's, where digests of the photos are kept; None: nowhere.

    Raises:
        RowError: It is damaged, lacks a column or image bytes, or its class ids have no names.
    """

    def __init__(
        self,
        path: Path,
        *,
        labelled: bool = True,
        label_names: Sequence[str] = (),
        packed: bool = False,
        root: Path | None = None,
    ) -> None:
        self.path, self.packed = path, packed
        table = TableFile(path)
        self.photo_column, path_column = _photo_column(table, needed=packed)
        if packed and not self.photo_column:
            raise RowError(
                f"{path}: has no photos in it; name the folder of photos ([data] images, --images)"
            )
        columns = _columns(table, labelled, bool(self.photo_column) and (packed or path_column))
        self.named = columns[_ID] is not None
        names = _class_names(table, columns["label"]) or tuple(label_names)
        if columns["label"] and not names and _is_number(table, columns["label"]):
            if labelled:
                raise _unnamed(path, columns["label"])
            # Not guessed: the rows have no label.
            columns["label"] = None
        id_column = columns[_ID] or path_column
        wanted = [c for c in dict.fromkeys((id_column, columns["text"], columns["label"])) if c]
        state, started_ns = _state(path), time.time_ns()
        known = _known_digests(path, root, state) if packed else None
        self.ids: list[Any] = []
        self.rows: list[tuple[Any, Any]] = []
        self.places: list[tuple[int, int]] = []
        self.digests: list[bytes] = []
        reading = [*wanted, self.photo_column] if packed and known is None else wanted
        text_column = columns["text"] or ""  # which every file has
        for block in table.blocks(reading, BLOCK_ROWS if len(reading) > len(wanted) else 4096):
            values = {name: block.columns[name].to_pylist() for name in wanted}
            blank = [None] * len(block)
            self.ids += values.get(id_column, blank)
            labels = values.get(columns["label"] or "", blank)
            labels = [named_class(label, names) for label in labels] if names else labels
            self.rows += zip(values[text_column], labels, strict=True)
            self.places += ((block.group, block.row + i) for i in range(len(block)))
            if len(reading) > len(wanted):
                self.digests += map(_digest, block.columns[self.photo_column])
        if known is not None and len(known) == len(self.rows):
            self.digests = known
        elif known is not None:
            raise RowError(f"{path}: changed while it was read; run the command again")
        elif packed and root is not None and state == _state(path) and _settled(state, started_ns):
            _keep_digests(path, root, state, self.digests)
        if not self.named:
            self.ids = [_last_part(value) for value in self.ids]
        if packed and self.rows and not any(self.digests):
            first = next((f", such as {short(value)}" for value in self.ids if value), "")
            raise RowError(
                f"{path}: no row has image bytes in {self.photo_column}{first}; name the folder of"
                " photos ([data] images, --images), or save the data set with its images embedded"
            )

    def result(self, labelled: bool, unique: bool, classes: int = 2) -> ReadResult:
        """Check the rows' values; see `collect`. A row's line is its place in the file, from 1."""
        raws = (
            Raw(number, image_id, text, label)
            for number, (image_id, (text, label)) in enumerate(
                zip(self.ids, self.rows, strict=True), 1
            )
        )
        return collect(self.path, raws, labelled, unique, classes=classes)

    def located(self) -> Iterator[tuple[str, bytes, PackedPhoto]]:
        """Yield image id, digest and place of each row's photo, where it has one."""
        file = os.path.abspath(self.path)
        for number, (image_id, digest, place) in enumerate(
            zip(self.ids, self.digests, self.places, strict=True), 1
        ):
            if digest:
                name, _, _ = read_image_id(image_id)
                yield name, digest, PackedPhoto(file, self.photo_column, *place, number)


def packed_images(tables: Sequence[TableRows]) -> PackedImages:
    """Give the photos of some files their image ids, and say where each is.

    Args:
        tables: With photos; those that have no column of image ids are given ids.

    Raises:
        DataError: An id names two photos.
    """
    unnamed = [table for table in tables if not table.named]
    if not _names_each(unnamed):
        for table in unnamed:
            table.ids = [digest.hex() or None for digest in table.digests]
    photos: dict[str, PackedPhoto] = {}
    digests: dict[str, bytes] = {}
    for table in tables:
        for image_id, digest, photo in table.located():
            photos.setdefault(image_id, photo)
            if digests.setdefault(image_id, digest) != digest:
                raise DataError(
                    f"{photo}: image id {short(image_id)} has other image bytes than in"
                    f" {photos[image_id]}; give each photo an id of its own, or remove the column"
                    " of ids: photos are then known by their bytes"
                )
    places = [os.path.abspath(table.path) for table in tables]
    folder = Path(os.path.commonpath(places))
    return PackedImages(folder, {}, {}, photos=photos)


def _names_each(tables: Iterable[TableRows]) -> bool:
    """Tell whether every photo has a name, and no two the same."""
    seen: dict[Any, bytes] = {}
    for table in tables:
        for image_id, digest in zip(table.ids, table.digests, strict=True):
            name, reason, _ = read_image_id(image_id)
            if digest and (reason or seen.setdefault(name, digest) != digest):
                return False
    return True


def _photo_column(table: TableFile, needed: bool = False) -> tuple[str, str]:
    """Return the columns of the photos' bytes and of their paths, "" where none is known.

    Raises:
        RowError: It is needed, and several may be it.
    """
    types = pyarrow(table.path).types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: dict[str, tuple[str, str]] = {}
    for part in table.schema:
        if is_bytes(part.type):
            found[part.name] = part.name, ""
        elif types.is_struct(part.type):
            inner = {sub.name: sub.type for sub in part.type}
            if "bytes" in inner and is_bytes(inner["bytes"]):
                has_path = "path" in inner
                found[part.name] = f"{part.name}.bytes", f"{part.name}.path" if has_path else ""
    names = list(found)
    at = columns_named(names, _PHOTO_NAMES) or range(len(names))
    if len(at) > 1 and needed:
        several = " and ".join(short(names[i]) for i in at)
        raise RowError(
            f"{table.path}: more than one column of image bytes, {several}; rename the one of the"
            " photos to image, or remove the others"
        )
    return found[names[at[0]]] if len(at) == 1 else ("", "")


def _columns(table: TableFile, labelled: bool, given: object) -> dict[str, str | None]:
    """Find the columns of image ids, texts and labels; ids may be absent where photos are given."""
    types = pyarrow(table.path).types

    def is_plain(kind: Any) -> bool:
        if types.is_dictionary(kind):
            kind = kind.value_type
        return not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))

    names = [part.name for part in table.schema if is_plain(part.type)]
    at, problem = resolve(names, labelled)
    if given and at.image_id is None:
        # The photos have names of their own, or get them.
        at, problem = resolve([*names, _ID], labelled)
        at = at._replace(image_id=None)
    if problem:
        raise column_error(table.path, 1, problem, [part.name for part in table.schema])
    found = (None if i is None else names[i] for i in at)
    return dict(zip((_ID, "text", "label"), found, strict=True))


def _is_number(table: TableFile, column: str) -> bool:
    types, kind = pyarrow(table.path).types, table.schema.field(column).type
    return bool(types.is_integer(kind) or types.is_floating(kind))


def _unnamed(path: Path, column: str) -> RowError:
    return RowError(
        f"{path}: the labels in {column} are class ids without names; say what they mean, from 0"
        ' on, such as [data] label_names = ["entailment", "neutral", "contradiction"]'
        " (--label-names entailment,neutral,contradiction)"
    )


def _class_names(table: TableFile, column: str | None) -> tuple[str, ...]:
    """Return the names of a column's class ids, as `datasets` writes them into the schema."""
    metadata = table.schema.metadata or {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
        if isinstance(names, dict):  # of older versions: {"0": "entailment", …}
            names = [names[str(i)] for i in range(len(names))]
        return tuple(map(str, names))
    return ()


def _last_part(value: Any) -> Any:
    """Return a path's own name: where a photo once lay says nothing."""
    return PurePosixPath(value.replace("\\", "/")).name if isinstance(value, str) else value


def _digest(value: Any) -> bytes:
    """Return the XXH3-128 of an Arrow value's bytes; nothing where it is null or empty."""
    buffer = value.as_buffer() if value.is_valid else None
    return xxhash.xxh3_128_digest(buffer) if buffer else b""


def _digests_file(path: Path, root: Path) -> Path:
    return root / DIGESTS / f"rows-{text_digest(os.path.realpath(path))[:16]}.npz"


def _state(path: Path) -> list[int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _settled(state: Sequence[int], read_ns: int) -> bool:
    """Tell whether any change after the reading gives the file another state; see `photos.py`."""
    return all(abs(read_ns - changed_ns) >= RACY_NS for changed_ns in state[1:])


def _known_digests(path: Path, root: Path | None, state: Sequence[int]) -> list[bytes] | None:
    """Return the digests of a file's photos, where they are kept and the file is as it was."""
    if root is None:
        return None
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile),
        np.load(_digests_file(path, root), allow_pickle=False) as kept,
    ):
        if int(kept["format"]) == FORMAT and kept["state"].tolist() == state:
            there = kept["there"].tolist()
            values = kept["digests"]
            return [values[i].tobytes() if there[i] else b"" for i in range(len(there))]
    return None


def _keep_digests(path: Path, root: Path, state: Sequence[int], digests: Sequence[bytes]) -> None:
    """Keep the digests of a file's photos; nothing is said where the store cannot be written."""
    values = np.zeros((len(digests), 16), np.uint8)
    for i, digest in enumerate(digests):
        values[i, : len(digest)] = np.frombuffer(digest, np.uint8)
    with (
        contextlib.suppress(FeatstoreError, OSError),
        publish(_digests_file(path, root)) as temporary,
        temporary.open("wb") as file,
    ):
        there = np.array([bool(digest) for digest in digests])
        np.savez(file, format=FORMAT, state=state, there=there, digests=values)
