"""Publishing files: whole or not at all, whatever fails and whoever else writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import FeatstoreError
from featstore.publish import (
    TEMPORARY,
    command_line,
    package_versions,
    publish,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)

ROOT = Path(__file__).resolve().parent.parent


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_failing_system_call_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(FeatstoreError, match=r"x: cannot be written .No space left") as caught:
            write_bytes(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    script = (
        "import resource, signal, sys\n"
        "from featstore.errors import FeatstoreError\n"
        "from featstore.publish import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_bytes(sys.argv[1], b'n' * 5000)\n"
        "except FeatstoreError as error:\n"
        "    sys.exit(str(error))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cannot be written (File too large)" in done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt()])
def test_an_exception_of_the_writer_passes_and_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def write_half() -> None:
        with publish(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_the_new_file_replaces_the_old_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x"
    write_bytes(path, b"old")
    with path.open("rb") as reader:
        write_text(path, "né")
        assert reader.read() == b"old"
    assert path.read_bytes() == "né".encode()
    assert os.listdir(path.parent) == ["x"]


def test_the_data_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name[:4])
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    folder = tmp_path / "folder"
    write_bytes(folder / "x", b"1")
    assert calls == ["fsync " + TEMPORARY[:4], "replace", "fsync fold"]


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FeatstoreError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "x", b"1")


def test_json_is_strict(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": "é", "a": [1, None]})
    assert path.read_text() == '{\n  "b": "é",\n  "a": [\n    1,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text())["b"] == "é"


def test_threads_that_publish_one_path_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [bytes([65 + i]) * 20_000 for i in range(4)]
    failures: list[BaseException] = []
    start = threading.Barrier(len(contents) + 1)

    def work(content: bytes) -> None:
        start.wait()
        try:
            for _ in range(25):
                with publish(path) as temporary, temporary.open("wb") as file:
                    for half in (content[:10_000], content[10_000:]):
                        file.write(half)
                        file.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    for thread in threads:
        thread.join()
    assert failures == []
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["x"]


def test_processes_that_publish_one_path_do_not_mix(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom featstore.publish import write_bytes\n"
        "for _ in range(40): write_bytes(sys.argv[1], sys.argv[2].encode() * 50_000)\n"
    )
    path = tmp_path / "x"
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(path), letter], cwd=ROOT)
        for letter in "ab"
    ]
    while any(worker.poll() is None for worker in workers):
        if path.exists():
            assert path.read_bytes() in (b"a" * 50_000, b"b" * 50_000)
    assert [worker.returncode for worker in workers] == [0, 0]
    assert os.listdir(tmp_path) == ["x"]


def test_a_killed_writer_leaves_the_old_file_and_a_removable_leftover(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"old")
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom featstore.publish import publish\n"
        "with publish(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    assert remove_leftovers(tmp_path) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_remove_leftovers_touches_nothing_else(tmp_path: Path) -> None:
    for name in ("x", ".lock", "tmp-1", f"{TEMPORARY}1-x", f"{TEMPORARY}2-y"):
        (tmp_path / name).write_text("")
    assert remove_leftovers(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == [".lock", "tmp-1", "x"]
    assert remove_leftovers(tmp_path / "absent") == 0


def test_what_an_output_records(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"python", "numpy", "h5py"} <= package_versions().keys()
    monkeypatch.setattr(sys, "argv", ["/somewhere/cli.py", "train", "--name", "a b"])
    assert command_line() == "python cli.py train --name 'a b'"


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("/somewhere/cli.py", "python cli.py"),
        ("/env/bin/featstore", "featstore"),
        ("/env/lib/featstore/__main__.py", "python -m featstore"),
    ],
)
def test_a_recorded_command_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, started: str, typed: str
) -> None:
    monkeypatch.setattr(sys, "argv", [started, "store", "verify"])
    assert command_line() == f"{typed} store verify"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("--storage=postgresql://me:s3cret@host:1/db", "--storage=postgresql://me:***@host:1/db"),
        ("postgresql+psycopg://me:a@b@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("hf://owner/name", "hf://owner/name"),
    ],
)
def test_a_recorded_command_has_no_password(
    monkeypatch: pytest.MonkeyPatch, given: str, kept: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/cli.py", "search", given, "--name", "a b"])
    assert command_line() == f"python cli.py search {kept} --name 'a b'"
