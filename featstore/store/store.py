"""Open the features of one spec, find rows by key, gather them.

A key may stand in several shards (its photo changed): the last one counts.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED, FeatureSpec, canonical_json, differing_fields
from featstore.errors import (
    Command,
    CorruptShardError,
    MissingFeaturesError,
    StaleFeaturesError,
    StoreError,
)
from featstore.store.folder import _manifest_lines, read_quarantine, read_spec, shard_paths
from featstore.store.numbers import SCALE_DTYPE
from featstore.store.shard import (
    VERIFY,
    digest_keys,
    feature_dtype,
    open_shard,
)

IntArray = NDArray[np.int64]

ALIGNMENT_BYTES = 64


def aligned_empty(
    shape: tuple[int, ...], dtype: Any, alignment: int = ALIGNMENT_BYTES
) -> NDArray[Any]:
    """Return an uninitialised array that starts at a multiple of `alignment` bytes.

    NumPy's own large arrays start 16 bytes past a page. Copying to there from
    rows that start at a page takes twice the time on processors whose string
    moves are slow at such distances, AMD's Zen 3 and 4 among them.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + size].view(dtype).reshape(shape)


class Store:
    """The features of one spec, read-only.

    Safe to use from several threads. Nothing of HDF5 stays open, so it may
    also be used after a fork.
    """

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder = folder
        self.spec = spec
        try:
            self.dtype = feature_dtype(spec["dtype"])
        except TypeError as error:
            raise CorruptShardError(f"{folder}: unknown dtype {spec['dtype']!r}") from error
        self.shards = [
            open_shard(path, spec["kind"], folder.name, spec["dtype"])
            for path, _ in _manifest_lines(folder)
        ]
        for shard in self.shards:
            expected = self.shards[0].features.shape[1:]
            if shard.features.shape[1:] != expected:
                raise CorruptShardError(
                    f"{shard.path}: a row has shape {shard.features.shape[1:]}, expected"
                    f" {expected} as in {self.shards[0].path.name}",
                    VERIFY,
                )
        counts = [len(shard) for shard in self.shards]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._first_rows = self._starts[:-1].tolist()
        digests = [shard.index["key_digests"] for shard in self.shards]
        self._digests = np.concatenate(digests) if digests else np.zeros((0, 2), np.uint64)
        self._order = np.argsort(self._digests[:, 0], kind="stable")
        self._sorted = self._digests[self._order, 0]
        self._checked = bytearray(len(self))
        # A photo that changed and then failed: the features of its old bytes are stale.
        quarantine = read_quarantine(folder, with_lost=True)
        stale = [key for key, entry in quarantine.items() if entry["source_digest"]]
        self._stale = set(self._find(stale).tolist()) - {-1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def quantised(self) -> bool:
        """Whether `gather` gives int8 levels, which `gather_scales` has the scales of."""
        return bool(self.spec["dtype"] == QUANTISED)

    def lookup(self, keys: Sequence[str] | NDArray[Any]) -> IntArray:
        """Find rows by key.

        Args:
            keys: Image ids, or sentences; repeats allowed.

        Returns:
            int64 of shape (len(keys),): store positions, -1 where absent. A
            photo that changed and can no longer be decoded is absent too.
        """
        positions = self._find(keys)
        if self._stale:
            positions = np.where(np.isin(positions, list(self._stale)), -1, positions)
        return positions

    def _find(self, keys: Sequence[str] | NDArray[Any]) -> IntArray:
        if not len(keys) or not len(self):
            return np.full(len(keys), -1, np.int64)
        wanted = digest_keys(keys)
        # The last of equal digests is the newest row: the sort is stable.
        slots = np.searchsorted(self._sorted, wanted[:, 0], side="right") - 1
        positions = self._order[slots]
        found = (slots >= 0) & (self._digests[positions] == wanted).all(axis=1)
        return np.where(found, positions, -1)

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Return shard numbers and rows inside them, both int64 of shape (batch,).

        Raises:
            IndexError: A position is outside [0, len(self)).
        """
        positions = self._in_range(positions)
        shards = np.searchsorted(self._starts, positions, side="right") - 1
        return shards, positions - self._starts[shards]

    def newest(self) -> IntArray:
        """Return the position of each key's newest row, ascending; the others are superseded."""
        order = np.lexsort((self._digests[:, 1], self._digests[:, 0]))
        digests = self._digests[order]
        last = np.ones(len(order), bool)
        last[:-1] = (digests[1:] != digests[:-1]).any(axis=1)
        return np.sort(order[last])

    def live(self) -> IntArray:
        """Return the positions that `lookup` can give, ascending."""
        newest = self.newest()
        return newest[~np.isin(newest, list(self._stale))] if self._stale else newest

    def keys(self) -> list[str]:
        """Return every key in store order, superseded rows included."""
        return [key for shard in self.shards for key in shard.keys()]  # noqa: SIM118

    def _in_range(self, positions: IntArray) -> IntArray:
        """Return positions as int64; raise IndexError where one is outside [0, len(self))."""
        positions = np.asarray(positions, np.int64)
        if positions.size:
            self._check_range(int(positions.min()), int(positions.max()))
        return positions

    def _check_range(self, least: int, greatest: int) -> None:
        if least < 0 or greatest >= len(self):
            raise IndexError(f"positions must lie in [0, {len(self)})")

    def _places(self, positions: IntArray) -> list[tuple[int, int]]:
        """Return shard and row of each position, after checking rows that were never read.

        In lists: for a batch, arrays would take a tenth as long as copying it.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        wanted: list[int] = positions.tolist()
        if not wanted:
            return []
        self._check_range(min(wanted), max(wanted))
        first_rows = self._first_rows
        places = [
            (shard := bisect_right(first_rows, position) - 1, position - first_rows[shard])
            for position in wanted
        ]
        if not all(map(self._checked.__getitem__, wanted)):
            self._check_rows(wanted, places)
        return places

    def _check_rows(self, positions: list[int], places: list[tuple[int, int]]) -> None:
        """Check the checksum of each row that is read for the first time."""
        for position, (shard, row) in zip(positions, places, strict=True):
            if not self._checked[position]:
                self.shards[shard].check_row(row)
                self._checked[position] = True


class VisionStore(Store):
    """Image features: `(views, tokens, width)` a row."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        # Sliced once, to rows that `concatenate` joins: for a batch of 32, slicing each row and
        # copying it by a call of its own would cost a tenth of the copy.
        self._plain_views = [shard.features[:, :1] for shard in self.shards]
        self._plain_scales = [
            shard.scales[:, 0] for shard in self.shards if shard.scales is not None
        ]

    @functools.cached_property
    def row_shape(self) -> tuple[int, int]:
        """(tokens, width) of one view."""
        return self.shards[0].features.shape[2:]

    def source_digests(self, positions: IntArray) -> NDArray[np.uint64]:
        """Return the digests of the files that rows were made from, (batch, 2)."""
        shards, rows = self.locate(positions)
        pairs = zip(shards, rows, strict=True)
        found = [self.shards[s].index["source_digests"][r] for s, r in pairs]
        return np.array(found, np.uint64).reshape(-1, 2)

    def empty(self, rows: int) -> NDArray[Any]:
        """Return an uninitialised batch that `gather` fills at full speed.

        Returns:
            Stored dtype, shape (rows, tokens, width), aligned to 64 bytes.
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
            IndexError: A position is outside [0, len(self)).

        Cost: some microseconds a row where it is in memory already.
        """
        shards, rows = self.locate(positions)
        if not hasattr(os, "posix_fadvise"):
            return  # macOS and Windows: the map still reads, page by page
        for number in np.unique(shards).tolist():
            shard = self.shards[number]
            parts = [(shard.features_offset, shard.features[0].nbytes)]
            if shard.scales is not None:
                parts.append((shard.scales_offset, shard.scales[0].nbytes))
            # Only a hint: a file that cannot be opened any more is still mapped.
            with contextlib.suppress(OSError), shard.path.open("rb") as file:
                for row in rows[shards == number].tolist():
                    for offset, row_bytes in parts:
                        start = offset + row * row_bytes
                        os.posix_fadvise(file.fileno(), start, row_bytes, os.POSIX_FADV_WILLNEED)

    def gather(self, positions: IntArray, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Copy feature rows in the order of `positions`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            out: Stored dtype, shape (batch, tokens, width), to fill, best
                made by `empty`; or None to allocate.

        Returns:
            Stored dtype, shape (batch, tokens, width): view 0. int8 are
            levels, to be multiplied by `gather_scales`.

        Raises:
            IndexError: A position is outside [0, len(self)).
            ValueError: `out` has another shape or dtype.
            CorruptShardError: A row no longer has its checksum.

        Cost: one memory copy of the rows, and one pass of the checksum the
        first time that a row is read; no HDF5 call.
        """
        positions = np.asarray(positions, np.int64)
        if out is None:
            out = self.empty(len(positions))
        elif out.shape != (len(positions), *self.row_shape) or out.dtype != self.dtype:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, expected {self.dtype}"
                f" {(len(positions), *self.row_shape)}"
            )
        if rows := [self._plain_views[shard][row] for shard, row in self._places(positions)]:
            np.concatenate(rows, out=out)
        return out

    def _check_rows(self, positions: list[int], places: list[tuple[int, int]]) -> None:
        self.will_need(np.array([p for p in positions if not self._checked[p]]))
        super()._check_rows(positions, places)

    def gather_scales(self, positions: IntArray) -> NDArray[np.float32]:
        """Copy the scales of int8 rows in the order of `positions`.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Returns:
            float32 of shape (batch, tokens): one level of each token of view 0.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        scales = np.empty((len(positions), self.row_shape[0]), SCALE_DTYPE)
        for i, (shard, row) in enumerate(self._places(positions)):
            scales[i] = self._plain_scales[shard][row]
        return scales


class TextStore(Store):
    """Sentence features: `(valid tokens, width)` a row, packed."""

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        super().__init__(folder, spec)
        lengths = [np.diff(shard.index["offsets"]) for shard in self.shards]
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return int(self.shards[0].features.shape[1])

    def lengths(self, positions: IntArray) -> IntArray:
        """Return the number of valid tokens of rows, int64 of shape (batch,).

        Raises:
            IndexError: A position is outside [0, len(self)).
        """
        return self._lengths[self._in_range(positions)]

    def gather(self, positions: IntArray, length: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Copy sentences, padded with zeros to one length.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            length: Tokens of the result. 1 gives the `[CLS]` states alone; a
                sentence longer than `length` is otherwise an error.

        Returns:
            Hidden states in the stored dtype, shape (batch, length, width),
            and the padding mask, bool of shape (batch, length), True at valid
            tokens. int8 are levels, to be multiplied by `gather_scales`.

        Raises:
            IndexError: A position is outside [0, len(self)).
            ValueError: A sentence is longer than `length`.
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        valid = self.lengths(positions)
        if length > 1 and valid.size and valid.max() > length:
            raise ValueError(f"a sentence has {valid.max()} tokens, more than {length}")
        hidden = np.zeros((len(positions), length, self.width), self.dtype)
        for i, (shard, row) in enumerate(self._places(positions)):
            part = self.shards[shard]
            start = part.index["offsets"][row]
            count = min(int(valid[i]), length)
            hidden[i, :count] = part.features[start : start + count]
        return hidden, np.arange(length) < valid[:, None]

    def gather_scales(self, positions: IntArray, length: int) -> NDArray[np.float32]:
        """Copy the scales of int8 sentences, padded with zeros to one length.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.
            length: As in `gather`; of a longer sentence, the first scales.

        Returns:
            float32 of shape (batch, length): one level of each token.

        Raises:
            IndexError: A position is outside [0, len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        positions = np.asarray(positions, np.int64)
        scales = np.zeros((len(positions), length), SCALE_DTYPE)
        for i, (shard, row) in enumerate(self._places(positions)):
            part = self.shards[shard]
            assert part.scales is not None
            start, end = part.index["offsets"][row : row + 2]
            count = min(int(end - start), length)
            scales[i, :count] = part.scales[start : start + count]
        return scales


def open_store(folder: str | os.PathLike[str]) -> VisionStore | TextStore:
    """Open a features folder, whatever its spec; neither its preset nor a framework is needed.

    Args:
        folder: `<root>/vit/<fingerprint>` or `<root>/text/<fingerprint>`.

    Raises:
        MissingFeaturesError: There are no features.
        CorruptShardError: It is damaged.
    """
    folder = Path(folder)
    if not shard_paths(folder):
        raise MissingFeaturesError(
            f"{folder}: no features there; expected a folder such as cache/vit/<fingerprint>,"
            " which extraction makes"
        )
    spec = read_spec(folder)
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
    command = command or Command(f"extract-{spec.kind}")
    folder = spec.folder(root)
    if shard_paths(folder):
        found = read_spec(folder)
        if canonical_json(found) != canonical_json(spec.to_dict()):
            raise CorruptShardError(f"{folder}: holds another spec than its name says")
        return (VisionStore if spec.kind == "vit" else TextStore)(folder, found)
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
