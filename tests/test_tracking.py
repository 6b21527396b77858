"""Who is told what a run does: MLflow on its own server, the others' files; failures."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import prepared, tiny_config

import trainer
import trainer.api
from featstore.errors import ConfigError, StoppedError, UsageError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.publish import read_json
from trainer.config import Config, TrackConfig, load_config
from trainer.run import tracking
from trainer.run.training import Reporter


@pytest.fixture(scope="module")
def config(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    found = tiny_config(tmp_path_factory.mktemp("tracked"), tiny_vit, tiny_text, epochs=3)
    prepared(found)
    return found


def to(config: Config, *names: str, project: str = "tiny") -> Project:
    return Project(dataclasses.replace(config, track=TrackConfig(names, project)))


def train(project: Project, runs: Path, name: str = "first", **options: Any) -> Any:
    return trainer.train(project, name=name, runs=runs, show=SILENT, **options)


class Told:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    told: list[Any]
    fails: str

    def __init__(self, project: str, name: str, group: str, params: Any, folder: Path) -> None:
        self.told.append(("made", project, name, group, dict(params)))

    def _tell(self, what: str, *values: Any) -> None:
        if what == self.fails:
            raise OSError("the server is gone\nand more")
        self.told.append((what, *values))

    def begin(self, known: str | None) -> str:
        self._tell("begin", known)
        return "a-name"

    def epoch(self, number: int, figures: Any) -> None:
        print("printed by the tracker")
        self._tell("epoch", number, dict(figures))

    def end(self, status: str, best: Any, files: Any) -> None:
        self._tell("end", status, dict(best), [file.name for file in files])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    monkeypatch.setattr(Told, "told", [], raising=False)
    monkeypatch.setattr(Told, "fails", "", raising=False)
    monkeypatch.setitem(tracking.MAKERS, "mlflow", Told)
    monkeypatch.setattr(tracking, "check_trackers", lambda track: None)
    monkeypatch.setattr("trainer.api.check_trackers", lambda track: None)
    return Told


def test_a_run_that_goes_on_is_the_same_run_there(
    config: Config, told: type[Told], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = itertools.count(1)
    stopping = Reporter(stopping=lambda: next(asked) >= 12)
    with pytest.raises(StoppedError):
        train(to(config, "mlflow"), tmp_path, reporter=stopping)
    assert [line[0] for line in told.told] == ["made", "begin", "epoch", "end"]
    assert told.told[0][1:4] == ("tiny", "first", "")
    assert told.told[0][4]["lr"] == config.train.lr
    assert told.told[1] == ("begin", None)
    assert told.told[3][1] == "stopped"
    run = train(to(config, "mlflow"), tmp_path)
    assert told.told[5] == ("begin", "a-name")
    epochs = [line for line in told.told if line[0] == "epoch"]
    assert [line[1] for line in epochs] == [1, 2, 3]
    assert [line[2]["val_loss"] for line in epochs] == run.history["val_loss"].tolist()
    what, status, best, files = told.told[-1]
    assert (what, status) == ("end", "finished")
    assert best["best_val_loss"] == run.history["val_loss"].min()
    assert {"config.toml", "manifest.json", "metrics.json", "history.csv", "curves.png"} == {*files}
    assert not run.tensorboard_path.exists()
    captured = capsys.readouterr()
    assert "printed by the tracker" not in captured.out
    assert "printed by the tracker" in captured.err
    # One that was told nothing of the last epochs hears of them when it is told again.
    (tmp_path / "first" / "tracking.json").write_text('{"mlflow": {"id": "a-name", "epoch": 1}}')
    told.told.clear()
    train(to(config, "mlflow"), tmp_path, epochs=4, keep_state=True, name="first-again")
    assert [line[1] for line in told.told if line[0] == "epoch"] == [1, 2, 3, 4]


@pytest.mark.parametrize("fails", ["begin", "epoch", "end"])
def test_a_run_goes_on_without_one_who_fails(
    config: Config, told: type[Told], tmp_path: Path, fails: str
) -> None:
    told.fails = fails
    notes: list[str] = []
    reporter = Reporter()
    reporter.note = notes.append  # type: ignore[method-assign]
    run = train(to(config, "tensorboard", "mlflow"), tmp_path, reporter=reporter)
    assert run.manifest["status"] == "finished"
    (line,) = (note for note in notes if "mlflow" in note)
    assert line == "first: mlflow is told no more (the server is gone); the run goes on"
    assert len(list(run.tensorboard_path.iterdir())) == 1
    assert sum(said[0] == "epoch" for said in told.told) == (3 if fails == "end" else 0)


def test_what_is_not_installed_is_said_before_anything_is_done(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name)
    )
    for start in (train, lambda *given: trainer.search(given[0], name="s", runs=given[1])):
        with pytest.raises(UsageError, match=r"wandb is not installed; `pip install"):
            start(to(config, "wandb"), tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*"))
    file = tmp_path / "featstore.toml"
    file.write_text('[track]\nto = ["mlfow"]\n')
    with pytest.raises(ConfigError, match=r"found 'mlfow' \(did you mean 'mlflow'\?\)"):
        load_config(file)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty MLflow server of this test's own."""
    pytest.importorskip("flask", reason="MLflow's server is not installed")
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    kept = ("--backend-store-uri", f"sqlite:///{folder}/db.sqlite")
    files = ("--artifacts-destination", str(folder / "artifacts"))
    command = [sys.executable, "-m", "mlflow", "server", *options, *kept, *files]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_mlflow_has_the_run_and_a_searchs_trials(
    config: Config, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    from mlflow.tracking import MlflowClient

    run = train(to(config, "mlflow"), tmp_path)
    space = {"search": {"sampler": "grid"}, "train": {"lr": {"choice": [0.01, 0.001]}}}
    trainer.search(to(config, "mlflow"), space, name="grid", runs=tmp_path, epochs=1, show=SILENT)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tiny").experiment_id
    found = {one.info.run_name: one for one in client.search_runs([experiment])}
    assert found.keys() == {"first", "trial-0000", "trial-0001"}
    assert {one.info.status for one in found.values()} == {"FINISHED"}
    assert [found[name].data.tags.get("search") for name in sorted(found)] == [None, "grid", "grid"]
    rates = {found[name].data.params["lr"] for name in ("trial-0000", "trial-0001")}
    assert rates == {"0.01", "0.001"}
    first = found["first"]
    assert first.info.run_id == read_json(run.folder / "tracking.json")["mlflow"]["id"]
    history = client.get_metric_history(first.info.run_id, "val_loss")
    assert [point.value for point in history] == run.history["val_loss"].tolist()
    assert [point.step for point in history] == [1, 2, 3]
    files = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert {"config.toml", "manifest.json", "metrics.json", "history.csv", "curves.png"} == files


@pytest.mark.slow
def test_wandb_keeps_a_run_in_its_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(to(config, "wandb"), tmp_path)
    assert read_json(run.folder / "tracking.json")["wandb"]["epoch"] == 3
    assert list((run.folder / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_trackio_keeps_a_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackio = pytest.importorskip("trackio")
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "trackio")
    run = train(to(config, "trackio"), tmp_path)
    assert read_json(run.folder / "tracking.json")["trackio"] == {"id": "first", "epoch": 3}
