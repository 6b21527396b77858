"""One immutable HDF5 shard: write it, map it, check it.

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
                    (see `quantise.py`): vision (rows, views, tokens); text
                    (all tokens,). A row's checksum goes on with its scales.

Root attributes: `format`, `kind`, `fingerprint`, `dtype` (bfloat16 is kept as
its uint16 bits), `versions`, `number` (the one in the file's name; shards of the
first version do not say it), and `index_checksum`, the XXH3-128 of everything
above except the features and their scales. The file holds no time stamp: equal rows give equal
bytes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED, format_of
from featstore.errors import Advice, Command, CorruptShardError, StoreError
from featstore.publish import publish
from featstore.store.numbers import SCALE_DTYPE

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


def feature_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a stored number format."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _disk_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(np.uint16) if name == "bfloat16" else np.dtype(name)


def token_bytes(dtype: str, width: int) -> int:
    """Return the bytes that one token of features takes on the disk, its scale included."""
    scale_bytes = SCALE_DTYPE.itemsize if dtype == QUANTISED else 0
    return width * feature_dtype(dtype).itemsize + scale_bytes


def digest_keys(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return the XXH3-128 digests of keys, uint64 of shape (len(keys), 2)."""
    digests = b"".join(xxhash.xxh3_128_digest(key.encode()) for key in keys)
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def digest_bytes(data: bytes) -> tuple[int, int]:
    """Return the XXH3-128 digest of a source file as two 64-bit numbers."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (2**64 - 1)


def row_checksum(
    features: NDArray[Any],
    token_ids: NDArray[np.int32] | None = None,
    scales: NDArray[np.float32] | None = None,
) -> int:
    """Return the XXH3-64 checksum of one row: ids of a text row, features, scales if any."""
    state = xxhash.xxh3_64()
    if token_ids is not None:
        state.update(np.ascontiguousarray(token_ids).view(np.uint8).data)
    state.update(np.ascontiguousarray(features).view(np.uint8).data)
    if scales is not None:
        state.update(np.ascontiguousarray(scales).view(np.uint8).data)
    return state.intdigest()


@dataclass
class ShardRows:
    """The rows of a shard, in memory, before it is published.

    Attributes:
        keys: Image ids, or sentences.
        features: Vision `(rows, views, tokens, width)`; text `(all tokens,
            width)`. In the stored dtype.
        source_digests: Vision only: two 64-bit numbers a row.
        offsets: Text only: int64 of shape (rows + 1,).
        token_ids: Text only: int32 of shape (all tokens,).
        scales: int8 features only: float32, the shape of `features` but its
            last axis.
    """

    keys: list[str]
    features: NDArray[Any]
    source_digests: list[tuple[int, int]] | None = None
    offsets: NDArray[np.int64] | None = None
    token_ids: NDArray[np.int32] | None = None
    scales: NDArray[np.float32] | None = None

    def _checksum(self, row: int | slice) -> int:
        """Return the checksum of a row, or of a text row's tokens."""
        ids = None if self.token_ids is None else self.token_ids[row]
        return row_checksum(
            self.features[row], ids, None if self.scales is None else self.scales[row]
        )

    def index(self) -> dict[str, NDArray[Any]]:
        """Return every dataset but the features and their scales."""
        encoded = [key.encode() for key in self.keys]
        key_offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(key) for key in encoded], out=key_offsets[1:])
        arrays: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(encoded), np.uint8),
            "key_offsets": key_offsets,
            "key_digests": digest_keys(self.keys),
        }
        if self.offsets is None:
            arrays["source_digests"] = np.array(self.source_digests, np.uint64).reshape(-1, 2)
            checksums = [self._checksum(row) for row in range(len(self.features))]
        else:
            assert self.token_ids is not None
            arrays["offsets"] = self.offsets
            arrays["token_ids"] = self.token_ids
            spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
            checksums = [self._checksum(slice(a, b)) for a, b in spans]
        arrays["checksums"] = np.array(checksums, np.uint64)
        return arrays


def _index_checksum(arrays: dict[str, NDArray[Any]], header: dict[str, Any]) -> str:
    state = xxhash.xxh3_128()
    state.update(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        if array.size:
            state.update(array.view(np.uint8).data)
    return state.hexdigest()


def write_shard(
    path: Path,
    kind: str,
    fingerprint: str,
    dtype: str,
    rows: ShardRows,
    versions: dict[str, str],
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Publish a shard.

    Args:
        path: Final name; a file that is already there is an error.
        kind: "vit" or "text".
        fingerprint: Of the spec that the features were made by.
        dtype: Stored number format.
        rows: What to write.
        versions: Package name to version, kept as an attribute.
        before: Called right before the file gets its name; see `publish`.

    Returns:
        The shard's line of the manifest: name, rows, bytes, digest.

    Raises:
        CorruptShardError: `path` exists.
        FeatstoreError: The file system refused.
    """
    if path.exists():
        raise CorruptShardError(f"{path}: a published shard is never written again")
    number = shard_number(path)
    arrays = rows.index()
    return _publish_shard(path, kind, fingerprint, dtype, rows, arrays, versions, number, before)


def _reserve(path: Path, size: int) -> None:
    """Refuse to write a file that the disk has no room for.

    HDF5 does not survive a disk that fills up under it: closing the file fails
    too, and has been seen to end the process.

    Raises:
        OSError: The disk, the quota or the limit of a file's size is too small.
    """
    if not hasattr(os, "posix_fallocate"):
        return  # macOS and Windows
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                raise  # otherwise a file system that cannot tell


def _publish_shard(
    path: Path,
    kind: str,
    fingerprint: str,
    dtype: str,
    rows: ShardRows,
    arrays: dict[str, NDArray[Any]],
    versions: dict[str, str],
    number: int | None,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    features = np.ascontiguousarray(rows.features).view(_disk_dtype(dtype))
    numbers: dict[str, NDArray[Any]] = {"features": features}
    if dtype == QUANTISED:
        assert rows.scales is not None
        # Before the features: who reads the file once has a row's scales when its features come.
        numbers = {"scales": np.ascontiguousarray(rows.scales), **numbers}
    header = {
        "format": format_of(dtype),
        "kind": kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "shape": list(features.shape),
        "versions": json.dumps(versions, sort_keys=True),
    }
    if number is not None:
        header["number"] = number
    with publish(path, before) as temporary:
        sizes = [array.nbytes for array in (*numbers.values(), *arrays.values())]
        # Each dataset may be moved to the next page; the rest are headers and attributes.
        _reserve(temporary, sum(sizes) + (len(sizes) + 4) * PAGE_BYTES)
        # Page alignment lets a row be mapped, and copied, from an aligned address.
        with h5py.File(
            temporary, "w", alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES
        ) as file:
            for name, array in (numbers | arrays).items():
                file.create_dataset(name, data=array)
            for name, value in header.items():
                if name != "shape":
                    file.attrs[name] = value
            file.attrs["index_checksum"] = _index_checksum(arrays, header)
        entry = describe_file(temporary)
    return {"name": path.name, "rows": len(rows.keys), **entry}


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
        features: Read-only map of `/features`.
        index: The other datasets by name.
        versions: Packages that wrote it.
        features_offset: Where `/features` starts in the file; 0 where it is empty.
        number: The number that it states; None in a shard of the first version.
        scales: Read-only map of `/scales`; None where there are none.
        scales_offset: Where `/scales` starts in the file.
    """

    path: Path
    kind: str
    fingerprint: str
    dtype: str
    features: NDArray[Any]
    index: dict[str, NDArray[Any]]
    versions: dict[str, str] = field(default_factory=dict)
    features_offset: int = 0
    number: int | None = None
    scales: NDArray[np.float32] | None = None
    scales_offset: int = 0

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
        scales = None if self.scales is None else self.scales[part]
        found = row_checksum(self.features[part], ids, scales)
        return found == int(self.index["checksums"][row])

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

        def ends_in(offset: int, array: NDArray[Any]) -> NDArray[np.int64]:
            step = array.dtype.itemsize * math.prod(array.shape[1:])
            return np.asarray(offset + ends * step, np.int64)

        found = ends_in(self.features_offset, self.features)
        if self.scales is None:
            return found
        return np.maximum(found, ends_in(self.scales_offset, self.scales))


def rewrite_shard(shard: Shard, keep: NDArray[np.int64], restored: Set[int]) -> dict[str, Any]:
    """Publish a shard again under its own name, with some of its rows.

    With every row kept and restored to its old value, the file has the bytes
    that it was first published with (by the same version of HDF5).

    Args:
        shard: Opened with `private`; its restored rows are already put right
            in `features` and `scales`.
        keep: int64, ascending: the rows to keep.
        restored: Rows whose features were computed anew; every other row must
            still have its checksum.

    Returns:
        The shard's new line of the manifest.

    Raises:
        CorruptShardError: A kept row is damaged; nothing was written.
        FeatstoreError: The file system refused.

    Cost: where rows are left out, the memory of those that stay.
    """
    index, keys = shard.index, shard.keys()
    rows = ShardRows([keys[row] for row in keep.tolist()], shard.features, scales=shard.scales)
    whole = len(keep) == len(shard)
    kept = keep
    if shard.kind == "vit":
        rows.source_digests = [tuple(pair) for pair in index["source_digests"][keep].tolist()]
    elif whole:
        rows.offsets, rows.token_ids = index["offsets"], index["token_ids"]
    else:
        spans = [np.arange(*index["offsets"][row : row + 2]) for row in keep.tolist()]
        kept = np.concatenate([np.zeros(0, np.int64), *spans])
        rows.token_ids = index["token_ids"][kept]
        rows.offsets = np.concatenate([[0], np.cumsum([len(span) for span in spans])])
        rows.offsets = rows.offsets.astype(np.int64)
    if not whole:
        rows.features = shard.features[kept]
        rows.scales = None if shard.scales is None else shard.scales[kept]
    arrays = rows.index()
    for row, found in zip(keep.tolist(), arrays["checksums"], strict=True):
        # Writing a damaged row again would give it a checksum that fits.
        if row not in restored and found != index["checksums"][row]:
            shard.check_row(row)
    return _publish_shard(
        shard.path,
        shard.kind,
        shard.fingerprint,
        shard.dtype,
        rows,
        arrays,
        shard.versions,
        shard.number,
    )


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
            f"{path}: /features has shape {shape}, which does not fit {rows} rows"
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
        if stored.dtype != _disk_dtype(dtype):
            raise CorruptShardError(
                f"{path}: /features is {stored.dtype}, expected {_disk_dtype(dtype)}"
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
    header: dict[str, Any] = {
        "format": format_of(dtype),
        "kind": kind,
        "fingerprint": fingerprint,
        "dtype": dtype,
        "shape": list(stored.shape),
        "versions": attributes["versions"],
    }
    if "number" in attributes:
        named = shard_number(path)
        header["number"] = attributes["number"] if named is None else named
    for name, wanted in header.items():
        if name in attributes and attributes[name] != wanted:
            raise CorruptShardError(f"{path}: {name} is {attributes[name]!r}, expected {wanted!r}")
    if attributes["index_checksum"] != _index_checksum(index, header):
        raise CorruptShardError(
            f"{path}: keys, digests or offsets were changed (index checksum differs)"
        )
    try:
        versions = dict(json.loads(str(header["versions"])))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CorruptShardError(f"{path}: not a readable shard ({reason})") from error
    number = header.get("number")
    return Shard(
        path,
        kind,
        fingerprint,
        dtype,
        stored.read(memory).view(feature_dtype(dtype)),
        index,
        versions,
        features_offset=stored.offset or 0,
        number=number,
        scales=scaled.read(memory) if scaled else None,
        scales_offset=(scaled.offset or 0) if scaled else 0,
    )


def _map(path: Path, private: bool) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if private else mmap.ACCESS_READ)
