"""Predictions of rows that a run has not seen: each row once, in order, never inverted."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from PIL import Image
from tiny_runs import SENTENCES, prepared, tiny_config

import trainer
import trainer.results.unseen
from featstore import Project
from featstore.config import with_paths
from featstore.data.collect import CONFLICT
from featstore.data.labels import CLASS_IDS, UNLABELLED
from featstore.data.rows import read_examples, read_frame
from featstore.errors import DataError, RowError
from featstore.extract.held import Holder
from featstore.progress import SILENT
from featstore.quantities import share
from trainer.batches import Batch
from trainer.commands.main import cli
from trainer.logits import sigmoid
from trainer.results.score import Scorer
from trainer.results.unseen import blocks_of, score_rows
from trainer.run.training import Reporter

HEADER = ["Image_ID", "Hypothesis", "Label", "probability_entailment", "confidence", "reason"]
BLOCKS = ("BLOCK_PHOTOS", 3), ("BLOCK_ROWS", 7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Path:
    """A folder with a store in float16 and a run on it, with `k_txt` 1."""
    folder = tmp_path_factory.mktemp("predict")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, k_txt=1, epochs=1)
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, dtype="float16"))
    trainer.train(
        prepared(config), name="first", runs=folder / "runs", show=SILENT, reporter=Reporter()
    )
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> trainer.Run:
    """The run and its store, moved, without the rows and the photos that it was trained on."""
    folder = tmp_path / "own"
    shutil.copytree(made / "data" / "cache", folder / "cache")
    shutil.copytree(made / "runs", folder / "runs")
    run = trainer.load_run(folder / "runs" / "first")
    config = trainer.load_run(made / "runs" / "first").config
    run.write_config(with_paths(config, lambda p: p.replace(str(made / "data"), str(folder))))
    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten photos that the run has not seen, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 255, (20 + i, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"new{i}.png")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


GOOD = [
    {"Image_ID": f"new{i % 10}", "Hypothesis": SENTENCES[i % 4], "Label": ("0", "1")[i % 3 == 0]}
    for i in range(40)
]
# By what is said of them.
BAD = {
    "no photo": {"Image_ID": "nobody", "Hypothesis": "a dog"},
    "unreadable photo: broken.jpg": {"Image_ID": "broken", "Hypothesis": "a dog"},
    "empty text": {"Image_ID": "new1", "Hypothesis": " "},
    "unsafe image id": {"Image_ID": "../new1", "Hypothesis": "a dog"},
    "no image id": {"Image_ID": None, "Hypothesis": "a dog"},
    "broken text": {"Image_ID": "new2", "Hypothesis": "a \ud800 dog"},
}


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixed() -> tuple[list[dict[str, Any]], list[str]]:
    """Good rows with bad ones among them, each repeated; and the start of each one's reason."""
    rows: list[tuple[dict[str, Any], str]] = [(row, "") for row in GOOD]
    for i, (reason, row) in enumerate(BAD.items()):
        rows.insert(5 * i, (row, reason))
        rows.append((row, reason))
    return [row for row, _ in rows], [reason for _, reason in rows]


def command(run: trainer.Run, *args: str, stdin: bytes | None = None) -> Result:
    command = ("predict", str(run.folder), *args)
    return CliRunner().invoke(cli, list(command), input=stdin, prog_name="featstore")


def succeed(run: trainer.Run, *args: str, stdin: bytes | None = None) -> Result:
    done = command(run, *args, stdin=stdin)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class ByHand:
    """A predictor whose logit is on the side of the threshold that the row's label says."""

    def __init__(self, cut: float) -> None:
        self.cut, self.seen = cut, 0

    def predict(self, batch: Batch) -> np.ndarray:
        labels = batch.labels[: len(batch.rows)]
        # All between 0 and the cut, or beyond: entailment is more than a positive logit.
        steps = np.linspace(0.01, 0.5, len(labels)) * min(1.0, self.cut)
        self.seen += len(labels)
        return np.where(labels == 1, self.cut + steps, self.cut - steps)[None].astype(np.float32)


@pytest.mark.parametrize("cache", ["--cache", "--no-cache"])
def test_labels_are_never_inverted_and_every_row_is_kept(
    own: trainer.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    own.metrics_path.write_text(json.dumps({**own.metrics, "threshold": 0.7}))
    predictor = ByHand(float(np.log(0.7 / 0.3)))
    monkeypatch.setattr(Scorer, "predictor", predictor)
    for name, value in BLOCKS:
        monkeypatch.setattr(trainer.results.unseen, name, value)
    rows, reasons = mixed()
    done = succeed(
        own,
        *("--rows", str(rows_file(tmp_path / "rows.jsonl", rows))),
        *("--images", str(photos), cache),
    )
    header, *lines = csv.reader(io.StringIO(done.stdout))
    assert header == HEADER
    assert len(lines) == len(rows)
    assert predictor.seen == len(GOOD)
    words = {"1": "entailment", "0": "contradiction"}
    for (image_id, text, label, *numbers, why), row, reason in zip(
        lines, rows, reasons, strict=True
    ):
        assert image_id == (row["Image_ID"] or "")
        assert text == row["Hypothesis"].strip().replace("\ud800", "\\ud800")
        assert why.startswith(reason)
        if reason:
            assert (label, *numbers) == ("", "", "")
            continue
        assert (label, why) == (words[row["Label"]], "")
        probability, confidence = map(float, numbers)
        assert probability > 0.5
        assert (probability >= 0.7) == (row["Label"] == "1")
        assert confidence == (probability if row["Label"] == "1" else 1 - probability)
    # Its own labels are measured, and named where they cannot be mistaken for predictions.
    assert "40 of 52 rows predicted at τ = 0.70 (14 entailment, 26 contradiction)" in done.stderr
    assert "40 labelled rows: accuracy 100.00 %" in done.stderr
    assert "tp 14, fp 0, fn 0, tn 26" in done.stderr
    assert "2 unreadable photo" in done.stderr


@pytest.mark.slow
def test_the_same_bits_with_and_without_keeping_features(
    own: trainer.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in BLOCKS:
        monkeypatch.setattr(trainer.results.unseen, name, value)
    rows, _ = mixed()
    path = rows_file(tmp_path / "rows.jsonl", rows)
    root = Path(own.config.store.root)

    def features() -> dict[str, bytes]:
        return files(root / "vit") | files(root / "text")

    before = features()

    def logits(rows: Path, cache: bool) -> np.ndarray:
        _, scores = score_rows(own.scorer, rows, photos, cache=cache)
        return scores.logits

    fresh = logits(path, False)
    assert features() == before
    # Some of it stored, which is used; then all of it.
    logits(rows_file(tmp_path / "some.jsonl", GOOD[:5]), True)
    partly = logits(path, False)
    kept = logits(path, True)
    assert features() != before
    stored = logits(path, False)
    assert len(kept) == len(GOOD)
    for found in (fresh, partly, stored):
        np.testing.assert_array_equal(found, kept)
    for cache in (True, False):
        _, shuffled = score_rows(own.scorer, path, photos, cache=cache, control="shuffled-images")
        # The same rows, each on another photo; that which cannot be read is shown to none.
        assert len(shuffled.logits) == len(kept)
        assert (shuffled.logits != kept).all()
        assert list(shuffled.unread) == ["broken"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_what_is_held_is_what_is_stored(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path, dtype: str
) -> None:
    config = tiny_config(tmp_path, tiny_vit, tiny_text, k_txt=2)
    project = Project(
        dataclasses.replace(config, store=dataclasses.replace(config.store, dtype=dtype))
    )
    for kind in ("vit", "text"):
        keys = project.keys(kind, "val")
        absent = Holder(project.plan(kind, "val", 2)).rows(keys)
        project.extract(kind, "val", 2, show=SILENT)
        there = Holder(project.plan(kind, "val", 2)).rows(keys)
        assert list(absent) == list(there) == keys
        for key in keys:
            for one, other in zip(absent[key].arrays, there[key].arrays, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_another_photo_of_a_known_id_counts_only_where_nothing_is_kept(
    own: trainer.Run, photos: Path
) -> None:
    frame = pd.DataFrame([("new0", "a dog")], columns=HEADER[:2])
    expected = own.predict(frame, photos, SILENT, cache=False)
    shutil.copy(photos / "new0.png", photos / "photo003.png")
    renamed = frame.assign(Image_ID="photo003")
    with pytest.raises(DataError, match=r"1 photo with the id of another.*--no-cache"):
        own.predict(renamed, photos, SILENT)
    found = own.predict(renamed, photos, SILENT, cache=False)
    assert_frame_equal(found.drop(columns="Image_ID"), expected.drop(columns="Image_ID"))


@pytest.mark.slow
def test_every_format_reads_back_as_the_table(
    own: trainer.Run, photos: Path, tmp_path: Path
) -> None:
    rows, _ = mixed()
    path = rows_file(tmp_path / "rows.jsonl", rows)
    expected = own.predict(path, photos, SILENT)
    assert list(expected.columns) == HEADER
    assert expected.attrs["metrics"]["rows"] == len(GOOD)
    common = ("--images", str(photos))
    printed = {}
    for form in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{form}"
        done = succeed(own, "--rows", str(path), *common, "--out", str(out), "--json")
        summary = json.loads(done.stdout)
        assert (summary["format"], summary["rows"]) == (form, len(rows))
        assert summary["metrics"] == expected.attrs["metrics"]
        args = ("--rows", "-", *common, "--format", form)
        printed[form] = succeed(own, *args, stdin=path.read_bytes()).stdout_bytes
        assert printed[form] == out.read_bytes()
    text = printed["jsonl"].decode()
    read = {
        "csv": pd.read_csv(io.BytesIO(printed["csv"]), keep_default_na=False),
        "jsonl": pd.DataFrame([json.loads(line) for line in text.splitlines()]),
        "parquet": pd.read_parquet(io.BytesIO(printed["parquet"])),
    }
    for form, found in read.items():
        for name in HEADER[3:5]:
            numbers = pd.to_numeric(found[name], errors="coerce")
            np.testing.assert_array_equal(numbers, expected[name])
        for name in ("Image_ID", "Hypothesis", "Label", "reason"):
            assert found[name].fillna("").tolist() == expected[name].fillna("").tolist(), (
                form,
                name,
            )


INDEPENDENT = [
    "A café at night.",
    "Two men — talking.",
    "a dog",
    "the man sits",
    "The cat’s asleep.",
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1"])
def test_the_independent_set_of_the_study(
    own: trainer.Run, photos: Path, tmp_path: Path, encoding: str
) -> None:
    texts = INDEPENDENT
    if encoding == "latin-1":
        # Bytes that cp1252 does not have.
        texts = [text.replace("—", "\x81").replace("’", "\x8d") for text in texts]
    pairs = [(f"new{i}.png", text) for i in range(10) for text in texts]
    path = tmp_path / "independent.csv"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["no.", "caption", "gold label", "source", "image"])
        writer.writerows([i, text, "Entailment", "x", name] for i, (name, text) in enumerate(pairs))
    if encoding != "latin-1":
        assert path.read_text(encoding).count("—") == 10
    # Accents in most lines: which of the western code pages it is cannot be told from the bytes.
    named = () if encoding.startswith("utf") else ("--encoding", encoding)
    done = succeed(own, "--rows", str(path), "--images", str(photos), "--no-cache", *named)
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(line["Image_ID"], line["Hypothesis"]) for line in lines] == pairs
    assert all(line["Label"] and not line["reason"] for line in lines)
    said = Counter(line["Label"] for line in lines)
    assert f"accuracy {share(said['entailment'] / 50, 2)}" in done.stderr


@pytest.mark.slow
def test_one_question_needs_no_store(own: trainer.Run, photos: Path) -> None:
    frame = pd.DataFrame([("new0", SENTENCES[3])], columns=HEADER[:2])
    expected = own.predict(frame, photos, SILENT).iloc[0]
    shutil.rmtree(own.config.store.root)
    args = ("--image", str(photos / "new0.png"), "--text", f" {SENTENCES[3]} ")
    found = json.loads(succeed(own, *args, "--json").stdout)
    assert found["label"] == expected["Label"]
    probability = expected["probability_entailment"]
    assert found["probability_entailment"] == pytest.approx(probability, abs=1e-5)
    assert found["probability_entailment"] == float(sigmoid(found["logit"]))
    assert found["threshold"] == own.metrics["threshold"]
    assert found["label"] in succeed(own, *args).stdout
    assert not Path(own.config.store.root).exists()
    for image, text, words in (
        (photos / "broken.jpg", "a dog", "broken.jpg: not a JPEG"),
        (photos / "none.jpg", "a dog", "none.jpg: cannot be read"),
        (photos / "new0.png", " ", "cannot be used: empty text"),
    ):
        done = command(own, "--image", str(image), "--text", text)
        assert (done.exit_code, done.stderr.count("\n"), words in done.stderr) == (1, 1, True)


def test_an_interrupt_leaves_the_features_and_no_file(
    own: trainer.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = rows_file(tmp_path / "rows.jsonl", GOOD), tmp_path / "out" / "found.csv"
    args = ("--rows", str(path), "--images", str(photos), "--out", str(out))

    class Interrupted:
        def predict(self, batch: Batch) -> np.ndarray:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "predictor", Interrupted())
        done = command(own, *args)
    assert (done.exit_code, done.stdout) == (130, "")
    assert list(out.parent.iterdir()) == []
    store = files(Path(own.config.store.root) / "vit")
    succeed(own, *args)
    assert list(out.parent.iterdir()) == [out]
    # What was extracted is used.
    assert files(Path(own.config.store.root) / "vit") == store


def test_a_run_without_the_picture_predicts_without_it(own: trainer.Run, photos: Path) -> None:
    text = own.config_path.read_text().replace('control = "none"', 'control = "hypothesis-only"')
    own.config_path.write_text(text)
    rows = [(f"new{i}", "a dog") for i in range(10)]
    found = own.predict(pd.DataFrame(rows, columns=HEADER[:2]), photos, SILENT)
    assert len(set(found["probability_entailment"])) == 1


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ((), 2, "give --rows FILE, or --image PHOTO and --text SENTENCE"),
        (("--rows", "x", "--image", "y"), 2, "give --rows FILE, or"),
        (("--image", "y"), 2, "give --rows FILE, or"),
        (("--rows", "x", "--json"), 2, "--out FILE"),
        (("--image", "y", "--text", "z", "--out", "f.csv"), 2, "--out: of --rows"),
        (("--image", "y", "--text", "z", "--format", "csv"), 2, "--format: of --rows"),
        (
            ("--image", "y", "--text", "z", "--images", "f", "--encoding", "gbk"),
            2,
            "--images, --en",
        ),
        (("--image", "y", "--text", "z", "--no-cache"), 2, "--cache/--no-cache: of --rows"),
        (("--rows", "x", "--out", "y.txt"), 2, "expected a name that ends in .csv"),
        (("--rows", "x", "--out", "y.csv"), 1, "x: no such file"),
        (("--rows", "-"), 1, "stdin: has no rows: the file is empty"),
    ],
)
def test_what_is_wrong_is_one_line(
    own: trainer.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = command(own, *args, stdin=b"")
    assert not list(Path().iterdir())
    # Never a prediction; with --json the error is an object.
    assert (done.exit_code, bool(done.stdout)) == (code, "--json" in args)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_parquet_without_pyarrow_is_said_before_the_work(
    own: trainer.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = command(own, "--rows", "-", "--format", "parquet", stdin=b"not read")
    assert done.exit_code == 1
    assert "pip install 'featstore[parquet]'" in done.stderr


@pytest.mark.slow
def test_rows_of_a_caption_set_in_another_encoding(
    own: trainer.Run, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    lines = [f"new{i}.png#{i},一个男人 {i},{i % 2}" for i in range(3)]
    path.write_bytes("\n".join(["image,caption,label", *lines, "NEW3.png#0,x,1"]).encode("gbk"))
    given = ("--rows", str(path), "--images", str(photos), "--no-cache")
    done = command(own, *given)
    assert done.exit_code == 1
    assert "'new0.png#0,一个男人 0,0' as gb18030, or" in done.stderr
    done = succeed(own, *given, "--encoding", "gbk")
    said = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["Image_ID"] for row in said] == [
        *(f"new{i}.png#{i}" for i in range(3)),
        "NEW3.png#0",
    ]
    assert [row["Hypothesis"] for row in said[:3]] == [f"一个男人 {i}" for i in range(3)]
    assert said[3]["reason"] == "no photo: 'new3.png' is there, in another case"
    assert "no photo for 'NEW3.png#0' of line 5: 'new3.png' is there" in done.stderr
    found = own.evaluate(rows=path, images=photos, encoding="gbk", cache=False, show=SILENT)
    assert (found["rows"], found["rows_left_out"]) == (3, {"no photo": 1})
    assert found["rows_notes"] == [
        "no photo for 'NEW3.png#0' of line 5: 'new3.png' is there, in another case"
    ]
    shutil.copytree(own.folder, own.folder.parent / "second")
    with pytest.raises(RowError, match="its encoding is in doubt"):
        own.compare("second", rows=path, images=photos, show=SILENT)
    assert own.compare("second", rows=path, images=photos, encoding="gbk", show=SILENT)["rows"] == 3


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_the_encoding_is_of_rows(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "absent", "--encoding", "gbk"])
    assert done.exit_code == 2
    assert "belong to --rows" in done.stderr


# --- labels that are not needed ---------------------------------------------------------


def test_a_label_is_read_where_it_is_one(tmp_path: Path) -> None:
    given = ["entailment", 0, "1", None, "", "neutral", "maybe", 0.5]
    rows = [{"Image_ID": str(i), "Hypothesis": "h", "Label": x} for i, x in enumerate(given)]
    path = rows_file(tmp_path / "rows.jsonl", rows)
    frame = pd.DataFrame(rows)
    for found in (read_examples(path, labelled=False), read_frame(frame)):
        assert found.examples.labels.tolist() == [1, 0, 1, *[UNLABELLED] * 5]
        reasons = [(issue.kind, issue.image_id, issue.reason) for issue in found.issues]
        assert reasons == [
            ("kept", "5", "neutral"),
            ("kept", "6", "unknown label"),
            ("kept", "7", "unknown label"),
        ]
    twice = frame.assign(gold_label="entailment")
    assert set(read_frame(twice).examples.labels) == {UNLABELLED}
    assert set(read_frame(frame.drop(columns="Label")).examples.labels) == {UNLABELLED}


def test_class_ids_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image_id,hypothesis,label\n1,a,0\n2,b,entailment\n3,c,2\n4,d,1\n")
    found = read_examples(path, labelled=False)
    assert found.examples.labels.tolist() == [UNLABELLED, 1, UNLABELLED, UNLABELLED]
    assert Counter(issue.reason for issue in found.issues) == {CLASS_IDS: 2, "unknown label": 1}


def test_both_labels_of_one_pair_beside_an_unlabelled_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("image_id,hypothesis,label\n1,a,\n1,a,1\n1,a,\n1,a,0\n2,b,\n2,b,1\n")
    found = read_examples(path, labelled=False, duplicates="keep")
    assert found.examples.labels.tolist() == [-1, 1, -1, 0, -1, 1]
    assert [(issue.line, issue.reason) for issue in found.issues] == [(3, CONFLICT), (5, CONFLICT)]


# --- blocks -----------------------------------------------------------------------------


@given(
    ids=st.lists(st.sampled_from("abcdefgh"), max_size=60),
    photos=st.integers(1, 4),
    rows=st.integers(1, 9),
)
def test_blocks_hold_every_row_once(ids: list[str], photos: int, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.results.unseen, "BLOCK_PHOTOS", photos)
        patch.setattr(trainer.results.unseen, "BLOCK_ROWS", rows)
        blocks = blocks_of(np.array(ids, dtype=object))
    assert sorted(row for block in blocks for row in block.tolist()) == list(range(len(ids)))
    counts = Counter(ids)
    for block in blocks:
        assert len(block) <= rows
        assert (np.diff(block) > 0).all()
        inside = Counter(ids[row] for row in block)
        assert len(inside) <= photos
        cut = [image_id for image_id in inside if inside[image_id] < counts[image_id]]
        assert all(counts[image_id] > rows for image_id in cut)
