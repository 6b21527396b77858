"""The order of rows is a pure function; batches hold what the stores hold; threads end."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import DataError
from featstore.store.folder import write_manifest
from featstore.store.numbers import Numbers
from featstore.store.shard import shard_name
from featstore.store.store import TextStore, VisionStore
from featstore.store.write import ShardRows, write_shard
from trainer.batches import (
    WINDOW_BATCHES,
    Batch,
    CachedRows,
    Emphasis,
    epoch_batches,
    other_images,
)
from trainer.prefetch import PREFETCHED, Prefetcher

IMAGES, TOKENS, WIDTH, TEXT_WIDTH = 7, 3, 4, 5
SENTENCE_LENGTHS = np.array([3, 9, 4, 24, 12, 8])


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> VisionStore:
    folder = tmp_path_factory.mktemp("vit")
    rng = np.random.default_rng(0)
    features = rng.normal(size=(IMAGES, 1, TOKENS, WIDTH)).astype(np.float16)
    keys = [f"image{i}" for i in range(IMAGES)]
    rows = ShardRows(keys, Numbers(features), [(i, i) for i in range(IMAGES)])
    line = write_shard(folder / shard_name(0), "vit", folder.name, "float16", rows, {})
    write_manifest(folder, folder.name, [line])
    return VisionStore(folder, {"kind": "vit", "dtype": "float16"})


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextStore:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(1)
    offsets = np.concatenate([[0], np.cumsum(SENTENCE_LENGTHS)])
    features = rng.normal(size=(offsets[-1], TEXT_WIDTH)).astype(np.float16)
    ids = np.arange(offsets[-1], dtype=np.int32)
    keys = [f"sentence {i}" for i in range(len(SENTENCE_LENGTHS))]
    rows = ShardRows(keys, Numbers(features), offsets=offsets, token_ids=ids)
    line = write_shard(folder / shard_name(0), "text", folder.name, "float16", rows, {})
    write_manifest(folder, folder.name, [line])
    return TextStore(folder, {"kind": "text", "dtype": "float16"})


def make_rows(
    vision: VisionStore,
    text: TextStore,
    count: int = 40,
    k_txt: int = 2,
    control: str = "none",
    weights: np.ndarray | None = None,
) -> CachedRows:
    rng = np.random.default_rng(2)
    return CachedRows(
        vision,
        text,
        rng.integers(0, IMAGES, count),
        rng.integers(0, len(SENTENCE_LENGTHS), count),
        rng.integers(0, 2, count).astype(np.int8),
        whole=k_txt > 0,
        control=control,
        emphasis=Emphasis(row_weights=weights),
    )


def test_a_row_has_its_weight_and_a_filling_one_none(vision: VisionStore, text: TextStore) -> None:
    rows = make_rows(vision, text, weights=np.arange(40, dtype=np.float32))
    assert rows.batch(np.array([7, 3, 9]), 5).weights.tolist() == [7, 3, 9, 0, 0]
    plain = make_rows(vision, text).batch(np.array([7, 3, 9]), 5).weights
    assert (plain.dtype, plain.tolist()) == (np.float32, [1, 1, 1, 0, 0])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([8, 12, 24]), max_size=700),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 1000),
    group=st.booleans(),
)
def test_an_epoch_holds_every_row_once_in_full_batches(
    lengths: list[int], batch_size: int, seed: int, epoch: int, group: bool
) -> None:
    array = np.array(lengths, np.int64)
    batches = epoch_batches(array, batch_size, seed, epoch, group)
    flat = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    assert sorted(flat.tolist()) == list(range(len(lengths)))
    assert sum(len(batch) != batch_size for batch in batches) <= 1
    assert all(0 < len(batch) <= batch_size for batch in batches)
    again = epoch_batches(array, batch_size, seed, epoch, group)
    assert [b.tolist() for b in again] == [b.tolist() for b in batches]


@pytest.mark.parametrize("group", [False, True])
def test_order_differs_between_epochs_and_seeds(group: bool) -> None:
    lengths = np.random.default_rng(0).choice([8, 12, 24], 300)

    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(lengths, 16, seed, epoch, group)).tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(o) for o in orders}) == 4


def test_grouped_batches_have_rows_of_like_length() -> None:
    size, windows = 8, 2
    lengths = np.random.default_rng(0).choice([8, 12, 24], windows * WINDOW_BATCHES * size)
    mixed = sum(
        len(set(lengths[batch])) > 1 for batch in epoch_batches(lengths, size, 0, 0, group=True)
    )
    # Within a window sorted by three lengths, two batches at most hold a border.
    assert mixed <= 2 * windows
    plain = epoch_batches(lengths, size, 0, 0, group=False)
    assert sum(len(set(lengths[batch])) > 1 for batch in plain) > len(plain) / 2


def test_grouping_does_not_order_the_epoch_by_length() -> None:
    lengths = np.random.default_rng(0).choice([8, 24], 64 * 8)
    of_batches = [int(lengths[b].max()) for b in epoch_batches(lengths, 8, 0, 0, group=True)]
    assert of_batches not in (sorted(of_batches), sorted(of_batches, reverse=True))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=200), st.integers(0, 2**32))
def test_other_images_replaces_each_image_by_one_other(images: list[int], seed: int) -> None:
    positions = np.array(images, np.int64)
    if len(set(images)) == 1:
        with pytest.raises(DataError, match="two images"):
            other_images(positions, seed)
        return
    shuffled = other_images(positions, seed)
    assert (shuffled != positions).all()
    pairs = set(zip(images, shuffled.tolist(), strict=True))
    assert len(pairs) == len(set(images))
    assert {new for _, new in pairs} == set(images)
    assert shuffled.tolist() == other_images(positions, seed).tolist()


def test_a_batch_is_filled_with_its_first_row_at_weight_0(
    vision: VisionStore, text: TextStore
) -> None:
    rows = make_rows(vision, text)
    wanted = np.array([5, 30, 11])
    batch = rows.batch(wanted, 8)
    assert batch.weights.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.weights.dtype == batch.labels.dtype == np.float32
    assert batch.rows.tolist() == wanted.tolist()
    for i, row in enumerate([5, 30, 11, 5, 5, 5, 5, 5]):
        image, sentence = rows.image_positions[row], rows.text_positions[row]
        np.testing.assert_array_equal(
            batch.features.values[i], vision.shards[0].features.values[image, 0]
        )
        start = SENTENCE_LENGTHS[:sentence].sum()
        count = SENTENCE_LENGTHS[sentence]
        np.testing.assert_array_equal(
            batch.hidden.values[i, :count], text.shards[0].features.values[start : start + count]
        )
        assert not batch.hidden.values[i, count:].any()
        assert batch.padding_mask[i].tolist() == [j < count for j in range(batch.hidden.shape[1])]
        assert batch.labels[i] == rows.labels[row]
    assert batch.features.values.dtype == np.float16


def test_batches_are_as_long_as_their_longest_sentence(
    vision: VisionStore, text: TextStore
) -> None:
    rows = make_rows(vision, text)
    for some in (np.array([0]), np.array([7]), np.arange(5), np.arange(len(rows))):
        batch = rows.batch(some, len(some))
        lengths = SENTENCE_LENGTHS[rows.text_positions[some]]
        assert batch.hidden.shape[1] == lengths.max()
        np.testing.assert_array_equal(batch.padding_mask.sum(axis=1), lengths)


def test_k_txt_0_reads_the_first_state_alone(vision: VisionStore, text: TextStore) -> None:
    rows = make_rows(vision, text, k_txt=0)
    batch = rows.batch(np.arange(6), 6)
    starts = np.concatenate([[0], np.cumsum(SENTENCE_LENGTHS)])[rows.text_positions[:6]]
    np.testing.assert_array_equal(batch.hidden.values[:, 0], text.shards[0].features.values[starts])
    assert batch.hidden.shape == (6, 1, TEXT_WIDTH)
    assert batch.padding_mask.all()


def test_hypothesis_only_reads_zeros(vision: VisionStore, text: TextStore) -> None:
    seen = make_rows(vision, text).batch(np.arange(6), 8)
    blind = make_rows(vision, text, control="hypothesis-only").batch(np.arange(6), 8)
    assert not blind.features.values.any()
    assert blind.features.shape == seen.features.shape
    assert blind.features.values.dtype == seen.features.values.dtype
    np.testing.assert_array_equal(blind.hidden.values, seen.hidden.values)


def test_shuffled_images_changes_the_picture_alone(vision: VisionStore, text: TextStore) -> None:
    plain = make_rows(vision, text)
    shuffled = make_rows(vision, text, control="shuffled-images")
    a, b = plain.batch(np.arange(8), 8), shuffled.batch(np.arange(8), 8)
    assert (a.features.values != b.features.values).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(a.hidden.values, b.hidden.values)
    np.testing.assert_array_equal(a.labels, b.labels)


@pytest.mark.parametrize("k_txt", [0, 2])
@pytest.mark.parametrize("count", [1, 16, 40])
def test_in_order_reads_each_row_once_by_length(
    vision: VisionStore, text: TextStore, k_txt: int, count: int
) -> None:
    rows = make_rows(vision, text, count, k_txt)
    batches = rows.in_order(16)
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert all(0 < len(batch) <= 16 for batch in batches)
    assert (np.diff(rows.lengths[np.concatenate(batches)]) >= 0).all()
    assert all(len(batch) == 16 for batch in batches[:-1])


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def assert_same(a: Batch, b: Batch) -> None:
    assert a.inputs().keys() == b.inputs().keys()
    for name, array in a.inputs().items():
        np.testing.assert_array_equal(array, b.inputs()[name])
    for name in ("labels", "weights", "rows"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_prefetching_gives_what_reading_gives(vision: VisionStore, text: TextStore) -> None:
    rows = make_rows(vision, text)
    steps = rows.epoch(7, seed=3, epoch=1)
    with Prefetcher(rows, steps, 7) as batches:
        found = list(batches)
    assert len(found) == len(steps)
    for batch, step in zip(found, steps, strict=True):
        assert_same(batch, rows.batch(step, 7))
    assert batches.wait_seconds > 0
    assert not prefetch_threads()


def test_nothing_to_prefetch(vision: VisionStore, text: TextStore) -> None:
    with Prefetcher(make_rows(vision, text), [], 4) as batches:
        assert list(batches) == []


def test_what_goes_wrong_in_the_thread_is_raised_in_its_place(
    vision: VisionStore, text: TextStore
) -> None:
    rows = make_rows(vision, text)
    steps = [np.array([0]), np.array([1]), np.array([len(rows)]), np.array([2])]
    with Prefetcher(rows, steps, 1) as batches:
        iterator = iter(batches)
        assert [next(iterator).rows.tolist() for _ in range(2)] == [[0], [1]]
        with pytest.raises(IndexError):
            next(iterator)
    assert not prefetch_threads()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_ends_the_thread(vision: VisionStore, text: TextStore, taken: int) -> None:
    rows = make_rows(vision, text)
    with Prefetcher(rows, [np.arange(4)] * 1000, 4) as batches:
        iterator = iter(batches)
        for _ in range(taken):
            next(iterator)
    assert not prefetch_threads()


def test_an_exception_of_the_reader_ends_the_thread(vision: VisionStore, text: TextStore) -> None:
    def read() -> None:
        with Prefetcher(make_rows(vision, text), [np.arange(4)] * 1000, 4) as batches:
            for _ in batches:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    assert not prefetch_threads()


def test_few_batches_are_in_memory_however_long_the_epoch(
    vision: VisionStore, text: TextStore
) -> None:
    rows = make_rows(vision, text)
    most = 0
    with Prefetcher(rows, [np.arange(4)] * 300, 4) as batches:
        for number, _ in enumerate(batches):
            if number % 50 == 49:
                alive = sum(isinstance(item, Batch) for item in gc.get_objects())
                most = max(most, alive)
    # In the queue, one being put, one being read.
    assert 0 < most <= PREFETCHED + 2
