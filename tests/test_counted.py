"""What is not read is not counted as read: photos in quarantine, cut sentences, replaced photos."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import SENTENCES, tiny_config

import trainer
from featstore.care.info import describe_store
from featstore.care.sources import extract_again
from featstore.care.verify import verify_store
from featstore.encoders import tokens
from featstore.errors import Advice, Command, StaleFeaturesError
from featstore.extract import lengths
from featstore.extract.lengths import LENGTHS, count_cut, find_cut
from featstore.progress import SILENT, Show
from featstore.project import Project
from trainer.config import Config
from trainer.run.shown import threshold_line

# Start and end, and one token a word: 4, 5, 7 and 15.
TOKENS = {text: len(text.split()) + 2 for text in SENTENCES}
LIMIT = 7
CUT = [text for text, tokens in TOKENS.items() if tokens > LIMIT]


@dataclasses.dataclass
class Trained:
    """A run with one photo of train and one of val in quarantine, and the lines that it showed."""

    config: Config
    run: trainer.Run
    lines: list[str]

    @property
    def images(self) -> Path:
        return Path(self.config.data.images)

    def project(self) -> Project:
        return Project(self.config)

    def stored(self, kind: str) -> dict[str, Any]:
        """Return what `store info` says of the features of a kind."""
        features = describe_store(self.project())["features"]
        return next(entry for entry in features if entry["kind"] == kind)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Trained:
    folder = tmp_path_factory.mktemp("counted")
    config = tiny_config(folder, tiny_vit, tiny_text, epochs=1)
    encoders = dataclasses.replace(config.encoders, sequence_length=LIMIT)
    config = dataclasses.replace(config, encoders=encoders)
    splits = json.loads(Path(config.data.split_file).read_text())
    for split in ("train", "val"):
        (Path(config.data.images) / f"{splits[split][0]}.png").write_bytes(b"no photo")
    project = Project(config)
    project.extract("vit", show=SILENT)
    lines: list[str] = []
    show = Show(note=lines.append)
    settings = {f.name: getattr(config.train, f.name) for f in dataclasses.fields(config.train)}
    run = trainer.train(project, name="a", runs=folder / "runs", show=show, **settings)
    return Trained(config, run, lines)


def test_the_rows_that_are_read_are_counted_and_those_that_are_not(work: Trained) -> None:
    counts = work.run.manifest["data"]["counts"]
    assert counts["train"] == {
        "rows": 124,
        "images": 31,
        "entailment": 64,
        "contradiction": 60,
        "rows_of_split": 128,
        "rows_left_out": {"photo in quarantine": 4},
        "rows_cut": 31,
    }
    assert (counts["val"]["rows"], counts["val"]["rows_of_split"]) == (44, 48)
    # Not read: its photos may not even be extracted.
    assert counts["test"] == {"rows": 48, "images": 12, "entailment": 24, "contradiction": 24}
    assert work.run.metrics["rows"] == 44
    (line,) = [line for line in work.lines if line.startswith("rows:")]
    assert line == (
        "rows: train 124 of 128 (4 left out: photo in quarantine),"
        " val 44 of 48 (4 left out: photo in quarantine)"
    )


def test_cut_sentences_are_counted_and_named(work: Trained) -> None:
    assert [len(CUT), min(TOKENS.values())] == [1, 4]
    assert LIMIT in TOKENS.values(), "one sentence just fits"
    (line,) = [line for line in work.lines if "cut at" in line]
    assert line.startswith("warning: 1 of 4 sentences (25.0 %) is cut at sequence_length 7;")
    found = work.run.manifest["data"]["cut_sentences"]
    assert found["longest"] == {CUT[0]: TOKENS[CUT[0]]}
    assert json.loads(Path(found["file"]).read_text())["tokens"].keys() == {
        text for text, tokens in TOKENS.items() if tokens >= LIMIT
    }
    entry = work.stored("text")
    assert (entry["cut"]["cut"], entry["cut"]["uncounted"]) == (1, 0)
    assert entry["cut"]["file"] == found["file"]


def test_sentences_are_counted_once_and_again_where_the_list_is_damaged(
    work: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, preset = work.project().sentences(), work.config.encoders.text
    path = opened.folder / LENGTHS
    whole = path.read_bytes()
    counted: list[str] = []

    def counting(preset: object, sentences: list[str]) -> list[int]:
        counted.extend(sentences)
        return tokens.token_counts(preset, sentences)  # type: ignore[arg-type]

    monkeypatch.setattr(lengths, "token_counts", counting)
    assert list(count_cut(opened, SENTENCES, preset).tokens) == CUT
    assert counted == []
    for damaged in (None, whole[:-40], whole.replace(b"15", b"16"), b"[]", b'{"tokens": 3}'):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        assert find_cut(opened, SENTENCES).uncounted == 2
        counted.clear()
        assert count_cut(opened, SENTENCES, preset).tokens == {CUT[0]: TOKENS[CUT[0]]}
        assert len(counted) == 2
        assert path.read_bytes() == whole


def test_few_rows_of_val_say_how_sure_the_threshold_is(work: Trained) -> None:
    metrics = work.run.metrics
    interval = metrics["threshold_interval"]
    assert 0 < interval["low"] <= metrics["threshold"] <= interval["high"] < 1
    assert work.lines[-1] == threshold_line(metrics)
    assert f"{interval['low']:.2f}–{interval['high']:.2f}" in work.lines[-1]
    assert "44 val rows" in work.lines[-1]
    del metrics["threshold_interval"]
    assert threshold_line(metrics) == ""
    record = work.run.history.iloc[metrics["epoch"] - 1]
    assert record["val_accuracy_at_half"] == pytest.approx(metrics["at_half"]["accuracy"])
    assert record["val_macro_f1_at_half"] == pytest.approx(metrics["at_half"]["macro_f1"])


def test_a_replaced_photo_stops_whatever_reads_its_features(work: Trained, tmp_path: Path) -> None:
    splits = json.loads(Path(work.config.data.split_file).read_text())
    project, run = work.project(), trainer.load_run(work.run.folder)
    assert len(project.usable("train")[0]) == 124
    assert run.evaluate("train", show=SILENT)["rows"] == 124
    replaced, other = (work.images / f"{splits['train'][i]}.png" for i in (5, 6))
    whole = replaced.read_bytes()
    try:
        shutil.copy(other, replaced)
        says = f"1 photo of split 'train' changed .*'{replaced.stem}'.*extract-vit --split train"
        for reads in (
            lambda: trainer.train(project, name="b", runs=tmp_path, show=SILENT, k_txt=0),
            lambda: run.evaluate("train", show=SILENT),
            lambda: work.project().features("train"),
        ):
            with pytest.raises(StaleFeaturesError, match=says):
                reads()
        assert not (tmp_path / "b").exists()
        assert run.evaluate("val", show=SILENT)["rows"] == 44
    finally:
        replaced.write_bytes(whole)
    # The same bytes with other times.
    assert run.evaluate("train", show=SILENT)["rows"] == 124


def test_what_mends_a_changed_photo_names_the_settings_of_its_folder(
    work: Trained, tiny_vit: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(work.config.store.root, tmp_path / "cache")
    images = shutil.copytree(work.images, tmp_path / "images")
    config = dataclasses.replace(
        work.config,
        data=dataclasses.replace(work.config.data, images=str(images)),
        store=dataclasses.replace(work.config.store, root=str(root)),
    )
    halves = dataclasses.replace(config.store, dtype="float16", tokens="all")
    own, other = Project(config), Project(dataclasses.replace(config, store=halves))
    other.extract("vit", "test", show=SILENT)
    folder = other.vision_spec.folder(other.root)
    photo = images / f"{other.keys('vit', 'test')[0]}.png"
    photo.write_bytes((images / f"{other.keys('vit', 'test')[1]}.png").read_bytes())
    mends = {
        report.folder: problem.mend
        for report in verify_store(own, ("vit",), photos=True)
        for problem in report.problems
    }
    assert mends == {
        own.vision_spec.folder(own.root): Command("extract-vit"),
        folder: Command("extract-vit", dtype="float16", tokens="all"),
    }
    # As typed, they mend.
    Project(other.config).extract("vit", "test", show=SILENT)
    own.extract("vit", show=SILENT)
    assert not any(report.problems for report in verify_store(own, ("vit",), photos=True))
    # Another encoder is named by what it was called; one that is gone is not.
    moved = shutil.copytree(tiny_vit, tmp_path / "vit")
    named = dataclasses.replace(
        config, encoders=dataclasses.replace(config.encoders, vit=str(tmp_path / "absent"))
    )
    found = extract_again(Project(named), folder)
    assert found == Command("extract-vit", vit=str(tiny_vit), dtype="float16", tokens="all")
    spec = json.loads((folder / "spec.json").read_text())
    spec["names"] = {"preset": str(moved)}
    (folder / "spec.json").write_text(json.dumps(spec))
    shutil.rmtree(moved)
    found = extract_again(Project(named), folder)
    assert isinstance(found, Advice)
    assert str(moved) in str(found)
