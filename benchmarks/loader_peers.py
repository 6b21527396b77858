"""Other formats that could hold the features, each read as its users read it.

A peer is a context manager function `(features, folder) -> reader`: it writes
the rows into an empty folder and opens them. Its package is imported inside,
so that one that is not installed costs only its own line of the table.

Random readers are called with positions and an `out` of shape (batch, tokens,
width), and return the batch. Streams yield the batches of one epoch, shuffled
through a buffer; the last batch may be short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
RandomReader = Callable[[NDArray[np.int64], Array], Array]
StreamReader = Callable[[int], Iterator[Array]]

SHUFFLED_ROWS = 512


@dataclass(frozen=True)
class Peer:
    """One way to store and read the rows.

    Attributes:
        name: As the table calls it.
        streams: Reads in the order of the file, through a shuffle buffer.
        open: Write the rows and open them.
    """

    name: str
    streams: bool
    open: Callable[[Array, Path], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def numpy_memmap(features: Array, folder: Path) -> Iterator[RandomReader]:
    np.save(folder / "rows.npy", features)
    rows = np.load(folder / "rows.npy", mmap_mode="r")
    yield lambda positions, out: np.take(rows, positions, axis=0, out=out, mode="clip")


@contextlib.contextmanager
def _hdf5(features: Array, folder: Path, chunks: tuple[int, ...] | None) -> Iterator[Any]:
    import h5py

    with h5py.File(folder / "rows.h5", "w") as file:
        file.create_dataset("rows", data=features, chunks=chunks)
    with h5py.File(folder / "rows.h5", "r") as file:
        yield file["rows"]


def _row_by_row(dataset: Any) -> RandomReader:
    def read(positions: NDArray[np.int64], out: Array) -> Array:
        for i, position in enumerate(positions.tolist()):
            dataset.read_direct(out, np.s_[position], np.s_[i])
        return out

    return read


@contextlib.contextmanager
def hdf5_chunks(features: Array, folder: Path) -> Iterator[RandomReader]:
    with _hdf5(features, folder, (1, *features.shape[1:])) as dataset:
        yield _row_by_row(dataset)


@contextlib.contextmanager
def hdf5_contiguous(features: Array, folder: Path) -> Iterator[RandomReader]:
    with _hdf5(features, folder, None) as dataset:
        yield _row_by_row(dataset)


@contextlib.contextmanager
def hdf5_sorted(features: Array, folder: Path) -> Iterator[RandomReader]:
    with _hdf5(features, folder, None) as dataset:

        def read(positions: NDArray[np.int64], out: Array) -> Array:
            # h5py takes increasing indices alone; the batch goes back into its own order.
            order = np.argsort(positions)
            out[order] = dataset[positions[order]]
            return out

        yield read


@contextlib.contextmanager
def lmdb(features: Array, folder: Path) -> Iterator[RandomReader]:
    import lmdb

    room = 2 * features.nbytes + (64 << 20)
    with lmdb.open(str(folder), map_size=room) as environment:
        for start in range(0, len(features), 256):
            with environment.begin(write=True) as writing:
                for i, row in enumerate(features[start : start + 256], start):
                    writing.put(i.to_bytes(4, "big"), row.tobytes(), append=True)
    with lmdb.open(str(folder), readonly=True, lock=False) as environment:

        def read(positions: NDArray[np.int64], out: Array) -> Array:
            with environment.begin(buffers=True) as reading:
                for i, position in enumerate(positions.tolist()):
                    value: Any = reading.get(position.to_bytes(4, "big"))
                    out[i] = np.frombuffer(value, out.dtype).reshape(out.shape[1:])
            return out

        yield read


@contextlib.contextmanager
def zarr(features: Array, folder: Path) -> Iterator[RandomReader]:
    import zarr

    chunks = (1, *features.shape[1:])
    zarr.create_array(
        folder / "rows.zarr",
        shape=features.shape,
        dtype=features.dtype,
        chunks=chunks,
        compressors=None,
        filters=None,
        zarr_format=3,
    )[:] = features
    rows = zarr.open_array(folder / "rows.zarr", mode="r")

    def read(positions: NDArray[np.int64], out: Array) -> Array:
        # Five times as fast as `rows.oindex[positions]`.
        for i, position in enumerate(positions.tolist()):
            out[i] = rows[position]
        return out

    yield read


@contextlib.contextmanager
def array_record(features: Array, folder: Path) -> Iterator[RandomReader]:
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(folder / "rows.array_record")
    # One row a chunk, not compressed: the settings for random reads.
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    for row in features:
        writer.write(row.tobytes())
    writer.close()
    with grain.sources.ArrayRecordDataSource([path]) as source:

        def read(positions: NDArray[np.int64], out: Array) -> Array:
            for i, record in enumerate(source.__getitems__(positions.tolist())):
                out[i] = np.frombuffer(record, out.dtype).reshape(out.shape[1:])
            return out

        yield read


@contextlib.contextmanager
def tfrecord(features: Array, folder: Path) -> Iterator[StreamReader]:
    import tensorflow as tf

    path = str(folder / "rows.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
        for row in features:
            writer.write(row.tobytes())

    def decode(records: Any) -> Any:
        return tf.reshape(tf.io.decode_raw(records, features.dtype), (-1, *features.shape[1:]))

    def read(batch_size: int) -> Iterator[Array]:
        records = tf.data.TFRecordDataset(path).shuffle(SHUFFLED_ROWS).batch(batch_size)
        decoded = records.map(decode, num_parallel_calls=tf.data.AUTOTUNE)
        return iter(decoded.prefetch(tf.data.AUTOTUNE).as_numpy_iterator())

    yield read


@contextlib.contextmanager
def tfdata_cache(features: Array, folder: Path) -> Iterator[StreamReader]:
    import tensorflow as tf

    def compute(position: Any) -> Any:
        row = tf.numpy_function(lambda i: features[i], [position], features.dtype)
        return tf.ensure_shape(row, features.shape[1:])

    rows = tf.data.Dataset.range(len(features)).map(compute).cache(str(folder / "rows"))
    for _ in rows:  # the first epoch writes the cache
        pass

    def read(batch_size: int) -> Iterator[Array]:
        batches = rows.shuffle(SHUFFLED_ROWS).batch(batch_size).prefetch(tf.data.AUTOTUNE)
        return iter(batches.as_numpy_iterator())

    yield read


@contextlib.contextmanager
def webdataset(features: Array, folder: Path) -> Iterator[StreamReader]:
    import webdataset as wds

    path = str(folder / "rows.tar")
    with wds.TarWriter(path) as writer:
        for i, row in enumerate(features):
            writer.write({"__key__": f"{i:08d}", "bin": row.tobytes()})

    def decode(sample: tuple[bytes]) -> tuple[Array]:
        return (np.frombuffer(sample[0], features.dtype).reshape(features.shape[1:]),)

    def read(batch_size: int) -> Iterator[Array]:
        samples = wds.WebDataset(path, shardshuffle=False).shuffle(SHUFFLED_ROWS).to_tuple("bin")
        return (batch[0] for batch in samples.map(decode).batched(batch_size))

    yield read


PEERS = (
    Peer("NumPy memmap, take", False, numpy_memmap),
    Peer("h5py contiguous, read_direct a row", False, hdf5_contiguous),
    Peer("h5py contiguous, sorted indices", False, hdf5_sorted),
    Peer("h5py chunk a row, read_direct a row", False, hdf5_chunks),
    Peer("LMDB", False, lmdb),
    Peer("ArrayRecord (Grain)", False, array_record),
    Peer("Zarr v3, chunk a row", False, zarr),
    Peer("TFRecord (tf.data)", True, tfrecord),
    Peer("tf.data file cache", True, tfdata_cache),
    Peer("WebDataset", True, webdataset),
)
