"""`cli.py search` as it is typed: workers, files, Ctrl-C, kills, what it prints, errors.

The study is kept in a journal, and on a real PostgreSQL server with several drivers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
from click.testing import CliRunner
from PIL import Image
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tiny_runs import extracted, prepared, tiny_config, worker_here

from featstore.errors import UsageError
from trainer.commands.main import cli
from trainer.config import load_config, render_config
from trainer.run.checkpoint import build_model
from trainer.tuning.storage import open_storage

ROOT = Path(__file__).resolve().parent.parent
SPACE = """
[search]
trials = 4
metric = "val_loss"
together = 1

[train]
lr = {log_uniform = [1e-3, 1e-2]}
k_txt = {choice = [0, 1]}
epochs = 2
"""


PASSWORD = "s3cret-word"
USER = "searcher"
# A server does not run as root.
UNPRIVILEGED = "postgres"


class Project:
    """A folder with settings, features of the photos and searches."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.runs = folder, folder / "runs"
        (folder / "featstore.toml").write_text(render_config(config))
        (folder / "space.toml").write_text(SPACE)
        self.settings = ["--config", str(folder / "featstore.toml")]
        self.space = [*self.settings, "--space", str(folder / "space.toml")]

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "cli.py", *arguments, "--runs", str(self.runs)]

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def call(self, *arguments: str, code: int = 0) -> Any:
        """Run a command that needs no processes in this one, where TensorFlow is loaded."""
        result = CliRunner().invoke(cli, [*arguments, "--runs", str(self.runs)])
        assert result.exit_code == code, result.output
        return result

    def begin(self, name: str, *arguments: str) -> None:
        """Make a search of which no trial is run yet."""
        with worker_here():
            self.call("search", "--name", name, *arguments, "--timeout", "0")

    def search(self, name: str, *arguments: str) -> Any:
        return json.loads(self.run("search", "--name", name, "--json", *arguments).stdout)

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command("search", "--name", name, "--json", *arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_for(self, process: subprocess.Popen[bytes], path: str) -> None:
        while process.poll() is None and not list(self.runs.glob(path)):
            time.sleep(0.02)


def hparams_of(folder: Path) -> list[Any]:
    """What TensorBoard's HParams tab shows of a folder, by trial."""
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    board = base_plugin.TBContext(data_provider=provider, logdir=str(folder))
    context = backend_context.Context(board)
    request = api_pb2.ListSessionGroupsRequest(slice_size=99, include_metrics=True)
    request.allowed_statuses.extend(api_pb2.Status.values())
    handler = list_session_groups.Handler(RequestContext(), context, "", request)
    return sorted(handler.run().session_groups, key=lambda group: str(group.name))


@pytest.fixture(scope="module")
def project(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("search")
    config = tiny_config(folder, tiny_vit, tiny_text)
    extracted(config)
    return Project(folder, config)


def program(name: str) -> str | None:
    """Find a program of the server, which Debian keeps out of the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name)
    return next((str(f / name) for f in folders if (f / name).exists()), found)


def as_user(command: list[str]) -> list[str]:
    if os.geteuid() == 0:
        return ["runuser", "-u", UNPRIVILEGED, "--", *command]
    return command


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of an empty database on a server of this test's own."""
    initdb, postgres = program("initdb"), program("postgres")
    if not (initdb and postgres):
        if os.environ.get("REQUIRE_POSTGRESQL"):
            pytest.fail("no PostgreSQL server is installed")
        pytest.skip("no PostgreSQL server is installed")
    folder = Path(tempfile.mkdtemp(prefix="featstore-pg-"))
    password = folder / "password"
    password.write_text(PASSWORD)
    if os.geteuid() == 0:
        for path in (folder, password):
            shutil.chown(path, UNPRIVILEGED)
    data = folder / "data"
    setup = [initdb, "-D", str(data), "-U", USER, f"--pwfile={password}", "--auth=scram-sha-256"]
    subprocess.run(as_user(setup), check=True, capture_output=True, cwd="/")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [postgres, "-D", str(data), "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            as_user([*command, "-h", "127.0.0.1"]), stdout=log, stderr=log, cwd="/"
        )
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        assert process.poll() is None, (folder / "log").read_text()
        yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        # To the server itself: what runs it as another user does not pass a signal on.
        os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGINT)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def results(found: Any) -> list[Any]:
    return [(t["trial"], t["state"], t["params"], t["value"]) for t in found["trials"]]


@pytest.fixture(scope="module")
def whole(project: Project) -> list[Any]:
    """What an undisturbed search with two workers gives."""
    found = project.search("whole", *project.space, "--workers", "2")
    assert found["peak_memory_bytes"] > 0
    assert (found["workers"], found["worker_deaths"]) == (2, 0)
    assert len({trial["worker"] for trial in found["trials"]}) == 2
    return results(found)


@pytest.mark.slow
def test_what_a_search_leaves(project: Project, whole: list[Any]) -> None:
    folder = project.runs / "whole"
    assert [state for _, state, *_ in whole] == ["complete"] * 4
    for name in ("history", "parallel_coordinates"):
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5
    # As the printed commands open it.
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.load_study(study_name="whole", storage=storage)
    assert study.best_value == min(value for *_, value in whole)
    groups = hparams_of(folder)
    assert [group.name for group in groups] == [f"trial-{number:04d}" for number, *_ in whole]
    for group, (_, _, params, value) in zip(groups, whole, strict=True):
        found = {name: setting.number_value for name, setting in group.hparams.items()}
        assert found == params
        losses = [m.value for m in group.metric_values if m.name.tag == "epoch/val_loss"]
        assert losses[0] >= value - 1e-6
    config = (folder / "trial-0001" / "config.toml").read_text()
    assert f"lr = {whole[1][2]['lr']}" in config
    project.call("evaluate", str(folder / "trial-0001"), "--split", "test")


@pytest.mark.slow
def test_show_and_best(project: Project, whole: list[Any]) -> None:
    shown = project.call("search", "show", "whole")
    best = min(whole, key=lambda trial: trial[3])
    line = shown.stdout.splitlines()[1]
    assert line.startswith(f"trial-{best[0]:04d}")
    assert f"{best[3]:.4f}" in line
    found = json.loads(project.call("search", "show", "whole", "--json").stdout)
    assert sorted(results(found)) == whole
    one = json.loads(project.call("search", "best", "whole", "--json").stdout)
    assert (one["trial"], one["value"]) == (best[0], best[3])
    refused = project.call("search", "best", "whole", "--split", "test", code=2)
    assert "--split belongs to --epochs and --seeds" in refused.stderr
    again = ["search", "best", "whole", "--seeds", "2", "--epochs", "2", "--json"]
    first = json.loads(project.call(*again).stdout)
    scores = [run["accuracy"] for run in first["runs"]]
    assert len(scores) == 2
    assert first["accuracy"]["mean"] == pytest.approx(sum(scores) / 2)
    assert first["accuracy"]["deviation"] == pytest.approx(float(np.std(scores, ddof=1)))
    weights = Path(first["runs"][0]["run"]) / "best.weights.h5"
    before = weights.stat().st_mtime_ns
    assert json.loads(project.call(*again).stdout) == first
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--runs elsewhere show whole", "--runs"),
        ("--json --trials 9 best whole", "--json, --trials"),
        ("-q --lr 1e-4 show whole", "--lr"),
    ],
)
def test_what_stands_before_show_and_best_is_not_lost(line: str, flags: str) -> None:
    done = CliRunner().invoke(cli, ["search", *line.split()])
    assert done.exit_code == 2
    told = set(done.stderr.partition(": before")[0].removeprefix("error: ").split(", "))
    assert told == set(flags.split(", "))
    assert "which does not see what is given there" in done.stderr
    quiet = CliRunner().invoke(cli, ["search", "-q", "show", "absent"])
    assert (quiet.exit_code, "absent: no search there" in quiet.stderr) == (1, True)


@pytest.mark.slow
def test_ctrl_c_and_on_by_the_name(project: Project, whole: list[Any]) -> None:
    process = project.start("stopped", *project.space, "--workers", "2")
    project.wait_for(process, "stopped/trial-0001/history.csv")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err.decode()
    assert "--name stopped goes on" in err.decode()
    assert "Traceback" not in err.decode()
    shown = json.loads(project.call("search", "show", "stopped", "--json").stdout)
    assert "running" not in {trial["state"] for trial in shown["trials"]}
    assert "stopped" in {trial["state"] for trial in shown["trials"]}
    assert results(project.search("stopped", "--workers", "2")) == whole


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_as_undisturbed(
    project: Project, whole: list[Any]
) -> None:
    chance = random.Random(0)
    kills = 0
    for number in (0, 2):
        arguments = project.space if number == 0 else []
        process = project.start("shot", *arguments, "--workers", "2")
        project.wait_for(process, f"shot/trial-000{number}/*")
        time.sleep(3 * chance.random())
        children = psutil.Process(process.pid).children(recursive=True)
        for child in [*children, process]:
            kills += 1
            child.kill()
        process.communicate()
    assert kills >= 4
    assert results(project.search("shot", "--workers", "2")) == whole


@pytest.mark.slow
def test_a_killed_worker_is_replaced(project: Project, whole: list[Any]) -> None:
    process = project.start("worker", *project.space)
    project.wait_for(process, "worker/trial-0001/history.csv")
    children = psutil.Process(process.pid).children()
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    found = json.loads(out)
    assert found["worker_deaths"] == 1
    one_thread_more = [(*trial[:3], pytest.approx(trial[3], abs=1e-5)) for trial in whole]
    assert results(found) == one_thread_more


def hides_the_password(folder: Path, *outputs: str) -> None:
    texts = [*outputs]
    for path in folder.rglob("*"):
        if path.is_file():
            texts.append(path.read_bytes().decode(errors="replace"))
    assert not any(PASSWORD in text for text in texts)


@pytest.mark.slow
def test_two_drivers_share_one_study(server: str, project: Project, whole: list[Any]) -> None:
    given = ["--storage", server, "--workers", "1"]
    project.begin("shared", *project.space, *given)
    # They take as long to load, so that neither has done all when the other begins.
    first, second = (project.start("shared", *given) for _ in range(2))
    ends = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ends
    there = ["shared", "--storage", server, "--json"]
    found = json.loads(project.call("search", "show", *there).stdout)
    rows = sorted(results(found))
    assert [row[:3] for row in rows] == [row[:3] for row in whole]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in whole], abs=1e-5)
    assert len({trial["worker"] for trial in found["trials"]}) == 2
    hides_the_password(project.runs / "shared", *(part.decode() for end in ends for part in end))
    best = json.loads(project.call("search", "best", *there).stdout)
    assert best["value"] == min(row[3] for row in rows)


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(server: str, project: Project, whole: list[Any]) -> None:
    given = ["--storage", server, "--workers", "2"]
    process = project.start("killed", *project.space, *given)
    project.wait_for(process, "killed/trial-0001/history.csv")
    for child in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        child.kill()
    process.communicate()
    assert results(project.search("killed", *given)) == whole


@pytest.mark.slow
def test_a_study_of_the_name_in_another_folder_is_refused(server: str, project: Project) -> None:
    first = ["--config", project.settings[1], "--storage", server]
    spaces = []
    for name in ("one", "two"):
        path = project.folder / f"{name}.toml"
        path.write_text(SPACE.replace("1e-2", "1e-2" if name == "one" else "1e-1"))
        spaces.append(["--space", str(path)])
    project.begin("same", *first, *spaces[0])
    shutil.rmtree(project.runs / "same")
    done = project.call("search", "--name", "same", *first, *spaces[1], code=2)
    assert "the storage has another study named 'same'" in done.stderr


@pytest.mark.slow
def test_a_search_is_gone_on_with_in_its_own_storage(server: str, project: Project) -> None:
    project.begin("own", *project.space, "--storage", server)
    done = project.call("search", "--name", "own", code=2)
    assert "its storage is postgresql://searcher:***@" in done.stderr
    assert "give that as --storage" in done.stderr


@pytest.mark.slow
def test_a_wrong_password_is_one_line_without_it(server: str, tmp_path: Path) -> None:
    wrong = server.replace(PASSWORD, "wr0ng-word")
    with pytest.raises(UsageError, match="cannot be opened") as raised:
        open_storage(tmp_path, wrong)
    message = str(raised.value)
    assert "\n" not in message
    assert "wr0ng-word" not in message
    assert "searcher:***@" in message


@pytest.mark.slow
def test_the_boundaries_are_extracted_first_with_an_estimate(
    tiny_vit: Path, tiny_text: Path, tmp_path: Path
) -> None:
    project = Project(tmp_path, tiny_config(tmp_path, tiny_vit, tiny_text))
    cache = tmp_path / "cache"
    dry = project.call("search", "--name", "dry", *project.space, "--dry-run")
    assert "to extract: 44 images, about" in dry.stderr
    assert "sentences at k_txt 0" in dry.stderr
    assert "sentences at k_txt 1" in dry.stderr
    assert "4 trials of lr, k_txt" in dry.stdout
    assert not project.runs.exists()
    assert not list(cache.rglob("*.h5"))
    done = project.run("search", "--name", "x", *project.space, "--trials", "1", "--epochs", "1")
    assert done.stderr.count("to extract:") == 3
    assert len(list((cache / "vit").iterdir())) == 1
    assert len(list((cache / "text").iterdir())) == 2
    # What is said of the disk is what the weights take, but for HDF5's own part.
    said = json.loads(
        project.call(
            "search", *project.space, "--trials", "1", "--k-txt", "1", "--dry-run", "--json"
        ).stdout
    )
    config = load_config(tmp_path / "featstore.toml", {"train": {"k_txt": 1}})
    model = build_model(config, (16, 16))
    assert said["kept_bytes"] == sum(4 * int(np.prod(v.shape)) for v in model.trainable_variables)
    assert "optuna-dashboard" in done.stderr
    assert "tensorboard --logdir" in done.stderr
    # Said before the training that it would be for.
    best = project.call("search", "best", "x", "--seeds", "1", "--split", "test", code=1)
    assert "of split 'test' (first" in best.stderr
    assert not list((project.runs / "x").glob("best-*"))
    stored = {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5")}
    again = project.call("search", "--name", "y", *project.space, "--dry-run")
    assert "to extract:" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.h5")} == stored


@pytest.mark.slow
def test_no_trial_starts_after_the_timeout(project: Project) -> None:
    found = project.run(
        "search", "--name", "late", *project.space, "--timeout", "0", "--json"
    ).stdout
    assert json.loads(found)["trials"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--space", "none.toml"], 2, "none.toml"),
        (["--name", "../x"], 2, "--name '../x'"),
        (["--name", ""], 2, "--name ''"),
        (["--storage", "nonsense://x"], 2, "--storage nonsense://x"),
        (["--num-gpus", "1"], 2, "give --ray ADDRESS"),
        (["--num-cpus", "2"], 2, "give --ray ADDRESS"),
        (["--ray", "nowhere"], 2, "expected host:port"),
        (["--trials", "-1"], 2, "trials"),
        (["show", "nothing"], 1, "no search there"),
        (["best", "nothing"], 1, "no search there"),
    ],
)
def test_errors_are_one_line(project: Project, arguments: list[str], code: int, words: str) -> None:
    first = [] if arguments[0] in ("show", "best") else project.settings
    result = project.call("search", *arguments, *first, code=code)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]
    # Said before anything is extracted.
    assert "to extract" not in result.stderr
    assert not list(project.runs.glob("search-*"))
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_run_and_a_search_do_not_share_a_name(project: Project, whole: list[Any]) -> None:
    done = project.call("train", "--name", "whole", *project.settings, code=2)
    assert "a search, not a run; choose another --name" in done.stderr
    assert whole


ALONE = """
import sys
from click.testing import CliRunner
from trainer.commands.main import cli
if __name__ == "__main__":
    done = CliRunner().invoke(cli, sys.argv[1:])
    assert done.exit_code == 0, done.output
    print("trial-0000  complete" in done.stdout, "keras" in sys.modules)
"""


@pytest.mark.slow
def test_who_starts_the_workers_does_not_import_keras(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    """It takes seconds, and each worker does it anyway."""
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, epochs=1)
    prepared(config)
    (tmp_path / "featstore.toml").write_text(render_config(config))
    (tmp_path / "space.toml").write_text("[search]\ntrials = 1\n[train]\nlr = {choice = [0.001]}\n")
    (tmp_path / "alone.py").write_text(ALONE)
    typed = ["search", "--config", "featstore.toml", "--space", "space.toml", "--runs", "runs"]
    done = subprocess.run(
        [sys.executable, "alone.py", *typed],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False"], done.stdout + done.stderr
