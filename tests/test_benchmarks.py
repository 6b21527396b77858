"""The benchmarks themselves, at sizes where a figure means nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.loader import COLD_HEADER, OURS, OURS_FIRST, WARM_HEADER, measure, report
from benchmarks.loader_peers import PEERS, Peer, RandomReader, StreamReader, numpy_memmap
from benchmarks.tables import table

TINY: dict[str, Any] = {
    "rows": 64,
    "row_shape": (4, 8),
    "batch_size": 8,
    "batches": 2,
    "rounds": 2,
}


def test_a_table_is_markdown_of_even_columns() -> None:
    assert table(("way", "ms"), [("memcpy", "0.5"), ("a|b", "10.25")]).splitlines() == [
        "| way    |    ms |",
        "| ------ | ----: |",
        "| memcpy |   0.5 |",
        r"| a\|b   | 10.25 |",
    ]
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        table(("way", "ms"), [("memcpy",)])


def test_the_loader_benchmark_measures_every_way_that_is_installed(tmp_path: Path) -> None:
    figures = measure(**TINY, scratch=str(tmp_path))
    assert not list(tmp_path.iterdir())
    names = {peer.name for peer in PEERS}
    assert names <= figures["warm"].keys() | figures["absent"].keys()
    assert {"NumPy memmap, take", "TFRecord (tf.data)", OURS_FIRST} <= figures["warm"].keys()
    assert all("pip install" in needs for needs in figures["absent"].values())
    assert figures["warm"][OURS]["featstore_speed_to_this"] == 1
    for way in figures["warm"].values():
        low, high = way["spread_milliseconds"]
        assert 0 < low <= way["milliseconds_a_batch"] <= high
    text = report(figures)
    assert all(name in text for name in (*WARM_HEADER, *names))
    assert all(name in text for name in COLD_HEADER) or not figures["cold"]


@contextlib.contextmanager
def shifted_rows(features: Any, folder: Path) -> Iterator[RandomReader]:
    yield lambda positions, out: features[(positions + 1) % len(features)]


@contextlib.contextmanager
def one_row_twice(features: Any, folder: Path) -> Iterator[StreamReader]:
    yield lambda batch_size: iter([features[:1], features])


@contextlib.contextmanager
def one_row_short(features: Any, folder: Path) -> Iterator[StreamReader]:
    yield lambda batch_size: iter([features[1:]])


@contextlib.contextmanager
def not_installed(features: Any, folder: Path) -> Iterator[RandomReader]:
    import a_format_that_nobody_has  # noqa: F401

    yield lambda positions, out: out


@pytest.mark.parametrize(
    "peer",
    [
        Peer("shifted", False, shifted_rows),
        Peer("twice", True, one_row_twice),
        Peer("short", True, one_row_short),
    ],
    ids=lambda peer: peer.name,
)
def test_a_way_that_returns_other_rows_is_refused(tmp_path: Path, peer: Peer) -> None:
    with pytest.raises(ValueError, match=f"^{peer.name}: "):
        measure(**TINY, scratch=str(tmp_path), peers=[peer])


def test_a_peer_that_is_not_installed_is_listed(tmp_path: Path) -> None:
    peers = [Peer("nobody's", False, not_installed), Peer("memmap", False, numpy_memmap)]
    figures = measure(**TINY, scratch=str(tmp_path), peers=peers)
    assert "a_format_that_nobody_has" in figures["absent"]["nobody's"]
    assert "memmap" in figures["warm"]
    assert "nobody's is absent" in report(figures)


def test_too_few_rows_for_a_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 batches of 8 need more than 20 rows"):
        measure(**TINY | {"rows": 20, "batches": 3}, scratch=str(tmp_path))


def test_the_checks_read_what_was_written(tmp_path: Path) -> None:
    features = np.arange(48, dtype=np.float16).reshape(6, 2, 4)
    for peer in PEERS:
        folder = tmp_path / peer.name.replace("/", " ")
        folder.mkdir()
        with contextlib.suppress(ImportError), peer.open(features, folder) as read:
            if peer.streams:
                rows = np.concatenate([np.array(batch) for batch in read(4)])
                rows = rows[np.argsort(rows[:, 0, 0])]
                assert rows.tobytes() == features.tobytes(), peer.name
            else:
                found = read(np.array([5, 0, 3]), np.zeros((3, 2, 4), np.float16))
                assert found.tobytes() == features[[5, 0, 3]].tobytes(), peer.name
