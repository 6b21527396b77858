"""Plan, encode, publish: run a frozen encoder once per input and keep the result.

A plan is what is missing now. Rows are encoded in the plan's order and
published as whole shards, so a run that was killed continues at the shard that
it was making and ends with the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import filelock
import numpy as np
from numpy.typing import NDArray

from featstore.config import EncodersConfig, StoreConfig
from featstore.encoders import TextEncoder, VisionEncoder
from featstore.errors import ImageError, StoreError
from featstore.images import ImageIndex, decode_image, read_bytes
from featstore.plan import Plan, plan_images, plan_text, text_spec, vision_spec
from featstore.publish import package_versions, remove_leftovers
from featstore.shard import ShardRows, digest_bytes, feature_dtype, shard_name, write_shard
from featstore.spec import FeatureSpec, write_spec
from featstore.store import (
    read_quarantine,
    reconcile_manifest,
    shard_paths,
    write_manifest,
    write_quarantine,
)

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


@contextlib.contextmanager
def writing(folder: Path, timeout_seconds: float = -1) -> Iterator[None]:
    """Hold a features folder's lock.

    The lock belongs to the process: the system takes it back when that dies.

    Raises:
        StoreError: The folder cannot be made or locked, or another process
            held the lock for `timeout_seconds`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=timeout_seconds)
        lock.acquire()
    except filelock.Timeout as error:
        raise StoreError(f"{folder}: another extraction holds the lock") from error
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


class _Publisher:
    """Publishes full shards from a thread while the next one is being encoded."""

    def __init__(self, plan: Plan, names: dict[str, str]) -> None:
        self.plan = plan
        self.folder = plan.folder
        self.versions = package_versions()
        self.quarantine = read_quarantine(plan.folder, with_lost=True)
        if not shard_paths(self.folder) or not (self.folder / "spec.json").exists():
            write_spec(self.folder, plan.spec, names)
        self.lines = reconcile_manifest(self.folder)
        numbers = [int(path.stem.split("-")[1]) for path in shard_paths(self.folder)]
        self.next_number = max(numbers, default=-1) + 1
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def quarantine_row(self, key: str, reason: str, digest: tuple[int, int] | None) -> None:
        self.quarantine[key] = {
            "reason": reason,
            "source_digest": None if digest is None else list(digest),
        }

    def publish(self, rows: ShardRows) -> None:
        """Hand a shard over; waits for the one before it."""
        self._wait()
        number, self.next_number = self.next_number, self.next_number + 1
        self._pending = self._pool.submit(self._write, number, rows, dict(self.quarantine))

    def _write(self, number: int, rows: ShardRows, quarantine: dict[str, Any]) -> None:
        spec = self.plan.spec
        line = write_shard(
            self.folder / shard_name(number),
            spec.kind,
            spec.fingerprint,
            spec.dtype,
            rows,
            self.versions,
        )
        self.lines.append(line)
        for key in rows.keys:
            quarantine.pop(key, None)
            self.quarantine.pop(key, None)
        self._write_lists(quarantine)

    def _write_lists(self, quarantine: dict[str, Any]) -> None:
        if quarantine or (self.folder / "quarantine.json").exists():
            write_quarantine(self.folder, quarantine)
        write_manifest(self.folder, self.plan.spec.fingerprint, self.lines)

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the last shard and write the lists."""
        self._wait()
        self._write_lists(self.quarantine)

    def stop(self) -> None:
        """End the thread; what was handed over is still published."""
        self._pool.shutdown(wait=True)


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


def _stored(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Cast to the stored dtype; also return which rows stayed finite."""
    with np.errstate(over="ignore"):
        cast = values.astype(feature_dtype(dtype))
    return cast, np.isfinite(cast).reshape(len(cast), -1).all(axis=1)


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
    features: NDArray[Any] | None
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
    batch: list[_Decoded] = []

    def encoded() -> Iterator[EncodedPhoto]:
        values = batched(np.stack([item.pixels for item in batch if item.pixels is not None]))
        rows, finite = _stored(values, dtype)
        for item, row, ok in zip(batch, rows, finite.tolist(), strict=True):
            if ok:
                yield EncodedPhoto(item.key, item.digest, row)
            else:
                yield EncodedPhoto(item.key, item.digest, None, _does_not_fit(dtype))
        batch.clear()

    for item in _decoded(photos, encoder, store.decode_threads, 3 * store.encode_batch_size):
        if item.pixels is None:
            yield EncodedPhoto(item.key, item.digest, None, item.reason)
            continue
        batch.append(item)
        if len(batch) >= batched.batch_size:
            yield from encoded()
    if batch:
        yield from encoded()


def extract_images(
    plan: Plan,
    encoder: VisionEncoder,
    store: StoreConfig,
    name: str,
    progress: Progress = lambda rows: None,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Summary:
    """Encode and publish a plan's photos. The caller holds the folder's lock.

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
    summary = Summary(batch_size=store.encode_batch_size)
    started = time.perf_counter()
    publisher = _Publisher(plan, {"preset": name})
    batched = Batched(encoder, store.encode_batch_size, on_halved)
    row_shape = (1, encoder.num_tokens, encoder.width)
    capacity = min(store.shard_rows, max(1, len(plan.keys)))
    keys: list[str] = []
    digests: list[tuple[int, int]] = []
    features = np.empty((capacity, *row_shape), feature_dtype(plan.spec.dtype))

    def publish() -> None:
        nonlocal keys, digests, features
        publisher.publish(ShardRows(keys, features[: len(keys)], digests))
        summary.extracted += len(keys)
        keys, digests = [], []
        features = np.empty_like(features)

    try:
        photos = zip(plan.keys, plan.paths, strict=True)
        for item in encode_photos(photos, encoder, batched, store, plan.spec.dtype):
            progress(1)
            if item.features is None:
                summary.failed[item.key] = item.reason
                publisher.quarantine_row(item.key, item.reason, item.digest)
                continue
            assert item.digest is not None
            features[len(keys), 0] = item.features
            keys.append(item.key)
            digests.append(item.digest)
            if len(keys) == capacity:
                publish()
        if keys:
            publish()
        publisher.close()
    finally:
        publisher.stop()
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
    features: NDArray[Any] | None


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
        cast, _ = _stored(batched(token_ids[span], mask[span]), dtype)
        for i, row in enumerate(cast, first):
            valid = row[: lengths[i]].copy()
            fits = bool(np.isfinite(valid).all())
            yield EncodedSentence(sentences[i], token_ids[i, : lengths[i]], valid if fits else None)


def extract_text(
    plan: Plan,
    encoder: TextEncoder,
    store: StoreConfig,
    name: str,
    progress: Progress = lambda rows: None,
    on_halved: Callable[[int], None] = lambda size: None,
) -> Summary:
    """Encode and publish a plan's sentences. The caller holds the folder's lock.

    Only valid tokens are kept. A shard holds about `TEXT_SHARD_TOKENS` tokens
    at most, so that its memory is bounded whatever `shard_rows` says.

    Args and result as in `extract_images`.
    """
    summary = Summary(batch_size=store.encode_batch_size)
    started = time.perf_counter()
    publisher = _Publisher(plan, {"preset": name})
    batched = text_batches(encoder, plan.spec, store, on_halved)
    rows_of_shard = min(store.shard_rows, max(1, TEXT_SHARD_TOKENS // encoder.sequence_length))
    try:
        for start in range(0, len(plan.keys), rows_of_shard):
            keys: list[str] = []
            parts: list[NDArray[Any]] = []
            ids: list[NDArray[np.int32]] = []
            sentences = plan.keys[start : start + rows_of_shard]
            for item in encode_sentences(sentences, encoder, batched, store, plan.spec.dtype):
                progress(1)
                if item.features is None:
                    summary.failed[item.key] = _does_not_fit(plan.spec.dtype)
                    publisher.quarantine_row(item.key, summary.failed[item.key], None)
                    continue
                keys.append(item.key)
                parts.append(item.features)
                ids.append(item.token_ids)
            if keys:
                offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
                publisher.publish(
                    ShardRows(
                        keys,
                        np.concatenate(parts),
                        offsets=offsets.astype(np.int64),
                        token_ids=np.concatenate(ids).astype(np.int32),
                    )
                )
                summary.extracted += len(keys)
        publisher.close()
    finally:
        publisher.stop()
    summary.seconds = time.perf_counter() - started
    summary.batch_size = batched.batch_size
    return summary


@contextlib.contextmanager
def no_progress(total: int) -> Iterator[Progress]:
    """Show nothing."""
    yield lambda rows: None


def bring_images(
    encoders: EncodersConfig,
    store: StoreConfig,
    image_ids: Sequence[str],
    index: ImageIndex,
    bar: ProgressBar = no_progress,
    on_halved: Callable[[int], None] = lambda size: None,
) -> tuple[Plan, Summary]:
    """Make the store hold the features of these images.

    Two processes that ask for the same do the work once: the second waits for
    the first and then finds nothing to do.

    Args:
        encoders, store: The configuration.
        image_ids: Ids, each with a photo in `index`.
        index: Where the photos are.
        bar: Makes a progress display for a number of rows.
        on_halved: Called with the new batch size after memory ran out.

    Returns:
        The plan as it was under the lock, and what was done.
    """
    spec = vision_spec(encoders, store)
    plan = plan_images(spec, store, image_ids, index)
    if not plan.keys:
        return plan, Summary()
    with writing(plan.folder):
        plan = plan_images(spec, store, image_ids, index)
        if not plan.keys:
            return plan, Summary()
        plan.check_space()
        encoder = VisionEncoder(encoders.vit, store.tokens, store.precision)
        with bar(len(plan.keys)) as progress:
            return plan, extract_images(plan, encoder, store, encoders.vit, progress, on_halved)


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
