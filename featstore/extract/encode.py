"""Photos and sentences through a frozen encoder, in batches of one shape, into rows of shards.

No batch spans two shards: a shard's bytes are the same whichever process makes
it, and whatever was made before.

The encoder has no time to wait for the host. Threads decode the photos of the next batches; an
accelerator is given a batch while it still works on the one before; other threads wait for what it
computed, and round it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from featstore.config import StoreConfig
from featstore.data.images import Photo, decode_image
from featstore.data.views import View
from featstore.encoders.compiled import XLA, is_out_of_memory
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import ImageError
from featstore.extract.kernels import kernels_of
from featstore.extract.photos import PhotoDigests, read_photo
from featstore.extract.worklist import PlannedShard
from featstore.progress import Progress
from featstore.store.numbers import Numbers
from featstore.store.write import ShardRows

# Sentences are encoded by so many batches at once.
SENTENCE_BATCHES = 8
# Batches that an encoder was given and that were not taken yet, and threads that finish them.
UNFINISHED, FINISHING_THREADS = 2, 2
PhotoDigest = tuple[int, int]
# Key to the reason and the digest of a photo that failed.
Failed = Mapping[str, tuple[str, PhotoDigest | None]]
# A planned shard's rows, and why the others of it failed.
Made = tuple[PlannedShard, ShardRows, Failed]
Encoder = VisionEncoder | TextEncoder
Result = TypeVar("Result")


class Batched:
    """Calls an encoder with one fixed batch shape; halves it when memory runs out.

    Args:
        encode: The compiled forward pass; what it returns may still be computed, until
            `np.asarray` waits for it.
        batch_size: Rows of a batch.
        on_halved: Called with the new batch size.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        batch_size: int,
        on_halved: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.encode, self.batch_size, self.on_halved = encode, batch_size, on_halved
        self._halving = threading.Lock()

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """Encode rows of any number; the last batch is filled up with its first row."""
        while True:
            size = self.batch_size
            try:
                return np.concatenate(list(self._parts(inputs, size)))
            except Exception as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
            self._halve(size)

    def begin(self, *inputs: NDArray[Any]) -> Callable[[], NDArray[Any]]:
        """Begin to encode rows; more than `batch_size` only when they are waited for.

        Returns:
            Waits for their features; may be called in another thread.
        """
        size = self.batch_size
        if len(inputs[0]) > size:
            # Gathered before it was halved: another shape would be compiled for them alone.
            return lambda: self(*inputs)
        try:
            begun = self.encode(*filled(inputs, size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return lambda: self(*inputs)

        def finish() -> NDArray[Any]:
            try:
                return np.asarray(begun)[: len(inputs[0])]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            return self(*inputs)

        return finish

    def _halve(self, size: int) -> None:
        """Halve the batch size, unless another thread did so since it was `size`."""
        with self._halving:
            if self.batch_size == size:
                self.batch_size //= 2
                self.on_halved(self.batch_size)

    def _parts(self, inputs: tuple[NDArray[Any], ...], size: int) -> Iterator[NDArray[Any]]:
        for start in range(0, len(inputs[0]), size):
            part = [array[start : start + size] for array in inputs]
            yield np.asarray(self.encode(*filled(part, size)))[: len(part[0])]


def in_order(
    calls: Iterable[Callable[[], Result]], threads: int, ahead: int
) -> Generator[Result, None, None]:
    """Run calls in threads and yield what they return, in order.

    Args:
        calls: Taken by the reader's thread.
        threads: How many run at once.
        ahead: So many are begun when the first is yielded.
    """
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[Result]] = deque()
        try:
            for call in calls:
                begun.append(pool.submit(call))
                if len(begun) >= ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def filled(inputs: Sequence[NDArray[Any]], rows: int) -> list[NDArray[Any]]:
    """Return inputs of so many rows: the missing repeat the first."""
    missing = rows - len(inputs[0])
    if missing <= 0:
        return list(inputs)
    return [np.concatenate([array, np.repeat(array[:1], missing, axis=0)]) for array in inputs]


@dataclass(frozen=True)
class Encoded:
    """One input's features, or why it has none.

    Attributes:
        key: Image id or sentence.
        numbers: Stored dtype, shape (tokens, width); None where it failed.
        reason: Why it failed.
        digest: Of a photo's bytes; None where it cannot be read.
        token_ids: Of a sentence, int32 of shape (valid tokens,).
    """

    key: str
    numbers: Numbers | None
    reason: str = ""
    digest: PhotoDigest | None = None
    token_ids: NDArray[np.int32] | None = None


def _fitting(row: Numbers, dtype: str) -> tuple[Numbers | None, str]:
    """Return a row that fits its stored dtype, or None and the reason."""
    if row.is_finite():
        return row, ""
    return None, f"features do not fit {dtype}; use [store] dtype float32"


class Encoding(Protocol):
    """One kind of input through its encoder."""

    batched: Batched

    def rows(self, keys: Sequence[str], paths: Sequence[Photo]) -> Iterator[Encoded]:
        """Encode inputs, each once and in order; one that fails never shifts another."""
        ...

    def shards(
        self, planned: Iterable[PlannedShard], progress: Progress
    ) -> Generator[Made, None, None]:
        """Encode planned shards, one after the other.

        Args:
            planned: Taken one at a time, maybe some batches before they are encoded.
            progress: Called with the number of rows just dealt with.
        """
        ...


@dataclass(frozen=True)
class _Decoded:
    """A photo's pixels, or the reason why it has none."""

    key: str
    digest: PhotoDigest | None
    pixels: NDArray[np.float32] | None
    reason: str = ""


class PhotoEncoding:
    """Photos: read, decode and convert in threads, encode.

    Args:
        spec: Of the features.
        encoder: The frozen vision encoder.
        store: Threads and batch size.
        on_halved: Called with the new batch size after memory ran out.
        photos: Learns the digests of the photos that are read.
    """

    def __init__(
        self,
        spec: VisionSpec,
        encoder: VisionEncoder,
        store: StoreConfig,
        on_halved: Callable[[int], None] = lambda size: None,
        photos: PhotoDigests | None = None,
    ) -> None:
        self._read = read_photo if photos is None else photos.read
        self.dtype, self.encoder, self.store = spec.dtype, encoder, store
        self._view = View.of(spec.view) if spec.view else None
        encode: Callable[..., Any] = encoder.encode
        if not spec.final_norm:
            encode = functools.partial(encode, k_vit=encoder.num_layers - spec.boundary)
        if (kernels := kernels_of(spec.folder(Path(store.root)))) != XLA:
            encode = functools.partial(encode, kernels=kernels)
        self.batched = Batched(encode, store.encode_batch_size, on_halved)

    def rows(self, keys: Sequence[str], paths: Sequence[Photo]) -> Iterator[Encoded]:
        """Encode photos; see `Encoding`."""
        with (
            closing(self._decoded(zip(keys, paths, strict=True))) as decoded,
            closing(self._encoded(self._batches(decoded))) as encoded,
        ):
            yield from chain.from_iterable(encoded)

    def shards(
        self, planned: Iterable[PlannedShard], progress: Progress
    ) -> Generator[Made, None, None]:
        """Encode planned shards, the photos of the next ones decoded meanwhile; see `Encoding`."""
        decoding: deque[PlannedShard] = deque()
        encoding: deque[PlannedShard] = deque()

        def photos() -> Iterator[tuple[str, Photo]]:
            for shard in planned:
                decoding.append(shard)
                yield from zip(shard.keys, shard.paths, strict=True)

        def batches(decoded: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
            for first in decoded:
                shard = decoding.popleft()
                encoding.append(shard)
                yield from self._batches(chain([first], islice(decoded, len(shard.keys) - 1)))

        # Closed at once: its threads must not be waited for wherever a failure's traceback goes.
        with (
            closing(self._decoded(photos())) as decoded,
            closing(self._encoded(batches(decoded))) as encoded,
        ):
            rows = chain.from_iterable(encoded)
            for first in rows:
                shard = encoding.popleft()
                yield self._made(shard, chain([first], islice(rows, len(shard.keys) - 1)), progress)

    def _decoded(self, photos: Iterable[tuple[str, Photo]]) -> Generator[_Decoded, None, None]:
        """Return photos in order, decoded some batches ahead of the reader by threads."""
        calls = (functools.partial(self._decode, key, path) for key, path in photos)
        return in_order(calls, self.store.threads, 3 * self.store.encode_batch_size)

    def _decode(self, key: str, path: Photo) -> _Decoded:
        digest = None
        try:
            data, digest = self._read(path)
            return _Decoded(key, digest, self._pixels(key, decode_image(data, path.name)))
        except ImageError as error:
            return _Decoded(key, digest, None, str(error))

    def _pixels(self, key: str, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self._view is None:
            return self.encoder.to_pixels(photo)
        view = self._view
        return self.encoder.to_pixels(photo, lambda levels: view.changed(levels, key))

    def _batches(self, photos: Iterable[_Decoded]) -> Iterator[list[_Decoded]]:
        """Cut photos into batches; one that was not decoded comes in its place, and counts not."""
        batch: list[_Decoded] = []
        fit = 0
        for item in photos:
            batch.append(item)
            fit += item.pixels is not None
            if fit >= self.batched.batch_size:
                yield batch
                batch, fit = [], 0
        if batch:
            yield batch

    def _encoded(self, batches: Iterable[list[_Decoded]]) -> Generator[list[Encoded], None, None]:
        """Return what became of each batch, in order; the encoder is some batches ahead."""

        def begun() -> Iterator[Callable[[], list[Encoded]]]:
            for batch in batches:
                pixels = [item.pixels for item in batch if item.pixels is not None]
                features = self.batched.begin(np.stack(pixels)) if pixels else None
                # Stacked they are there once more: a batch's own would wait with its features.
                done = [dataclasses.replace(item, pixels=None) for item in batch]
                batch.clear()
                yield functools.partial(self._finished, done, features)

        return in_order(begun(), FINISHING_THREADS, UNFINISHED + 1)

    def _finished(
        self, batch: Sequence[_Decoded], features: Callable[[], NDArray[Any]] | None
    ) -> list[Encoded]:
        """Return the rows of a batch, rounded as they will be stored."""
        rows: Iterator[tuple[Numbers | None, str]] = iter(())
        if features is not None:
            stored = Numbers.rounded(features(), self.dtype)
            rows = (_fitting(stored[i], self.dtype) for i in range(len(stored)))
        return [
            Encoded(item.key, None, item.reason, item.digest)
            if item.reason
            else Encoded(item.key, *next(rows), item.digest)
            for item in batch
        ]

    def _made(self, shard: PlannedShard, items: Iterable[Encoded], progress: Progress) -> Made:
        shape = (len(shard.keys), 1, self.encoder.num_tokens, self.encoder.width)
        # In place: lists of rows, joined at the end, would take the memory of two shards.
        features = Numbers.empty(shape, self.dtype)
        keys: list[str] = []
        digests: list[PhotoDigest] = []
        failed: dict[str, tuple[str, PhotoDigest | None]] = {}
        for item in items:
            progress(1)
            if item.numbers is None:
                failed[item.key] = (item.reason, item.digest)
                continue
            assert item.digest is not None
            features[len(keys), 0] = item.numbers
            keys.append(item.key)
            digests.append(item.digest)
        return shard, ShardRows(keys, features[: len(keys)], digests), failed


class SentenceEncoding:
    """Sentences: tokenise, encode up to the boundary, keep the valid tokens.

    Args:
        spec: Of the features.
        encoder: The frozen text encoder.
        store: Batch size.
        on_halved: Called with the new batch size after memory ran out.
    """

    def __init__(
        self,
        spec: TextSpec,
        encoder: TextEncoder,
        store: StoreConfig,
        on_halved: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.dtype, self.encoder, self.store = spec.dtype, encoder, store
        k_txt = encoder.num_layers - spec.boundary
        self.batched = Batched(
            lambda ids, mask: encoder.encode(ids, mask, k_txt), store.encode_batch_size, on_halved
        )

    def rows(self, keys: Sequence[str], paths: Sequence[Photo] = ()) -> Iterator[Encoded]:
        """Encode sentences; see `Encoding`."""
        token_ids, mask = self.encoder.tokenize(keys)
        lengths = mask.sum(axis=1)
        step = self.store.encode_batch_size * SENTENCE_BATCHES
        for first in range(0, len(keys), step):
            span = slice(first, first + step)
            stored = Numbers.rounded(self.batched(token_ids[span], mask[span]), self.dtype)
            for i in range(first, first + len(stored)):
                ids = token_ids[i, : lengths[i]]
                row, reason = _fitting(stored[i - first, : len(ids)], self.dtype)
                if row is not None:
                    # Copied, else a sentence would keep its whole batch in memory.
                    row = row.copy()
                yield Encoded(keys[i], row, reason, token_ids=ids)

    def shards(
        self, planned: Iterable[PlannedShard], progress: Progress
    ) -> Generator[Made, None, None]:
        """Encode planned shards; see `Encoding`."""
        for shard in planned:
            yield self._made(shard, self.rows(shard.keys), progress)

    def _made(self, shard: PlannedShard, items: Iterable[Encoded], progress: Progress) -> Made:
        kept: list[tuple[str, Numbers, NDArray[np.int32]]] = []
        failed: dict[str, tuple[str, PhotoDigest | None]] = {}
        for item in items:
            progress(1)
            if item.numbers is None:
                failed[item.key] = (item.reason, None)
            else:
                assert item.token_ids is not None
                kept.append((item.key, item.numbers, item.token_ids))
        nothing = Numbers.empty((0, self.encoder.width), self.dtype)
        lengths = [len(ids) for _, _, ids in kept]
        rows = ShardRows(
            [key for key, _, _ in kept],
            Numbers.concatenate([nothing, *(numbers for _, numbers, _ in kept)]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            token_ids=np.concatenate([np.empty(0, np.int32), *(ids for _, _, ids in kept)]),
        )
        return shard, rows, failed


def load_encoder(spec: FeatureSpec, preset: str) -> Encoder:
    """Load the encoder of a spec.

    Args:
        spec: Of the features.
        preset: The preset, as the user names it.

    Raises:
        PresetError: It cannot be loaded.
    """
    if isinstance(spec, VisionSpec):
        return VisionEncoder(preset, spec.tokens, spec.precision)
    assert isinstance(spec, TextSpec)
    return TextEncoder(preset, spec.sequence_length, spec.precision)


def encoding_of(
    spec: FeatureSpec,
    encoder: Encoder,
    store: StoreConfig,
    on_halved: Callable[[int], None] = lambda size: None,
    photos: PhotoDigests | None = None,
) -> Encoding:
    """Return what runs a spec's inputs through its encoder."""
    if isinstance(spec, VisionSpec):
        return PhotoEncoding(spec, cast(VisionEncoder, encoder), store, on_halved, photos)
    return SentenceEncoding(cast(TextSpec, spec), cast(TextEncoder, encoder), store, on_halved)
