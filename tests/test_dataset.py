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

from featstore.config import SPLITS, DataConfig
from featstore.data.dataset import load_dataset, rows_to_predict
from featstore.errors import ConfigError, DataError, RowError, SplitError

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
    with pytest.raises(DataError) as caught:
        load_dataset(replace(data, rows=write_rows(tmp_path / "o.jsonl", ["x", "P3.jpg"])), root)
    report = root / "reports" / "unusable-o.jsonl.csv"
    assert str(caught.value) == (
        f"{tmp_path / 'o.jsonl'}: none of its 4 rows has a photo in {data.images}: the image id"
        f" 'P3.jpg' of line 3 was looked for as 'P3.jpg'; 'p3.png' is there, in another case (each"
        f" row is named in {report}); write the ids as the files are named, or check [data] images"
    )
    with report.open(newline="") as file:
        found = [(row["line"], row["reason"], row["detail"]) for row in csv.DictReader(file)]
    assert found == [
        *((line, "no photo", "") for line in "12"),
        *((line, "no photo", "'p3.png' is there, in another case") for line in "34"),
    ]
    with pytest.raises(DataError, match=r"its row has no photo in .*: the image id 'x' of line 1"):
        load_dataset(replace(data, rows=write_rows(tmp_path / "1.jsonl", ["x"], 1)), root)


def test_rows_that_cannot_be_used_are_reported(data: DataConfig, root: Path) -> None:
    path = Path(str(data.rows))
    text = path.read_text().replace("entailment", "ent").replace("contradiction", "con")
    path.write_text(text)
    with pytest.raises(RowError, match=r"line 1: unknown label .label 'con'.; labels read: entail"):
        load_dataset(data, root, report=False)
    assert not root.exists()
    with pytest.raises(RowError, match="each row is named in ") as caught:
        load_dataset(data, root)
    report = root / "reports" / "unusable-rows.jsonl.csv"
    assert str(report) in str(caught.value)
    with report.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    report.unlink()
    with forbidden(report.parent, left=0o555), pytest.raises(RowError) as caught:
        load_dataset(data, root)
    assert "unusable-rows" not in str(caught.value)


def test_a_photo_has_one_id_in_all_files(data: DataConfig, root: Path, tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [*IDS, "p3.png", "p4.PNG"])
    lines = Path(mixed).read_text().replace("of p4.PNG", "of p4")
    Path(mixed).write_text(lines)
    dataset = load_dataset(replace(data, rows=mixed), root)
    assert set(dataset.examples.image_ids) == set(IDS)
    # Rows 23 and 24 repeat rows of p4 now.
    assert [(i.line, i.image_id, i.reason) for i in dataset.issues] == [
        (23, "p4.PNG", "duplicate"), (24, "p4.PNG", "duplicate")
    ]  # fmt: skip
    assert list(dataset.examples.written_ids[-2:]) == ["p3.png"] * 2
    kept = load_dataset(replace(data, rows=mixed, duplicates="keep"), root)
    assert len(kept.examples) == 24
    leak = {"train": data.rows, "test": write_rows(tmp_path / "t.jsonl", ["p0.png#0"])}
    with pytest.raises(SplitError, match="image 'p0' is in 'test' and in 'train'"):
        load_dataset(replace(data, rows=leak), root)


def test_rows_of_a_caption_set(data: DataConfig, root: Path, tmp_path: Path) -> None:
    numbered = [f"{image_id}.png#{i}" for image_id in IDS for i in range(2)]
    rows = write_rows(tmp_path / "captions.jsonl", numbered)
    dataset = load_dataset(replace(data, rows=rows), root)
    assert sorted(set(dataset.examples.image_ids)) == [f"{image_id}.png" for image_id in IDS]
    assert list(dataset.examples.written_ids[::2]) == numbered
    assert dataset.counts()["images"] == {"train": 6, "val": 2, "test": 2}
    # A split may be by the rows' ids or by the photos'.
    for train, val, test in (
        (numbered[8:], numbered[:4], numbered[4:8]),
        ([f"{i}.png" for i in IDS[4:]], IDS[:2], IDS[2:4]),
    ):
        mine = tmp_path / "mine.csv"
        lines = [f"{i},{s}" for s, ids in zip(SPLITS, (train, val, test), strict=True) for i in ids]
        mine.write_text("\n".join(["FileName,Split", *lines]))
        given = load_dataset(replace(data, rows=rows, split_file=str(mine)), root)
        assert given.splits.assignment["val"] == ("p0.png", "p1.png")
    mine.write_text(mine.read_text().replace("p0,val", "p0.png#0,val\np0.png#1,test"))
    with pytest.raises(SplitError, match=r"leak: image 'p0.png' is in"):
        load_dataset(replace(data, rows=rows, split_file=str(mine)), root)


def test_what_people_should_see_of_the_rows(data: DataConfig, root: Path, tmp_path: Path) -> None:
    assert load_dataset(data, root).notes() == []
    rows, folder = tmp_path / "rows.csv", Path(data.images) / "closed"
    lines = [f"{i},A {'café' if i == 'p2' else 'dog'} of {i},{n % 2}" for n, i in enumerate(IDS)]
    rows.write_bytes("\n".join(["image,caption,label", *lines, "P1,x,1"]).encode("cp1252"))
    folder.mkdir()
    with forbidden(folder):
        dataset = load_dataset(replace(data, rows=str(rows)), root)
    assert dataset.notes() == [
        f"{rows} is not UTF-8: read as cp1252, so line 4 says 'A café of p2'; if that is wrong, set"
        " [data] encoding (--encoding)",
        "no photo for 'P1' of line 12: 'p1.png' is there, in another case",
        f"{folder}: cannot be listed (Permission denied); passed over",
    ]
    assert dataset.counts()["kept_with_warning"] == {"read as cp1252": 1}
    dataset.save()
    assert dataset.report is not None
    assert "read as cp1252,the file is not UTF-8,A café of p2" in dataset.report.read_text()
    named = load_dataset(replace(data, rows=str(rows), encoding="cp1252"), root)
    assert named.examples.digest() == dataset.examples.digest()
    assert [issue.reason for issue in named.issues] == ["no photo"]


def test_the_encoding_reads_each_file(data: DataConfig, root: Path, tmp_path: Path) -> None:
    rows = {}
    for split, ids in (("train", IDS[:6]), ("val", IDS[6:8]), ("test", IDS[8:])):
        path = tmp_path / f"{split}.csv"
        lines = [f"{i},一个男人坐在长椅上 {i},{n % 2}" for n, i in enumerate(ids)]
        path.write_bytes("\n".join(["image,caption,label", *lines]).encode("gbk"))
        rows[split] = str(path)
    mine = tmp_path / "mine.csv"
    mine.write_bytes("image,split,说明\np0,train,说明\np1,val,\np2,test,\n".encode("gbk"))
    with pytest.raises(RowError, match="its encoding is in doubt"):
        load_dataset(replace(data, rows=rows), root)
    dataset = load_dataset(replace(data, rows=rows, encoding="gbk"), root)
    assert set(dataset.examples.hypotheses) == {f"一个男人坐在长椅上 {i}" for i in IDS}
    assert dataset.notes() == []
    few = replace(data, rows=write_rows(tmp_path / "f.jsonl", IDS[:3]), split_file=str(mine))
    with pytest.raises(SplitError, match=r"mine.csv.*its encoding is in doubt"):
        load_dataset(few, root)
    assert load_dataset(replace(few, encoding="gbk"), root).counts()["images"]["val"] == 1


def test_rows_to_predict_keep_their_ids(data: DataConfig, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_bytes("image,caption\np0.png#0,咖啡\np0.png#1,咖啡\np9#0,x\nq#1,x\n".encode("gbk"))
    dataset = rows_to_predict(path, data.images, root, "gbk")
    assert list(dataset.examples.image_ids) == ["p0.png", "p0.png", "p9"]
    assert list(dataset.examples.written_ids) == ["p0.png#0", "p0.png#1", "p9#0"]
    assert list(dataset.examples.hypotheses) == ["咖啡", "咖啡", "x"]
    assert [(i.line, i.image_id) for i in dataset.issues] == [(5, "q#1")]


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
