"""Rows, photos and splits brought together."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from unprivileged import forbidden

from featstore.config import DataConfig
from featstore.data.dataset import load_dataset
from featstore.errors import ConfigError, DataError, SplitError

FRACTIONS = (0.6, 0.2, 0.2)


def write_rows(path: Path, ids: list[str], per_image: int = 2) -> str:
    with path.open("w") as file:
        for image_id in ids:
            for i in range(per_image):
                label = ("contradiction", "entailment")[i % 2]
                row = {"Image_ID": image_id, "Hypothesis": f"h{i} of {image_id}", "Label": label}
                file.write(json.dumps(row) + "\n")
    return str(path)


IDS = [f"p{i}" for i in range(10)]


@pytest.fixture
def photos(tmp_path: Path) -> str:
    folder = tmp_path / "photos"
    folder.mkdir()
    for image_id in IDS:
        Image.new("RGB", (4, 4)).save(folder / f"{image_id}.png")
    return str(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def data(tmp_path: Path, photos: str) -> DataConfig:
    return DataConfig(write_rows(tmp_path / "rows.jsonl", IDS), photos, FRACTIONS)


def replace(data: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(data, **changes)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_rows_photos_and_split(data: DataConfig, root: Path) -> None:
    dataset = load_dataset(data, root)
    assert dataset.counts() == {
        "rows": {"train": 12, "val": 4, "test": 4},
        "images": {"train": 6, "val": 2, "test": 2},
        "dropped": {},
        "kept_with_warning": {},
    }
    parts = [dataset.rows(split) for split in ("train", "val", "test")]
    assert sorted(np.concatenate(parts)) == dataset.rows("all").tolist() == list(range(20))
    assert dataset.report is None
    assert dataset.splits_path.name == f"{dataset.splits.digest()}.json"
    dataset.save()
    assert files(root) == [f"splits/{dataset.splits_path.name}"]
    with pytest.raises(SplitError, match="no split 'dev'"):
        dataset.rows("dev")


def test_missing_photos_are_reported(data: DataConfig, root: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "more.jsonl", [*IDS, "lost"])
    with Path(rows).open("a") as file:
        file.write(json.dumps({"Image_ID": "p1", "Hypothesis": "x", "Label": "neutral"}) + "\n")
    dataset = load_dataset(replace(data, rows=rows), root)
    assert dataset.counts()["dropped"] == {"no photo": 2, "neutral": 1}
    assert "lost" not in dataset.examples.image_ids
    dataset.save()
    assert dataset.report is not None
    with dataset.report.open(newline="") as file:
        found = [(row["reason"], row["image_id"], row["line"]) for row in csv.DictReader(file)]
    assert found == [
        ("neutral", "p1", "23"),
        ("no photo", "lost", "21"),
        ("no photo", "lost", "22"),
    ]


def test_no_row_has_a_photo(data: DataConfig, root: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "other.jsonl", ["x", "y"])
    with pytest.raises(DataError, match=r"none of its 4 rows has a photo in .*check \[data\] imag"):
        load_dataset(replace(data, rows=rows), root)


def test_one_row_file_per_split(data: DataConfig, root: Path, tmp_path: Path) -> None:
    rows = {
        "test": write_rows(tmp_path / "c.jsonl", IDS[8:]),
        "train": write_rows(tmp_path / "a.jsonl", [*IDS[:6], "lost"]),
        "dev": write_rows(tmp_path / "b.jsonl", IDS[6:8]),
    }
    dataset = load_dataset(replace(data, rows=rows), root)
    assert dataset.counts()["rows"] == {"train": 12, "val": 4, "test": 4}
    assert dataset.splits.source == "rows"
    assert dataset.counts()["dropped"] == {"no photo": 2}
    assert set(dataset.examples.image_ids[dataset.rows("test")]) == {"p8", "p9"}
    assert set(dataset.examples.sources[dataset.rows("val")]) == {rows["dev"]}
    assert load_dataset(replace(data, rows=rows), root).splits == dataset.splits
    with pytest.raises(ConfigError, match="exclude each other"):
        load_dataset(replace(data, rows=rows, split_file="x"), root)
    leak = {**rows, "test": write_rows(tmp_path / "d.jsonl", IDS[5:])}
    with pytest.raises(SplitError, match="leak"):
        load_dataset(replace(data, rows=leak), root)


def test_a_split_file_of_the_user(data: DataConfig, root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"train": IDS[4:], "val": IDS[:2], "test": IDS[2:4]}))
    dataset = load_dataset(replace(data, split_file=str(mine)), root)
    assert dataset.splits.source == "file"
    assert set(dataset.examples.image_ids[dataset.rows("val")]) == {"p0", "p1"}
    mine.write_text(json.dumps({"train": IDS[4:], "val": IDS[:2], "test": IDS[2:3]}))
    with pytest.raises(SplitError, match="'p3' of the rows is in no split"):
        load_dataset(replace(data, split_file=str(mine)), root)


def test_the_second_save_finds_the_split_written(data: DataConfig, root: Path) -> None:
    first = load_dataset(data, root)
    first.save()
    stat = first.splits_path.stat()
    # A store that was made elsewhere is read as it is.
    with forbidden(first.splits_path.parent, left=0o555):
        second = load_dataset(data, root)
        second.save()
    assert second.splits == first.splits
    assert second.splits_path.stat().st_mtime_ns == stat.st_mtime_ns
    assert second.splits_path.stat().st_ino == stat.st_ino


def test_a_saved_split_is_a_record_and_decides_nothing(data: DataConfig, root: Path) -> None:
    first = load_dataset(data, root)
    first.save()
    written = first.splits_path.read_bytes()
    content = json.loads(written)
    splits = content["splits"]
    splits["train"][0], splits["val"][0] = splits["val"][0], splits["train"][0]
    for text in (json.dumps(content), "{"):
        first.splits_path.write_text(text)
        second = load_dataset(data, root)
        assert second.splits == first.splits
        assert second.splits_path == first.splits_path
        second.save()
        assert second.splits_path.read_bytes() == written


def test_other_seed_other_split(data: DataConfig, root: Path) -> None:
    one, two = (load_dataset(replace(data, split_seed=seed), root) for seed in (0, 1))
    assert one.splits_path != two.splits_path
    assert one.examples.digest() == two.examples.digest()
    one.save()
    two.save()
    assert len(files(root)) == 2


def test_nothing_is_written_before_it_is_saved(
    data: DataConfig, root: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "more.jsonl", [*IDS, "lost"])
    before = files(tmp_path)
    dataset = load_dataset(replace(data, rows=rows), root)
    assert dataset.report is not None
    assert files(tmp_path) == before
    assert not root.exists()
    dataset.save()
    written = [f"reports/{dataset.report.name}", f"splits/{dataset.splits_path.name}"]
    assert files(root) == written
    assert load_dataset(replace(data, rows=rows), root).splits == dataset.splits


def test_no_photos(data: DataConfig, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[data\] images: name the folder of photos"):
        load_dataset(replace(data, images=""), root)
    with pytest.raises(DataError, match=r"photos cannot be listed .No such file"):
        load_dataset(replace(data, images=str(tmp_path / "none")), root)
