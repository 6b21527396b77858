"""Image features on the device that computes the steps, put there once.

Over an accelerator's bus a batch of features takes longer than a step over it; its own memory is
many times as fast. Rows are gathered there into the batch that the host would have made, with the
same bits, so where features are decides no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from featstore.encoders.compiled import is_out_of_memory
from featstore.errors import RunError, counted
from featstore.progress import working
from featstore.project import Project
from featstore.quantities import size
from featstore.store.numbers import Numbers, token_bytes
from trainer.batches import CachedRows, ImageFeatures, IntArray, NoPhotos

CHUNK_BYTES = 1 << 28
"""Bytes that are copied at once."""
SHARE = 0.5
"""Of the memory that is free on an accelerator, what features may take unasked."""

Gather = Callable[[NDArray[np.int32]], Sequence[Any]]


class OnDevice:
    """Rows of image features in the memory of the device that Keras computes on.

    Args:
        vision: Where they are read from, once.
        positions: int64 of any shape: the rows that will be asked for.

    Raises:
        RunError: They do not fit.
    """

    def __init__(self, vision: ImageFeatures, positions: IntArray) -> None:
        self.spec, self.row_shape = vision.spec, vision.row_shape
        self._blank, self._stores = _blank(vision), _stores(vision)
        self._positions = _distinct(vision, positions)
        try:
            with working("putting the features on the device"):
                self._gather = _put(vision, self._positions)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"the features of {counted(len(self._positions), 'image')} do not fit on the device"
                f' ({size(device_bytes(vision, positions))}); set [train] features_on = "host"'
            ) from error

    def has(self, vision: ImageFeatures, positions: IntArray) -> bool:
        """Tell whether rows are there, as the store has them since it was last opened."""
        same = [*map(id, _stores(vision))] == [*map(id, self._stores)]
        return same and (self._blank or bool(np.isin(positions, self._positions).all()))

    def gather_stored(self, positions: IntArray) -> Numbers:
        """Return rows on the device, in the order of `positions`."""
        places = np.searchsorted(self._positions, positions)
        if self._blank:
            places[:] = 0
        return Numbers(*self._gather(places.astype(np.int32)))

    def will_need(self, positions: IntArray) -> None:
        """Nothing to do."""


def _blank(vision: ImageFeatures) -> bool:
    return isinstance(vision, NoPhotos)


def _stores(vision: ImageFeatures) -> list[Any]:
    """Return what rows are read from: a store, those of several views, or nothing."""
    return [] if _blank(vision) else list(getattr(vision, "stores", [vision]))


def _distinct(vision: ImageFeatures, positions: IntArray) -> IntArray:
    """Return the rows that have to be there: each once; of zeros a single one."""
    return np.unique(positions)[: 1 if _blank(vision) else None]


def device_bytes(vision: ImageFeatures, positions: IntArray) -> int:
    """Return the bytes that some rows take on the device, each once."""
    return len(_distinct(vision, positions)) * _row_bytes(vision)


def _row_bytes(vision: ImageFeatures) -> int:
    tokens, width = vision.row_shape
    return tokens * token_bytes(vision.spec["dtype"], width)


def free_bytes() -> int | None:
    """Return the free memory of the accelerator; None where there is none, or none that tells.

    TensorFlow tells of none.
    """
    if keras.backend.backend() != "jax":
        return None
    import jax

    (device, *_) = jax.local_devices()
    about = device.memory_stats() if device.platform != "cpu" else None
    if not about or "bytes_limit" not in about:
        return None
    return int(about["bytes_limit"]) - int(about.get("bytes_in_use", 0))


def put_features(project: Project, features_on: str, splits: Mapping[str, CachedRows]) -> str:
    """Have rows find their image features on the device, if that is where they are to be.

    The runs of a process share them, one after the other.

    Args:
        project: Whose rows they are.
        features_on: `[train] features_on`. "auto": where an accelerator has twice the room, and
            takes them.
        splits: By their names: the rows that a run reads.

    Returns:
        "device" or "host".

    Raises:
        RunError: They were asked for there, and do not fit.
    """
    there: dict[str, OnDevice] = project.once("features on the device", dict)
    views = max(rows.views for rows in splits.values())
    features = [project.view_spec(view).fingerprint for view in range(views)]
    keys = {split: f"{split} {features} {_blank(rows.vision)}" for split, rows in splits.items()}
    shared = all(
        keys[split] in there and there[keys[split]].has(rows.vision, rows.image_positions)
        for split, rows in splits.items()
    )
    if features_on == "host":
        return "host"
    if not shared:
        # Those of other settings make room, once the runs that read them end.
        there.clear()
        if features_on == "auto" and not _fit(splits):
            return "host"
        try:
            for split, rows in splits.items():
                there[keys[split]] = OnDevice(rows.vision, rows.image_positions)
        except RunError:
            there.clear()
            if features_on == "device":
                raise
            return "host"
    for split, rows in splits.items():
        rows.vision = there[keys[split]]
    return "device"


def _fit(splits: Mapping[str, CachedRows]) -> bool:
    """Say whether an accelerator has room for features, and as much again for the rest."""
    free = free_bytes()
    if free is None:
        return False
    wanted = sum(device_bytes(rows.vision, rows.image_positions) for rows in splits.values())
    return wanted <= SHARE * free


def _put(vision: ImageFeatures, positions: IntArray) -> Gather:
    """Copy rows to the device; return what gathers them there by their places."""
    empty = Numbers.empty((0, *vision.row_shape), vision.spec["dtype"])
    shapes = [(len(positions), *array.shape[1:]) for array in empty.arrays]
    dtypes = [array.dtype for array in empty.arrays]
    make = _jax_tables if keras.backend.backend() == "jax" else _tensorflow_tables
    write, gather = make(shapes, dtypes)
    step = max(1, min(len(positions), CHUNK_BYTES // _row_bytes(vision)))
    for chunk in range(0, len(positions), step):
        # The last one begins earlier, so that all have one shape.
        first = min(chunk, len(positions) - step)
        write(first, vision.gather_stored(positions[first : first + step]).arrays)
    return gather


Write = Callable[[int, Sequence[NDArray[Any]]], None]


def _jax_tables(shapes: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Write, Gather]:
    import jax

    numpy = jax.numpy
    made = zip(shapes, dtypes, strict=True)
    tables = [jax.device_put(numpy.zeros(shape, dtype)) for shape, dtype in made]

    def written(table: Any, part: Any, first: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(table, part, first, 0)

    def taken(tables: Any, places: Any) -> Any:
        return [numpy.take(table, places, axis=0, mode="clip") for table in tables]

    put, take = jax.jit(written, donate_argnums=0), jax.jit(taken)

    def write(first: int, arrays: Sequence[NDArray[Any]]) -> None:
        tables[:] = [
            put(table, part, np.int32(first)) for table, part in zip(tables, arrays, strict=True)
        ]

    return write, lambda places: take(tables, places)


def _tensorflow_tables(shapes: Sequence[Any], dtypes: Sequence[Any]) -> tuple[Write, Gather]:
    import tensorflow as tf

    made = zip(shapes, dtypes, strict=True)
    tables = [tf.Variable(tf.zeros(shape, tf.as_dtype(dtype))) for shape, dtype in made]

    def write(first: int, arrays: Sequence[NDArray[Any]]) -> None:
        for table, part in zip(tables, arrays, strict=True):
            table[first : first + len(part)].assign(part)

    return write, lambda places: [tf.gather(table, places) for table in tables]
