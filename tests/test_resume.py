"""Going on with a run by its name: a stopped one, and a finished one for longer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_runs import tiny_config, with_train

import trainer
from featstore.errors import MissingFeaturesError, StoppedError, UsageError
from featstore.extract import extract, worklist
from featstore.progress import SILENT, Show
from featstore.project import Project
from trainer.commands.main import cli
from trainer.config import Config, render_config
from trainer.run.checkpoint import load_best, read_progress
from trainer.run.folder import Run
from trainer.run.resume import check_resumable
from trainer.run.training import Reporter

TIMES = {"seconds", "val_seconds", "wait_share"}


@dataclasses.dataclass
class Place:
    """A project with its features, and a folder of runs."""

    config: Config
    project: Project
    runs: Path

    def train(self, name: str, own: bool = False, **given: Any) -> Run:
        """Train; with `own` by the name alone, with the run's own settings."""
        given = {"show": SILENT, "reporter": Reporter(), **given}
        if own:
            what: Any = trainer.load_run(name, self.runs)
        else:
            what, given = self.project, {"keep_state": True, **given}
        return trainer.train(what, name=name, runs=self.runs, **given)


@pytest.fixture(scope="module")
def place(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, epochs=2)
    project = Project(config)
    project.extract("vit", show=SILENT)
    return Place(config, project, folder / "runs")


@pytest.fixture(scope="module")
def short(place: Place) -> Run:
    """A finished run of two epochs."""
    return place.train("short")


def copied(run: Run, name: str) -> Run:
    shutil.copytree(run.folder, run.folder.parent / name)
    return Run(run.folder.parent / name)


def assert_same(a: Run, b: Run) -> None:
    """Check that two runs have the same figures, and the same state and weights bit for bit."""
    figures = [run.history.drop(columns=[*TIMES]) for run in (a, b)]
    assert figures[0].equals(figures[1])
    assert a.metrics == b.metrics
    with np.load(a.checkpoint_path) as first, np.load(b.checkpoint_path) as second:
        assert first.files == second.files
        for name in set(first.files) - {"progress"}:
            assert first[name].tobytes() == second[name].tobytes(), name
    best = zip(load_best(a).get_weights(), load_best(b).get_weights(), strict=True)
    assert all(x.tobytes() == y.tobytes() for x, y in best)


LONGER: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"epochs": 2}, {"epochs": 4}),
    # Its rate is cut on the way, before and after the first end.
    (
        {"epochs": 3, "lr": 0.3, "reduce_lr_patience": 1, "early_stop_patience": 9},
        {"epochs": 6},
    ),
    # It ends early first.
    (
        {"epochs": 8, "lr": 0.3, "early_stop_patience": 1, "reduce_lr_patience": 1},
        {"early_stop_patience": 3},
    ),
    pytest.param({"epochs": 1, "k_txt": 1}, {"epochs": 3}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("first", "then"), LONGER)
def test_a_run_made_longer_is_the_run_that_was_so_from_the_start(
    place: Place, first: dict[str, Any], then: dict[str, Any]
) -> None:
    name = "-".join(f"{value}" for value in (*first.values(), *then.values()))
    whole = place.train(f"whole-{name}", **{**first, **then})
    run = place.train(f"longer-{name}", **first)
    began = len(run.history)
    place.train(run.name, own=True, **then)
    assert began < len(run.history) == len(whole.history)
    assert_same(run, whole)
    assert dataclasses.asdict(run.config.train) == dataclasses.asdict(whole.config.train)
    assert run.manifest["status"] == "finished"
    assert run.manifest["ended"] == whole.manifest["ended"]


def test_the_settings_in_full_make_a_run_longer_too(place: Place, short: Run) -> None:
    run = copied(short, "in-full")
    place.train(run.name, epochs=3)
    assert len(run.history) == 3


@pytest.mark.parametrize("given", [{}, {"epochs": 2}, {"epochs": 1}, {"early_stop_patience": 1}])
def test_a_finished_run_that_gets_no_longer_is_taken(
    place: Place, short: Run, given: dict[str, Any]
) -> None:
    before = short.manifest
    with pytest.raises(
        UsageError, match=r"short: a (finished run; choose|run with other settings)"
    ):
        place.train("short", own=True, **given)
    assert short.manifest == before


def test_other_settings_are_refused_also_when_it_gets_longer(place: Place, short: Run) -> None:
    with pytest.raises(UsageError, match=r"a run with other settings .*train\.lr"):
        place.train("short", epochs=4, lr=1e-5)


def test_a_run_that_kept_no_state_says_how_to_start_from_it(place: Place, short: Run) -> None:
    run = copied(short, "stateless")
    run.checkpoint_path.unlink()
    with pytest.raises(UsageError, match=r"kept no state \(last\.npz\)") as caught:
        place.train(run.name, own=True, epochs=4)
    assert "`featstore train --init-from stateless`" in str(caught.value)
    assert run.manifest["status"] == "finished"


def test_what_ended_early_is_not_gone_on_with_for_more_epochs(place: Place) -> None:
    lines: list[str] = []
    settings = {"epochs": 6, "lr": 0.3, "early_stop_patience": 1}
    run = place.train("early", reporter=Reporter(note=lines.append), **settings)
    count = len(run.history)
    assert count < 6
    assert run.manifest["ended"] == "early stop"
    best = run.metrics["epoch"]
    assert lines == [
        f"early stop after epoch {count} of 6: val_loss has not improved for 1 epoch,"
        f" since epoch {best}"
    ]
    with pytest.raises(UsageError, match="ended early: val_loss had not improved") as caught:
        place.train("early", own=True, epochs=9)
    assert "`featstore train --name early --epochs 9 --early-stop-patience 2`" in str(caught.value)


def test_a_stopped_run_goes_on_by_its_name_and_says_from_where(place: Place, short: Run) -> None:
    asked = itertools.count(1)
    with pytest.raises(StoppedError):
        place.train("stopped", reporter=Reporter(stopping=lambda: next(asked) >= 11))
    lines: list[str] = []
    run = place.train("stopped", own=True, reporter=Reporter(note=lines.append))
    assert lines == [f"{run.folder}: goes on with epoch 2 of 2 after step 3"]
    assert_same(run, short)
    assert read_progress(run.checkpoint_path).epoch == 2


def test_a_kill_between_status_and_settings_loses_nothing(place: Place, short: Run) -> None:
    """The status of a run that gets longer is written first, then its settings."""
    run = copied(short, "killed")
    run.write_manifest({**run.manifest, "status": "running"})
    place.train(run.name, own=True, epochs=3)
    assert len(run.history) == 3
    again = copied(short, "killed-too")
    again.write_manifest({**again.manifest, "status": "running"})
    place.train(again.name, own=True)
    assert again.manifest["status"] == "finished"
    assert_same(again, short)


def test_what_changes_no_number_may_change(place: Place, short: Run) -> None:
    run = copied(short, "elsewhere")
    run.write_manifest({**run.manifest, "status": "running"})
    store = dataclasses.replace(place.config.store, decode_threads=3)
    config = dataclasses.replace(place.config, store=store)
    check_resumable(run, with_train(config, keep_state=False))
    with pytest.raises(UsageError, match=r"train\.lr"):
        check_resumable(run, with_train(config, lr=1e-5))


def test_a_run_goes_on_under_its_own_name(short: Run) -> None:
    with pytest.raises(UsageError, match="its own name, not as 'other'"):
        trainer.train(short, name="other")


def test_missing_features_are_extracted_after_an_estimate(
    place: Place, tiny_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    for module in (extract, worklist):
        make_plan = module.make_plan
        monkeypatch.setattr(
            module,
            "make_plan",
            lambda job, *given, make=make_plan: planned.append(job.spec.kind) or make(job, *given),
        )
    store = dataclasses.replace(place.config.store, root=str(tmp_path / "cache"))
    project = Project(dataclasses.replace(place.config, store=store))
    with pytest.raises(MissingFeaturesError):
        trainer.train(project, runs=tmp_path, epochs=1, show=SILENT)
    notes: list[str] = []
    show = Show(note=notes.append)
    run = trainer.train(
        project, runs=tmp_path, epochs=1, extract=True, show=show, reporter=Reporter()
    )
    assert notes[0].startswith("to extract: 44 images, about ")
    assert notes[1].startswith("to extract: 4 sentences at k_txt 0, about ")
    assert len(run.history) == 1
    # What is missing is looked for once.
    assert planned.count("vit") == 1
    notes.clear()
    trainer.train(project, runs=tmp_path, epochs=1, extract=True, show=show, reporter=Reporter())
    assert not [line for line in notes if line.startswith("to extract")]


@pytest.mark.slow
def test_the_command(place: Place, short: Run, tmp_path: Path) -> None:
    def command(*words: str, code: int = 0) -> Result:
        done = CliRunner().invoke(cli, ["train", *words, "--runs", str(place.runs)])
        assert done.exit_code == code, done.stderr
        return done

    settings = tmp_path / "featstore.toml"
    settings.write_text(render_config(with_train(place.config, keep_state=True)))
    new = json.loads(command("--config", str(settings), "--name", "typed", "--json").stdout)
    assert (new["epochs"], new["ended"]) == (2, "all epochs")
    taken = command("--name", "typed", code=2)
    assert "a finished run; choose another --name, or more --epochs than its 2" in taken.stderr
    longer = command("--name", "typed", "--epochs", "3")
    assert f"{place.runs / 'typed'}: goes on with epoch 3 of 3" in longer.stderr.splitlines()
    assert len(Run(place.runs / "typed").history) == 3
