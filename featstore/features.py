"""Cached features for loops that are not the trainer's.

`FeatureRows` is a map-style data set, as PyTorch's `DataLoader` and Grain take
it; it also gives a `tf.data.Dataset`, and plain arrays for scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import Command, StoreError
from featstore.store.store import IntArray, TextStore, VisionStore, open_store

Arrays = dict[str, NDArray[Any]]

# Rows that `arrays` reads at once.
CHUNK_ROWS = 256


def read_numbers(
    store: VisionStore | TextStore, positions: IntArray, length: int = 1
) -> NDArray[Any]:
    """Gather rows as numbers that every library knows: float16 or float32.

    Args:
        store: int8 and bfloat16 are widened to float32.
        positions: int64 of shape (batch,).
        length: Of a text store: the tokens of the result, as in `TextStore.gather`.

    Returns:
        Shape (batch, tokens, width).
    """
    if isinstance(store, VisionStore):
        values = store.gather(positions)
    else:
        values, _ = store.gather(positions, length)
    # bfloat16 is no type of NumPy's own.
    return values if values.dtype.kind == "f" else values.astype(np.float32)


def find_rows(store: VisionStore | TextStore, wanted: Sequence[str] | NDArray[Any]) -> IntArray:
    """Return store positions, int64 of shape (len(wanted),), of keys or of positions.

    Raises:
        MissingKeyError: A key has no features.
        IndexError: A position is outside [0, store.rows).
    """
    positions = store.positions(wanted)
    store.locate(positions)
    return positions


class FeatureRows:
    """Rows of cached features: each a photo, with a sentence and a label where there are any.

    A row is a dict of:

    - `features`: shape (tokens, width), the photo;
    - `hidden`: shape (valid tokens, text width), the sentence; with `pad_to`,
      (`pad_to`, text width) and zeros at the end;
    - `padding_mask`: with `pad_to` only, bool of shape (`pad_to`,), True at
      valid tokens;
    - `label`: a scalar of the labels' dtype.

    Features and hidden states are float16 or float32 as stored; int8 and
    bfloat16 stores give float32. Rows are writable and the caller's own.

    Safe to use from several threads and after a fork. Can be pickled: the
    process that receives it opens the stores again.

    Args:
        vision: Image features.
        text: Sentence features, or None for photos alone.
        images: For each row an image id, or its position in `vision`.
        sentences: For each row a sentence, or its position in `text`.
        labels: Of shape (rows,), or None.
        pad_to: Tokens of every sentence, for loops that stack rows. 1 gives the
            `[CLS]` states alone.

    Raises:
        MissingKeyError: A photo or a sentence has no features.
        IndexError: A position is not in the store.
        ValueError: Columns of different lengths, a text store without
            sentences or sentences without one, or a sentence longer than
            `pad_to`.
    """

    def __init__(
        self,
        vision: VisionStore,
        text: TextStore | None,
        images: Sequence[str] | NDArray[Any],
        sentences: Sequence[str] | NDArray[Any] | None = None,
        labels: Sequence[int] | NDArray[Any] | None = None,
        *,
        pad_to: int | None = None,
    ) -> None:
        if (text is None) != (sentences is None):
            raise ValueError("a text store and sentences go together: give both or neither")
        self.vision, self.text, self.pad_to = vision, text, pad_to
        self.image_positions = find_rows(vision, images)
        self.labels = None if labels is None else np.asarray(labels)
        columns = {"images": len(self), "labels": len(self if labels is None else labels)}
        if text is not None and sentences is not None:
            self.text_positions = find_rows(text, sentences)
            self.lengths = text.lengths(self.text_positions)
            columns["sentences"] = len(self.lengths)
            longest = int(self.lengths.max(initial=1))
            if pad_to is not None and (pad_to < 1 or 1 < pad_to < longest):
                raise ValueError(f"pad_to is {pad_to}; the longest sentence has {longest} tokens")
        if len(set(columns.values())) != 1:
            raise ValueError(f"columns of different lengths: {columns}")

    def __len__(self) -> int:
        return len(self.image_positions)

    def __getitem__(self, index: int) -> Arrays:
        """Return one row.

        Raises:
            IndexError: `index` is outside [-len(self), len(self)).
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Arrays]:
        """Return several rows, read together; PyTorch's loader calls this.

        Raises:
            IndexError: An index is outside [-len(self), len(self)).
            CorruptShardError: A row no longer has its checksum.
        """
        batch = self.batch(indices)
        rows = [{name: values[i] for name, values in batch.items()} for i in range(len(indices))]
        if self.text is not None and self.pad_to is None:
            for row in rows:
                row["hidden"] = row["hidden"][row.pop("padding_mask")]
        return rows

    # Grain's loader asks for this name.
    _getitems = __getitems__

    def batch(self, indices: Sequence[int] | IntArray) -> Arrays:
        """Return several rows as one batch.

        Args:
            indices: Of shape (batch,), each in [-len(self), len(self)).

        Returns:
            `features` of shape (batch, tokens, width), `hidden` of shape
            (batch, length, text width), zeros after a sentence's end,
            `padding_mask`, bool of shape (batch, length), and `label` of
            shape (batch,). `length` is `pad_to`, or that of the longest
            sentence of the batch.

        Raises:
            IndexError: An index is out of range.
            CorruptShardError: A row no longer has its checksum.
        """
        rows = np.asarray(indices, np.int64)
        batch: Arrays = {"features": read_numbers(self.vision, self.image_positions[rows])}
        if self.text is not None:
            lengths = self.lengths[rows]
            length = self.pad_to or int(lengths.max(initial=1))
            batch["hidden"] = read_numbers(self.text, self.text_positions[rows], length)
            batch["padding_mask"] = np.arange(length) < lengths[:, None]
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        return batch

    def to_tf_dataset(self, batch_size: int, shuffle_seed: int | None = None) -> Any:
        """Return a `tf.data.Dataset` of padded batches, as `keras.Model.fit` takes it.

        Args:
            batch_size: Rows of a batch; the last may have fewer.
            shuffle_seed: Decides the order of the rows, another one for each
                pass. None keeps them in order.

        Returns:
            Batches `(inputs, labels)`, or `inputs` without labels. `inputs`
            is a dict as in `batch`; labels have shape (batch,).
        """
        import tensorflow as tf

        passes = 0

        def batches() -> Iterator[Any]:
            nonlocal passes
            order = np.arange(len(self))
            if shuffle_seed is not None:
                order = np.random.default_rng([shuffle_seed, passes]).permutation(len(self))
            passes += 1
            for start in range(0, len(self), batch_size):
                inputs = self.batch(order[start : start + batch_size])
                yield (inputs, inputs.pop("label")) if self.labels is not None else inputs

        # Of no rows: the shapes and dtypes are those of every batch.
        signature: Any = {
            name: tf.TensorSpec((None, *values.shape[1:]), values.dtype)
            for name, values in self.batch([]).items()
        }
        for name in signature.keys() & {"hidden", "padding_mask"}:
            shape = (None, self.pad_to, *signature[name].shape[2:])
            signature[name] = tf.TensorSpec(shape, signature[name].dtype)
        if self.labels is not None:
            signature = (signature, signature.pop("label"))
        found = tf.data.Dataset.from_generator(batches, output_signature=signature)
        return found.apply(tf.data.experimental.assert_cardinality(-(-len(self) // batch_size)))

    def arrays(self, pool: str | None = "mean") -> tuple[NDArray[np.float32], NDArray[Any] | None]:
        """Return every row as one vector, as scikit-learn takes it.

        Args:
            pool: What of a photo: "mean" of its tokens, its class token ("cls"),
                or all its tokens one after the other (None). A sentence's
                `[CLS]` state stands beside it.

        Returns:
            X, float32 of shape (rows, width of the photo + text width), and y,
            the labels of shape (rows,) or None.

        Raises:
            ValueError: Another `pool`.
            StoreError: No class token is stored.
            CorruptShardError: A row no longer has its checksum.

        Cost: X in memory; the features pass through it some rows at a time.
        """
        if pool not in ("mean", "cls", None):
            raise ValueError(f"pool is {pool!r}, expected 'mean', 'cls' or None")
        if pool == "cls" and self.vision.spec["tokens"] != "all":
            raise StoreError(
                f"{self.vision.folder}: pool 'cls' needs the class token, but tokens ="
                f" {self.vision.spec['tokens']!r} were stored",
                Command("extract-vit", tokens="all"),
            )
        tokens, width = self.vision.row_shape
        photo_width = width if pool else tokens * width
        text_width = self.text.width if self.text is not None else 0
        found = np.empty((len(self), photo_width + text_width), np.float32)
        for start in range(0, len(self), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            features = read_numbers(self.vision, self.image_positions[part])
            if pool == "mean":
                found[part, :photo_width] = features.mean(axis=1, dtype=np.float32)
            else:
                kept = features[:, :1] if pool else features
                found[part, :photo_width] = kept.reshape(len(kept), -1)
            if self.text is not None:
                found[part, photo_width:] = read_numbers(self.text, self.text_positions[part], 1)[
                    :, 0
                ]
        return found, self.labels

    def __getstate__(self) -> dict[str, Any]:
        # A store is maps of files: pickled, they would be copies of all its features.
        stores = {name: _described(getattr(self, name)) for name in ("vision", "text")}
        return self.__dict__ | stores

    def __setstate__(self, state: dict[str, Any]) -> None:
        opened = {name: _opened(state[name]) for name in ("vision", "text")}
        self.__dict__.update(state | opened)


Described = tuple[Any, list[tuple[str, int]]]


def _shards(store: VisionStore | TextStore) -> list[tuple[str, int]]:
    return [(shard.path.name, len(shard)) for shard in store.shards]


def _described(store: VisionStore | TextStore | None) -> Described | None:
    return None if store is None else (store.folder, _shards(store))


def _opened(described: Described | None) -> VisionStore | TextStore | None:
    if described is None:
        return None
    folder, shards = described
    store = open_store(folder)
    # More may have been added; others would move the rows.
    if _shards(store)[: len(shards)] != shards:
        raise StoreError(
            f"{folder}: its shards changed since these rows were pickled; make them again"
        )
    return store
