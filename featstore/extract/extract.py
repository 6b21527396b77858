"""Plan, encode, publish: run a frozen encoder once per input and keep the result.

A plan is what is missing now, cut into planned shards (see `worklist.py`).
Rows are encoded shard by shard, and no batch spans two of them: a shard's
bytes are the same whichever process makes it, and a run that was killed
continues at the shard that it was making.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import ImageIndex, decode_image, read_bytes
from featstore.encoders.spec import FeatureSpec, VisionSpec, text_spec, vision_spec
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import ImageError, StoreError
from featstore.extract.plan import Plan, plan_images, plan_text
from featstore.extract.worklist import (
    Failed,
    PlannedShard,
    Share,
    WorkList,
    alone,
    sharing,
    writing,
)
from featstore.store.numbers import Numbers
from featstore.store.shard import digest_bytes
from featstore.store.write import ShardRows

TEXT_SHARD_TOKENS = 1 << 18
Progress = Callable[[int], None]
ProgressBar = Callable[[int], contextlib.AbstractContextManager[Progress]]


class Encoder(Protocol):
    """What the encode loop needs of an encoder."""

    def encode(self, *inputs: Any) -> NDArray[Any]: ...


@dataclass
class Summary:
    """What an extraction did.

    Attributes:
        extracted: Rows published.
        failed: Key to reason of the inputs quarantined in this run.
        seconds: Wall time of encoding and publishing.
        batch_size: Rows of a forward pass at the end; smaller than asked for
            after memory ran out.
    """

    extracted: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    batch_size: int = 0

    @property
    def rows_per_second(self) -> float:
        """Throughput over the whole run."""
        return self.extracted / self.seconds if self.seconds else 0.0

    def add(self, other: Summary) -> None:
        """Count what was done after this."""
        self.extracted += other.extracted
        self.failed |= other.failed
        self.seconds += other.seconds
        self.batch_size = other.batch_size


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether an accelerator ran out of memory, for TensorFlow and JAX alike."""
    text = f"{type(error).__name__} {error}".lower()
    return any(
        mark in text for mark in ("resourceexhausted", "resource_exhausted", "out of memory")
    )


class Batched:
    """Calls an encoder with one fixed batch shape; halves it when memory runs out."""

    def __init__(self, encoder: Encoder, batch_size: int, on_halved: Callable[[int], None]) -> None:
        self.encoder = encoder
        self.batch_size = batch_size
        self.on_halved = on_halved

    def __call__(self, *inputs: NDArray[Any]) -> NDArray[Any]:
        """Encode rows of any number; the last batch is filled up with its first row."""
        while True:
            try:
                return np.concatenate(list(self._parts(inputs)))
            except Exception as error:
                if not _is_out_of_memory(error) or self.batch_size == 1:
                    raise
                self.batch_size //= 2
                self.on_halved(self.batch_size)

    def _parts(self, inputs: tuple[NDArray[Any], ...]) -> Iterator[NDArray[Any]]:
        size = self.batch_size
        for start in range(0, len(inputs[0]), size):
            part = [array[start : start + size] for array in inputs]
            count = len(part[0])
            if count < size:
                part = [np.concatenate([a, np.repeat(a[:1], size - count, axis=0)]) for a in part]
            yield np.asarray(self.encoder.encode(*part))[:count]


def _does_not_fit(dtype: str) -> str:
    return f"features do not fit {dtype}; use [store] dtype float32"


@dataclass(frozen=True)
class _Decoded:
    key: str
    digest: tuple[int, int] | None
    pixels: NDArray[np.float32] | None
    reason: str = ""


def _decode(key: str, path: Path, encoder: VisionEncoder) -> _Decoded:
    digest = None
    try:
        data = read_bytes(path)
        digest = digest_bytes(data)
        return _Decoded(key, digest, encoder.to_pixels(decode_image(data, path.name)))
    except ImageError as error:
        return _Decoded(key, digest, None, str(error))


def _decoded(
    photos: Iterable[tuple[str, Path]], encoder: VisionEncoder, threads: int, ahead: int
) -> Iterator[_Decoded]:
    """Yield photos in order, decoded `ahead` of the reader by threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Decoded]] = deque()
        try:
            for key, path in photos:
                waiting.append(pool.submit(_decode, key, path, encoder))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class EncodedPhoto:
    """One photo's features, or why it has none.

    Attributes:
        key: Image id.
        digest: Of the file's bytes; None where it cannot be read.
        features: Stored dtype, shape (tokens, width); None where it failed.
        reason: Why it failed.
    """

    key: str
    digest: tuple[int, int] | None
    features: Numbers | None
    reason: str = ""


def encode_photos(
    photos: Iterable[tuple[str, Path]],
    encoder: VisionEncoder,
    batched: Batched,
    store: StoreConfig,
    dtype: str,
) -> Iterator[EncodedPhoto]:
    """Decode and encode photos; one that fails never shifts another.

    Args:
        photos: Image id and file.
        encoder: The frozen vision encoder.
        batched: Calls it.
        store: Threads and batch size.
        dtype: Stored number format.

    Yields:
        Each photo once, in order but for those that cannot be decoded, which
        come as soon as that is known.
    """
    return _encoded(_decoded_ahead(photos, encoder, store), batched, dtype)


def _decoded_ahead(
    photos: Iterable[tuple[str, Path]], encoder: VisionEncoder, store: StoreConfig
) -> Iterator[_Decoded]:
    return _decoded(photos, encoder, store.decode_threads, 3 * store.encode_batch_size)


def _encoded(photos: Iterable[_Decoded], batched: Batched, dtype: str) -> Iterator[EncodedPhoto]:
    batch: list[_Decoded] = []

    def encoded() -> Iterator[EncodedPhoto]:
        values = batched(np.stack([item.pixels for item in batch if item.pixels is not None]))
        stored = Numbers.rounded(values, dtype)
        for i, item in enumerate(batch):
            row = stored[i]
            if row.is_finite():
                yield EncodedPhoto(item.key, item.digest, row)
            else:
                yield EncodedPhoto(item.key, item.digest, None, _does_not_fit(dtype))
        batch.clear()

    for item in photos:
        if item.pixels is None:
            yield EncodedPhoto(item.key, item.digest, None, item.reason)
            continue
        batch.append(item)
        if len(batch) >= batched.batch_size:
            yield from encoded()
    if batch:
        yield from encoded()


# A planned shard's rows, and why the others of it failed.
Made = tuple[PlannedShard, ShardRows, Failed]


def make_shards(
    shards: Iterable[PlannedShard],
    encoder: VisionEncoder,
    batched: Batched,
    store: StoreConfig,
    dtype: str,
    progress: Progress = lambda rows: None,
) -> Iterator[Made]:
    """Encode planned shards of photos, one after the other.

    Photos of the next shards are decoded ahead, but a batch holds rows of one
    shard only: its bytes do not depend on which shards were made before it.

    Args:
        shards: Taken one at a time, a few batches before they are encoded.
        encoder: The frozen vision encoder.
        batched: Calls it.
        store: Threads and batch size.
        dtype: Stored number format.
        progress: Called with the number of rows just dealt with.

    Yields:
        Each shard with its rows, and key to reason and digest of those that
        failed.
    """
    begun: deque[PlannedShard] = deque()

    def photos() -> Iterator[tuple[str, Path]]:
        for shard in shards:
            begun.append(shard)
            yield from zip(shard.keys, shard.paths, strict=True)

    decoded = _decoded_ahead(photos(), encoder, store)
    for first in decoded:
        shard = begun.popleft()
        count = len(shard.keys)
        features = Numbers.empty((count, 1, encoder.num_tokens, encoder.width), dtype)
        keys: list[str] = []
        digests: list[tuple[int, int]] = []
        failed: dict[str, tuple[str, tuple[int, int] | None]] = {}
        for item in _encoded(chain([first], islice(decoded, count - 1)), batched, dtype):
            progress(1)
            if item.features is None:
                failed[item.key] = (item.reason, item.digest)
                continue
            assert item.digest is not None
            features[len(keys), 0] = item.features
            keys.append(item.key)
            digests.append(item.digest)
        yield shard, ShardRows(keys, features[: len(keys)], digests), failed


def _publish_all(work: WorkList, made: Iterable[Made], summary: Summary) -> None:
    """Publish shards from a thread while the next one is being encoded."""
    pending: Future[None] | None = None

    def publish(shard: PlannedShard, rows: ShardRows, failed: Failed) -> None:
        if work.publish(shard, rows, failed):
            summary.extracted += len(rows.keys)
            summary.failed |= {key: reason for key, (reason, _) in failed.items()}

    with ThreadPoolExecutor(1) as pool:
        for item in made:
            if pending is not None:
                pending.result()
            pending = pool.submit(publish, *item)
        if pending is not None:
            pending.result()


def _extract(
    work: WorkList,
    shards: range,
    make: Callable[[Iterable[PlannedShard]], Iterator[Made]],
    progress: Progress,
    summary: Summary,
) -> None:
    """Make planned shards: first those that nobody is making, then what is left of others'."""
    left: list[int] = []

    def take(positions: Iterable[int]) -> Iterator[PlannedShard]:
        for position in positions:
            if work.claim(position):
                yield work.shard(position)
            else:
                left.append(position)

    _publish_all(work, make(take(work.pending(shards))), summary)
    for position in left:
        # With no claim of our own: two processes that wait for each other would never end.
        if work.claim(position, wait=True):
            _publish_all(work, make([work.shard(position)]), summary)
        else:
            progress(len(work.shard(position).keys))
    work.finish()


def extract_images(
    plan: Plan,
    encoder: VisionEncoder,
    store: StoreConfig,
    name: str,
    progress: Progress = lambda rows: None,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Summary:
    """Encode and publish a plan's photos. The caller holds the folder by `writing`.

    Args:
        plan: From `plan_images`.
        encoder: The frozen vision encoder of the plan's spec.
        store: Shard size, batch size and threads.
        name: The preset's name, kept for people.
        progress: Called with the number of rows just dealt with.
        on_halved: Called with the new batch size after memory ran out.

    Returns:
        What was done. A photo that cannot be decoded, or whose features do
        not fit the stored dtype, is quarantined and never shifts another.
    """
    work = alone(plan, store.shard_rows, name)
    return extract_shards(work, range(len(work)), encoder, store, progress, on_halved)


def extract_shards(
    work: WorkList,
    shards: range,
    encoder: VisionEncoder,
    store: StoreConfig,
    progress: Progress = lambda rows: None,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Summary:
    """Make some planned shards of photos; wait for those that other processes make.

    Args:
        work: The planned shards.
        shards: Which of them, by their place in the plan; may reach beyond its end.
        encoder, store, progress, on_halved: As in `extract_images`.

    Returns:
        What this process did.
    """
    summary = Summary(batch_size=store.encode_batch_size)
    started = time.perf_counter()
    batched = Batched(encoder, store.encode_batch_size, on_halved)
    dtype = work.publisher.spec.dtype

    def make(planned: Iterable[PlannedShard]) -> Iterator[Made]:
        return make_shards(planned, encoder, batched, store, dtype, progress)

    _extract(work, shards, make, progress, summary)
    summary.seconds = time.perf_counter() - started
    summary.batch_size = batched.batch_size
    return summary


class _Boundary:
    """A text encoder cut where the trained layers begin."""

    def __init__(self, encoder: TextEncoder, k_txt: int) -> None:
        self.encoder, self.k_txt = encoder, k_txt

    def encode(self, *inputs: Any) -> NDArray[Any]:
        token_ids, padding_mask = inputs
        return self.encoder.encode(token_ids, padding_mask, self.k_txt)


@dataclass(frozen=True)
class EncodedSentence:
    """One sentence's hidden states.

    Attributes:
        key: The sentence.
        token_ids: int32 of shape (valid tokens,).
        features: Stored dtype, shape (valid tokens, width); None where they
            do not fit it.
    """

    key: str
    token_ids: NDArray[np.int32]
    features: Numbers | None


def text_batches(
    encoder: TextEncoder,
    spec: FeatureSpec,
    store: StoreConfig,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Batched:
    """Return what runs a text encoder up to a spec's boundary."""
    cut = _Boundary(encoder, encoder.num_layers - spec.boundary)
    return Batched(cut, store.encode_batch_size, on_halved)


def encode_sentences(
    sentences: Sequence[str],
    encoder: TextEncoder,
    batched: Batched,
    store: StoreConfig,
    dtype: str,
) -> Iterator[EncodedSentence]:
    """Encode sentences, yielding each once and in order; only valid tokens are kept."""
    token_ids, mask = encoder.tokenize(sentences)
    lengths = mask.sum(axis=1)
    step = store.encode_batch_size * 8
    for first in range(0, len(sentences), step):
        span = slice(first, first + step)
        stored = Numbers.rounded(batched(token_ids[span], mask[span]), dtype)
        for i in range(first, first + len(stored)):
            ids = token_ids[i, : lengths[i]]
            row = stored[i - first, : len(ids)]
            if row.is_finite():
                # Copied, else a sentence would keep its whole batch in memory.
                yield EncodedSentence(sentences[i], ids, row.copy())
            else:
                yield EncodedSentence(sentences[i], ids, None)


def extract_text(
    plan: Plan,
    encoder: TextEncoder,
    store: StoreConfig,
    name: str,
    progress: Progress = lambda rows: None,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Summary:
    """Encode and publish a plan's sentences. The caller holds the folder by `writing`.

    Only valid tokens are kept. A shard holds about `TEXT_SHARD_TOKENS` tokens
    at most, so that its memory is bounded whatever `shard_rows` says.

    Args and result as in `extract_images`.
    """
    summary = Summary(batch_size=store.encode_batch_size)
    started = time.perf_counter()
    batched = text_batches(encoder, plan.spec, store, on_halved)
    rows_of_shard = min(store.shard_rows, max(1, TEXT_SHARD_TOKENS // encoder.sequence_length))
    work = alone(plan, rows_of_shard, name)

    def make(planned: Iterable[PlannedShard]) -> Iterator[Made]:
        for shard in planned:
            yield _make_text_shard(shard, encoder, batched, store, plan.spec.dtype, progress)

    _extract(work, range(len(work)), make, progress, summary)
    summary.seconds = time.perf_counter() - started
    summary.batch_size = batched.batch_size
    return summary


def _make_text_shard(
    shard: PlannedShard,
    encoder: TextEncoder,
    batched: Batched,
    store: StoreConfig,
    dtype: str,
    progress: Progress,
) -> Made:
    parts = [Numbers.empty((0, encoder.width), dtype)]
    ids: list[NDArray[np.int32]] = []
    keys: list[str] = []
    failed: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for item in encode_sentences(shard.keys, encoder, batched, store, dtype):
        progress(1)
        if item.features is None:
            failed[item.key] = (_does_not_fit(dtype), None)
            continue
        keys.append(item.key)
        parts.append(item.features)
        ids.append(item.token_ids)
    offsets = np.cumsum([len(part) for part in parts])
    rows = ShardRows(
        keys,
        Numbers.concatenate(parts),
        offsets=offsets.astype(np.int64),
        token_ids=np.concatenate([np.empty(0, np.int32), *ids]).astype(np.int32),
    )
    return shard, rows, failed


@contextlib.contextmanager
def no_progress(total: int) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda rows: None


ALL = range(sys.maxsize)


def bring_images(
    encoders: EncodersConfig,
    store: StoreConfig,
    image_ids: Sequence[str],
    index: ImageIndex,
    bar: ProgressBar = no_progress,
    on_halved: Callable[[int], None] = lambda size: None,
    shards: range = ALL,
) -> tuple[Plan, Summary]:
    """Make the store hold the features of these images.

    Processes that ask for the same share the work: each planned shard is made
    once, and each process returns when all that it asked for is there.

    Args:
        encoders, store: The configuration.
        image_ids: Ids, each with a photo in `index`.
        index: Where the photos are.
        bar: Makes a progress display for a number of rows.
        on_halved: Called with the new batch size after memory ran out.
        shards: Which planned shards this process makes.

    Returns:
        What was missing when this process began, and what it did.
    """
    spec = vision_spec(encoders, store)

    def load() -> VisionEncoder:
        return VisionEncoder(encoders.vit, store.tokens, store.precision)

    return share_images(spec, load, encoders.vit, store, image_ids, index, bar, on_halved, shards)


def share_images(
    spec: VisionSpec,
    load: Callable[[], VisionEncoder],
    name: str,
    store: StoreConfig,
    image_ids: Sequence[str],
    index: ImageIndex,
    bar: ProgressBar = no_progress,
    on_halved: Callable[[int], None] = lambda size: None,
    shards: range = ALL,
) -> tuple[Plan, Summary]:
    """Make the store hold the features of these images by one spec; see `bring_images`.

    Args:
        spec: Of the features.
        load: Loads the spec's encoder; called if there is something to do.
        name: The preset's name, kept for people.
        store, image_ids, index, bar, on_halved, shards: As in `bring_images`.
    """
    encoder: VisionEncoder | None = None
    begun: Plan | None = None
    total = Summary(batch_size=store.encode_batch_size)
    rest = True
    while rest:
        with share_of_images(spec, name, store, image_ids, index, shards) as share:
            begun = begun or share.plan
            rest = share.rest and shards == ALL
            rows = share.work.rows(shards) if share.work else 0
            if share.work and rows:
                encoder = encoder or load()
                with bar(rows) as progress:
                    total.add(
                        extract_shards(share.work, shards, encoder, store, progress, on_halved)
                    )
            elif share.work:
                # A kill, or a process that had the last shard, left the plan open.
                share.work.finish()
    assert begun is not None
    return begun, total


def share_of_images(
    spec: VisionSpec,
    name: str,
    store: StoreConfig,
    image_ids: Sequence[str],
    index: ImageIndex,
    shards: range = ALL,
) -> contextlib.AbstractContextManager[Share]:
    """Join the processes that extract these images; see `worklist.sharing`."""

    def path_of(image_id: str) -> Path:
        path = index.lookup(image_id)
        if path is None:
            raise StoreError(f"{index.folder}: no photo for image id {image_id!r}")
        return path

    return sharing(
        lambda: plan_images(spec, store, image_ids, index),
        spec.folder(Path(store.root)),
        image_ids,
        store.shard_rows,
        name,
        path_of,
        shards.start,
    )


def bring_text(
    encoders: EncodersConfig,
    store: StoreConfig,
    sentences: Sequence[str],
    k_txt: int,
    bar: ProgressBar = no_progress,
    on_halved: Callable[[int], None] = lambda size: None,
) -> tuple[Plan, Summary]:
    """Make the store hold the hidden states of these sentences for one `k_txt`.

    Args and result as in `bring_images`.
    """
    spec = text_spec(encoders, store, k_txt)
    plan = plan_text(spec, store, sentences)
    if not plan.keys:
        return plan, Summary()
    with writing(plan.folder):
        plan = plan_text(spec, store, sentences)
        if not plan.keys:
            return plan, Summary()
        plan.check_space()
        encoder = TextEncoder(encoders.text, encoders.sequence_length, store.precision)
        with bar(len(plan.keys)) as progress:
            return plan, extract_text(plan, encoder, store, encoders.text, progress, on_halved)


def _rows_per_second(encoder: Encoder, *inputs: NDArray[Any]) -> float:
    """Time the compiled forward pass on one batch, after its compilation."""
    encoder.encode(*inputs)
    started = time.perf_counter()
    np.asarray(encoder.encode(*inputs))
    return len(inputs[0]) / (time.perf_counter() - started)


def estimate_images(
    encoders: EncodersConfig, store: StoreConfig, image_ids: Sequence[str], index: ImageIndex
) -> tuple[Plan, float]:
    """Say what `bring_images` would do, and how fast; change nothing.

    Returns:
        The plan, and images a second of the real encoder on this machine (0
        where there is nothing to do).
    """
    plan = plan_images(vision_spec(encoders, store), store, image_ids, index)
    if not plan.keys:
        return plan, 0.0
    encoder = VisionEncoder(encoders.vit, store.tokens, store.precision)
    pixels = np.zeros((store.encode_batch_size, *encoder.image_size, 3), np.float32)
    return plan, _rows_per_second(encoder, pixels)


def estimate_text(
    encoders: EncodersConfig, store: StoreConfig, sentences: Sequence[str], k_txt: int
) -> tuple[Plan, float]:
    """Say what `bring_text` would do, and how fast; change nothing."""
    plan = plan_text(text_spec(encoders, store, k_txt), store, sentences)
    if not plan.keys:
        return plan, 0.0
    encoder = TextEncoder(encoders.text, encoders.sequence_length, store.precision)
    token_ids = np.zeros((store.encode_batch_size, encoders.sequence_length), np.int32)
    mask = np.ones(token_ids.shape, bool)
    return plan, _rows_per_second(_Boundary(encoder, k_txt), token_ids, mask)
