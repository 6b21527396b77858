"""Searches in one process: what is drawn, pruned, failed, stopped and gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from tiny_runs import extracted, tiny_config

import trainer.fit
import trainer.loop
from featstore.errors import StoppedError, UsageError
from trainer import search as searching
from trainer.fit import Training
from trainer.leaderboard import best_row, ranked, trial_rows, write_leaderboard
from trainer.run import Run
from trainer.search import Search, known_search, open_search, start_search
from trainer.search_space import read_space
from trainer.trials import work

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
    dataset: Any

    def start(self, name: str, space: str = SPACE, **given: Any) -> Search:
        settings = {
            "trials": 4,
            "sampler": "random",
            "pruner": "none",
            "together": 1,
            "seed": 0,
            "epochs": 2,
        }
        path = self.folder / f"{name}.toml"
        path.write_text(space.format(**{**settings, **given}))
        found = read_space(path, {}, {})
        runs = self.folder / "runs"
        return start_search(runs / name, found.base(self.config), found, None, None, self.dataset)

    def run(self, name: str, **given: Any) -> Search:
        search = self.start(name, **given)
        work(search, self.dataset)
        return search

    def again(self, search: Search, **flags: Any) -> Search:
        """Open a search anew, as the same command does."""
        base, space, source = known_search(search.folder, flags)
        return start_search(search.folder, base, space, source, None, self.dataset)


@pytest.fixture(scope="module", autouse=True)
def without_xla() -> Iterator[None]:
    """Compiling takes most of such a small trial's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.fit, "Training", functools.partial(Training, compiled=False))
        yield


@pytest.fixture(scope="module")
def place(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("search")
    config = tiny_config(folder, tiny_vit, tiny_text)
    return Place(folder, config, extracted(config))


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
        assert run.config().train.lr == values["lr"]
        history = pd.read_csv(run.folder / "history.csv")
        assert history["val_loss"].min() == pytest.approx(value, abs=1e-6)
    files = [path.name for path in write_leaderboard(search)]
    assert files == ["leaderboard.csv", "history.png", "importance.png", "parallel_coordinates.png"]
    table = (search.folder / "leaderboard.csv").read_text().splitlines()
    assert table[0].startswith("rank,trial,run,state,value,")
    assert table[1].split(",")[:4] == ["1", str(best["trial"]), best["run"], "complete"]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "tpe", "cma"])
def test_a_seed_gives_the_same_trials(place: Place, sampler: str) -> None:
    # TPE and CMA draw at random before they have seen some trials; few are enough here, as each
    # draw has a seed of its own that follows from its place.
    one = results(place.run(f"{sampler}-1", sampler=sampler, seed=5))
    two = results(place.run(f"{sampler}-2", sampler=sampler, seed=5))
    other = results(place.run(f"{sampler}-3", sampler=sampler, seed=6))
    assert one == two
    assert one[0][2] == other[0][2]  # the fixed trial
    assert one[1][2] != other[1][2]


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


@pytest.mark.slow
def test_a_grid_is_run_once_also_when_it_is_stopped(place: Place) -> None:
    search = place.start("grid", GRID)
    with pytest.raises(StoppedError):
        work(search, place.dataset, Stop(20))
    assert search.unfinished
    search = place.again(search)
    work(search, place.dataset)
    found = sorted(tuple(values.values()) for _, _, values, *_ in results(search))
    assert found == [(1e-3, 0.0), (1e-3, 0.25), (5e-3, 0.0), (5e-3, 0.25)]
    assert not search.unfinished
    work(place.again(search), place.dataset)
    assert len(results(search)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 11, 17, 30])
def test_a_stopped_search_ends_as_the_undisturbed(
    place: Place, whole: list[Any], steps: int
) -> None:
    search = place.start(f"stopped-{steps}")
    with pytest.raises(StoppedError):
        work(search, place.dataset, Stop(steps))
    assert search.unfinished
    search = place.again(search)
    work(search, place.dataset)
    assert results(search) == whole


@pytest.mark.slow
def test_more_trials_can_be_asked_for(place: Place, whole: list[Any]) -> None:
    search = place.run("more", trials=2)
    assert results(search) == whole[:2]
    search = place.again(search, trials=4)
    work(search, place.dataset)
    assert results(search) == whole


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["median", "halving", "hyperband"])
def test_poor_trials_are_ended_early(place: Place, pruner: str) -> None:
    space = SPACE.replace("[1e-3, 1e-2]", "[1e-7, 1e-2]")
    search = place.run(f"pruned-{pruner}", space=space, pruner=pruner, trials=12, epochs=4)
    rows = trial_rows(search)
    pruned = [row for row in rows if row["state"] == "pruned"]
    assert pruned
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    for row in pruned:
        assert row["epoch"] < 4
        assert Run(search.folder / row["run"]).manifest()["status"] == "pruned"
    best = best_row(search, rows)
    assert best is not None
    assert best["value"] <= min(row["value"] for row in pruned)


@pytest.mark.slow
def test_trials_together_are_the_trials_alone(place: Place, whole: list[Any]) -> None:
    assert results(place.run("together", together=4)) == whole


class ResourceExhaustedError(Exception):
    """TensorFlow's, by name."""


def failing(kind: Callable[[], Exception], which: int) -> Callable[..., Any]:
    """A `train_together` that fails in one of its calls."""
    whole, calls = trainer.loop.train_together, iter(range(100))

    def fail(members: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == which:
            raise kind()
        return whole(members, *args, **kwargs)

    return fail


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (lambda: ResourceExhaustedError("OOM of 3 GB\nmore"), "out of memory: OOM of 3 GB"),
        (lambda: MemoryError("no"), "out of memory: no"),
        (lambda: ValueError("odd\nmore"), "ValueError: odd"),
    ],
)
def test_a_failed_trial_has_its_reason_and_the_rest_goes_on(
    place: Place,
    whole: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    error: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(trainer.loop, "train_together", failing(error, 1))
    search = place.run(f"failed-{type(error()).__name__}")
    rows = trial_rows(search)
    assert [row["state"] for row in rows] == ["complete", "fail", "complete", "complete"]
    assert rows[1]["reason"] == reason
    assert [r for r in results(search) if r[0] != 1] == [r for r in whole if r[0] != 1]
    assert ranked(search, rows)[-1]["trial"] == 1


@pytest.mark.slow
def test_a_diverged_trial_is_recorded(place: Place) -> None:
    space = SPACE.replace("lr = 2e-3", "lr = 1e30").replace("[1e-3, 1e-2]", "[1e-3, 1e30]")
    search = place.run("diverged", space=space, trials=1)
    (row,) = trial_rows(search)
    assert row["state"] == "fail"
    assert "finite" in row["reason"] or "nan" in row["reason"].lower()
    assert Run(search.folder / row["run"]).manifest()["status"] == "failed"


WORKER = """
import functools, os, signal, sys
from pathlib import Path
import trainer.fit
from trainer import trials
trainer.fit.Training = functools.partial(trainer.fit.Training, compiled=False)
calls = iter(range(100))
count = trials._count_attempt
def die(trial, by):
    count(trial, by)
    if by > 0 and next(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
trials._count_attempt = die
trials.work_in(Path(sys.argv[1]), None, lambda: False, float("inf"))
"""


@pytest.mark.slow
def test_a_killed_workers_trial_is_taken_over(place: Place, whole: list[Any]) -> None:
    search = place.start("killed")
    done = subprocess.run([sys.executable, "-c", WORKER, str(search.folder), "1"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [row["state"] for row in trial_rows(search)] == ["complete", "running"]
    search = place.again(search)
    work(search, place.dataset)
    assert results(search) == whole


@pytest.mark.slow
def test_a_trial_that_always_ends_its_worker_is_given_up(place: Place) -> None:
    search = place.start("deadly", trials=2)
    for _ in range(searching.MOST_ATTEMPTS):
        command = [sys.executable, "-c", WORKER, str(search.folder), "0"]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    search = place.again(search)
    work(search, place.dataset)
    first, second = trial_rows(search)
    assert first["state"] == "fail"
    assert first["reason"] == "its process ended 3 times in epoch 1; out of memory?"
    assert second["state"] == "complete"


def test_a_trial_killed_while_it_is_drawn_is_drawn_again(place: Place) -> None:
    search = place.start("undrawn", trials=1)
    # As `ask` leaves it when it is killed before the second parameter.
    trial = search.study.ask()
    trial.suggest_float("lr", 1e-3, 1e-2, log=True)
    (claim,) = place.again(search).claim(1)
    claim.held.close()
    assert claim.trial.number == 1
    assert set(claim.trial.params) == {"lr", "dropout"}
    assert [t.number for t in search.drawn()] == [1]


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
    work(search, place.dataset, deadline=0.0)
    assert results(search) == []
    assert best_row(search, trial_rows(search)) is None


def test_another_search_of_the_name_is_refused(place: Place, whole: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"a search of something else .*epochs"):
        place.start("whole", epochs=3)
    with pytest.raises(UsageError, match=r"a search of something else .*seed"):
        place.start("whole", seed=9)
    run = open_search(place.folder / "runs" / "whole").run_of(0)
    with pytest.raises(UsageError, match="a run, not a search"):
        place.start("whole/trial-0000".replace("/", os.sep))
    with pytest.raises(UsageError, match="a search, not a run"):
        Run(run.folder.parent).check_free_or_same(place.config)
    assert math.isfinite(whole[0][3])
