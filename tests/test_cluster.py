"""A search on Ray: actors on two nodes end it as the processes of one machine do."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_processes import none_left, ray_processes
from tiny_runs import tiny_config

from featstore.errors import RunError, StoppedError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.ray_cluster import Actors
from trainer.tuning import ray as on_ray
from trainer.tuning.ray import TrialActor, run_on_ray
from trainer.tuning.search_file import start_search
from trainer.tuning.space import Space
from trainer.tuning.space_file import read_space
from trainer.tuning.study import Search
from trainer.tuning.table import trial_rows
from trainer.tuning.workers import Watched, run_workers

ROOT = Path(__file__).resolve().parent.parent
TWO = Actors(count=2, num_gpus=0, num_cpus=1)
TRIALS = 4
FOREVER = float("inf")
# Long enough that every actor can be met in the middle of a trial, one that starts last too.
EPOCHS = 20


def space_of(folder: Path, epochs: int = EPOCHS) -> Space:
    path = folder / "space.toml"
    path.write_text(
        f'[search]\ntrials = {TRIALS}\ntogether = 1\nseed = 3\nmetric = "val_loss"\n'
        f"[train]\nlr = {{log_uniform = [1e-4, 1e-3]}}\nk_txt = {{choice = [0, 1]}}\n"
        f"epochs = {epochs}\nearly_stop_patience = {epochs}\n"
    )
    return read_space(path, {}, {})


def searches(work: tuple[Path, Any, Any], name: str) -> Search:
    folder, config, project = work
    space = space_of(folder)
    return start_search(folder / "runs" / name, space.base(config), space, None, None, project)


@pytest.fixture(scope="module")
def work(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("search")
    config = tiny_config(folder, tiny_vit, tiny_text)
    project = Project(config)
    project.extract("vit", show=SILENT)
    return folder, config, project


@pytest.fixture(scope="module")
def alone(work: Any) -> list[Any]:
    """The results of one machine's processes, each with one thread as an actor has."""
    search = searches(work, "alone")
    run_workers(search, 2, FOREVER, lambda: False)
    return results(search)


def results(search: Search) -> list[Any]:
    """What each trial drew and reached; the order in which they ended does not count."""
    rows = trial_rows(search)
    return [(row["trial"], row["state"], row["params"], row["value"]) for row in rows]


def actors() -> list[psutil.Process]:
    return ray_processes("TrialActor")


Rows = list[dict[str, Any]]


class At:
    """Calls a function once, as soon as the trials are as far as it needs them."""

    def __init__(
        self, search: Search, far: Callable[[Rows], bool], call: Callable[[], object]
    ) -> None:
        self.search, self.far, self.call, self.called = search, far, call, False

    def __call__(self, watched: Watched) -> None:
        if not self.called and self.far(trial_rows(self.search)):
            self.called = True
            self.call()


def begun(rows: Rows) -> bool:
    """Tell whether a trial is somewhere in its middle."""
    return sum(row["epoch"] for row in rows) >= EPOCHS // 2


def busy(rows: Rows) -> set[int]:
    """Return the processes that are in a trial, after its first epoch."""
    running = [row for row in rows if row["state"] == "running" and row["epoch"]]
    return {int(row["worker"].split()[-1]) for row in running}


@pytest.mark.slow
def test_two_nodes_end_as_one_machine(cluster: Any, work: Any, alone: list[Any]) -> None:
    search, lines = searches(work, "two"), []
    watched = run_on_ray(cluster.address, search, TWO, FOREVER, lambda: False, say=lines.append)
    assert results(search) == alone
    assert {state for _, state, _, _ in alone} == {"complete"}
    workers = {row["worker"] for row in trial_rows(search)}
    assert len(workers) == 2
    assert lines == ["Ray: 2 workers, each with 0 GPUs and 1 CPUs"]
    assert (watched.workers, watched.deaths) == (2, 0)
    assert watched.peak_bytes > 0
    assert not list(search.folder.glob(".tmp-*"))
    assert none_left("TrialActor")


@pytest.mark.slow
def test_killed_workers_lose_nothing(cluster: Any, work: Any, alone: list[Any]) -> None:
    search = searches(work, "killed")

    def kill() -> None:
        for process in actors():
            process.kill()

    watch = At(search, lambda rows: len(busy(rows)) == 2, kill)
    watched = run_on_ray(cluster.address, search, TWO, FOREVER, lambda: False, watch)
    assert watch.called
    assert watched.deaths >= 2
    assert results(search) == alone


@pytest.mark.slow
def test_a_lost_node_loses_nothing(cluster: Any, work: Any, alone: list[Any]) -> None:
    search = searches(work, "lost")
    node = cluster.add_node(num_cpus=1)
    three = dataclasses.replace(TWO, count=3)
    (raylet,) = node.all_processes["raylet"]
    own = psutil.Process(raylet.process.pid).children
    watch = At(
        search,
        lambda rows: bool(busy(rows) & {child.pid for child in own()}),
        lambda: cluster.remove_node(node, allow_graceful=False),
    )
    watched = run_on_ray(
        # Two nodes have no room for the third actor: it waits, and the search ends without it.
        cluster.address,
        search,
        three,
        FOREVER,
        lambda: False,
        watch,
    )
    assert watch.called
    assert watched.deaths == 1
    assert results(search) == alone


@pytest.mark.slow
def test_a_stopped_search_goes_on(cluster: Any, work: Any, alone: list[Any]) -> None:
    search, asked = searches(work, "stopped"), []
    watch = At(search, begun, lambda: asked.append(True))
    with pytest.raises(StoppedError, match="--name stopped goes on"):
        run_on_ray(cluster.address, search, TWO, FOREVER, lambda: bool(asked), watch)
    assert none_left("TrialActor")
    states = [row["state"] for row in trial_rows(search)]
    assert "running" in states
    # Saved between two epochs, so that nothing is computed twice.
    run_on_ray(cluster.address, search, TWO, FOREVER, lambda: False)
    assert results(search) == alone


@pytest.mark.slow
def test_workers_that_cannot_live_are_given_up(
    cluster: Any, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fatal(TrialActor):
        def work(self, job: Any) -> Any:
            os._exit(1)

    monkeypatch.setattr(on_ray, "TrialActor", Fatal)
    search = searches(work, "fatal")
    with pytest.raises(RunError, match="6 workers ended one after the other"):
        run_on_ray(cluster.address, search, TWO, FOREVER, lambda: False)


def test_a_worker_elsewhere_says_what_it_does_not_see(tmp_path: Path) -> None:
    def job(folder: Path, token: str = "of this search") -> Any:
        return on_ray._Job(folder, "marker", token, None, FOREVER, ".", 0, {}, tuple(sys.argv), "")

    (tmp_path / "marker").write_text("of another search")
    for wrong in (job(tmp_path / "nowhere"), job(tmp_path)):
        ended = TrialActor().work(wrong)
        assert ended.how == "refused"
        assert f"{wrong.folder} is not there; a search on several machines" in ended.why
    right = job(tmp_path, "of another search")
    assert "no search there" in TrialActor().work(right).why


@pytest.mark.slow
def test_the_command_on_ray_stops_and_goes_on(work: Any, alone: list[Any]) -> None:
    folder, config, _ = work
    from trainer.config import render_config

    (folder / "featstore.toml").write_text(render_config(config))
    space_of(folder)
    ray = ["--ray", "local", "--num-cpus", "1", "--workers", "1", "--runs", str(folder / "runs")]
    begin = ["--config", str(folder / "featstore.toml"), "--space", str(folder / "space.toml")]
    command = [sys.executable, "cli.py", "search", "--name", "typed", "--json", *ray]
    process = subprocess.Popen(
        [*command, *begin],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    history = folder / "runs" / "typed" / "trial-0000" / "history.csv"
    while process.poll() is None and not history.exists():
        time.sleep(0.05)
    # As Ctrl-C does: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert "Traceback" not in err.decode()
    assert "--name typed goes on" in err.decode()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = [(t["trial"], t["state"], t["params"], t["value"]) for t in found["trials"]]
    # The command's own actors train with XLA, which rounds otherwise.
    assert rows == [(*trial[:3], pytest.approx(trial[3], abs=1e-5)) for trial in alone]
    assert found["workers"] == 1
