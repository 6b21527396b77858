"""The photos of a data set: their sizes, those that cannot be read, and a perceptual hash of each.

The hash is that of Zauner 2010 (Implementation and Benchmarking of Perceptual Image Hash
Functions, section 3.2.1): of a photo squeezed to 32×32 grey pixels, the 8×8 lowest
frequencies of the discrete cosine transform without the constant ones, each a bit that says
whether it is above their median. Photos that look alike differ in few of the 64 bits.

What was found of a photo is kept by the digest of its bytes beside the digests themselves:

    <root>/photo-digests/<folder>-looks.npz

Like them it is a shortcut: where it is missing or damaged, photos are decoded again.
"""

from __future__ import annotations

import contextlib
import functools
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.data.images import Photo, glance
from featstore.errors import FeatstoreError, ImageError
from featstore.extract.photos import Digest, PhotoDigests
from featstore.progress import SILENT, Show
from featstore.publish import publish

SIDE = 32
HASH_BITS = 64
FORMAT = 1
_LOOK = np.dtype(
    [("digest", "<u8", (2,)), ("width", "<u4"), ("height", "<u4"), ("kind", "S8"), ("hash", "<u8")]
)


@dataclass(frozen=True)
class Looks:
    """What photos are, those that can be read.

    Attributes:
        ids: Their image ids.
        sizes: int64 of shape (photos, 2): width and height in pixels.
        formats: Of each, such as "JPEG".
        hashes: uint64 of shape (photos,); see the module.
        digests: uint64 of shape (photos, 2): XXH3-128 of the files' bytes.
        unreadable: Image id to the reason, of the others.
    """

    ids: list[str]
    sizes: NDArray[np.int64]
    formats: list[str]
    hashes: NDArray[np.uint64]
    digests: NDArray[np.uint64]
    unreadable: dict[str, str]


@functools.cache
def _cosines() -> NDArray[np.float64]:
    """Return the frequencies 1 to 8 of the cosine transform: shape (8, `SIDE`)."""
    at = (np.arange(SIDE) + 0.5) * np.pi / SIDE
    return np.asarray(np.cos(np.arange(1, 9)[:, None] * at))


def perceptual_hash(grey: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hash of small grey pictures; see the module.

    Args:
        grey: uint8 of shape (pictures, 32, 32).

    Returns:
        uint64 of shape (pictures,).
    """
    cosines = _cosines()
    found = (cosines @ grey.astype(np.float64) @ cosines.T).reshape(len(grey), HASH_BITS)
    bits = found > np.median(found, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)


def look_at(
    ids: Sequence[str],
    paths: Sequence[Photo | None],
    root: Path,
    folder: Path,
    threads: int,
    show: Show = SILENT,
) -> Looks:
    """Look at photos, each once for each state of its file.

    Args:
        ids: Image ids, distinct.
        paths: Where each photo is.
        root: The store's root; nothing is kept where it may not be written.
        folder: Of the photos.
        threads: That read and decode.
        show: Shows the reading.

    Cost: 1 to 2 ms a photo of 500×375 pixels the first time, and a `stat` after that.
    """
    digests = PhotoDigests(root, folder)
    kept = _Kept(digests.path.with_name(f"{digests.path.stem}-looks.npz"))
    lines = np.zeros(len(ids), _LOOK)
    known = digests.known(paths, threads)
    unknown = []
    for i, digest in enumerate(known):
        if digest is not None and (line := kept.lines.get(digest)) is not None:
            lines[i] = line
        else:
            unknown.append(i)
    failed: dict[int, str] = {}

    def look(i: int) -> NDArray[np.uint8]:
        path = paths[i]
        try:
            if path is None:
                raise ImageError(f"{ids[i]}: no photo")
            data, digest = digests.read(path)
            found = glance(data, _name(path), SIDE)
        except ImageError as error:
            failed[i] = error.message
            return np.zeros((SIDE, SIDE), np.uint8)
        lines[i] = (digest, found.width, found.height, found.format.encode(), 0)
        return found.grey

    with ThreadPoolExecutor(max(1, threads)) as pool, show.slow_bar(len(unknown), "photos") as bar:
        for start in range(0, len(unknown), 256):
            part = unknown[start : start + 256]
            greys = dict(zip(part, pool.map(look, part), strict=True))
            read = [i for i in part if i not in failed]
            if read:
                lines["hash"][read] = perceptual_hash(np.stack([greys[i] for i in read]))
            bar(len(part))
    digests.save()
    there = np.array([i not in failed for i in range(len(ids))], np.bool_)
    kept.save(lines[there], learnt=bool(unknown))
    sound = lines[there]
    return Looks(
        [image_id for image_id, kept_one in zip(ids, there, strict=True) if kept_one],
        np.stack([sound["width"], sound["height"]], axis=1).astype(np.int64),
        [kind.decode() for kind in sound["kind"].tolist()],
        sound["hash"].astype(np.uint64),
        sound["digest"].astype(np.uint64),
        {ids[i]: failed[i] for i in sorted(failed)},
    )


def _name(path: Photo) -> str:
    return path.name


class _Kept:
    """What is known of photos, by the digest of their bytes.

    Args:
        path: The file, which need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = self._read()

    def _read(self) -> dict[Digest, np.void]:
        try:
            with self.path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                if int(archive["format"]) != FORMAT or archive["looks"].dtype != _LOOK:
                    return {}
                lines = archive["looks"]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return {}
        keys = map(tuple, lines["digest"].tolist())
        return dict(zip(keys, lines, strict=True))

    def save(self, lines: NDArray[np.void], learnt: bool) -> None:
        """Keep what was learnt; nothing is said where it cannot be written."""
        if not learnt:
            return
        found = self._read() | dict(zip(map(tuple, lines["digest"].tolist()), lines, strict=True))
        with (
            contextlib.suppress(FeatstoreError),
            publish(self.path) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, format=FORMAT, looks=np.array(list(found.values()), _LOOK))
