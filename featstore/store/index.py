"""The rows of a features folder: opened, found by key, checked when they are first read.

A key may stand in several shards (its photo changed): the last one counts. Who
reads by key sees these rows alone. A position counts every row of the shards,
in their order; it is what a loop looks up once and gathers by ever after.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.spec import QUANTISED, extraction_of
from featstore.errors import CorruptShardError, MissingKeyError, counted
from featstore.quantities import size
from featstore.store.folder import manifest_lines, read_names, read_quarantine
from featstore.store.numbers import feature_dtype
from featstore.store.shard import VERIFY, digest_keys, open_shard

IntArray = NDArray[np.int64]
# Ids or sentences, or store positions.
Keys = Sequence[str] | Sequence[int] | NDArray[Any]


class Store:
    """The features of one spec, read-only: key to array.

    `store[key]`, `key in store`, `len(store)`, iteration and `keys()` are those
    of a mapping of the keys that have features now.

    Safe to use from several threads. Nothing of HDF5 stays open, so it may
    also be used after a fork.

    Attributes:
        folder: Of the features.
        spec: What decides their values, as in its `spec.json`.
        dtype: Of the arrays that reading gives: the stored one; float32 where
            int8 is stored.
        rows: Positions: rows of all shards, superseded and stale ones included.
    """

    def __init__(self, folder: Path, spec: dict[str, Any]) -> None:
        self.folder = folder
        self.spec = spec
        self.quantised = spec["dtype"] == QUANTISED
        try:
            stored = feature_dtype(spec["dtype"])
        except TypeError as error:
            raise CorruptShardError(f"{folder}: unknown dtype {spec['dtype']!r}") from error
        self.dtype = np.dtype(np.float32) if self.quantised else stored
        self.shards = [
            open_shard(path, spec["kind"], folder.name, spec["dtype"])
            for path, _ in manifest_lines(folder)
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
        self.rows = int(self._starts[-1])
        self._first_rows = self._starts[:-1].tolist()
        digests = [shard.index["key_digests"] for shard in self.shards]
        self._digests = np.concatenate(digests) if digests else np.zeros((0, 2), np.uint64)
        self._order = np.argsort(self._digests[:, 0], kind="stable")
        self._sorted = self._digests[self._order, 0]
        self._checked = bytearray(self.rows)
        # A photo that changed and then failed: the features of its old bytes are stale.
        quarantine = read_quarantine(folder, with_lost=True)
        stale = [key for key, entry in quarantine.items() if entry["source_digest"]]
        self._stale = set(self._find(stale).tolist()) - {-1}

    def __len__(self) -> int:
        """Return the number of keys that have features."""
        return len(self._live)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self.lookup([key])[0] >= 0)

    def keys(self) -> list[str]:
        """Return the keys that have features, in store order."""
        return self.keys_of(self._live)

    def keys_of(self, positions: IntArray) -> list[str]:
        """Return the keys of rows.

        Args:
            positions: int64 of shape (batch,). Store positions; repeats allowed.

        Raises:
            IndexError: A position is outside [0, rows).
            CorruptShardError: A key is not UTF-8.
        """
        shards, rows = self.locate(positions)
        names = {number: self.shards[number].keys() for number in np.unique(shards).tolist()}
        pairs = zip(shards.tolist(), rows.tolist(), strict=True)
        return [names[number][row] for number, row in pairs]

    @property
    def nbytes(self) -> int:
        """Bytes that the features of all rows take on the disk."""
        return sum(shard.features.nbytes for shard in self.shards)

    def __repr__(self) -> str:
        what = ", ".join(read_names(self.folder)) or self.spec.get("encoder", "unnamed")
        layers = self.spec.get("architecture", {}).get("num_layers")
        return (
            f"<{type(self).__name__} {what}: {self._extent()} {self.spec['dtype']}, boundary"
            f" {self.spec.get('boundary')}{f' of {layers}' if layers else ''},"
            f" {size(self.nbytes)} in {self.folder}>"
        )

    def _extent(self) -> str:
        """Say how many rows there are, and of what shape."""
        raise NotImplementedError

    def positions(self, keys: Keys) -> IntArray:
        """Return the store positions of keys, each of which must be there.

        Args:
            keys: Ids or sentences; store positions are returned as they are.

        Returns:
            int64 of shape (len(keys),).

        Raises:
            MissingKeyError: A key has no features.
            TypeError: Neither keys nor positions.
        """
        if isinstance(keys, np.ndarray) and keys.dtype == np.int64:
            return keys
        if isinstance(keys, str):
            raise TypeError(f"expected several keys, found one: [{keys!r}], or store[{keys!r}]")
        asked: Any = keys if isinstance(keys, np.ndarray) else list(keys)
        if len(asked) and isinstance(asked[0], str):
            found = self.lookup(asked)
            if (found < 0).any():
                raise self._missing(asked, found)
            return found
        plain = np.asarray(asked)
        if plain.size and plain.dtype.kind not in "iu":
            raise TypeError(f"expected keys or integer positions, found {plain.dtype}")
        return plain.astype(np.int64)

    def _position(self, key: str) -> int:
        if not isinstance(key, str):
            raise TypeError(f"expected a key, found {key!r}; positions are for gather")
        return int(self.positions([key])[0])

    def _missing(self, keys: Sequence[str], found: IntArray) -> MissingKeyError:
        """Say why the first of the keys that are not there has no features."""
        absent = [str(key) for key, at in zip(keys, found, strict=True) if at < 0]
        text = f"{self.folder}: no features of {absent[0]!r}"
        if len(keys) > 1:
            text = (
                f"{self.folder}: no features of {len(absent)} of {counted(len(keys), 'row')}"
                f" (first: {absent[0]!r})"
            )
        if failed := read_quarantine(self.folder, with_lost=True).get(absent[0]):
            text += f", which is quarantined: {failed['reason']}"
        elif len(self):
            text += f"; there are {len(self)} keys such as {self.keys_of(self._live[:1])[0]!r}"
        return MissingKeyError(text, extraction_of(self.spec))

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
        if not len(keys) or not self.rows:
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
            IndexError: A position is outside [0, rows).
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
        return self._live.copy()

    @functools.cached_property
    def _live(self) -> IntArray:
        newest = self.newest()
        return newest[~np.isin(newest, list(self._stale))] if self._stale else newest

    def _in_range(self, positions: IntArray) -> IntArray:
        """Return positions as int64; raise IndexError where one is outside [0, rows)."""
        positions = np.asarray(positions, np.int64)
        if positions.size:
            self._check_range(int(positions.min()), int(positions.max()))
        return positions

    def _check_range(self, least: int, greatest: int) -> None:
        if least < 0 or greatest >= self.rows:
            raise IndexError(f"positions must lie in [0, {self.rows})")

    def _places(self, positions: IntArray) -> list[tuple[int, int]]:
        """Return shard and row of each position, after checking rows that were never read.

        In lists: for a batch, arrays would take a tenth as long as copying it.

        Raises:
            IndexError: A position is outside [0, rows).
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
