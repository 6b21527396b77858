"""Open the features of one spec and read them, by key or by position (see `index.py`)."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import FeatureSpec, canonical_json, differing_fields
from featstore.errors import (
    Command,
    CorruptShardError,
    MissingFeaturesError,
    StaleFeaturesError,
    StoreError,
    counted,
)
from featstore.store.folder import read_spec, shard_paths
from featstore.store.index import IntArray, Keys, Store
from featstore.store.numbers import Numbers, aligned_empty
from featstore.store.shard import Shard


class VisionStore(Store):
    """Image features: `(views, tokens, width)` a row."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        # Sliced once, to rows that `concatenate` joins: for a batch of 32, slicing each row and
        # copying it by a call of its own would cost a tenth of the copy.
        # By array of `Numbers`, then by shard.
        views = [shard.features[:, :1].arrays for shard in self.shards]
        self._plain_views = list(zip(*views, strict=True))

    @functools.cached_property
    def row_shape(self) -> tuple[int, int]:
        """(tokens, width) of one view."""
        _, _, tokens, width = self.shards[0].features.shape
        return tokens, width

    def source_digests(self, positions: IntArray) -> NDArray[np.uint64]:
        """Return the digests of the files that rows were made from, (batch, 2)."""
        shards, rows = self.locate(positions)
        pairs = zip(shards, rows, strict=True)
        found = [self.shards[s].index["source_digests"][r] for s, r in pairs]
        return np.array(found, np.uint64).reshape(-1, 2)

    def _extent(self) -> str:
        if not self.rows:
            return "no rows,"
        return f"{counted(len(self), 'row')} of {self.row_shape[0]} x {self.row_shape[1]}"

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Return one image's features.

        Returns:
            `dtype`, shape (tokens, width): view 0, copied.

        Raises:
            MissingKeyError: It has none.
            CorruptShardError: The row no longer has its checksum.
        """
        return self.gather(np.array([self._position(key)]))[0]

    def empty(self, rows: int) -> NDArray[Any]:
        """Return an uninitialised batch that `gather` fills at full speed.

        Returns:
            `dtype`, shape (rows, tokens, width), aligned to 64 bytes.
        """
        return aligned_empty((rows, *self.row_shape), self.dtype)

    def will_need(self, positions: IntArray) -> None:
        """Let the system read rows from the disk, many at once, before they are gathered.

        Does not wait for the disk. `gather` does this for the rows of a batch
        that it reads for the first time; a reader that knows its next batches
        can do it some batches ahead.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Raises:
            IndexError: A position is outside [0, rows).

        Cost: some microseconds a row where it is in memory already.
        """
        shards, rows = self.locate(positions)
        if not hasattr(os, "posix_fadvise"):
            return  # macOS and Windows: the map still reads, page by page
        for number in np.unique(shards).tolist():
            shard = self.shards[number]
            sizes = [array[0].nbytes for array in shard.features.arrays]
            # Only a hint: a file that cannot be opened any more is still mapped.
            with contextlib.suppress(OSError), shard.path.open("rb") as file:
                for row in rows[shards == number].tolist():
                    for first, row_bytes in zip(shard.starts, sizes, strict=True):
                        start = first + row * row_bytes
                        os.posix_fadvise(file.fileno(), start, row_bytes, os.POSIX_FADV_WILLNEED)

    def gather(self, keys: Keys, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copy feature rows in the order of `keys`.

        Args:
            keys: Image ids or store positions, of shape (batch,); repeats
                allowed. Fastest: positions as int64.
            out: `dtype`, shape (batch, tokens, width), to fill, best made by
                `empty`; or None to allocate.

        Returns:
            `dtype`, shape (batch, tokens, width): view 0.

        Raises:
            MissingKeyError: An image has no features.
            IndexError: A position is outside [0, rows).
            ValueError: `out` has another shape or dtype.
            CorruptShardError: A row no longer has its checksum.

        Cost: one memory copy of the rows, and one pass of the checksum the
        first time that a row is read; no HDF5 call. Of int8 another pass, which
        widens them.
        """
        positions = self.positions(keys)
        if out is None:
            out = self.empty(len(positions))
        elif out.shape != (len(positions), *self.row_shape) or out.dtype != self.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, expected {self.dtype}"
                f" {(len(positions), *self.row_shape)}"
            )
        if self.quantised:
            return self.gather_stored(positions).plain(out)
        self._fill(positions, (out,))
        return out

    def gather_stored(self, positions: IntArray) -> Numbers:
        """Copy feature rows as they are stored; see `gather`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Returns:
            Shape (batch, tokens, width): view 0, aligned to 64 bytes.
        """
        found = Numbers.empty((len(positions), *self.row_shape), self.spec["dtype"])
        self._fill(positions, found.arrays)
        return found

    def mapped(self, positions: IntArray) -> list[list[NDArray[Any]]]:
        """Return rows where they are in the files, not copied; see `gather_stored`.

        Returns:
            By array of `Numbers`, then by row: stored dtype, shape (1, tokens, width), or of
            scales (1, tokens).
        """
        places = self._places(positions)
        return [[views[shard][row] for shard, row in places] for views in self._plain_views]

    def _fill(self, positions: IntArray, arrays: tuple[NDArray[Any], ...]) -> None:
        """Copy rows into the arrays of a `Numbers`."""
        if len(positions):
            for rows, array in zip(self.mapped(positions), arrays, strict=True):
                np.concatenate(rows, out=array)

    def _check_rows(self, positions: list[int], places: list[tuple[int, int]]) -> None:
        self.will_need(np.array([p for p in positions if not self._checked[p]]))
        super()._check_rows(positions, places)


class TextStore(Store):
    """Sentence features: `(valid tokens, width)` a row, packed."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        # By array of `Numbers`, then by shard.
        self._stored = list(zip(*(shard.features.arrays for shard in self.shards), strict=True))
        lengths = [np.diff(shard.index["offsets"]) for shard in self.shards]
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return int(self.shards[0].features.shape[1])

    def lengths(self, positions: IntArray) -> IntArray:
        """Return the number of valid tokens of rows, int64 of shape (batch,).

        Raises:
            IndexError: A position is outside [0, rows).
        """
        return self._lengths[self._in_range(positions)]

    def _extent(self) -> str:
        if not self.rows:
            return "no rows,"
        tokens = int(self.lengths(self._live).sum())
        return f"{counted(len(self), 'row')}, {counted(tokens, 'token')} x {self.width}"

    def _tokens(self, key: str) -> tuple[Shard, slice]:
        """Return where the valid tokens of a sentence are."""
        ((number, row),) = self._places(np.array([self._position(key)]))
        shard = self.shards[number]
        return shard, slice(*shard.index["offsets"][row : row + 2].tolist())

    def __getitem__(self, key: str) -> NDArray[Any]:
        """Return the hidden states of one sentence.

        Returns:
            `dtype`, shape (valid tokens, width), copied.

        Raises:
            MissingKeyError: It has none.
            CorruptShardError: The row no longer has its checksum.
        """
        shard, tokens = self._tokens(key)
        return shard.features[tokens].copy().plain()

    def token_ids(self, key: str) -> NDArray[np.int32]:
        """Return the ids of a sentence's valid tokens, int32 of shape (valid tokens,).

        Raises:
            MissingKeyError: It has no features.
            CorruptShardError: The row no longer has its checksum.
        """
        shard, tokens = self._tokens(key)
        return shard.index["token_ids"][tokens].copy()

    def gather(
        self, keys: Keys, length: int | None = None
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Copy sentences, padded with zeros to one length.

        Args:
            keys: Sentences or store positions, of shape (batch,); repeats
                allowed.
            length: Tokens of the result. 1 gives the `[CLS]` states alone; a
                sentence longer than `length` is otherwise an error. None: as
                long as the longest of them.

        Returns:
            Hidden states in `dtype`, shape (batch, length, width), and the
            padding mask, bool of shape (batch, length), True at valid tokens.

        Raises:
            MissingKeyError: A sentence has no features.
            IndexError: A position is outside [0, rows).
            ValueError: A sentence is longer than `length`.
            CorruptShardError: A row no longer has its checksum.
        """
        positions = self.positions(keys)
        if length is None:
            # Two at least: a length of 1 means the first token alone.
            length = max(2, int(self.lengths(positions).max(initial=0)))
        hidden, mask = self.gather_stored(positions, length)
        return hidden.plain(), mask

    def gather_stored(self, positions: IntArray, length: int) -> tuple[Numbers, NDArray[np.bool_]]:
        """Copy sentences as they are stored, padded with zeros; see `gather`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            length: As in `gather`.

        Returns:
            Hidden states of shape (batch, length, width), and the padding mask.

        Raises:
            IndexError: A position is outside [0, rows).
            ValueError: A sentence is longer than `length`.
            CorruptShardError: A row no longer has its checksum.
        """
        valid = self.lengths(positions)
        if length > 1 and valid.size and valid.max() > length:
            raise ValueError(f"a sentence has {valid.max()} tokens, more than {length}")
        hidden = Numbers.zeros((len(positions), length, self.width), self.spec["dtype"])
        counts = np.minimum(valid, length).tolist()
        places = [
            (shard, self.shards[shard].index["offsets"][row])
            for shard, row in self._places(positions)
        ]
        for stored, array in zip(self._stored, hidden.arrays, strict=True):
            for i, ((shard, start), count) in enumerate(zip(places, counts, strict=True)):
                array[i, :count] = stored[shard][start : start + count]
        return hidden, np.arange(length) < valid[:, None]


def open_store(folder: str | os.PathLike[str]) -> VisionStore | TextStore:
    """Open a features folder, whatever its spec; neither its preset nor a framework is needed.

    Args:
        folder: `<root>/vit/<fingerprint>` or `<root>/text/<fingerprint>`.

    Raises:
        MissingFeaturesError: There are no features.
        CorruptShardError: It is damaged.
    """
    # The last part of the path is the fingerprint: `.` or `..` would not say it.
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    if not shard_paths(folder):
        raise MissingFeaturesError(
            f"{folder}: no features there; expected a folder such as cache/vit/<fingerprint>,"
            " which extraction makes"
        )
    return store_of(folder, read_spec(folder))


def store_of(folder: Path, spec: dict[str, Any]) -> VisionStore | TextStore:
    """Open a features folder whose spec was read, be there shards or none.

    Raises:
        CorruptShardError: It is damaged, or of a kind that is not known.
    """
    kinds: dict[str, type[VisionStore | TextStore]] = {"vit": VisionStore, "text": TextStore}
    if spec["kind"] not in kinds:
        raise CorruptShardError(f"{folder}: holds features of kind {spec['kind']!r}")
    return kinds[spec["kind"]](folder, spec)


def open_features_of(root: Path, spec: FeatureSpec, command: Command | None = None) -> Any:
    """Open the features of a spec.

    Args:
        root: The store's root.
        spec: What the configuration asks for.
        command: What the user types to extract them, if not all of them, for the error.

    Returns:
        A `VisionStore` or a `TextStore`.

    Raises:
        MissingFeaturesError: Nothing of this kind was ever extracted.
        StaleFeaturesError: Only features of other specs are there; the
            message lists the fields in which the nearest differs.
        CorruptShardError: The folder is damaged.
    """
    command = command or spec.command()
    folder = spec.folder(root)
    if shard_paths(folder):
        found = read_spec(folder)
        if canonical_json(found) != canonical_json(spec.to_dict()):
            raise CorruptShardError(f"{folder}: holds another spec than its name says")
        return store_of(folder, found)
    others = []
    for path in sorted((root / spec.kind).glob("*/spec.json")):
        # Another folder's damage must not hide what is wrong with this one.
        with contextlib.suppress(StoreError):
            if shard_paths(path.parent):
                others.append(differing_fields(spec.to_dict(), read_spec(path.parent)))
    if not others:
        raise MissingFeaturesError(f"{root}: no {spec.kind} features have been extracted", command)
    nearest = min(others, key=len)
    raise StaleFeaturesError(
        f"{root}: the {spec.kind} features there do not match the configuration"
        f" ({'; '.join(nearest)})",
        command,
    )
