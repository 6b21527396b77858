"""Splits: no leak, full cover, the same everywhere; files that lie are found out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from featstore.data.examples import Examples
from featstore.data.splits import (
    Splits,
    check_no_leak,
    make_splits,
    photo_key,
    read_split_file,
    save_splits,
    splits_from_parts,
)
from featstore.errors import SplitError

THIRDS = (0.8, 0.1, 0.1)


def examples_of(image_ids: list[str]) -> Examples:
    n = len(image_ids)
    return Examples(
        np.array(image_ids, dtype=object),
        np.array([f"h{i}" for i in range(n)], dtype=object),
        (np.arange(n) % 2).astype(np.int8),
        np.arange(1, n + 1),
        np.full(n, "f", dtype=object),
    )


def numbered(n: int) -> Examples:
    return examples_of([str(i // 2) for i in range(2 * n)])


def test_sizes_of_the_study() -> None:
    splits = make_splits(examples_of([str(i) for i in range(19_573)]), THIRDS, 0)
    assert splits.counts() == {"train": 15_658, "val": 1_957, "test": 1_958}


def test_pinned_assignment() -> None:
    """A stored split must be made again, byte for byte, by any later version."""
    splits = make_splits(numbered(12), (0.5, 0.25, 0.25), seed=3)
    assert splits.assignment["val"] == ("0", "5", "7")
    assert splits.assignment["test"] == ("11", "2", "4")


@given(
    st.lists(st.integers(0, 60).map(lambda i: f"{i}"), min_size=30, max_size=90),
    st.integers(0, 2**70),
    st.randoms(use_true_random=False),
)
def test_grouped_split(ids: list[str], seed: int, random: Any) -> None:
    assume(len(set(ids)) >= 10)
    examples = examples_of(ids)
    splits = make_splits(examples, THIRDS, seed)
    check_no_leak(splits.assignment, "made")
    rows = [splits.rows(examples, split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(ids)))
    assert all(len(part) for part in rows)
    shuffled = list(ids)
    random.shuffle(shuffled)
    assert make_splits(examples_of(shuffled), THIRDS, seed).assignment == splits.assignment
    n = len(set(ids))
    assert splits.counts()["train"] == 8 * n // 10
    assert splits.counts()["val"] == n // 10


def test_adding_photos_moves_few() -> None:
    before = make_splits(examples_of([str(i) for i in range(2000)]), THIRDS, 0)
    after = make_splits(examples_of([str(i) for i in range(2100)]), THIRDS, 0)
    moved = set(before.assignment["train"]) - set(after.assignment["train"])
    assert len(moved) < 60  # a new random split would move about 320


def test_seed_counts() -> None:
    a, b = (make_splits(numbered(100), THIRDS, seed) for seed in (0, 1))
    assert a.assignment != b.assignment
    assert a.digest() != b.digest()


def test_ids_that_differ_in_the_suffix_are_one_photo() -> None:
    examples = examples_of([f"{i}{suffix}" for i in range(40) for suffix in ("", ".jpg", ".PNG")])
    splits = make_splits(examples, THIRDS, 0)
    assert splits.counts() == {"train": 96, "val": 12, "test": 12}
    check_no_leak(splits.assignment, "made")
    plain = make_splits(examples_of([str(i) for i in range(40)]), THIRDS, 0)
    assert {photo_key(i) for i in splits.assignment["val"]} == set(plain.assignment["val"])


@pytest.mark.parametrize(
    ("image_id", "key"), [("a.jpg", "a"), ("a.b", "a.b"), ("a.jpg.WebP", "a.jpg"), (".jpg", ".jpg")]
)
def test_photo_key(image_id: str, key: str) -> None:
    assert photo_key(image_id) == key


@pytest.mark.parametrize(
    ("fractions", "counts"),
    [
        ((1, 0, 0), (100, 0, 0)),
        ((0, 0, 1), (0, 0, 100)),
        ((0.9, 0.1, 0), (90, 10, 0)),
        ((0.71, 0.29, 0), (71, 29, 0)),
        ((0.29, 0.71, 0), (29, 71, 0)),
    ],
)
def test_empty_parts_that_were_asked_for(fractions: Any, counts: tuple[int, ...]) -> None:
    assert tuple(make_splits(numbered(100), fractions, 0).counts().values()) == counts


@pytest.mark.parametrize(
    ("fractions", "images", "message"),
    [
        ((0.8, 0.1), 100, "expected 3 shares"),
        ((0.8, 0.1, 0.2), 100, "sum of 1"),
        ((1.2, -0.1, -0.1), 100, "from 0 to 1"),
        ((float("nan"), 0.5, 0.5), 100, "from 0 to 1"),
        ((0.8, 0.1, 0.1), 9, "split 'val' would be empty: 0.1 of 9 photos"),
        ((0.8, 0.2, 0), 0, "split 'train' would be empty"),
    ],
)
def test_fractions_that_cannot_be(fractions: Any, images: int, message: str) -> None:
    with pytest.raises(SplitError, match=message):
        make_splits(numbered(images), fractions, 0)


def test_rows_of_an_unknown_split() -> None:
    examples = numbered(20)
    with pytest.raises(SplitError, match="no split 'dev'; expected one of train, val, test"):
        make_splits(examples, THIRDS, 0).rows(examples, "dev")


def test_a_saved_split_is_a_split_file(tmp_path: Path) -> None:
    examples = numbered(20)
    splits = make_splits(examples, THIRDS, 5)
    path = tmp_path / "deep" / "splits.json"
    save_splits(path, splits)
    assert json.loads(path.read_text())["counts"] == {"train": 16, "val": 2, "test": 2}
    read = read_split_file(path, examples)
    assert read.assignment == splits.assignment
    assert read.digest() == splits.digest()


def test_the_same_split_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    splits = make_splits(numbered(20), THIRDS, 5)
    save_splits(path, splits)
    first, content = path.stat(), path.read_bytes()
    save_splits(path, splits)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    for other in (b"", b"{", content[:-1], content.replace(b"0", b"1", 1)):
        path.write_bytes(other)
        save_splits(path, splits)
        assert path.read_bytes() == content


GIVEN = {"train": ["0", "1.jpg", 2, "elsewhere"], "Validation": ["3"], "test": ["4"]}
AS_CSV = "split;image_id\ntrain;0\ntrain;1.jpg\ntrain;2\ntrain;elsewhere\n\ndev;3\ntest;4\n"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GIVEN),
        AS_CSV,
        "\ufeff" + AS_CSV,
        *(AS_CSV.replace("image_id", name) for name in ("Image ID", "Flickr30K_ID", "filename")),
    ],
)
def test_a_users_split(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine"
    path.write_text(text, encoding="utf-8")
    examples = examples_of(["4", "0", "1", "2", "3", "3.jpg"])
    splits = read_split_file(path, examples)
    assert splits.assignment == {"train": ("0", "1", "2"), "val": ("3", "3.jpg"), "test": ("4",)}
    assert splits.rows(examples, "train").tolist() == [1, 2, 3]
    assert (splits.source, splits.seed, splits.fractions) == ("file", None, ())
    save_splits(tmp_path / "s.json", splits)
    assert read_split_file(tmp_path / "s.json", examples) == splits
    path.write_bytes(gzip.compress(text.encode()))
    assert read_split_file(path, examples) == splits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": ["0"], "val": ["1", "0"]}', "image '0' is in 'val' and in 'train'"),
        ('{"train": ["0"]}', "image '1' of the rows is in no split"),
        ('{"train": ["0", "1"], "test": ["9"]}', "no row is about an image of split 'test'.*'9'"),
        ('{"train": ["0", "1"], "holdout": []}', "unknown split 'holdout'; expected train"),
        ('{"val": ["0"], "dev": ["1"]}', "split 'val' is given twice"),
        ('{"train": "0"}', "expected a list of ids"),
        ('{"train": [null]}', "expected ids as text, found None"),
        ('["0"]', "found a list"),
        ('{"train"', "not a JSON"),
        ("", "is empty"),
        ("id,part\n0,train\n", "expected the columns image_id and split, found 'id,"),
        ("image_id,split\n0,train\n1,holdout\n", "mine:3: unknown split 'holdout'"),
        ("image_id,split\n0\n", "mine:2: expected an image id and a split"),
        ("image_id,split\n,train\n", "mine:2: expected an image id and a split"),
        ("image_id,split\n0,train\n1,test\n0,test\n", "image '0' is in 'test' and in 'train'"),
    ],
)
def test_a_users_split_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine"
    path.write_text(text)
    with pytest.raises(SplitError, match=message) as caught:
        read_split_file(path, examples_of(["0", "1"]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b'{\n"train"', "mine:2: not a JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 99999, "not a JSON"),
    ],
)
def test_an_unreadable_split(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "mine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SplitError, match=message) as caught:
        read_split_file(path, numbered(20))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_parts() -> None:
    parts = {"dev": examples_of(["b", "b"]), "train": examples_of(["a", "c"])}
    examples, splits = splits_from_parts(parts)
    assert list(examples.image_ids) == ["a", "c", "b", "b"]
    assert splits.rows(examples, "train").tolist() == [0, 1]
    assert splits.rows(examples, "val").tolist() == [2, 3]
    assert splits.rows(examples, "test").tolist() == []
    assert splits.source == "rows"
    assert splits.rows_digest == examples.digest()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": ["a", "b"], "test": ["b"]}, "row files: the splits leak: image 'b'"),
        ({"train": ["a", "b"], "test": ["b.png", "a"]}, "leak: .*, and 1 more"),
        ({"train": ["a"], "test": []}, "split 'test' has no rows"),
        ({"extra": ["a"]}, "unknown split 'extra'"),
        ({}, "no split given"),
    ],
)
def test_parts_that_are_wrong(parts: dict[str, list[str]], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        splits_from_parts({split: examples_of(ids) for split, ids in parts.items()})


ids = st.sets(st.sampled_from("abcdefgh"), max_size=5)


@given(ids, ids, ids)
def test_every_leak_is_found(train: set[str], val: set[str], test: set[str]) -> None:
    assignment = {"train": train, "val": {f"{i}.jpg" for i in val}, "test": test}
    try:
        check_no_leak(assignment, "given")
        found = False
    except SplitError:
        found = True
    assert found == bool(train & val | train & test | val & test)


def test_digest_covers_rows_and_assignment() -> None:
    def digest(rows: str, *splits: tuple[str, ...]) -> str:
        return Splits(dict(zip(("train", "val", "test"), splits, strict=True)), rows).digest()

    digests = {
        digest("r", ("a",), ("b",), ()),
        digest("r", ("a",), (), ("b",)),
        digest("r", ("a", "b"), (), ()),
        digest("q", ("a",), ("b",), ()),
    }
    assert len(digests) == 4
