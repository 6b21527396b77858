"""Buckets: whole words, whatever their case; a file that a user edits, and its mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.errors import ConfigError
from trainer.buckets import bucket_rows, load_buckets


def members(buckets: dict, text: str) -> set[str]:
    return {name for name, rows in bucket_rows(buckets, [text]).items() if rows[0]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Woman is not sitting outside.", {"gender", "negation", "posture", "locations"}),
        ("Humans and womankind", set()),  # words, not parts of them
        ("The man's dog", {"gender"}),
        ("It doesn’t bark", {"negation"}),  # a curly apostrophe
        ("it does n't bark", {"negation"}),  # as SNLI's tokens have it
        ("Two dogs next  to a car", {"counting", "spatial", "vehicles"}),
        ("Dogs next\nto it", {"spatial"}),
        ("There are 12 people", {"counting"}),
        ("A RED shirt", {"colors", "clothing"}),
        ("They are playing", {"activity"}),
        ("A notable knot", set()),
        ("", set()),
    ],
)
def test_the_shipped_buckets_find_whole_words(text: str, expected: set[str]) -> None:
    assert members(load_buckets(), text) == expected


def test_the_shipped_buckets_are_the_ten_of_the_study() -> None:
    assert list(load_buckets()) == [
        *("gender", "counting", "posture", "locations", "activity"),
        *("colors", "vehicles", "spatial", "clothing", "negation"),
    ]


def test_a_users_file_has_words_or_an_expression(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('dots = ["a.b", "C++"]\nyears = \'19\\d\\d|20\\d\\d\'\n')
    buckets = load_buckets(path)
    assert list(buckets) == ["dots", "years"]
    assert members(buckets, "in A.B of 1999") == {"dots", "years"}
    assert members(buckets, "axb, 21999") == set()
    assert members(buckets, "c++!") == {"dots"}
    rows = bucket_rows(buckets, [])
    assert [len(found) for found in rows.values()] == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no bucket in it"),
        ("colors = 3", "bucket 'colors': expected a list of words"),
        ("colors = ['red', 3]", "bucket 'colors': expected a list of words"),
        ("[colors]\nred = 1", "bucket 'colors': expected a list of words"),
        ("colors = []", "at least one word"),
        ("colors = ['red', ' ']", "none that is empty"),
        ("colors = 'red|(blue'", "not a regular expression"),
        ("colors = 'red)|(?:blue'", "not a regular expression"),
        ("colors = 'red|'", "matches no letter at all"),
        ("colors = red", "not a TOML file"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.toml") as caught:
        load_buckets(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_buckets(tmp_path / "none.toml")
