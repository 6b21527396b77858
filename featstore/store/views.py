"""Photometric views of the same photos, read as one store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.store.index import IntArray
from featstore.store.numbers import Numbers
from featstore.store.store import VisionStore


class ViewedImages:
    """The image features of several views, in one row of positions.

    The positions of a view follow those of the view before; see `VisionStore` for what a loop
    asks.

    Args:
        stores: Of each view, from view 0 on; their rows have one shape and number format.
    """

    def __init__(self, stores: Sequence[VisionStore]) -> None:
        self.stores = list(stores)
        self.spec: dict[str, Any] = self.stores[0].spec
        self._starts = np.cumsum([0, *(store.rows for store in self.stores)])

    @property
    def row_shape(self) -> tuple[int, int]:
        """(tokens, width)."""
        return self.stores[0].row_shape

    def lookup(self, keys: Sequence[str] | NDArray[Any]) -> IntArray:
        """Return the positions of photos in each view, one view after the other.

        Args:
            keys: Image ids, each of which every view has.

        Returns:
            int64 of shape (views × len(keys),).
        """
        found = [store.lookup(keys) for store in self.stores]
        return np.concatenate([f + s for f, s in zip(found, self._starts, strict=False)])

    def _by_view(self, positions: IntArray) -> list[tuple[VisionStore, IntArray, IntArray]]:
        """Return of each view that is asked its store, which of the positions, and its own."""
        views = np.searchsorted(self._starts, positions, side="right") - 1
        return [
            (self.stores[view], at, positions[at] - self._starts[view])
            for view in np.unique(views).tolist()
            for at in [np.flatnonzero(views == view)]
        ]

    def gather_stored(self, positions: IntArray) -> Numbers:
        """Copy rows; see `VisionStore.gather_stored`."""
        found = Numbers.empty((len(positions), *self.row_shape), self.spec["dtype"])
        rows: list[list[Any]] = [[None] * len(positions) for _ in found.arrays]
        for store, at, own in self._by_view(positions):
            for column, mapped in zip(rows, store.mapped(own), strict=True):
                for i, row in zip(at.tolist(), mapped, strict=True):
                    column[i] = row
        for column, array in zip(rows, found.arrays, strict=True):
            np.concatenate(column, out=array)
        return found

    def will_need(self, positions: IntArray) -> None:
        """Let the system read rows from the disk; see `VisionStore.will_need`."""
        for store, _, own in self._by_view(positions):
            store.will_need(own)
