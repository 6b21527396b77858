"""A search whose study a real PostgreSQL server keeps, with several drivers at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_search_command import SPACE, Project
from tiny_runs import extracted, tiny_config

from featstore.errors import UsageError
from trainer.tuning.storage import masked, open_storage

PASSWORD = "s3cret-word"
USER = "searcher"
# A server does not run as root.
UNPRIVILEGED = "postgres"


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
    import tempfile

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


@pytest.fixture(scope="module")
def project(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("postgresql")
    config = tiny_config(folder, tiny_vit, tiny_text)
    extracted(config)
    return Project(folder, config)


@pytest.fixture(scope="module")
def whole(project: Project) -> list[Any]:
    """The search with a journal; every trial runs with one thread, as with two workers."""
    return values(project.search("journal", *project.space, "--workers", "2"))


def values(found: Any) -> list[Any]:
    return [(t["trial"], t["state"], t["params"], t["value"]) for t in found["trials"]]


def hides_the_password(folder: Path, *outputs: str) -> None:
    texts = [*outputs]
    for path in folder.rglob("*"):
        if path.is_file():
            texts.append(path.read_bytes().decode(errors="replace"))
    assert not any(PASSWORD in text for text in texts)


@pytest.mark.slow
def test_two_drivers_share_one_study(server: str, project: Project, whole: list[Any]) -> None:
    given = ["--storage", server, "--workers", "1"]
    first = project.start("shared", *project.space, *given)
    project.wait_for(first, "shared/search.json")
    second = project.start("shared", *given)
    ends = [process.communicate() for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ends
    there = ["shared", "--storage", server, "--json"]
    found = json.loads(project.run("search", "show", *there).stdout)
    rows = sorted(values(found))
    assert [row[:3] for row in rows] == [row[:3] for row in whole]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in whole], abs=1e-5)
    assert len({trial["worker"] for trial in found["trials"]}) == 2
    hides_the_password(project.runs / "shared", *(part.decode() for end in ends for part in end))
    best = json.loads(project.run("search", "best", *there).stdout)
    assert best["value"] == min(row[3] for row in rows)


@pytest.mark.slow
def test_a_killed_driver_loses_nothing(server: str, project: Project, whole: list[Any]) -> None:
    import psutil

    given = ["--storage", server, "--workers", "2"]
    process = project.start("killed", *project.space, *given)
    project.wait_for(process, "killed/trial-0001/history.csv")
    for child in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        child.kill()
    process.communicate()
    assert values(project.search("killed", *given)) == whole


@pytest.mark.slow
def test_a_study_of_the_name_in_another_folder_is_refused(server: str, project: Project) -> None:
    first = ["--config", project.settings[1], "--storage", server, "--timeout", "0"]
    spaces = []
    for name in ("one", "two"):
        path = project.folder / f"{name}.toml"
        path.write_text(SPACE.replace("1e-2", "1e-2" if name == "one" else "1e-1"))
        spaces.append(["--space", str(path)])
    project.run("search", "--name", "same", *first, *spaces[0])
    shutil.rmtree(project.runs / "same")
    done = project.run("search", "--name", "same", *first, *spaces[1], code=2)
    assert "the storage has another study named 'same'" in done.stderr


@pytest.mark.slow
def test_a_search_is_gone_on_with_in_its_own_storage(server: str, project: Project) -> None:
    given = ["--name", "own", *project.space, "--timeout", "0"]
    project.run("search", *given, "--storage", server)
    done = project.run("search", "--name", "own", code=2)
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


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_server_that_is_not_there(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match="cannot be opened") as raised:
        open_storage(tmp_path, f"{scheme}://me:{PASSWORD}@127.0.0.1:1/x")
    assert PASSWORD not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_driver_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[postgresql\]'"):
        open_storage(tmp_path, "postgresql://me@127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://a:b@c:1/d", "postgresql://a:***@c:1/d"),
        ("postgresql://a:b%40x@c/d", "postgresql://a:***@c/d"),
        ("postgresql://a@c/d", "postgresql://a@c/d"),
        ("sqlite:///x.db", "sqlite:///x.db"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert masked(url) == shown
