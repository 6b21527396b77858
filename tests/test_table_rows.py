"""Rows of several files, and rows and photos of Parquet files and `save_to_disk` folders."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_extract import pixel_job, write_photos

from featstore.care.sources import compare_sources
from featstore.config import DataConfig, FeatureConfig, StoreConfig, load_sections, with_paths
from featstore.data import table_rows
from featstore.data.dataset import Dataset, load_dataset, rows_to_predict
from featstore.data.images import index_images, read_bytes
from featstore.data.tables import BLOCK_ROWS, BLOCKS_HELD, PackedPhoto, _reader
from featstore.errors import ConfigError, DataError, ImageError, RowError, StaleFeaturesError
from featstore.extract.extract import extract
from featstore.extract.plan import make_plan, refuse_replaced
from featstore.settings import render_toml
from featstore.store.folder import read_quarantine
from featstore.store.store import VisionStore, open_store

SNLI_VE = ("entailment", "neutral", "contradiction")
PHOTOS = 12
FRACTIONS = (0.5, 0.25, 0.25)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "photos"
    write_photos(folder, PHOTOS)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def features(names: Sequence[str] | None = SNLI_VE) -> dict[str, Any]:
    """Return what `datasets` says of the columns."""
    label: dict[str, Any] = {"dtype": "int64", "_type": "Value"}
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
    text = {"dtype": "string", "_type": "Value"}
    return {"image": {"_type": "Image"}, "hypothesis": text, "label": label}


def hub_table(
    paths: Sequence[Path],
    *,
    names: Sequence[str] | None = SNLI_VE,
    named: bool = True,
    embedded: bool = True,
    more: dict[str, Any] | None = None,
) -> pa.Table:
    """Return three rows a photo, entailment, neutral and contradiction, as on the hub."""
    three = [path for path in paths for _ in range(3)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [
        {"bytes": p.read_bytes() if embedded else None, "path": p.name if named else None}
        for p in three
    ]
    columns = {
        "image": pa.array(images, kind),
        "premise": pa.array(["unused"] * len(three)),
        "hypothesis": pa.array([f"h{i % 3} of {p.stem}" for i, p in enumerate(three)]),
        "label": pa.array([i % 3 for i in range(len(three))], pa.int64()),
        **(more or {}),
    }
    info = json.dumps({"info": {"features": features(names)}})
    return pa.table(columns).replace_schema_metadata({"huggingface": info})


def parquet(path: Path, table: pa.Table, group_rows: int = 5) -> str:
    pq.write_table(table, path, row_group_size=group_rows)
    return str(path)


def save_to_disk(folder: Path, table: pa.Table, files: int = 2) -> str:
    """Write a folder as `datasets.Dataset.save_to_disk` lays it out."""
    folder.mkdir(parents=True)
    step = -(-len(table) // files)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as sink:
            part = table.slice(i * step, step)
            with pa.ipc.new_stream(sink, table.schema) as writer:
                for batch in part.to_batches(max_chunksize=4):
                    writer.write_batch(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features()}))
    return str(folder)


def load(rows: Any, root: Path, images: Path | str = "", **settings: Any) -> Dataset:
    settings = {"fractions": FRACTIONS, **settings}
    return load_dataset(DataConfig(rows=rows, images=str(images), **settings), root)


def table(dataset: Dataset) -> list[tuple[Any, ...]]:
    found = dataset.examples
    columns = (found.image_ids, found.hypotheses, found.labels, found.source_lines, found.sources)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def jsonl(path: Path, rows: Sequence[tuple[str, str, Any]]) -> str:
    keys = ("Image_ID", "Hypothesis", "Label")
    lines = [json.dumps(dict(zip(keys, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "pattern", "folder", "arrow"])
def test_rows_and_photos_of_one_source(photos: Path, root: Path, tmp_path: Path, kind: str) -> None:
    paths, source = files_in(photos), tmp_path / "source"
    rows = ""
    if kind == "arrow":
        rows = save_to_disk(source, hub_table(paths))
    else:
        source.mkdir()
        for i in range(2):
            part = hub_table(paths[i * 6 : i * 6 + 6])
            rows = parquet(source / f"train-{i}.parquet", part)
        if kind == "parquet":
            rows = parquet(source / "all.parquet", hub_table(paths))
        else:
            rows = str(source / "train-*.parquet") if kind == "pattern" else str(source)
    dataset = load(rows, root)
    # Neutral rows are left out and counted; 0 is entailment because the file says so.
    assert dataset.counts()["dropped"] == {"neutral": PHOTOS}
    found = table(dataset)
    assert [row[:3] for row in found] == [
        (path.name, f"h{i} of {path.stem}", label)
        for path in paths
        for i, label in ((0, 1), (2, 0))
    ]
    # The line is the row's place in its own file.
    lines = [line for p in range(PHOTOS) for line in (3 * p + 1, 3 * p + 3)]
    half = 1 if kind == "parquet" else 2
    assert [row[3] for row in found] == lines[: len(lines) // half] * half
    assert len({row[4] for row in found}) == half
    for path in paths:
        photo = dataset.images.lookup(path.name)
        assert isinstance(photo, PackedPhoto)
        assert read_bytes(photo) == path.read_bytes()
    assert dataset.images.lookup("absent") is None
    assert len(dataset.images) == PHOTOS


def test_the_store_has_the_bytes_that_the_files_give(
    photos: Path, root: Path, tmp_path: Path
) -> None:
    rows = parquet(tmp_path / "rows.parquet", hub_table(files_in(photos)))
    packed = load(rows, root)
    ids = list(dict.fromkeys(packed.examples.image_ids))
    stored: dict[str, list[bytes]] = {}
    for name, index in (("packed", packed.images), ("files", index_images(photos))):
        store = StoreConfig(root=str(tmp_path / name), shard_rows=5, encode_batch_size=4)
        job = pixel_job(store, ids, index)
        plan, summary = extract(job)
        assert (len(plan.keys), summary.extracted) == (PHOTOS, PHOTOS)
        stored[name] = [path.read_bytes() for path in sorted(job.folder.glob("*.h5"))]
        opened = open_store(job.folder)
        assert isinstance(opened, VisionStore)
        assert compare_sources(job.folder, packed.images, 2) == []
        assert make_plan(job).keys == []
    assert stored["packed"] == stored["files"] != []


def test_a_changed_photo_and_one_that_cannot_be_decoded(
    photos: Path, root: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(photos, own)
    files_in(own)[3].write_bytes(b"no photo")
    rows = tmp_path / "rows.parquet"
    parquet(rows, hub_table(files_in(own)))
    store = StoreConfig(root=str(root), shard_rows=5, encode_batch_size=4)

    def job() -> Any:
        dataset = load(str(rows), root)
        return pixel_job(store, list(dict.fromkeys(dataset.examples.image_ids)), dataset.images)

    first = job()
    extract(first)
    bad = files_in(own)[3].name
    (entry,) = read_quarantine(first.folder).items()
    assert entry[0] == bad
    assert entry[1]["reason"].startswith("rows.parquet:10: not a JPEG")
    assert make_plan(job()).keys == []
    # Another photo in the same row of another file.
    changed = files_in(own)[7]
    shutil.copy(files_in(own)[8], changed)
    parquet(rows, hub_table(files_in(own)))
    os.utime(rows, (1, 1))
    again = job()
    opened = open_store(first.folder)
    assert isinstance(opened, VisionStore)
    (problem,) = compare_sources(first.folder, again.images, 2)
    assert (problem.what, problem.keys) == ("changed photos", (changed.name,))
    with pytest.raises(StaleFeaturesError, match=rf"'{changed.name}', .*rows\.parquet:22\)"):
        refuse_replaced(again, opened, "train")
    assert make_plan(again).keys == [changed.name]
    extract(again)
    assert compare_sources(first.folder, again.images, 2) == []
    rows.unlink()
    (problem,) = compare_sources(first.folder, again.images, 2)
    assert problem.what == "vanished photos"


def test_a_photo_is_known_by_its_bytes_where_nothing_names_it(
    photos: Path, root: Path, tmp_path: Path
) -> None:
    paths = files_in(photos)
    nameless = load(parquet(tmp_path / "a.parquet", hub_table(paths, named=False)), root)
    (first, *_), count = nameless.examples.image_ids, len(set(nameless.examples.image_ids))
    assert (len(first), count) == (32, PHOTOS)
    # The same photos under one name are told apart, and are the same ids.
    same = hub_table(paths)
    images = [{**line, "path": "image.jpg"} for line in same["image"].to_pylist()]
    kind = same.schema.field("image").type
    same = same.set_column(0, "image", pa.array(images, kind))
    found = load(parquet(tmp_path / "b.parquet", same), root)
    assert found.examples.image_ids.tolist() == nameless.examples.image_ids.tolist()
    # A column of bytes alone has no names.
    plain = pa.array([line["bytes"] for line in images])
    bare = same.set_column(0, "image", plain)
    assert load(parquet(tmp_path / "c.parquet", bare), root).examples.digest() == (
        found.examples.digest()
    )


def test_a_column_of_ids_names_photos(photos: Path, root: Path, tmp_path: Path) -> None:
    paths = files_in(photos)
    ids = pa.array([10 + i // 3 for i in range(3 * PHOTOS)])
    named = hub_table(paths, more={"Flickr30K_ID": ids})
    dataset = load(parquet(tmp_path / "a.parquet", named), root)
    assert list(dict.fromkeys(dataset.examples.image_ids)) == [str(10 + i) for i in range(PHOTOS)]
    wrong = hub_table(paths, more={"Flickr30K_ID": pa.array([1] * (3 * PHOTOS))})
    with pytest.raises(
        DataError, match=r"b\.parquet:4: image id '1' has other image bytes than in"
    ):
        load(parquet(tmp_path / "b.parquet", wrong), root)


def test_names_alone_are_looked_up_in_a_folder(photos: Path, root: Path, tmp_path: Path) -> None:
    rows = parquet(tmp_path / "a.parquet", hub_table(files_in(photos), embedded=False))
    dataset = load(rows, root, photos)
    assert dataset.images.lookup("p03.jpg") == photos / "p03.jpg"
    assert len(dataset.examples) == 2 * PHOTOS
    with pytest.raises(
        RowError, match=r"no row has image bytes in image\.bytes, such as 'p00\.jpg'"
    ):
        load(rows, root)


def test_columns_as_those_of_jsonl(photos: Path, root: Path, tmp_path: Path) -> None:
    plain = pa.table(
        {
            "Image_ID": [f"p{i:02}" for i in range(PHOTOS)] * 2,
            "Hypothesis": [f"h{i}" for i in range(2 * PHOTOS)],
            "Label": pa.array(["entailment"] * PHOTOS + ["no"] * PHOTOS).dictionary_encode(),
        }
    )
    rows = parquet(tmp_path / "a.parquet", plain)
    same = load(rows, root, photos)
    text = [tuple(line.values()) for line in plain.to_pylist()]
    assert same.examples.digest() == (
        load(jsonl(tmp_path / "a.jsonl", text), root, photos).examples.digest()
    )
    with pytest.raises(RowError, match="has no photos in it; name the folder of photos"):
        load(rows, root)


def test_class_ids_have_names_or_are_refused(photos: Path, root: Path, tmp_path: Path) -> None:
    paths = files_in(photos)
    named = load(parquet(tmp_path / "a.parquet", hub_table(paths)), root).examples.digest()
    rows = parquet(tmp_path / "b.parquet", hub_table(paths, names=None))
    with pytest.raises(RowError, match="labels in label are class ids without names; say what"):
        load(rows, root)
    assert load(rows, root, label_names=SNLI_VE).examples.digest() == named
    three = load(rows, root, label_names=SNLI_VE, classes=3)
    assert three.examples.labels.tolist() == [1, 2, 0] * PHOTOS
    # The file's own names win, in the other order here.
    other = parquet(tmp_path / "c.parquet", hub_table(paths, names=SNLI_VE[::-1]))
    labels = load(other, root, label_names=SNLI_VE).examples.labels
    assert labels.tolist() == [0, 1] * PHOTOS
    # Not guessed in rows to predict either.
    assert set(rows_to_predict(rows, None, root).examples.labels.tolist()) == {-1}
    found = rows_to_predict(str(tmp_path / "a.parquet"), None, root)
    assert found.examples.labels.tolist() == [1, -1, 0] * PHOTOS
    unnamed = rows_to_predict(rows, None, root, label_names=SNLI_VE)
    assert unnamed.examples.labels.tolist() == [1, -1, 0] * PHOTOS
    # Of text files too, which otherwise read 1 as entailment.
    lines = [(f"p{i:02}", f"h{j}", 2 * j) for i in range(PHOTOS) for j in (0, 1)]
    text = jsonl(tmp_path / "d.jsonl", [*lines, ("p00", "x", -1), ("p00", "y", 7)])
    ids = load(text, root, photos, label_names=SNLI_VE)
    assert ids.examples.labels.tolist() == [1, 0] * PHOTOS
    assert [issue.detail for issue in ids.issues] == ["missing", "label 'class id 7'"]
    frame = pd.DataFrame({"image_id": ["p01", "p02"], "text": ["a", "b"], "label": [0, 2]})
    for names, labels in (((), [-1, -1]), (SNLI_VE, [1, 0])):
        found = rows_to_predict(frame, photos, root, label_names=names)
        assert found.examples.labels.tolist() == labels


def test_a_saved_dict_has_its_splits(photos: Path, root: Path, tmp_path: Path) -> None:
    paths, folder = files_in(photos), tmp_path / "saved"
    for name, part in (("train", paths[:8]), ("validation", paths[8:10]), ("test", paths[10:])):
        save_to_disk(folder / name, hub_table(part))
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    dataset = load(str(folder), root)
    assert dataset.splits.source == "rows"
    assert dataset.counts()["images"] == {"train": 8, "val": 2, "test": 2}
    # With a split of one's own the rows are one table.
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"train": [p.name for p in paths[1:]], "val": [paths[0].name]}))
    assert load(str(folder), root, split_file=str(own)).counts()["images"]["train"] == 11
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert load(str(folder), root).counts()["images"]["train"] == 4


def test_several_files_are_one_table(photos: Path, root: Path, tmp_path: Path) -> None:
    first = [(f"p{i:02}", f"h{j}", ("no", "yes")[j]) for i in range(PHOTOS) for j in (0, 1)]
    second = [("p01.png", "h1", "yes"), ("p02", "h1", "no"), ("p03", "new", "yes")]
    a, b = jsonl(tmp_path / "a.jsonl", first), tmp_path / "b.csv"
    with b.open("w", newline="") as file:
        csv.writer(file).writerows([("image_id", "sentence", "label"), *second])
    both = load((a, str(b)), root, photos)
    assert [row[:3] for row in table(both)[-2:]] == [("p02", "h1", 0), ("p03", "new", 1)]
    assert {row[4] for row in table(both)} == {a, str(b)}
    issues = {(i.kind, i.file, i.line, i.reason, i.detail) for i in both.issues}
    assert issues == {
        ("dropped", str(b), 2, "duplicate", f"same as line 4 of {a}"),
        ("kept", str(b), 3, "conflicting labels", f"the other label stands in line 6 of {a}"),
        ("kept", a, 6, "conflicting labels", f"the other label stands in line 3 of {b}"),
    }
    assert len(load((a, str(b)), root, photos, duplicates="keep").examples) == len(first) + 3
    # One file in a list is that file.
    assert load((a,), root, photos).splits.digest() == load(a, root, photos).splits.digest()


def test_rows_of_a_split_may_be_several_files(photos: Path, root: Path, tmp_path: Path) -> None:
    files = [
        jsonl(tmp_path / f"{i}.jsonl", [(f"p{p:02}", f"h{j}", j) for p in at for j in (0, 1)])
        for i, at in enumerate((range(4), range(4, 8), range(8, PHOTOS)))
    ]
    dataset = load({"train": tuple(files[:2]), "dev": files[2]}, root, photos, row_weights=(2, 1))
    assert dataset.counts()["images"] == {"train": 8, "val": 4, "test": 0}
    assert dataset.examples.weights.tolist() == [2.0] * 8 + [1.0] * 16
    with pytest.raises(ConfigError, match="expected 2 numbers, one for each of train's files"):
        load(
            {"train": tuple(files[:2]), "dev": files[2]}, root, photos, row_weights=(2.0, 1.0, 1.0)
        )
    with pytest.raises(ConfigError, match="expected 1 number, one for each of the rows' files"):
        load(files[0], root, photos, row_weights=(2.0, 1.0))


def test_weights_are_part_of_the_digest_where_they_are_set(
    photos: Path, root: Path, tmp_path: Path
) -> None:
    lines = [(f"p{p:02}", f"h{j}", j) for p in range(PHOTOS) for j in (0, 1)]
    rows = jsonl(tmp_path / "a.jsonl", lines)
    more = jsonl(tmp_path / "b.jsonl", [("p01", "more", 1)])
    plain, ones, twos = (
        load((rows, more), root, photos, row_weights=weights) for weights in ((), (1, 1), (1, 2))
    )
    assert plain.splits.digest() == ones.splits.digest() != twos.splits.digest()
    # As before there were weights.
    state = hashlib.blake2b(digest_size=16)
    for image_id, text, label in [*lines, ("p01", "more", 1)]:
        state.update(f"{len(image_id)} {len(text)} {label} {image_id}{text}".encode())
    assert plain.examples.digest() == state.hexdigest()
    assert twos.examples.select([0, -1]).weights.tolist() == [1, 2]


def test_damage_is_one_line(photos: Path, root: Path, tmp_path: Path) -> None:
    path = Path(parquet(tmp_path / "a.parquet", hub_table(files_in(photos))))
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    with pytest.raises(RowError, match=r"a\.parquet: damaged or cut short, or not Parquet: "):
        load(str(path), root)
    middle = bytearray(data)
    middle[len(data) // 3 : len(data) // 3 + 3000] = bytes(3000)
    path.write_bytes(middle)
    with pytest.raises(RowError, match=r"a\.parquet: damaged or cut short"):
        load(str(path), root)
    folder = Path(save_to_disk(tmp_path / "saved", hub_table(files_in(photos)), files=1))
    (arrow,) = folder.glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:20000])
    with pytest.raises(RowError, match="damaged or cut short, or not an Arrow stream"):
        load(str(folder), root)
    (folder / "state.json").write_text('{"_indices_data_files": [1]}')
    with pytest.raises(RowError, match="save it after `flatten_indices"):
        load(str(folder), root)
    (folder / "state.json").unlink()
    with pytest.raises(RowError, match="is a folder without Parquet files, and not one that"):
        load(str(folder), root)
    empty = hub_table(files_in(photos)).slice(0, 0)
    with pytest.raises(RowError, match="has no usable row: nothing follows"):
        load(parquet(tmp_path / "empty.parquet", empty), root)
    (folder / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(RowError, match=r"state\.json: names no data files"):
        load(str(folder), root)
    with pytest.raises(RowError, match="no file fits the pattern"):
        load(str(tmp_path / "x*.parquet"), root)
    with pytest.raises(RowError, match=r"no\.parquet: no such file"):
        load(str(tmp_path / "no.parquet"), root)


def test_files_with_and_without_photos(photos: Path, root: Path, tmp_path: Path) -> None:
    packed = parquet(tmp_path / "a.parquet", hub_table(files_in(photos)))
    text = jsonl(tmp_path / "b.jsonl", [("p01.png", "x", 1)])
    with pytest.raises(
        ConfigError, match=r"a\.parquet may have its photos in it, .*b\.jsonl cannot"
    ):
        load((packed, text), root)
    assert len(load((packed, text), root, photos).examples) == 2 * PHOTOS + 1
    with pytest.raises(ConfigError, match="name the folder of photos"):
        load(text, root)
    two = hub_table(files_in(photos)).rename_columns(["left", "premise", "hypothesis", "label"])
    two = two.append_column("right", two["left"])
    with pytest.raises(RowError, match="more than one column of image bytes, 'left' and 'right'"):
        load(parquet(tmp_path / "c.parquet", two), root)


def test_without_pyarrow(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        RowError, match=r"pyarrow, which is not .*pip install 'featstore\[parquet\]'"
    ):
        load(str(tmp_path / "a.parquet"), root)


def test_photos_are_read_once_and_kept_in_mind(
    photos: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Path(parquet(tmp_path / "a.parquet", hub_table(files_in(photos))))
    counted: list[Any] = []
    digest = table_rows._digest
    monkeypatch.setattr(table_rows, "_digest", lambda v: counted.append(v) or digest(v))
    load(str(rows), root)
    # Just written: it could change again and keep its times.
    load(str(rows), root)
    assert len(counted) == 6 * PHOTOS
    now = time.time_ns
    monkeypatch.setattr(table_rows.time, "time_ns", lambda: now() + 3600 * 10**9)
    first = load(str(rows), root)
    counted.clear()
    again = load(str(rows), root)
    assert counted == []
    assert again.examples.digest() == first.examples.digest()
    assert [again.images.lookup(i) for i in again.images.names()] == [
        first.images.lookup(i) for i in first.images.names()
    ]
    (kept,) = (root / "photo-digests").iterdir()
    kept.write_bytes(b"damaged")
    assert load(str(rows), root).examples.digest() == first.examples.digest()
    assert len(counted) == 3 * PHOTOS


@pytest.mark.parametrize("write", [parquet, save_to_disk])
def test_any_order_of_reading(photos: Path, tmp_path: Path, write: Callable[..., str]) -> None:
    paths = files_in(photos) * 20
    made = Path(write(tmp_path / "many.parquet", hub_table(paths), 300 if write is parquet else 1))
    file = made if made.is_file() else next(made.glob("*.arrow"))
    group_rows = 300 if made.is_file() else 10**6
    wanted = [path for path in paths for _ in range(3)]
    order = [*range(0, 720, 7), *range(719, 0, -97), *range(40, 60)]
    for number in order:
        photo = PackedPhoto(str(file), "image.bytes", number // group_rows, number % group_rows, 0)
        assert photo.read() == wanted[number].read_bytes()
    reader = _reader(str(file), "image.bytes", file.stat().st_mtime_ns, file.stat().st_ino)
    assert sum(map(len, reader._held)) <= BLOCK_ROWS * BLOCKS_HELD
    with pytest.raises(ImageError, match="no image bytes"):
        PackedPhoto(str(file), "image.bytes", 0, 10**6, 10**6).read()


def test_settings(tmp_path: Path) -> None:
    file = tmp_path / "featstore.toml"
    file.write_text(
        '[data]\nrows = {train = ["a.jsonl", "b/*.parquet"], val = "c.jsonl"}\n'
        "row_weights = [2, 1]\n"
    )
    config = load_sections(FeatureConfig, file)
    rows = {
        "train": (f"{tmp_path}/a.jsonl", f"{tmp_path}/b/*.parquet"),
        "val": f"{tmp_path}/c.jsonl",
    }
    assert (config.data.rows, config.data.row_weights) == (rows, (2.0, 1.0))
    file.write_text(render_toml(config))
    assert load_sections(FeatureConfig, file) == config
    moved = with_paths(config, lambda path: os.path.relpath(path, tmp_path))
    assert moved.data.rows == {"train": ("a.jsonl", "b/*.parquet"), "val": "c.jsonl"}
    flat = dataclasses.replace(config, data=DataConfig(rows=("a.jsonl", "b.csv")))
    file.write_text(render_toml(flat))
    assert load_sections(FeatureConfig, file).data.rows == (
        f"{tmp_path}/a.jsonl",
        f"{tmp_path}/b.csv",
    )
    for bad in ("[1]", '{train = [["a"]]}', '{train = {x = "a"}}'):
        file.write_text(f"[data]\nrows = {bad}\n")
        with pytest.raises(ConfigError, match=r"\[data\] rows must be"):
            load_sections(FeatureConfig, file)
