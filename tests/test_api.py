"""`import trainer`: what a notebook calls, that it is what the commands do, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import matplotlib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pandas.testing import assert_frame_equal
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, tiny_config

import featstore.extract.photos
import trainer
import trainer.results.unseen
import trainer.tuning.drive
from featstore import Project
from featstore.errors import ConfigError, DataError, RunError
from featstore.progress import SILENT
from featstore.quantities import share
from trainer.commands.main import cli
from trainer.config import Config, TrainConfig, config_of, render_config
from trainer.metrics import evaluate_logits
from trainer.run.training import Reporter
from trainer.tuning.workers import Watched

QUIET: dict[str, Any] = {"show": SILENT, "reporter": Reporter()}
TIMES = ["seconds", "val_seconds", "wait_share"]


@dataclasses.dataclass
class Place:
    """A settings file over extracted features, a project of it, and a run that learned the rule."""

    folder: Path
    config: Config
    file: Path
    project: Project
    run: trainer.Run

    @property
    def runs(self) -> Path:
        return self.folder / "runs"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Place:
    folder = tmp_path_factory.mktemp("api")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, epochs=4)
    file = folder / "featstore.toml"
    file.write_text(render_config(config))
    project = Project.load(file)
    project.extract("vit", show=SILENT)
    run = trainer.train(project, name="first", runs=folder / "runs", **QUIET)
    return Place(folder, config, file, project, run)


def history(run: trainer.Run) -> pd.DataFrame:
    return run.history.drop(columns=TIMES)


def test_training_is_what_the_command_does(place: Place) -> None:
    # The [train] section of the project's file is in force.
    assert place.run.config == place.config
    args = ("train", "--config", str(place.file), "--runs", str(place.runs), "--name", "typed")
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.stderr
    typed = trainer.load_run("typed", place.runs)
    assert typed.metrics_path.read_bytes() == place.run.metrics_path.read_bytes()
    assert_frame_equal(history(typed), history(place.run))


def test_settings_by_name_win(place: Place) -> None:
    run = trainer.train(
        place.project, name="other", runs=place.runs, epochs=1, lr=1e-3, seed=7, **QUIET
    )
    train = dataclasses.replace(place.config.train, epochs=1, lr=1e-3, seed=7)
    assert run.config == dataclasses.replace(place.config, train=train)
    assert len(run.history) == 1


def test_a_project_without_a_file_trains_with_the_defaults(place: Place, tmp_path: Path) -> None:
    project = Project(place.project.config)
    given = {"k_txt": 0, "head_dim": 4, "num_heads": 2, "mlp_dim": 8, "epochs": 1}
    run = trainer.train(project, runs=tmp_path, **given, **QUIET)
    assert run.config.train == trainer.TrainConfig(**given)
    assert run.name.startswith("k0-")


def test_a_project_of_settings_alone_trains_on_what_they_name(place: Place, tmp_path: Path) -> None:
    data, encoders, store = place.config.data, place.config.encoders, place.config.store
    named = {"rows": data.rows, "images": data.images, **vars(encoders), "root": store.root}
    project = Project(**named, dtype="float32")
    config = config_of(project, lr=1e-3)
    assert (config.data, config.encoders, config.store) == (
        project.config.data,
        project.config.encoders,
        project.config.store,
    )
    assert config.train == dataclasses.replace(TrainConfig(), lr=1e-3)


def test_an_unknown_setting_is_named_with_the_nearest(place: Place, tmp_path: Path) -> None:
    for call in (trainer.train, trainer.search):
        with pytest.raises(ConfigError, match=r"'epoch'.*did you mean 'epochs'"):
            call(place.project, runs=tmp_path, epoch=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_run_tells(place: Place) -> None:
    run, metrics = place.run, place.run.metrics
    assert metrics == json.loads(run.metrics_path.read_text())
    assert run.history["epoch"].tolist() == [1, 2, 3, 4]
    assert run.history["val_loss"].min() == pytest.approx(metrics["loss"])
    assert isinstance(run.model, keras.Model)
    rows = run.scorer.rows("val")
    logits = np.asarray(run.model(rows.batch(np.arange(len(rows)), len(rows)).inputs()))[:, 0]
    assert evaluate_logits(rows.labels, logits)["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    found = run.evaluate("test", show=SILENT)
    written = json.loads((run.folder / "evaluate-test.json").read_text())
    assert {key: written[key] for key in found} == found
    assert found == trainer.evaluate(run, "test", show=SILENT)
    parity = run.parity("test", 8, show=SILENT)
    assert (parity["failure"], parity["rows"]) == (None, 8)
    at = metrics["at_threshold"]
    assert repr(run) == (
        f"<Run {str(run.folder)!r}: finished, epoch {metrics['epoch']}: val accuracy"
        f" {share(at['accuracy'], 2)}, macro-F1 {share(at['macro_f1'], 2)}>"
    )
    assert "nothing there yet" in repr(trainer.Run(place.runs / "none"))


def test_a_run_is_loaded_by_its_name_or_its_folder(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_name, by_folder = trainer.load_run("first", place.runs), trainer.load_run(place.run.folder)
    monkeypatch.chdir(place.folder)
    by_default = trainer.load_run("first")
    for run in (by_name, by_folder, by_default):
        assert run.metrics == place.run.metrics
        assert run.project.dataset.examples.digest() == place.project.dataset.examples.digest()
    with pytest.raises(RunError, match=r"frist: no such run .*first"):
        trainer.load_run("frist", place.runs)


@pytest.mark.slow
def test_a_run_without_the_picture_is_measured_without_it(place: Place) -> None:
    run = trainer.train(
        place.project, name="blind", runs=place.runs, control="hypothesis-only", **QUIET
    )
    found = run.evaluate("test", show=SILENT)
    assert found["control"] == "hypothesis-only"
    # Each sentence is right for half its photos.
    assert found["at_threshold"]["accuracy"] == 0.5
    assert run.evaluate("test", "none", show=SILENT)["control"] == "none"


# --- predictions ------------------------------------------------------------------------


@pytest.fixture
def own(place: Place, tmp_path: Path) -> trainer.Run:
    """The run and its store, for one test."""
    folder = Path(shutil.copytree(place.folder, tmp_path / "own"))
    run = trainer.load_run(folder / "runs" / "first")
    run.config_path.write_text(
        run.config_path.read_text().replace(str(place.folder), str(folder)), encoding="utf-8"
    )
    return run


@pytest.fixture
def photos(place: Place, tmp_path: Path) -> Path:
    """Photos that the run has not seen: red, blue, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    images = Path(place.config.data.images)
    for name, number in (("blue", 0), ("red", 1)):
        shutil.copy(images / f"photo{number:03d}.png", folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


ROWS = [
    ("red", "a dog"),
    ("nobody", "a dog"),
    ("blue", "a dog"),
    ("broken", "a dog"),
    ("red", ""),
    ("red", "a dog"),
    ("blue", "the cat in the park"),
    ("red", "the man sits"),
]
REASONS = {1: "no photo", 3: "broken.jpg", 4: "empty text"}


def frame_of(rows: list[tuple[str, str]], **more: Any) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["Image_ID", "Hypothesis"])
    return frame.assign(**more)


def kept_files(run: trainer.Run) -> dict[Path, bytes]:
    """Splits and reports of a run's store, and the run's own files."""
    root = Path(run.config.store.root)
    folders = (root / "splits", root / "reports", run.folder)
    return {path: path.read_bytes() for f in folders for path in f.rglob("*") if path.is_file()}


def test_rows_are_predicted_in_their_order_and_nothing_else_is_kept(
    own: trainer.Run, photos: Path
) -> None:
    before = kept_files(own)
    # A label that is there decides nothing.
    found = own.predict(frame_of(ROWS, Label="contradiction"), images=photos, show=SILENT)
    assert list(zip(found["Image_ID"], found["Hypothesis"], strict=True)) == ROWS
    for i, (image_id, _) in enumerate(ROWS):
        line = found.iloc[i]
        if i in REASONS:
            assert REASONS[i] in line["reason"]
            assert pd.isna(line["Label"])
            assert np.isnan([line["probability_entailment"], line["confidence"]]).all()
        else:
            # The rule that the run learned.
            assert line["Label"] == ("entailment" if image_id == "red" else "contradiction")
            assert line["reason"] == ""
    assert found.iloc[0].equals(found.iloc[5])
    assert kept_files(own) == before


def test_labels_are_the_logits_side_of_the_threshold(
    own: trainer.Run, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.metrics_path.write_text(json.dumps({**own.metrics, "threshold": 0.7}))
    cut = np.log(0.7 / 0.3)
    # By image and sentence, so that a row that got another's would show.
    logits = {
        ("red", "a dog"): cut - 0.01,
        ("blue", "a dog"): cut + 0.01,
        ("blue", "the cat in the park"): -4.0,
        ("red", "the man sits"): 4.0,
    }
    kept = [row for i, row in enumerate(ROWS) if i not in REASONS]

    def by_hand(predictor: Any, rows: Any, batch_size: int) -> np.ndarray:
        return np.array([[logits[row] for row in kept]], np.float32)

    monkeypatch.setattr(trainer.results.unseen, "predict_logits", by_hand)
    found = own.predict(frame_of(ROWS), images=photos, show=SILENT)
    found = found[found["reason"] == ""]
    expected = np.array([1 / (1 + np.exp(-logits[row])) for row in kept])
    np.testing.assert_allclose(found["probability_entailment"], expected, rtol=1e-5)
    # 0.7 is the threshold: more than a half may still be contradiction.
    labels = ["contradiction", "entailment", "contradiction", "contradiction", "entailment"]
    assert found["Label"].tolist() == labels
    confidence = np.where(found["Label"] == "entailment", expected, 1 - expected)
    np.testing.assert_allclose(found["confidence"], confidence, rtol=1e-5)


@pytest.mark.slow
def test_a_file_is_predicted_as_the_table(own: trainer.Run, photos: Path, tmp_path: Path) -> None:
    frame = frame_of(ROWS)
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    frame.to_json(lines, orient="records", lines=True)
    frame.to_csv(table, index=False)
    found = own.predict(frame, images=photos, show=SILENT)
    assert_frame_equal(own.predict(lines, images=photos, show=SILENT), found)
    assert_frame_equal(trainer.predict(own, table, images=photos, show=SILENT), found)
    # Without a folder, the run's own photos.
    ids = [f"photo{i:03d}" for i in range(sum(IMAGES_OF_SPLIT.values()))][-12:]
    rows = [(image_id, SENTENCES[0]) for image_id in ids]
    own_photos = own.predict(frame_of(rows), show=SILENT)
    assert own_photos["Label"].tolist() == ["contradiction", "entailment"] * 6


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("nobody", "a dog"), "its row has no photo in .*photos: the image id 'nobody'"),
        (("broken", "a dog"), "no row whose photo could be read$"),
        (("red", ""), "no usable row"),
    ],
)
def test_rows_of_which_none_can_be_used_are_one_line(
    own: trainer.Run, photos: Path, row: tuple[str, str], words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        own.predict(frame_of([row]), images=photos, show=SILENT)
    assert "\n" not in str(caught.value)


def test_another_photo_of_a_known_id_is_refused(own: trainer.Run, photos: Path) -> None:
    before = own.evaluate("test", show=SILENT)
    (photos / "red.png").rename(photos / "photo044.png")
    with pytest.raises(DataError, match="1 photo with the id of another"):
        own.predict(frame_of([("photo044", "a dog")]), images=photos, show=SILENT)
    assert trainer.load_run(own.folder).evaluate("test", show=SILENT) == before


# --- what is left as it was ---------------------------------------------------------------


def global_state() -> list[Any]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    return [matplotlib.get_backend(), list(warnings.filters), handlers, sys.stderr, sys.stdout]


@pytest.fixture
def svg() -> Iterator[None]:
    earlier = matplotlib.get_backend()
    matplotlib.use("svg")
    yield
    matplotlib.use(earlier)


@pytest.mark.slow
@pytest.mark.usefixtures("svg")
def test_nothing_global_is_changed(
    own: trainer.Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = global_state(), []
    reporter = Reporter(epoch=lambda record: during.append(global_state()))
    project = Project(own.config)
    project.extract("vit")
    run = trainer.train(project, runs=tmp_path / "runs", epochs=2, reporter=reporter)
    assert run.curves_path.exists()
    assert during == [before] * 2
    run.evaluate("val")
    run.predict(frame_of(ROWS), images=photos)
    run.parity("val", 4)
    assert global_state() == before
    monkeypatch.setattr(trainer.tuning.drive, "run_workers", lambda *args: Watched())
    trainer.search(project, SPACE, name="search", runs=tmp_path / "runs", trials=1)
    assert global_state() == before


# --- searches -----------------------------------------------------------------------------

SPACE = {"train": {"lr": {"log_uniform": [1e-3, 1e-2]}, "epochs": 1}}


@pytest.mark.slow
def test_a_search_and_going_on_by_its_name(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"name": "lr", "runs": place.runs, "show": SILENT}
    found = trainer.search(place.project, SPACE, trials=3, metric="val_loss", seed=2, **given)
    assert isinstance(found, trainer.SearchResults)
    assert set(found.trials["state"]) == {"complete"}
    assert len(found.trials) == found.trials["lr"].nunique() == 3
    # The best first; a fixed setting is every trial's.
    assert found.trials["value"].is_monotonic_increasing
    best = found.best_run
    assert isinstance(best, trainer.Run)
    assert best.name == found.trials["run"][0]
    assert best.config.train.seed == 2
    assert best.metrics["loss"] == pytest.approx(found.trials["value"][0])
    assert repr(found).startswith(f"<Search {str(place.runs / 'lr')!r}: 3 of 3 trials, best val_")
    lr = found.trials.set_index("trial")["lr"].sort_index()
    with monkeypatch.context() as patch:
        # As in a notebook or at a prompt.
        patch.setattr(sys, "argv", [""])
        more = trainer.search(None, trials=4, **given)
    last = trainer.load_run(found.folder / "trial-0003")
    assert last.manifest["command"].startswith("trainer.search(None, name='lr', runs=")
    assert len(more.trials) == 4
    assert more.trials.set_index("trial")["lr"].sort_index()[:3].tolist() == lr.tolist()
    again = trainer.load_search("lr", place.runs)
    assert_frame_equal(again.trials, more.trials)
    assert again.retrain(1, 2, "val", Reporter())["accuracy"]["deviation"] >= 0


@pytest.mark.slow
def test_a_search_reads_each_photo_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for k_txt in range(5):
        place.project.extract("text", k_txt=k_txt, show=SILENT)
    read: list[Path] = []
    # Nothing is known of the photos but what the store has.
    shutil.rmtree(place.project.root / "photo-digests")
    whole = featstore.extract.photos.read_bytes

    def counted(path: Any) -> bytes:
        read.append(Path(path))
        return whole(path)

    monkeypatch.setattr(featstore.extract.photos, "read_bytes", counted)
    monkeypatch.setattr(trainer.tuning.drive, "run_workers", lambda *args: Watched())
    space = {"train": {"k_txt": {"choice": [0, 1, 2, 3, 4]}, "epochs": 1}}
    found = trainer.search(
        Project.load(place.file), space, name="layers", runs=place.runs, show=SILENT
    )
    # Those of the train and val splits.
    assert len(read) == len(set(read)) == IMAGES_OF_SPLIT["train"] + IMAGES_OF_SPLIT["val"]
    assert found.best is None
    with pytest.raises(RunError, match="no trial is complete yet"):
        _ = found.best_run
