"""What is shown while work goes: drawn and removed on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from terminal import on_terminal, screen
from tiny_runs import prepared, tiny_config

import trainer
from featstore import progress
from featstore.progress import SHOWN, SILENT, Show, print_line, showing, shows_work, working
from featstore.publish import command_line
from trainer.config import render_config
from trainer.run.shown import epoch_bar, reporter_of

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0


class Stream(io.StringIO):
    """A stderr that can be waited at: other threads write to it."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal, self._news = terminal, threading.Condition()

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        with self._news:
            found = super().write(text)
            self._news.notify_all()
        return found

    def await_text(self, text: str, after: int = 0) -> None:
        """Return once a text was written; a test that waits in vain fails."""
        with self._news:
            assert self._news.wait_for(lambda: text in self.getvalue()[after:], SECONDS), (
                self.getvalue()
            )


def shown_on(terminal: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a test a stderr on which nothing has to be waited for before it is shown."""

    def add(test: Callable[..., None]) -> Callable[..., None]:
        def run(monkeypatch: pytest.MonkeyPatch) -> None:
            for name in ("LIVE_SECONDS", "SLOW_SECONDS", "REDRAW_SECONDS", "LOGGED_SECONDS"):
                monkeypatch.setattr(progress, name, 0.01)
            # In the test itself: pytest puts its own stderr there before.
            stream = Stream(terminal)
            with contextlib.redirect_stderr(stream):
                test(stream)

        return run

    return add


terminal, log = shown_on(True), shown_on(False)


@terminal
def test_a_wait_is_drawn_and_removed(stream: Stream) -> None:
    with showing(SHOWN), working("reading the rows"):
        stream.await_text("\rreading the rows: 0 s")
        print_line("a note")
        here = len(stream.getvalue())
        stream.await_text("reading the rows", here)
    assert screen(stream.getvalue()) == ["a note"]


@terminal
def test_of_waits_the_innermost_is_shown(stream: Stream) -> None:
    with showing(SHOWN), working("evaluating"):
        stream.await_text("evaluating")
        with working("loading"):
            here = len(stream.getvalue())
            stream.await_text("loading", here)
            assert "evaluating" not in stream.getvalue()[here:]
        stream.await_text("evaluating", len(stream.getvalue()))
    assert screen(stream.getvalue()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


@terminal
def test_a_wait_ends_with_its_work(stream: Stream) -> None:
    def divide() -> None:
        with showing(SHOWN), working("dividing"):
            stream.await_text("dividing")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()
    assert screen(stream.getvalue()) == []
    with working("outside"):
        assert "outside" not in stream.getvalue()


@terminal
def test_a_bar_lives_before_its_first_rows(stream: Stream) -> None:
    with SHOWN.bar(4, "photos") as advance:
        here = len(stream.getvalue())
        stream.await_text("0/4", here)
        advance(4)
    assert "4/4" in screen(stream.getvalue())[-1]
    with SHOWN.slow_bar(4, "rows of val") as advance:
        stream.await_text("rows of val")
        advance(4)
    assert not any("rows of val" in line for line in screen(stream.getvalue()))


@log
def test_a_log_has_lines(stream: Stream) -> None:
    with showing(SHOWN), working("reading the rows"):
        stream.await_text("reading the rows: 0 s\n")
    with SHOWN.bar(40_000, "photos") as advance:
        stream.await_text("photos: 0 of 40,000, 0 s\n")
        advance(5_000)
        stream.await_text("photos: 5,000 of 40,000 (12 %), 0 s\n")
        time.sleep(progress.BATCH_SECONDS)
        advance(5_000)
        stream.await_text("photos: 10,000 of 40,000 (25 %), ")
        stream.await_text(" left\n")
        advance(30_000)
    assert "\r" not in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].startswith("photos: 40,000 of 40,000, ")


def left(line: str) -> int:
    """Return the seconds that a log's line or a bar says are left."""
    found = re.search(r"about (?:(\d+) min )?(\d+) s left|<(\d+):(\d+)", line)
    assert found is not None, line
    return sum(60 * int(m or 0) + int(s or 0) for m, s in (found.groups()[:2], found.groups()[2:]))


@pytest.mark.parametrize("drawn", [False, True])
def test_what_was_waited_for_first_is_not_counted_for_the_rest(
    drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler, or the part of an epoch that an earlier command did."""
    for name in ("LIVE_SECONDS", "SLOW_SECONDS", "REDRAW_SECONDS", "LOGGED_SECONDS"):
        monkeypatch.setattr(progress, name, 0.02)
    for compiling, first in ((1.0, 1), (0.0, 500)):
        stream = Stream(drawn)
        with contextlib.redirect_stderr(stream), SHOWN.bar(1000, "photos") as advance:
            time.sleep(compiling)
            for _ in range(first):
                advance(1)
            time.sleep(progress.BATCH_SECONDS)
            for _ in range(6):
                time.sleep(0.05)
                advance(10)
        # At 200 a second.
        last = re.split("[\r\n]+", stream.getvalue().strip())[-2]
        assert 1 <= left(last) <= 10 - first // 100, stream.getvalue()


@log
def test_a_log_is_not_told_of_what_took_no_time(
    stream: Stream,
) -> None:
    progress.SLOW_SECONDS = 1000.0
    with showing(SHOWN), working("reading the rows"), SHOWN.slow_bar(2, "rows") as advance:
        advance(2)
    assert stream.getvalue() == ""
    with SHOWN.bar(2, "photos") as advance:
        advance(2)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("photos: 2 of 2, ")


@log
def test_an_epoch_in_a_log(stream: Stream) -> None:
    with epoch_bar(3, 200) as bar:
        bar.update(25)
        time.sleep(progress.BATCH_SECONDS)
        bar.update(25)
        bar.set_postfix(loss="0.6931")
        stream.await_text("epoch 3: 50 of 200 (25 %), ")
        stream.await_text("left, loss 0.6931\n")
    assert "\r" not in stream.getvalue()


def test_work_deep_inside_follows_show(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def wait(what: str) -> threading.Lock:
        said.append(what)
        return threading.Lock()

    @shows_work
    def work(what: str, show: Show = SILENT) -> str:
        with working(what):
            return what

    assert work("a") == "a"
    assert work("b", Show(wait=wait)) == "b"
    assert work("c", show=Show(wait=wait)) == "c"
    with working("d"):
        assert said == ["b", "c"]


@pytest.mark.slow
def test_silent_is_silent(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    project = prepared(tiny_config(tmp_path, tiny_vit, tiny_text))
    capfd.readouterr()
    trainer.train(project, name="a", runs=tmp_path / "runs", epochs=1, show=SILENT)
    assert capfd.readouterr() == ("", "")
    assert reporter_of(SHOWN) is not reporter_of(SILENT)


# Shows at once what is waited for; the entry is this tree's.
AT_ONCE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from featstore import progress;"
    " progress.LIVE_SECONDS = progress.SLOW_SECONDS = progress.REDRAW_SECONDS = 0.01;"
    " from trainer.commands.main import main; main()"
)


@pytest.mark.slow
def test_a_command_shows_its_work(tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> None:
    config = tiny_config(tmp_path, tiny_vit, tiny_text)
    (tmp_path / "featstore.toml").write_text(render_config(config))
    command = [sys.executable, "-c", AT_ONCE, str(ROOT), "extract-vit"]
    seen = on_terminal(command, str(tmp_path))
    assert seen.exit_code == 0, seen.text
    for what in ("loading Keras: ", "loading an encoder: "):
        assert f"\r{what}" in seen.text
    rows, bar, done = screen(seen.text)
    assert rows.startswith("rows: train ")
    assert "100%" in bar
    assert "extracted in" in done
    (features,) = (tmp_path / "cache" / "vit").iterdir()
    shutil.rmtree(features)
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "loading Keras: 0 s\n" in piped.stderr
    assert "\r" not in piped.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["/x/ipykernel_launcher.py", "-f", "/tmp/kernel.json"], "trainer.tried('vit', k_txt=3"),
        (["-c"], "trainer.tried('vit', k_txt=3"),
        (["cli.py", "train", "--name", "a b"], "python cli.py train --name 'a b'"),
        (["/w/study.py"], "python study.py"),
    ],
)
def test_the_command_of_a_notebook_is_the_call(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", argv)

    @shows_work
    def inner(show: Show = SILENT) -> str:
        return command_line()

    def tried(kind: str, project: object, show: Show = SILENT, **settings: object) -> str:
        return inner(show=show)

    tried.__module__, tried.__qualname__ = "trainer.api", "tried"
    settings = {"k_txt": 3, "runs": Path("r"), "storage": "postgresql://me:secret@host/d"}
    found = shows_work(tried)("vit", object(), **settings)
    if said.startswith("trainer"):
        said = "trainer.tried('vit', project, k_txt=3, runs='r',"
        assert found == f"{said} storage='postgresql://me:***@host/d')"
        assert command_line() == "Python"
    else:
        assert found == command_line() == said
