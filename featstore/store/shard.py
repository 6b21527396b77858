"""One immutable HDF5 shard: what is in the file, open it, map it, check it (`write.py` makes it).

Layout (format 1; every dataset contiguous and uncompressed):

    /features       vision (rows, views, tokens, width); text (all tokens, width)
    /keys           uint8, the keys' UTF-8 bytes one after the other
    /key_offsets    int64 (rows + 1,), where each key starts and the last ends
    /key_digests    uint64 (rows, 2), XXH3-128 of each key
    /source_digests uint64 (rows, 2), XXH3-128 of the source file's bytes; vision only
    /offsets        int64 (rows + 1,), first token of each row; text only
    /token_ids      int32 (all tokens,); text only
    /checksums      uint64 (rows,), XXH3-64 of each row's features
                    (text: of its token ids, then its features)

and in format 2, which int8 features have:

    /scales         float32, the size of one step of each token's features
                    (see `numbers.py`): vision (rows, views, tokens); text
                    (all tokens,). A row's checksum goes on with its scales.

Root attributes: `format`, `kind`, `fingerprint`, `dtype` (bfloat16 is kept as
its uint16 bits), `versions`, `number` (the one in the file's name; shards of the
first version do not say it), and `index_checksum`, the XXH3-128 of everything
above except the features and their scales. The file holds no time stamp: equal rows give equal
bytes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED, format_of
from featstore.errors import Advice, Command, CorruptShardError, StoreError, counted
from featstore.store.numbers import SCALE_DTYPE, Numbers, feature_dtype

PAGE_BYTES = 4096
VERIFY = Command("store", "verify")
REPAIR = Command("store", "repair")
MAKE_READABLE = Advice("make it readable for you, then run the command again")

INDEX_DATASETS: dict[str, dict[str, tuple[str, int]]] = {
    "vit": {
        "keys": ("uint8", 1),
        "key_offsets": ("int64", 1),
        "key_digests": ("uint64", 2),
        "source_digests": ("uint64", 2),
        "checksums": ("uint64", 1),
    },
    "text": {
        "keys": ("uint8", 1),
        "key_offsets": ("int64", 1),
        "key_digests": ("uint64", 2),
        "offsets": ("int64", 1),
        "token_ids": ("int32", 1),
        "checksums": ("uint64", 1),
    },
}

# What h5py raises on a file whose bytes were changed.
HDF5_ERRORS = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    OverflowError,
    MemoryError,
)

ATTRIBUTES = ("format", "kind", "fingerprint", "dtype", "versions", "index_checksum")

SHARD_NAME = re.compile(r"shard-([0-9]{5}|[1-9][0-9]{5,8})\.h5")


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.h5"


def shard_number(path: Path) -> int | None:
    """Return the number in a shard's file name; None where it is another name."""
    match = SHARD_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def disk_dtype(name: str) -> np.dtype[Any]:
    """Return the HDF5 dtype of a stored number format; it has none for bfloat16."""
    return np.dtype(np.uint16) if name == "bfloat16" else np.dtype(name)


def digest_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return the XXH3-128 digests of keys, uint64 of shape (len(keys), 2)."""
    digests = b"".join(xxhash.xxh3_128_digest(key.encode()) for key in keys)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def digest_bytes(data: bytes) -> tuple[int, int]:
    """Return the XXH3-128 digest of a source file as two 64-bit numbers."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (2**64 - 1)


def shard_header(
    kind: str, fingerprint: str, dtype: str, shape: tuple[int, ...], versions: str, number: Any
) -> dict[str, Any]:
    """Return what the index checksum covers beside the index; all but the shape are attributes."""
    header = {
        "format": format_of(dtype),
        "kind": kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "shape": list(shape),
        "versions": versions,
    }
    return header if number is None else {**header, "number": number}


def index_checksum(arrays: dict[str, NDArray[Any]], header: dict[str, Any]) -> str:
    """Return the XXH3-128 of a shard's index and header."""
    state = xxhash.xxh3_128()
    state.update(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        if array.size:
            state.update(array.view(np.uint8).data)
    return state.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return the size and the XXH3-128 digest of a whole file."""
    state = xxhash.xxh3_128()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
            size += len(block)
    return {"bytes": size, "digest": state.hexdigest()}


@dataclass
class Shard:
    """A shard open for reading: its index in memory, its features mapped.

    Attributes:
        features: Read-only map of `/features` and, of int8, `/scales`.
        starts: Where each of `features.arrays` starts in the file; 0 where it is empty.
        index: The other datasets by name.
        versions: Packages that wrote it.
        number: The number that it states; None in a shard of the first version.
    """

    path: Path
    kind: str
    fingerprint: str
    dtype: str
    features: Numbers
    starts: tuple[int, ...]
    index: dict[str, NDArray[Any]]
    versions: dict[str, str]
    number: int | None = None

    def __len__(self) -> int:
        return len(self.index["checksums"])

    def keys(self) -> list[str]:
        """Return the keys in row order.

        Raises:
            CorruptShardError: A key is not UTF-8.
        """
        data = self.index["keys"].tobytes()
        offsets = self.index["key_offsets"].tolist()
        try:
            return [data[a:b].decode() for a, b in itertools.pairwise(offsets)]
        except UnicodeDecodeError as error:
            raise CorruptShardError(f"{self.path}: a key is not UTF-8", VERIFY) from error

    def row_is_intact(self, row: int) -> bool:
        """Tell whether a row's features still have their checksum. Reads the row."""
        part: int | slice = row
        ids = None
        if self.kind == "text":
            part = slice(*self.index["offsets"][row : row + 2])
            ids = self.index["token_ids"][part]
        return self.features[part].checksum(ids) == int(self.index["checksums"][row])

    def check_row(self, row: int) -> None:
        """Read a row.

        Raises:
            CorruptShardError: It no longer has its checksum.
        """
        if not self.row_is_intact(row):
            raise CorruptShardError(
                f"{self.path}: row {row} ({self.keys()[row]!r}) does not have its checksum",
                REPAIR,
            )

    def row_ends(self) -> NDArray[np.int64]:
        """Return where each row ends in the file, int64 of shape (rows,)."""
        ends = self.index["offsets"][1:] if self.kind == "text" else np.arange(1, len(self) + 1)

        parts = zip(self.starts, self.features.arrays, strict=True)
        steps = [
            (start, array.dtype.itemsize * math.prod(array.shape[1:])) for start, array in parts
        ]
        return np.max([start + ends * step for start, step in steps], axis=0).astype(np.int64)


def salvage_keys(path: Path) -> list[str]:
    """Return the keys of a damaged shard that can still be told, in row order.

    A key counts only where it has its own digest. A file that HDF5 cannot read
    gives none.
    """
    try:
        if not path.is_file():
            return []
        with h5py.File(path, "r", locking=False) as file:
            data = file["keys"][...].tobytes()
            offsets = file["key_offsets"][...].tolist()
            digests = file["key_digests"][...]
            found = []
            for (a, b), digest in zip(itertools.pairwise(offsets), digests, strict=False):
                with contextlib.suppress(UnicodeDecodeError):
                    key = data[max(a, 0) : max(b, 0)].decode()
                    if np.array_equal(digest_keys([key])[0], digest):
                        found.append(key)
            return found
    except (*HDF5_ERRORS, IndexError):
        return []


@dataclass(frozen=True)
class _Stored:
    """Where a dataset's numbers lie in the file; `offset` is None where it has none."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int | None

    def read(self, memory: mmap.mmap) -> NDArray[Any]:
        """Return the numbers as an array on the mapped file."""
        count = math.prod(self.shape)
        if self.offset is None or not count:
            return np.empty(self.shape, self.dtype)
        # A plain array on the map: each slice of a memmap object costs microseconds more.
        return np.frombuffer(memory, self.dtype, count, self.offset).reshape(self.shape)


# HDF5 is called without h5py's objects in between: those cost a millisecond for each shard.
# Nothing stays open, whatever was opened inside the file.
_ACCESS = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
_ACCESS.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
_ACCESS.set_file_locking(False, True)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.h5f.FileID]:
    file = h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, _ACCESS)
    try:
        yield file
    finally:
        file.close()


def _dataset(file: h5py.h5f.FileID, path: Path, name: str, file_bytes: int) -> _Stored:
    """Return a plain dataset of this very file, or refuse."""
    links, key = file.links, name.encode()
    if not links.exists(key) or links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise CorruptShardError(f"{path}: /{name} is missing or a link to elsewhere")
    dataset = h5py.h5o.open(file, key)
    if not isinstance(dataset, h5py.h5d.DatasetID):
        raise CorruptShardError(f"{path}: /{name} is not a dataset")
    layout = dataset.get_create_plist()
    if layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_external_count():
        raise CorruptShardError(f"{path}: /{name} is not contiguous inside the file")
    found = _Stored(dataset.dtype, dataset.shape, dataset.get_offset())
    count = math.prod(found.shape)
    if found.dtype.hasobject:
        raise CorruptShardError(f"{path}: /{name} holds references or strings, expected numbers")
    if count and found.offset is None:
        raise CorruptShardError(f"{path}: /{name} has no data")
    size, claimed = dataset.get_storage_size(), count * found.dtype.itemsize
    if (found.offset or 0) + size > file_bytes or size != claimed:
        raise CorruptShardError(
            f"{path}: /{name} claims {claimed} bytes that the file does not have"
        )
    return found


def _attribute(file: h5py.h5f.FileID, path: Path, name: str) -> str | int:
    """Return a root attribute that is one text or integer, or refuse."""
    key = name.encode()
    if h5py.h5a.exists(file, key):
        attribute = h5py.h5a.open(file, key)
        dtype = attribute.dtype
        if attribute.shape == () and (dtype.kind in "iu" or dtype.metadata == {"vlen": str}):
            value = np.empty((), dtype)
            attribute.read(value)
            found = value.item()
            return found.decode() if isinstance(found, bytes) else found
    raise CorruptShardError(f"{path}: attribute {name} is missing or not one value")


def _check_shapes(path: Path, kind: str, shape: tuple[int, ...], index: dict[str, Any]) -> None:
    rows = len(index["checksums"])
    lengths = {"key_offsets": rows + 1, "key_digests": rows}
    lengths |= {"source_digests": rows} if kind == "vit" else {"offsets": rows + 1}
    for name, length in lengths.items():
        if len(index[name]) != length:
            raise CorruptShardError(
                f"{path}: /{name} has {len(index[name])} entries, expected {length}"
            )
    ends = {"key_offsets": len(index["keys"])}
    first_axis = rows
    if kind == "text":
        ends["offsets"] = first_axis = len(index["token_ids"])
    for name, end in ends.items():
        offsets = index[name]
        if offsets[0] != 0 or offsets[-1] != end or (offsets[1:] < offsets[:-1]).any():
            raise CorruptShardError(f"{path}: /{name} does not rise from 0 to {end}")
    ranks = {"vit": 4, "text": 2}
    if len(shape) != ranks[kind] or shape[0] != first_axis or 0 in shape[1:]:
        raise CorruptShardError(
            f"{path}: /features has shape {shape}, which does not fit {counted(rows, 'row')}"
        )


def open_shard(path: Path, kind: str, fingerprint: str, dtype: str, private: bool = False) -> Shard:
    """Open a shard and check everything but the features' own bytes.

    Args:
        path: The shard.
        kind, fingerprint, dtype: What its folder's spec says.
        private: The features may be written to; the file never sees it.

    Returns:
        The shard, its index read and checked, its features mapped. No HDF5
        handle stays open.

    Raises:
        CorruptShardError: The file is truncated, damaged, of another spec, or
            holds anything but plain contiguous datasets of its own.
        StoreError: It may not be read, which says nothing of what is in it.
    """
    try:
        return _open_shard(path, kind, fingerprint, dtype, private)
    except PermissionError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})", MAKE_READABLE) from error
    except CorruptShardError as error:
        raise CorruptShardError(error.message, VERIFY) from error


def _open_shard(path: Path, kind: str, fingerprint: str, dtype: str, private: bool) -> Shard:
    names = INDEX_DATASETS[kind]
    try:
        status = path.stat()
        file_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            # Opening a pipe would wait for a writer that never comes.
            raise CorruptShardError(f"{path}: not a regular file")
        # Before HDF5, whose own error would not say it in a word.
        memory = _map(path, private)
        with _opened(path) as file:
            attributes = {name: _attribute(file, path, name) for name in ATTRIBUTES}
            if h5py.h5a.exists(file, b"number"):
                attributes["number"] = _attribute(file, path, "number")
            mapped = ("features", "scales") if dtype == QUANTISED else ("features",)
            datasets = {name: _dataset(file, path, name, file_bytes) for name in (*names, *mapped)}
        for name, (expected, rank) in names.items():
            dataset = datasets[name]
            if dataset.dtype != np.dtype(expected) or len(dataset.shape) != rank:
                raise CorruptShardError(
                    f"{path}: /{name} is {dataset.dtype}{dataset.shape}, expected"
                    f" {expected} with {rank} axes"
                )
        stored = datasets["features"]
        if stored.dtype != disk_dtype(dtype):
            raise CorruptShardError(
                f"{path}: /features is {stored.dtype}, expected {disk_dtype(dtype)}"
            )
        scaled = datasets.get("scales")
        if scaled and (scaled.dtype, scaled.shape) != (SCALE_DTYPE, stored.shape[:-1]):
            raise CorruptShardError(
                f"{path}: /scales is {scaled.dtype}{scaled.shape}, expected"
                f" {SCALE_DTYPE}{stored.shape[:-1]}"
            )
        # Copies: what was checked must not change under the reader.
        index = {name: datasets[name].read(memory).copy() for name in names}
    except (CorruptShardError, PermissionError):
        raise
    except HDF5_ERRORS as error:
        reason = " ".join(str(error).split())
        raise CorruptShardError(f"{path}: not a readable shard ({reason})") from error
    _check_shapes(path, kind, stored.shape, index)
    number: Any = attributes.get("number")
    if number is not None and (named := shard_number(path)) is not None:
        number = named
    written_by = str(attributes["versions"])
    header = shard_header(kind, fingerprint, dtype, stored.shape, written_by, number)
    for name, wanted in header.items():
        if name in attributes and attributes[name] != wanted:
            raise CorruptShardError(f"{path}: {name} is {attributes[name]!r}, expected {wanted!r}")
    if attributes["index_checksum"] != index_checksum(index, header):
        raise CorruptShardError(
            f"{path}: keys, digests or offsets were changed (index checksum differs)"
        )
    try:
        versions = dict(json.loads(written_by))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CorruptShardError(f"{path}: not a readable shard ({reason})") from error
    values = stored.read(memory).view(feature_dtype(dtype))
    features = Numbers(values, scaled.read(memory) if scaled else None)
    starts = tuple(part.offset or 0 for part in (stored, scaled) if part)
    return Shard(path, kind, fingerprint, dtype, features, starts, index, versions, number)


def _map(path: Path, private: bool) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_READ)
