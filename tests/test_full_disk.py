"""Trainings and searches on a disk that fills up: one line, and they go on once there is space."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_runs import prepared, tiny_config, with_train

import trainer
from featstore import publish as publishing
from featstore.errors import WriteError
from featstore.progress import SILENT
from featstore.project import Project
from trainer.config import render_config
from trainer.run import checkpoint, training
from trainer.run.checkpoint import load_best, save_weights
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Reporter, Training
from trainer.tuning import live
from trainer.tuning.search_file import known_search, start_search
from trainer.tuning.space_file import read_space
from trainer.tuning.study import Search
from trainer.tuning.table import trial_rows
from trainer.tuning.trials import work
from trainer.tuning.workers import Watched

ROOT = Path(__file__).resolve().parent.parent
SPACE = {
    "search": {"trials": 3, "metric": "val_loss", "together": 1, "sampler": "random"},
    "train": {"lr": {"log_uniform": [1e-3, 1e-2]}, "epochs": 2},
}


class Disk:
    """A file system of a few megabytes, and a file that fills it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self, left: int = 0) -> None:
        """Use it up, down to so many bytes."""
        with self._ballast.open("ab", buffering=0) as file:
            while (missing := shutil.disk_usage(self.folder).free - left) > 0:
                try:
                    file.write(b"\0" * min(missing, 1 << 16))
                except OSError:  # Full, whatever it said to be free.
                    break

    def empty(self) -> None:
        """Give the space back."""
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up between the check of its space and the write."""
    for module in (checkpoint, training):
        monkeypatch.setattr(module, "check_space", lambda folder, num_bytes: None)


@pytest.fixture(scope="module")
def project(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    return prepared(tiny_config(tmp_path_factory.mktemp("full"), tiny_vit, tiny_text))


def train(project: Project, run: Run, reporter: Reporter | None = None, **changes: Any) -> Training:
    config = with_train(project.config, **changes)
    return Training(run, project, config.train, None, reporter)


def start(project: Project, folder: Path) -> Search:
    space = read_space(SPACE, {}, {})
    return start_search(folder, space.base(project.config), space, None, None, project)


def results(search: Search) -> list[Any]:
    return [(r["trial"], r["state"], r["params"], r["value"]) for r in trial_rows(search)]


@pytest.fixture(scope="module")
def whole(project: Project, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What an undisturbed search gives."""
    search = start(project, tmp_path_factory.mktemp("whole") / "search")
    work(search, project)
    return results(search)


def test_a_disk_without_space_is_one_line_before_anything_is_written(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    made = train(project, run)
    needed: list[int] = []
    monkeypatch.setattr(training, "check_space", lambda folder, size: needed.append(size))
    made.begin()
    run.manifest_path.unlink()
    free = SimpleNamespace(free=needed[0] + publishing.SPARE_BYTES - 1)
    monkeypatch.undo()
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda path: free)
    with pytest.raises(WriteError, match=r"run: needs 1\.\d+ MB, and 1\.\d+ MB of"):
        made.begin()
    assert not run.manifest_path.exists()
    free.free += 1
    made.begin()
    assert run.manifest["status"] == "running"
    made.end("stopped")


def test_what_a_run_holds_fits_into_what_was_asked_for(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(training, "check_space", lambda folder, size: asked.append(size))
    run = Run(tmp_path / "run")
    made = train(project, run)
    fit(made)
    made.save()
    largest = max(run.weights_path.stat().st_size, run.checkpoint_path.stat().st_size)
    held = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
    assert held + largest <= asked[0] + publishing.SPARE_BYTES


def test_weights_on_a_full_disk_leave_the_old_ones(
    project: Project, disk: Disk, unchecked: None
) -> None:
    run = Run(disk.folder / "run")
    done = train(project, run)
    fit(done)
    before = run.weights_path.read_bytes()
    disk.fill()
    with pytest.raises(WriteError, match=r"best\.weights\.h5: cannot be written .No space left"):
        save_weights(run, done.model)
    assert run.weights_path.read_bytes() == before
    loaded = load_best(run).get_weights()
    assert all((a == b).all() for a, b in zip(loaded, done.model.get_weights(), strict=True))


def test_an_epoch_whose_weights_have_no_space_is_not_the_best(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = Run(tmp_path / "whole"), Run(tmp_path / "run")
    fit(train(project, whole, epochs=3))

    def full(folder: Path, num_bytes: int) -> None:
        raise WriteError(f"{folder}: needs {num_bytes} bytes")

    def fill(record: dict[str, Any]) -> None:
        monkeypatch.setattr(checkpoint, "check_space", full)

    # Of the epochs, each is better than the one before.
    with pytest.raises(WriteError, match="needs"):
        fit(train(project, run, Reporter(epoch=fill), epochs=3))
    assert (run.metrics["epoch"], run.manifest["status"]) == (1, "stopped")
    monkeypatch.undo()
    fit(train(project, run, epochs=3))
    assert run.metrics == whole.metrics


@pytest.mark.parametrize("later", [IndexError("later"), OSError("later"), WriteError("later")])
def test_the_first_error_is_the_one_that_is_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Exception
) -> None:
    def first(record: dict[str, Any]) -> None:
        raise WriteError("first")

    def end(training: Training, status: str) -> None:
        raise later

    monkeypatch.setattr(Training, "end", end)
    with pytest.raises(WriteError, match="first"):
        fit(train(project, Run(tmp_path / "run"), Reporter(epoch=first), epochs=1))


def test_the_first_error_of_a_search_is_the_one_that_is_read(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = start(project, tmp_path / "search")

    def gone(search: Search) -> list[dict[str, Any]]:
        raise IndexError("later")

    def run() -> None:
        with live.live_view(search) as watch:
            watch(Watched(1))
            monkeypatch.setattr(live, "trial_rows", gone)
            raise WriteError("first")

    with pytest.raises(WriteError, match="first"):
        run()


def test_a_trial_whose_record_is_damaged_says_why_it_failed(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(trainings: list[Training]) -> list[Exception]:
        for one in trainings:
            one.begin()
            one.run.manifest_path.write_text("{")
        return [RuntimeError("lost") for _ in trainings]

    monkeypatch.setattr("trainer.run.fit.train_together", lost)
    search = start(project, tmp_path / "search")
    work(search, project)
    found = [(row["state"], row["reason"]) for row in trial_rows(search)]
    assert found == [("fail", "RuntimeError: lost")] * 3


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_run_goes_on_once_there_is_space(
    project: Project, disk: Disk, tmp_path: Path, unchecked: None, left: int
) -> None:
    whole, run = Run(tmp_path / "whole"), Run(disk.folder / "run")
    fit(train(project, whole, epochs=3))

    def fill(record: dict[str, Any]) -> None:
        disk.fill(left)

    with pytest.raises(WriteError, match="cannot be written") as caught:
        fit(train(project, run, Reporter(epoch=fill), epochs=3))
    assert "\n" not in str(caught.value)
    disk.empty()
    fit(train(project, run, epochs=3))
    assert run.metrics == whole.metrics
    assert run.manifest["status"] == "finished"


def test_a_search_draws_nothing_without_space_for_its_notes(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = start(project, tmp_path / "search")
    free = SimpleNamespace(free=publishing.SPARE_BYTES - 1)
    monkeypatch.setattr(publishing.shutil, "disk_usage", lambda path: free)
    with pytest.raises(WriteError, match="search: needs"):
        work(search, project)
    assert search.drawn() == []


@pytest.mark.slow
def test_a_search_goes_on_once_there_is_space(
    project: Project, disk: Disk, whole: list[Any], unchecked: None
) -> None:
    search = start(project, disk.folder / "search")
    for _ in range(4):  # More often than a trial may end its process.
        left = 3

        def fill() -> bool:
            nonlocal left
            left -= 1
            if left == 0:
                disk.fill()
            return False

        with pytest.raises(WriteError):
            work(search, project, fill)
        disk.empty()
        base, space, source = known_search(search.folder, {})
        search = start_search(search.folder, base, space, source, None, project)
        assert {row["state"] for row in trial_rows(search)} == {"running"}
    work(search, project)
    assert results(search) == whole


def test_a_page_says_why_its_figures_are_missing(project: Project, disk: Disk) -> None:
    fit(train(project, Run(disk.folder / "run")))
    run = trainer.load_run(disk.folder / "run")
    page = disk.folder.parent / "page.html"
    disk.fill()
    with pytest.raises(
        WriteError, match=r"run: measured, but .*\.csv: cannot be written .No space"
    ):
        run.report(page, show=SILENT)
    disk.empty()
    run.report(page, show=SILENT)
    # Nor are those of earlier weights shown in their place as if they were of these.
    changed = json.loads((run.folder / "evaluate-test.json").read_text())
    changed["weights_digest"] = "another"
    (run.folder / "evaluate-test.json").write_text(json.dumps(changed))
    disk.fill()
    with pytest.raises(WriteError, match="measured, but"):
        run.report(page, show=SILENT)


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_goes_on(
    project: Project, disk: Disk, whole: list[Any], tmp_path: Path
) -> None:
    settings = tmp_path / "featstore.toml"
    settings.write_text(render_config(project.config))
    space = tmp_path / "space.toml"
    space.write_text(
        '[search]\ntrials = 3\nmetric = "val_loss"\ntogether = 1\nsampler = "random"\n'
        "[train]\nlr = {log_uniform = [1e-3, 1e-2]}\nepochs = 2\n"
    )
    command = [sys.executable, "cli.py", "search", "--name", "s", "--runs", str(disk.folder)]
    # Enough to begin: for the search's own files and a first trial.
    disk.fill(left=1_150_000)
    given = [*command, "--config", str(settings), "--space", str(space), "--workers", "2"]
    full = subprocess.run(given, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 1, full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "of the disk are free" in line
    assert "search --name s --runs" in line
    assert line.endswith("goes on")
    assert "Traceback" not in full.stderr
    disk.empty()
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [(t["trial"], t["state"], t["params"], t["value"]) for t in found["trials"]] == whole
    assert found["worker_deaths"] == 0
