"""Write one shard, once; or write it again with some of its rows."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED
from featstore.errors import CorruptShardError
from featstore.publish import publish
from featstore.store.numbers import Numbers
from featstore.store.shard import (
    PAGE_BYTES,
    Shard,
    describe_file,
    digest_keys,
    disk_dtype,
    index_checksum,
    shard_header,
    shard_number,
)


@dataclass
class ShardRows:
    """The rows of a shard, in memory, before it is published.

    Attributes:
        keys: Image ids, or sentences.
        features: In the stored dtype: vision `(rows, views, tokens, width)`,
            text `(all tokens, width)`.
        source_digests: Vision only: two 64-bit numbers a row.
        offsets: Text only: int64 of shape (rows + 1,).
        token_ids: Text only: int32 of shape (all tokens,).
    """

    keys: list[str]
    features: Numbers
    source_digests: list[tuple[int, int]] | None = None
    offsets: NDArray[np.int64] | None = None
    token_ids: NDArray[np.int32] | None = None

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
            checksums = [self.features[row].checksum() for row in range(len(self.keys))]
        else:
            assert self.token_ids is not None
            arrays["offsets"] = self.offsets
            arrays["token_ids"] = self.token_ids
            spans = zip(self.offsets[:-1], self.offsets[1:], strict=True)
            checksums = [self.features[a:b].checksum(self.token_ids[a:b]) for a, b in spans]
        arrays["checksums"] = np.array(checksums, np.uint64)
        return arrays


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
    values = np.ascontiguousarray(rows.features.values).view(disk_dtype(dtype))
    stored: dict[str, NDArray[Any]] = {"features": values}
    if dtype == QUANTISED:
        assert rows.features.scales is not None
        # Before the features: who reads the file once has a row's scales when its features come.
        stored = {"scales": np.ascontiguousarray(rows.features.scales), **stored}
    header = shard_header(
        kind, fingerprint, dtype, values.shape, json.dumps(versions, sort_keys=True), number
    )
    with publish(path, before) as temporary:
        sizes = [array.nbytes for array in (*stored.values(), *arrays.values())]
        # Each dataset may be moved to the next page; the rest are headers and attributes.
        _reserve(temporary, sum(sizes) + (len(sizes) + 4) * PAGE_BYTES)
        # Page alignment lets a row be mapped, and copied, from an aligned address.
        with h5py.File(
            temporary, "w", alignment_threshold=PAGE_BYTES, alignment_interval=PAGE_BYTES
        ) as file:
            for name, array in (stored | arrays).items():
                file.create_dataset(name, data=array)
            for name, value in header.items():
                if name != "shape":
                    file.attrs[name] = value
            file.attrs["index_checksum"] = index_checksum(arrays, header)
        entry = describe_file(temporary)
    return {"name": path.name, "rows": len(rows.keys), **entry}


def rewrite_shard(shard: Shard, keep: NDArray[np.int64], restored: Set[int]) -> dict[str, Any]:
    """Publish a shard again under its own name, with some of its rows.

    With every row kept and restored to its old value, the file has the bytes
    that it was first published with (by the same version of HDF5).

    Args:
        shard: Opened with `private`; its restored rows are already put right
            in `features`.
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
    rows = ShardRows([keys[row] for row in keep.tolist()], shard.features)
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
