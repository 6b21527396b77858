"""The digests of photos, kept so that a photo is read once for each state of its file.

    <root>/photo-digests/<folder>.npz    one list for each folder of photos

Of each photo it has the size, the times of modification and of change, and the
inode that the file had when it was read, and the digest of its bytes; of a photo
in a Parquet or Arrow file, those of that file. It is a
shortcut, no part of the features: where it is missing, damaged or of another
data set, photos are read, and it is made anew.
"""

from __future__ import annotations

import contextlib
import os
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash

from featstore.data.images import Photo, read_bytes
from featstore.data.tables import PackedPhoto
from featstore.errors import FeatstoreError, ImageError
from featstore.progress import SILENT, Show
from featstore.publish import publish, text_digest
from featstore.store.shard import digest_bytes

Digest = tuple[int, int]
# Size in bytes, times of modification and of change in ns, inode.
State = tuple[int, int, int, int]

FOLDER = "photo-digests"
FORMAT = 1
RACY_NS = 2_000_000_000
"""A file that changed so shortly before it was read may change again and keep its times: those
of FAT count in steps of two seconds. Git's index calls such an entry racy."""

_ENTRY = np.dtype(
    [
        ("name", "V16"),
        ("size", "<u8"),
        ("mtime_ns", "<i8"),
        ("ctime_ns", "<i8"),
        ("inode", "<u8"),
        ("digest", "<u8", (2,)),
    ]
)
_CHUNK = 512


def read_photo(path: Photo) -> tuple[bytes, Digest]:
    """Return a photo's bytes and their XXH3-128.

    Raises:
        ImageError: The file cannot be read.
    """
    data = read_bytes(path)
    return data, digest_bytes(data)


def photo_digest(path: Photo) -> Digest | None:
    """Return the digest of a photo's bytes, or None where it cannot be read."""
    try:
        return read_photo(path)[1]
    except ImageError:
        return None


def photo_digests(paths: Sequence[Photo | None], threads: int) -> list[Digest | None]:
    """Return the digests of photos, read by threads; None where one is absent or unreadable."""
    with ThreadPoolExecutor(max(4, threads)) as pool:
        return list(pool.map(lambda path: path and photo_digest(path), paths))


def _state(path: Photo) -> State | None:
    """Return what tells whether a file changed; None where it cannot be asked."""
    try:
        status = os.stat(path.file if isinstance(path, PackedPhoto) else path)
    except OSError:
        return None
    inode = status.st_ino & (2**64 - 1)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, inode


def _is_settled(state: State, read_ns: int) -> bool:
    """Tell whether any change after the reading gives the file another state.

    The time of change is the system's own: one in the future comes of a clock
    that cannot be compared. That of modification may be set to anything.
    """
    _, modified, changed, _ = state
    return read_ns - changed >= RACY_NS and abs(read_ns - modified) >= RACY_NS


class PhotoDigests:
    """The digests of the photos of one folder. Safe to use from several threads.

    Args:
        root: The store's root, which need not exist.
        folder: Of the photos.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        self._place = os.path.realpath(folder)
        self.path = root / FOLDER / f"{text_digest(self._place)[:16]}.npz"
        self._entries = self._read()
        self._learnt = False

    def of(
        self,
        paths: Sequence[Photo | None],
        threads: int,
        show: Show = SILENT,
        every: bool = False,
    ) -> list[Digest | None]:
        """Return the digests of photos; those whose file changed, or is not known, are read.

        Args:
            paths: Below the folder, or None.
            threads: That read.
            show: Shows the reading where it takes long.
            every: Read all of them.

        Returns:
            XXH3-128 of each photo's bytes; None where one is absent or unreadable.

        Cost: one `stat` a photo, 0.1 s for 20,000 on a local disk, where nothing changed.
        """
        found: list[Digest | None]
        found = [None] * len(paths) if every else self.known(paths, threads)
        with ThreadPoolExecutor(max(8, threads)) as pool:
            unknown = [i for i, path in enumerate(paths) if path is not None and found[i] is None]
            with show.slow_bar(len(unknown), "photos read") as progress:
                digests = pool.map(lambda i: self._digest(paths[i]), unknown)
                for i, digest in zip(unknown, digests, strict=True):
                    found[i] = digest
                    progress(1)
        return found

    def known(self, paths: Sequence[Photo | None], threads: int) -> list[Digest | None]:
        """Return the digests of photos that did not change since they were read; None of others.

        Args:
            paths: Below the folder, or None.
            threads: That ask for a file's size and times.
        """
        # In threads for the sake of network file systems; in chunks for all others.
        chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
        with ThreadPoolExecutor(max(8, threads)) as pool:
            return [digest for chunk in pool.map(self._known, chunks) for digest in chunk]

    def _known(self, paths: Sequence[Photo | None]) -> list[Digest | None]:
        found: list[Digest | None] = []
        for path in paths:
            state, digest = self._entries.get(self._name(path), (None, None)) if path else (0, None)
            found.append(digest if digest and path and state == _state(path) else None)
        return found

    def _digest(self, path: Photo | None) -> Digest | None:
        try:
            return None if path is None else self.read(path)[1]
        except ImageError:
            return None

    def read(self, path: Photo) -> tuple[bytes, Digest]:
        """Read a photo and learn its digest; see `read_photo`."""
        name, state, read_ns = self._name(path), _state(path), time.time_ns()
        data, digest = read_photo(path)
        if state and state == _state(path) and _is_settled(state, read_ns):
            self._entries[name] = state, digest
            self._learnt = True
        return data, digest

    def _name(self, path: Photo) -> bytes:
        name = str(path).removeprefix(os.fspath(self.folder))
        return xxhash.xxh3_128_digest(os.fsencode(name))

    def _read(self) -> dict[bytes, tuple[State, Digest]]:
        try:
            # NumPy's archive has a checksum of each array, which reading compares.
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                if int(archive["format"]) != FORMAT:
                    return {}
                lines = archive["photos"]
                if lines.dtype != _ENTRY:
                    return {}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return {}
        states = zip(
            *(lines[field].tolist() for field in ("size", "mtime_ns", "ctime_ns", "inode")),
            strict=True,
        )
        digests = map(tuple, lines["digest"].tolist())
        return dict(zip(lines["name"].tolist(), zip(states, digests, strict=True), strict=True))

    def save(self) -> None:
        """Keep what was learnt; nothing is said where the store cannot be written."""
        if not self._learnt:
            return
        # Others may have learnt meanwhile. An entry that is out of date is only one photo to read.
        entries = self._read() | self._entries
        lines = np.zeros(len(entries), _ENTRY)
        for i, (name, (state, digest)) in enumerate(entries.items()):
            lines[i] = (name, *state, digest)
        with (
            contextlib.suppress(FeatstoreError),
            publish(self.path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, format=FORMAT, folder=self._place, photos=lines)
        self._learnt = False
