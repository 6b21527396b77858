"""Features in memory for a while: copied from the store where it has them, else encoded.

Nothing is written. What reads a store's rows in batches reads these too:
`HeldImages` and `HeldSentences` answer what a `VisionStore` and a `TextStore`
are asked for in a loop, with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import MissingFeaturesError
from featstore.extract.encode import Encoding, encoding_of
from featstore.extract.extract import encoder_of
from featstore.extract.plan import Plan
from featstore.progress import SILENT, Show
from featstore.store.folder import read_quarantine, shard_paths
from featstore.store.index import IntArray
from featstore.store.numbers import Numbers
from featstore.store.store import TextStore, VisionStore, open_store

Rows = Mapping[str, Numbers]


class HeldImages:
    """Image features in memory; see `VisionStore`.

    Args:
        rows: Image id to features of shape (tokens, width), in the order of their positions.
        dtype: The stored number format.
    """

    def __init__(self, rows: Rows, dtype: str) -> None:
        self._rows = list(rows.values())
        self.spec: dict[str, Any] = {"dtype": dtype}

    @property
    def row_shape(self) -> tuple[int, int]:
        """(tokens, width)."""
        tokens, width = self._rows[0].shape
        return tokens, width

    def gather_stored(self, positions: IntArray) -> Numbers:
        """Copy rows; see `VisionStore.gather_stored`."""
        found = Numbers.empty((len(positions), *self.row_shape), self.spec["dtype"])
        for i, position in enumerate(positions.tolist()):
            found[i] = self._rows[position]
        return found

    def will_need(self, positions: IntArray) -> None:
        """Nothing to do: the rows are in memory."""


class HeldSentences:
    """Sentence features in memory; see `TextStore`.

    Args:
        rows: Sentence to features of shape (valid tokens, width), in the order of their
            positions.
        dtype: The stored number format.
    """

    def __init__(self, rows: Rows, dtype: str) -> None:
        self._rows, self.dtype = list(rows.values()), dtype
        self._lengths = np.array([len(row) for row in self._rows], np.int64)

    def lengths(self, positions: IntArray) -> IntArray:
        """Return the number of valid tokens of rows, int64 of shape (batch,)."""
        return self._lengths[positions]

    def gather_stored(self, positions: IntArray, length: int) -> tuple[Numbers, NDArray[np.bool_]]:
        """Copy sentences, padded with zeros; see `TextStore.gather_stored`."""
        valid = self.lengths(positions)
        width = self._rows[0].shape[1]
        hidden = Numbers.zeros((len(positions), length, width), self.dtype)
        for i, position in enumerate(positions.tolist()):
            row = self._rows[position][:length]
            hidden[i, : len(row)] = row
        return hidden, np.arange(length) < valid[:, None]


class Holder:
    """Reads or encodes the features of a plan's inputs, some at a time.

    The encoder is loaded when the first input is not stored.

    Args:
        plan: Which inputs are stored with the bytes that they have now.
        show: Is told of smaller batches after memory ran out.

    Attributes:
        failed: Input to reason of those that have no features.
    """

    def __init__(self, plan: Plan, show: Show = SILENT) -> None:
        self.job, self.show, self._todo = plan.job, show, set(plan.keys)
        self.dtype: str = plan.job.spec.dtype
        folder = plan.job.folder
        self._store = open_store(folder) if shard_paths(folder) else None
        self.failed = {
            key: entry["reason"]
            for key, entry in read_quarantine(folder).items()
            if key not in self._todo
        }
        self._encoding: Encoding | None = None
        self._last: dict[str, Numbers] = {}

    def rows(self, keys: Sequence[str]) -> dict[str, Numbers]:
        """Return the features of inputs; those that have none are in `failed` afterwards.

        Args:
            keys: Of the plan's job, distinct.

        Returns:
            Key to features in the stored number format, of shape (tokens, width).
            Those of the call before are not encoded again.

        Raises:
            PresetError: The encoder cannot be loaded.
            CorruptShardError: A stored row does not have its checksum.
        """
        found = {key: self._last[key] for key in keys if key in self._last}
        rest = [key for key in keys if key not in found and key not in self.failed]
        found |= self._stored([key for key in rest if key not in self._todo])
        if todo := [key for key in rest if key in self._todo]:
            if self._encoding is None:
                job = self.job
                self._encoding = encoding_of(job.spec, encoder_of(job), job.store, self.show.halved)
            for item in self._encoding.rows(todo, self.job.paths_of(todo)):
                if item.numbers is None:
                    self.failed[item.key] = item.reason
                else:
                    found[item.key] = item.numbers
        self._last = found
        return found

    def _stored(self, keys: list[str]) -> dict[str, Numbers]:
        if not keys:
            return {}
        # What is planned as stored was there a moment ago.
        if self._store is None:
            raise MissingFeaturesError(f"{self.job.folder}: the features there are gone")
        positions = self._store.positions(keys)
        if isinstance(self._store, VisionStore):
            images = self._store.gather_stored(positions)
            return {key: images[i] for i, key in enumerate(keys)}
        assert isinstance(self._store, TextStore)
        lengths = self._store.lengths(positions)
        # Two at least: a length of 1 means the first token alone.
        hidden, _ = self._store.gather_stored(positions, max(2, int(lengths.max())))
        return {key: hidden[i, : lengths[i]] for i, key in enumerate(keys)}
