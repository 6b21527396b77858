"""Searches in one process: what is drawn, pruned, failed, stopped and gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pandas as pd
import pytest
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny_runs import tiny_config

import trainer
import trainer.run.fit
from featstore.config import usable_cores
from featstore.encoders import framework
from featstore.errors import ConfigError, RunError, StoppedError, UsageError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.settings import complete
from trainer.commands.main import cli
from trainer.run.checkpoint import load_best
from trainer.run.folder import Run
from trainer.run.training import Reporter
from trainer.tuning import study as searching
from trainer.tuning import trials as working
from trainer.tuning.again import retrain
from trainer.tuning.drive import SearchResults
from trainer.tuning.live import live_view
from trainer.tuning.plots import no_importance
from trainer.tuning.search_file import known_search, open_search, start_search
from trainer.tuning.space import SearchConfig
from trainer.tuning.space_file import read_space
from trainer.tuning.study import Search
from trainer.tuning.table import (
    best_row,
    ranked,
    rows_now,
    seconds_left,
    trial_rows,
    write_leaderboard,
)
from trainer.tuning.trials import count_attempt, work
from trainer.tuning.workers import Watched

SPACE = """
[search]
trials = {trials}
sampler = "{sampler}"
pruner = "{pruner}"
metric = "val_loss"
together = {together}
seed = {seed}

[[search.enqueue]]
lr = 2e-3
dropout = 0.125

[train]
lr = {{log_uniform = [1e-3, 1e-2]}}
dropout = {{uniform = [0.0, 0.5], step = 0.125}}
epochs = {epochs}
"""


@dataclasses.dataclass
class Place:
    """A data set, extracted, where searches can be started."""

    folder: Path
    config: Any
    project: Any

    def start(self, name: str, space: str = SPACE, **given: Any) -> Search:
        settings = {
            "trials": 4,
            "sampler": "random",
            "pruner": "none",
            "together": 1,
            "seed": 0,
            "epochs": 2,
        }
        path = self.folder / f"{Path(name).name}.toml"
        path.write_text(space.format(**{**settings, **given}))
        found = read_space(path, {}, {})
        runs = self.folder / "runs"
        return start_search(runs / name, found.base(self.config), found, None, None, self.project)

    def run(self, name: str, **given: Any) -> Search:
        search = self.start(name, **given)
        work(search, self.project)
        return search

    def again(self, search: Search, **flags: Any) -> Search:
        """Open a search anew, as the same command does."""
        base, space, source = known_search(search.folder, flags)
        return start_search(search.folder, base, space, source, None, self.project)


@pytest.fixture(scope="module")
def place(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("search")
    config = tiny_config(folder, tiny_vit, tiny_text)
    project = Project(config)
    project.extract("vit", show=SILENT)
    return Place(folder, config, project)


def results(search: Search) -> list[Any]:
    rows = trial_rows(search)
    return [(row["trial"], row["state"], row["params"], row["value"], row["epoch"]) for row in rows]


@pytest.fixture(scope="module")
def whole(place: Place) -> list[Any]:
    """What an undisturbed search gives."""
    return results(place.run("whole"))


class Stop:
    """Says stop after it was asked so often."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_search_is_runs_and_a_leaderboard(place: Place, whole: list[Any]) -> None:
    search = open_search(place.folder / "runs" / "whole")
    assert [state for _, state, *_ in whole] == ["complete"] * 4
    assert whole[0][2] == {"lr": 2e-3, "dropout": 0.125}
    assert len({values["lr"] for _, _, values, *_ in whole}) == 4
    rows = trial_rows(search)
    best = best_row(search, rows)
    assert best is not None
    assert best["value"] == min(value for *_, value, _ in whole)
    assert ranked(search, rows)[0] == best
    for number, _, values, value, _ in whole:
        run = search.run_of(number)
        assert run.config.train.lr == values["lr"]
        history = pd.read_csv(run.folder / "history.csv")
        assert history["val_loss"].min() == pytest.approx(value, abs=1e-6)
    files = [path.name for path in write_leaderboard(search)]
    assert files == ["leaderboard.csv", "history.png", "parallel_coordinates.png"]
    assert no_importance(search, rows) == (
        "no importance.png: 4 complete trials, expected at least 10"
    )
    table = (search.folder / "leaderboard.csv").read_text().splitlines()
    assert table[0].startswith("rank,trial,run,state,value,")
    assert table[1].split(",")[:4] == ["1", str(best["trial"]), best["run"], "complete"]


def test_a_trial_has_one_event_file_with_its_settings(place: Place, whole: list[Any]) -> None:
    search = open_search(place.folder / "runs" / "whole")
    for number, _, params, value, epochs in whole:
        folder = search.run_of(number).tensorboard_path
        assert len(list(folder.iterdir())) == 1
        found = EventAccumulator(str(folder)).Reload()
        losses = [e.tensor_proto.float_val[0] for e in found.Tensors("epoch/val_loss")]
        assert len(losses) == epochs
        assert min(losses) == pytest.approx(value, abs=1e-6)
        content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        start = HParamsPluginData.FromString(content).session_start_info
        assert {name: each.number_value for name, each in start.hparams.items()} == params


def test_a_search_leaves_the_settings_of_its_process(place: Place) -> None:
    printed: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = printed.append  # type: ignore[method-assign]
    logger = logging.getLogger("optuna")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with matplotlib.rc_context({"backend": "svg"}):
            filters = list(warnings.filters)
            search = place.start("polite", sampler="tpe", pruner="hyperband", trials=10)
            draw(search, 10)
            assert len(write_leaderboard(search)) == 4
            assert matplotlib.get_backend() == "svg"
            assert warnings.filters == filters
            assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    # It shows its trials itself.
    assert [record for record in printed if record.levelno >= logging.INFO] == []


def test_a_control_is_measured_as_it_was_trained(place: Place) -> None:
    space = SPACE.replace("[train]", '[train]\ncontrol = "hypothesis-only"')
    search = place.run("blind", space=space, trials=1, epochs=1)
    best = best_row(search, trial_rows(search))
    assert best is not None
    found = retrain(search, best, None, 1, "val", Reporter())
    (run,) = found["runs"]
    # Each sentence is right for exactly half its photos: who sees the picture has another figure.
    assert run["accuracy"] == 0.5
    assert (Path(run["run"]) / "evaluate-val-hypothesis-only.json").exists()
    assert not (Path(run["run"]) / "evaluate-val.json").exists()


def test_the_cores_of_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cores() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def goal(values: dict[str, Any]) -> float:
    """A stand-in for a trial's training: the lower, the nearer to one place of the space."""
    return float((math.log10(values["lr"]) + 2.4) ** 2 + 4 * (values["dropout"] - 0.1) ** 2)


def draw(search: Search, count: int) -> list[dict[str, Any]]:
    """Draw trials and tell their values, without training."""
    drawn = []
    for _ in range(count):
        (claim,) = search.claim(1)
        drawn.append(claim.trial.params)
        search.study.tell(claim.trial, goal(claim.trial.params))
        claim.held.close()
    return drawn


@pytest.mark.parametrize("sampler", ["random", "tpe", "cma"])
def test_a_seed_gives_the_same_trials(place: Place, sampler: str) -> None:
    space = SPACE.replace("step = 0.125", "step = 0.0625")
    given = {"sampler": sampler, "trials": 24, "space": space}
    one = draw(place.start(f"{sampler}-1", seed=5, **given), 24)
    # Stopped and gone on with, it draws what it would have drawn.
    stopped = place.start(f"{sampler}-2", seed=5, **given)
    two = draw(stopped, 11)
    two += draw(place.again(stopped), 13)
    other = draw(place.start(f"{sampler}-3", seed=6, **given), 2)
    assert one == two
    assert one[0] == other[0] == {"lr": 2e-3, "dropout": 0.125}
    assert one[1] != other[1]
    assert len({values["lr"] for values in one}) == 24
    # What was learned shows in what is drawn last; a sampler that learns nothing stays far away.
    late = sum(map(goal, one[-10:])) / 10
    if sampler == "random":
        assert late > 0.2
    else:
        assert late < 0.2


GRID = """
[search]
sampler = "grid"
metric = "val_loss"
together = {together}

[train]
lr = {{choice = [1e-3, 5e-3]}}
dropout = {{choice = [0.0, 0.25]}}
epochs = {epochs}
"""


def test_a_grid_is_run_once_also_when_it_is_stopped(place: Place) -> None:
    search = place.start("grid", GRID)
    drawn = draw(search, 1)
    # Two that a process held when it ended.
    for claim in search.claim(2):
        claim.held.close()
    assert search.idle() == {1, 2}
    # More than the grid has cannot be asked for.
    search = place.again(search, trials=9)
    assert search.unfinished
    drawn += draw(search, 3)
    found = sorted(tuple(values.values()) for values in drawn)
    assert found == [(1e-3, 0.0), (1e-3, 0.25), (5e-3, 0.0), (5e-3, 0.25)]
    assert not search.unfinished
    assert search.claim(1) == []


@pytest.mark.slow
def test_tables_are_searched_and_rows_that_differ_are_not_shared(place: Place) -> None:
    space = """
[search]
sampler = "grid"
metric = "val_loss"
together = 4

[train]
oversample = {{choice = ["", {{gender = 2.0}}]}}
label_smoothing = {{choice = [0.0, 0.1]}}
lr = {{choice = [1e-3, 2e-3]}}
epochs = 1
"""
    search = place.run("tables", space=space)
    rows = trial_rows(search)
    assert [row["state"] for row in rows] == ["complete"] * 8
    assert {str(row["params"]["oversample"]) for row in rows} == {"", "{'gender': 2.0}"}
    assert len({row["value"] for row in rows}) == 8
    assert [row["together"] for row in rows] == [2] * 8
    for row in rows:
        run = Run(search.folder / row["run"])
        assert run.config.train.oversample == row["params"]["oversample"]
        assert ("oversample" in run.manifest) == bool(row["params"]["oversample"])
    write_leaderboard(search)
    again = {str(p.values) for p in open_search(search.folder, None).space.parameters}
    assert again == {str(p.values) for p in search.space.parameters}


@pytest.mark.slow
def test_a_stopped_search_ends_as_the_undisturbed(place: Place, whole: list[Any]) -> None:
    search = place.start("stopped", trials=2)
    # In an epoch, at its end, in the second trial, and before its first step.
    for steps in (3, 6, 9, 0):
        with pytest.raises(StoppedError):
            work(search, place.project, Stop(steps))
        assert search.unfinished
        search = place.again(search)
    work(search, place.project)
    assert results(search) == whole[:2]
    # More trials can be asked for.
    search = place.again(search, trials=4)
    work(search, place.project)
    assert results(search) == whole


def test_a_trial_whose_draw_is_all_that_is_known_is_run(place: Place) -> None:
    search = place.start("drawn", trials=1)
    search.study.ask({p.name: p.distribution() for p in search.space.parameters})
    work(search, place.project)
    assert [row["state"] for row in trial_rows(search)] == ["complete"]


def test_an_error_before_the_training_ends_the_work(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise LookupError("refused")

    search = place.start("refused", trials=1)
    monkeypatch.setattr("trainer.tuning.trials.count_attempt", refuse)
    asked = iter(range(9))
    with pytest.raises(LookupError, match="refused"):
        work(search, place.project, lambda: next(asked) == 8)


def test_looking_at_a_search_writes_nothing_into_its_journal(place: Place) -> None:
    search = place.start("seen", trials=1)
    journal = search.folder / "study.journal"
    before = journal.read_bytes()
    assert trial_rows(open_search(search.folder, None)) == []
    assert journal.read_bytes() == before


@pytest.mark.parametrize("lost", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_search_whose_journal_is_lost_is_not_begun_anew(place: Place, lost: Any) -> None:
    folder = place.start("lost", trials=1).folder
    (folder / "trial-0000").mkdir()
    lost(folder / "study.journal")
    said = r"study\.journal has no study 'lost', though 1 trial left a folder here; put it back"
    with pytest.raises(RunError, match=said):
        open_search(folder, None)
    (folder / "trial-0000").rmdir()
    assert trial_rows(open_search(folder, None)) == []


def test_the_time_of_a_stopped_trial_does_not_go_on(place: Place) -> None:
    search = place.start("left", trials=2)
    with pytest.raises(StoppedError):
        work(search, place.project, Stop(3))
    (row,) = rows_now(search)
    assert (row["state"], row["seconds"]) == ("stopped", None)
    assert SearchResults(search).rows() == ranked(search, [row])
    write_leaderboard(search)
    board = pd.read_csv(search.folder / "leaderboard.csv")
    assert board["state"].tolist() == ["stopped"]
    assert board["seconds"].isna().all()


def test_a_stopped_trial_is_said_to_be_stopped_everywhere(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search = place.start("halted", trials=2)
    with pytest.raises(StoppedError):
        work(search, place.project, Stop(3))
    assert "0 of 2 trials" in repr(SearchResults(search))
    with live_view(search) as watch:
        watch(Watched(1))
    assert "trial-0000 running" in (err := capsys.readouterr().err)
    assert "trial-0000 stopped" in err
    assert err.splitlines()[-1].startswith("0 of 2 trials ended")
    # As where a worker of another command was killed.
    monkeypatch.setattr("trainer.tuning.drive.run_workers", lambda *args: Watched(1))
    again = ["search", "--name", "halted", "--runs", str(search.folder.parent)]
    found = CliRunner().invoke(cli, again)
    assert re.search(r"^trial-0000 +stopped ", found.stdout, re.M), found.output
    assert "0 of 2 trials ended" in found.stderr
    found = CliRunner().invoke(cli, [*again, "--json"])
    assert [row["state"] for row in json.loads(found.stdout)["trials"]] == ["stopped"]


def test_a_trial_whose_folder_was_deleted_is_said(place: Place) -> None:
    search = place.run("deleted", trials=2)
    results, runs = SearchResults(search), ["--runs", str(search.folder.parent)]
    best, other = results.rows()
    metrics = Run(search.folder / best["run"]).metrics
    shutil.rmtree(search.folder / best["run"])
    gone = f"no run folder is left of {best['run']}"
    for line in ("search show deleted", "search best deleted", "report deleted"):
        done = CliRunner().invoke(cli, [*line.split(), *runs])
        assert done.exit_code == 0, done.output
        assert gone in done.stderr
        assert other["run"] not in done.stderr
    page = (search.folder / "report.html").read_text(encoding="utf-8")
    assert gone in page
    assert f"{best['run']}/config.toml" not in page
    with pytest.raises(RunError, match=f"{gone}.*search best .*deleted --seeds 1"):
        _ = results.best_run
    # Trained again it is what it was.
    (made,) = results.retrain(show=SILENT)["runs"]
    assert Run(Path(made["run"])).metrics == metrics
    assert results.rows() == [best, other]


@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_poor_trials_are_ended_early(place: Place, pruner: str) -> None:
    search = place.start(f"pruned-{pruner}", pruner=pruner, trials=16, epochs=4)
    ended = []
    for _ in range(16):
        (claim,) = search.claim(1)
        value = goal(claim.trial.params)
        for epoch in range(4):
            claim.trial.report(value + 1 / (epoch + 1), epoch)
            if claim.trial.should_prune():
                break
        ended.append((value, epoch + 1))
        search.study.tell(claim.trial, value)
        claim.held.close()
    poor = [value for value, epochs in ended if epochs < 4]
    kept = [value for value, epochs in ended if epochs == 4]
    assert poor
    assert min(kept) < min(poor)
    assert sum(kept) / len(kept) < sum(poor) / len(poor)


@pytest.mark.slow
def test_a_pruned_trial_stays_so_when_those_trained_with_it_are_stopped(place: Place) -> None:
    space = SPACE.replace("[1e-3, 1e-2]", "[1e-7, 1e-2]")
    given = {"space": space, "pruner": "halving", "together": 3, "trials": 3, "epochs": 3}
    expected = results(place.run("pruned", **given))
    assert {state for _, state, *_ in expected} == {"complete", "pruned"}
    search = place.start("pruned-stopped", **given)
    with pytest.raises(StoppedError):
        # In the second epoch: the steps of the first one ask too.
        work(search, place.project, Stop(3 * 10))
    rows = trial_rows(search)
    assert {row["state"] for row in rows} == {"running", "pruned"}
    search = place.again(search)
    work(search, place.project)
    assert results(search) == expected
    for row in trial_rows(search):
        assert row["seconds"] > 0
        if row["state"] == "pruned":
            assert row["epoch"] < 3
            assert row["val_accuracy"] is not None
            assert Run(search.folder / row["run"]).manifest["status"] == "pruned"


@pytest.mark.slow
def test_only_the_best_trials_keep_their_weights(place: Place, tmp_path: Path) -> None:
    space = SPACE.replace("[search]", "[search]\nkeep = 2")
    search = place.run("kept", space=space, trials=5, pruner="halving", epochs=3)
    rows = ranked(search, trial_rows(search))
    runs = [Run(search.folder / row["run"]) for row in rows]
    assert [run.weights_path.exists() for run in runs] == [True, True, False, False, False]
    for row, run in zip(rows, runs, strict=True):
        assert not run.checkpoint_path.exists()
        assert run.metrics_path.exists()
        if run.weights_path.exists():
            continue
        assert sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file()) < 200_000
        if row["state"] != "complete":
            continue
        # The same settings and seed give the same weights: as the message says.
        name = f"kept-{run.name}"
        with pytest.raises(RunError, match="kept the weights of its best trials only") as caught:
            load_best(run)
        line = f"featstore train --config {run.config_path} --name {name}"
        assert f"`{line}`" in str(caught.value)
        project = Project(run.config)
        again = trainer.train(project, name=name, runs=tmp_path, reporter=Reporter(), show=SILENT)
        assert again.metrics == run.metrics
        assert again.weights_path.exists()
    # More may be kept from now on; what is gone is gone.
    more = place.again(search, trials=6, keep="all")
    work(more, place.project)
    assert Run(more.folder / "trial-0005").weights_path.exists()


@pytest.mark.parametrize("keep", ["some", "-1", "2.5"])
def test_how_many_keep_their_weights_is_checked(keep: str) -> None:
    with pytest.raises(ConfigError, match=r"\[search\] keep must be a number or 'all'"):
        SearchConfig(keep=keep)


def test_old_searches_keep_all_weights() -> None:
    old = dataclasses.asdict(SearchConfig())
    del old["keep"]
    assert SearchConfig(**complete(SearchConfig, old)).keep == "all"
    assert SearchConfig().kept == 5


@pytest.mark.slow
def test_trials_together_are_the_trials_alone(place: Place, whole: list[Any]) -> None:
    search = place.run("together", together=4)
    for found, alone in zip(results(search), whole, strict=True):
        assert (*found[:3], found[4]) == (*alone[:3], alone[4])
        assert found[3] == pytest.approx(alone[3], abs=1e-4)
    assert [row["together"] for row in trial_rows(search)] == [4] * 4


@pytest.mark.slow
def test_trials_that_do_not_fit_together_run_alone(
    place: Place, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MemoryError("no room for both")
    monkeypatch.setattr(trainer.run.fit, "train_together", failing({0: error}))
    search = place.run("apart", together=2, trials=2)
    assert results(search) == whole[:2]
    assert [row["together"] for row in trial_rows(search)] == [1, 1]


class ResourceExhaustedError(Exception):
    """TensorFlow's, by name."""


def failing(errors: dict[int, Exception]) -> Callable[..., Any]:
    """A `train_together` that fails in some of its calls."""
    whole, calls = trainer.run.fit.train_together, iter(range(100))

    def fail(members: Any, *args: Any, **kwargs: Any) -> Any:
        error = errors.get(next(calls))
        if error is not None:
            raise error
        return whole(members, *args, **kwargs)

    return fail


@pytest.mark.slow
def test_a_failed_trial_has_its_reason_and_the_rest_goes_on(
    place: Place, whole: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [
        ResourceExhaustedError("OOM of 3 GB\nmore"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 GB"),
        ValueError("odd\nmore"),
    ]
    monkeypatch.setattr(trainer.run.fit, "train_together", failing(dict(enumerate(errors))))
    search = place.run("failed")
    rows = trial_rows(search)
    assert [row["state"] for row in rows] == ["fail", "fail", "fail", "complete"]
    assert [row["reason"] for row in rows[:3]] == [
        "out of memory: OOM of 3 GB",
        "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 3 GB",
        "ValueError: odd",
    ]
    assert results(search)[3] == whole[3]
    assert ranked(search, rows)[0]["trial"] == 3


@pytest.mark.slow
def test_a_diverged_trial_is_recorded(place: Place) -> None:
    space = SPACE.replace("lr = 2e-3", "lr = 1e30").replace("[1e-3, 1e-2]", "[1e-3, 1e30]")
    search = place.run("diverged", space=space, trials=1)
    (row,) = trial_rows(search)
    assert row["state"] == "fail"
    assert row["reason"].startswith(("the loss is nan in epoch 1", "a val logit is"))
    assert Run(search.folder / row["run"]).manifest["status"] == "failed"


WORKER = """
import os, signal, sys
from pathlib import Path
from trainer.tuning import trials
calls = iter(range(100))
count = trials.count_attempt
def die(trial, by):
    count(trial, by)
    if by > 0 and next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
trials.count_attempt = die
trials.work_in(Path(sys.argv[1]), None, lambda: False, float("inf"))
"""


@pytest.mark.slow
def test_a_killed_workers_trial_is_taken_over(place: Place, whole: list[Any]) -> None:
    search = place.start("killed")
    done = subprocess.run([sys.executable, "-c", WORKER, str(search.folder), "1"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["state"] for row in trial_rows(search)] == ["complete", "running"]
    search = place.again(search)
    work(search, place.project)
    assert results(search) == whole


def test_a_trial_that_always_ends_its_worker_is_given_up(place: Place) -> None:
    search = place.start("deadly", trials=2)
    for _ in range(searching.MOST_ATTEMPTS):
        # As a process leaves it that dies in the trial's first epoch.
        (claim,) = search.claim(1)
        assert claim.trial.number == 0
        count_attempt(claim.trial, 1)
        claim.held.close()
        search = place.again(search)
    (claim,) = search.claim(1)
    assert claim.trial.number == 1
    claim.held.close()
    first, _ = trial_rows(search)
    assert first["state"] == "fail"
    assert first["reason"] == "its process ended 3 times in epoch 1; out of memory?"


def test_a_trial_killed_while_it_is_drawn_is_drawn_again(place: Place) -> None:
    search = place.start("undrawn", trials=1)
    # As `ask` leaves it when it is killed before the second parameter.
    trial = search.study.ask()
    trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    (claim,) = place.again(search).claim(1)
    claim.held.close()
    assert claim.trial.number == 1
    # The fixed one is not lost.
    assert claim.trial.params == {"lr": 2e-3, "dropout": 0.125}
    assert [t.number for t in search.drawn()] == [1]


def test_a_search_killed_while_it_queues_its_grid_queues_the_rest(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, calls = optuna.Study.enqueue_trial, iter(range(100))

    def killed(study: Any, *args: Any, **kwargs: Any) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        queue(study, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        with pytest.raises(KeyboardInterrupt):
            place.start("queued", GRID)
    drawn = draw(place.start("queued", GRID), 4)
    assert len({tuple(values.values()) for values in drawn}) == 4
    assert not open_search(place.folder / "runs" / "queued").claim(1)


def test_a_line_cut_short_in_the_journal_is_taken_away(place: Place) -> None:
    search = place.start("torn")
    journal = search.folder / "study.journal"
    before = journal.read_bytes()
    journal.write_bytes(before + b'{"op_code": 4, "wor')
    search = place.again(search)
    with contextlib.ExitStack() as stack:
        for claim in search.claim(2):
            stack.enter_context(claim.held)
    assert journal.read_bytes().startswith(before)
    lines = journal.read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert len(optuna.load_study(study_name="torn", storage=search.storage).trials) == 2


def test_two_claims_never_hold_one_trial(place: Place) -> None:
    search = place.start("claims", trials=3)
    other = place.again(search)
    first, second = search.claim(1), other.claim(5)
    numbers = [claim.trial.number for claim in (*first, *second)]
    assert sorted(numbers) == [0, 1, 2]
    assert other.claim(1) == []
    for claim in (*first, *second):
        claim.held.close()


def test_a_deadline_draws_no_more(place: Place) -> None:
    search = place.start("late")
    work(search, place.project, deadline=0.0)
    assert results(search) == []
    assert best_row(search, trial_rows(search)) is None


def row(trial: int, state: str, seconds: float, epoch: int, together: int = 1) -> dict[str, Any]:
    found = {"trial": trial, "state": state, "seconds": seconds, "epoch": epoch}
    return {**found, "together": together, "params": {}}


@pytest.mark.parametrize(
    ("rows", "workers", "left"),
    [
        ([], 1, None),
        ([row(0, "running", 5.0, 0)], 1, None),
        # Half of its two epochs took 5 s: 5 s are left of it, and 10 s for each other one.
        ([row(0, "running", 5.0, 1)], 1, 35.0),
        ([row(0, "complete", 10.0, 2), row(1, "running", 4.0, 0)], 1, 26.0),
        ([row(0, "complete", 10.0, 2), row(1, "running", 4.0, 0)], 2, 13.0),
        # Four trials that took 40 s in the same passes over the store took 10 s each.
        ([row(i, "complete", 40.0, 2, 4) for i in range(3)], 1, 10.0),
        ([row(i, "running", 20.0, 1, 4) for i in range(4)], 1, 20.0),
    ],
)
def test_the_time_that_is_left(
    place: Place, rows: list[dict[str, Any]], workers: int, left: float | None
) -> None:
    search = place.start("eta")
    assert seconds_left(search, rows, workers) == (None if left is None else pytest.approx(left))


def test_another_search_of_the_name_is_refused(place: Place, whole: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"a search of something else .*epochs"):
        place.start("whole", epochs=3)
    with pytest.raises(UsageError, match=r"a search of something else .*seed"):
        place.start("whole", seed=9)
    with pytest.raises(UsageError, match=r"a search of something else .*parameters.*no other set"):
        place.start("whole", space=SPACE.replace("1e-2]", "2e-2]"))
    run = open_search(place.folder / "runs" / "whole").run_of(0)
    with pytest.raises(UsageError, match="a run, not a search"):
        place.start("whole/trial-0000")
    with pytest.raises(UsageError, match="a search, not a run"):
        Run(run.folder.parent).check_free_or_same(place.config)
    assert math.isfinite(whole[0][3])


def test_a_worker_without_a_device_takes_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UsageError("JAX finds no device")

    # No search: whoever goes on has nothing to read from it.
    monkeypatch.setattr(working, "open_search", lambda *given: None)
    monkeypatch.setattr(framework, "open_device", refuse)
    with pytest.raises(UsageError, match="no device"):
        working.work_in(tmp_path, None, lambda: False, 0.0)
