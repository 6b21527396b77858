"""Commands that messages name: typed as they stand, they do what they are said to do."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from tiny_presets import write_tiny_family
from tiny_runs import extracted, tiny_config

import trainer.tuning.drive
from featstore.errors import Command, UsageError
from featstore.store.folder import shard_paths
from trainer.commands import console
from trainer.commands.answer import Answer, answer, json_option
from trainer.commands.main import cli
from trainer.config import render_config
from trainer.tuning.workers import Watched

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("python cli.py", "featstore", "python -m featstore")
SPACE = '[search]\ntrials = 2\nmetric = "val_loss"\n[train]\nlr = {log_uniform = [1e-3, 1e-2]}\n'


def invoke(*args: str, program: str = PROGRAMS[0]) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name=program)


def advised(result: Result) -> list[str]:
    """Return the commands that a message names."""
    return re.findall(r"`([^`]+)`", result.stderr)


def follow(line: str, program: str = PROGRAMS[0]) -> Result:
    """Type a command that a message named."""
    assert line.startswith(f"{program} ")
    return invoke(*shlex.split(line.removeprefix(program)), program=program)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Path:
    """A folder with settings, a space and the photos' features."""
    folder = tmp_path_factory.mktemp("console")
    config = tiny_config(folder / "data", tiny_vit, tiny_text)
    extracted(config)
    (folder / "featstore.toml").write_text(render_config(config))
    (folder / "space.toml").write_text(SPACE)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds nothing of the project."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_has_the_name_and_the_settings_in_force_that_it_takes(program: str) -> None:
    shown: list[str] = []
    commands = [
        Command("extract-vit", split="train"),
        Command("extract-text", k_txt=2),
        Command("search", name="s", bare=True),
        Command("store", "verify"),
        Command("store", "gc"),
        Command("evaluate", "a run"),
    ]

    @click.group()
    def root() -> None:
        """Stand in for the program, with one command that fails."""

    for name, command in cli.commands.items():
        root.add_command(command, name)

    @root.command("failing")
    @console.runs_option
    def failing(runs: str) -> None:
        console.remember_settings(("--config", "c.toml"), ("--k-txt", 3), ("--dtype", "int8"))
        shown.extend(map(console.typed, commands))

    for arguments in (["--runs", "my runs"], []):
        done = CliRunner().invoke(root, ["failing", *arguments], prog_name=program)
        assert done.exit_code == 0, done.exception
    place = "--runs 'my runs'"
    assert shown[:6] == [
        f"{program} extract-vit --split train --config c.toml --dtype int8",
        f"{program} extract-text --k-txt 2 --config c.toml --dtype int8",
        f"{program} search --name s {place}",
        f"{program} store verify --config c.toml --k-txt 3 --dtype int8",
        f"{program} store gc --config c.toml --k-txt 3 --dtype int8 {place}",
        f"{program} evaluate 'a run' {place}",
    ]
    # Where it is by default is not said.
    assert shown[6:] == [line.replace(f" {place}", "") for line in shown[:6]]


def test_lists_are_typed_by_commas_and_files_by_repeated_flags(elsewhere: Path) -> None:
    found: list[Any] = []

    @click.group()
    def root() -> None:
        """Stand in for the program, with one command of settings."""

    root.add_command(cli.commands["extract-vit"], "extract-vit")

    @root.command("read")
    @console.settings("data")
    def read(config_file: str | None, **flags: Any) -> None:
        config = console.read_config(config_file, flags)
        found.append((config.data, console.typed(Command("extract-vit"))))

    def data(*arguments: str) -> Any:
        done = CliRunner().invoke(root, ["read", *arguments], prog_name="featstore")
        if done.exception:
            raise done.exception
        return found[-1]

    typed = (
        "--rows a.jsonl --rows b.csv --row-weights 2,1 --label-names 'entailment, contradiction'"
    )
    read_back, line = data(*shlex.split(typed))
    assert read_back.rows == (str(elsewhere / "a.jsonl"), str(elsewhere / "b.csv"))
    assert read_back.row_weights == (2.0, 1.0)
    assert read_back.label_names == ("entailment", "contradiction")
    assert line == f"featstore extract-vit {typed}"
    assert data("--rows", "a.jsonl")[0].rows == str(elsewhere / "a.jsonl")
    (elsewhere / "featstore.toml").write_text("[data]\nrows = ['a.jsonl', 'b.csv']\n")
    assert data()[0].rows == (str(elsewhere / "a.jsonl"), str(elsewhere / "b.csv"))
    with pytest.raises(UsageError, match=r"--row-weights 'x': expected numbers, such as 2,1"):
        data("--row-weights", "x")


def test_without_a_command_line_the_program_is_called_by_its_name() -> None:
    assert console.typed(Command("store", "verify")) == "featstore store verify"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_way_to_start_it_is_named_as_typed(program: str, tmp_path: Path) -> None:
    script = tmp_path / "featstore"
    script.write_text("from trainer.commands.main import main\nmain()\n")
    command = ["evaluate", "absent", "--runs", str(tmp_path / "r")]
    started = {"python cli.py": ["cli.py"], "featstore": [str(script)]}
    done = subprocess.run(
        [sys.executable, *started.get(program, ["-m", "featstore"]), *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith(f"train one with `{program} train --runs {tmp_path / 'r'}`\n")


@pytest.mark.parametrize("command", [("evaluate", "none"), ("parity", "none"), ("train",)])
def test_advice_keeps_to_the_runs_that_were_named(
    folder: Path, elsewhere: Path, command: tuple[str, ...]
) -> None:
    args = [*command, "--runs", "here"]
    settings = []
    if command == ("train",):
        settings = ["--config", str(folder / "featstore.toml"), "--epochs", "1"]
        args += [*settings, "--init-from", "none"]
    done = invoke(*args)
    assert done.exit_code == 1
    (line,) = advised(done)
    assert line == shlex.join(["python", "cli.py", "train", *settings, "--runs", "here"])
    if settings:
        assert follow(line).exit_code == 0
        assert len(list(Path("here").glob("*/metrics.json"))) == 1
        assert not Path("runs").exists()


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that ends before its first trial, as at its timeout."""
    monkeypatch.setattr(trainer.tuning.drive, "run_workers", lambda *args: Watched())


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_searchs_advice_goes_on_with_that_search(
    folder: Path, elsewhere: Path, program: str
) -> None:
    settings = ("--config", str(folder / "featstore.toml"), "--space", str(folder / "space.toml"))
    begun = invoke("search", "--name", "s", "--runs", "here", *settings, program=program)
    assert begun.exit_code == 0, begun.stderr
    (line,) = advised(begun)
    assert "0 of 2 trials ended" in begun.stderr
    other = invoke("search", "--name", "s", "--runs", "here", *settings, "--epochs", "7")
    assert other.exit_code == 2
    assert advised(other) == [line.replace(program, PROGRAMS[0], 1)]
    study = (Path("here") / "s" / "search.json").read_bytes()
    done = follow(f"{line} --json", program)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["search"] == str(Path("here") / "s")
    # The same one, and no other beside it.
    assert json.loads((Path("here") / "s" / "search.json").read_bytes()) | {"command": ""} == (
        json.loads(study) | {"command": ""}
    )
    assert [path.name for path in elsewhere.iterdir()] == ["here"]
    assert [path.name for path in Path("here").glob("[!.]*")] == ["s"]
    absent = invoke("search", "show", "none", "--runs", "here", program=program)
    assert advised(absent) == [f"{program} search --name none --runs here"]


def test_advice_of_repair_never_repeats_the_wrong_encoder(
    folder: Path, tmp_path: Path, tiny_vit: Path
) -> None:
    wrong = write_tiny_family("vit", tmp_path / "other-vit")
    shutil.copy(tiny_vit / "image_converter.json", wrong)
    root = shutil.copytree(folder / "data" / "cache", tmp_path / "cache")
    (features,) = (root / "vit").iterdir()
    path = shard_paths(features)[0]
    path.write_bytes(path.read_bytes()[:1000])
    settings = ["--config", str(folder / "featstore.toml"), "--root", str(root)]
    done = invoke("store", "repair", *settings, "--vit", str(wrong))
    assert done.exit_code == 1
    assert "give the --vit and --config that they were extracted with" in done.stderr
    # With the wrong one it would list what the right one asks for.
    assert advised(done) == [shlex.join(["python", "cli.py", "store", "gc", *settings])]
    assert "0 B can go" in follow(advised(done)[0]).stdout
    assert invoke("store", "repair", *settings).exit_code == 0
    assert invoke("store", "verify", *settings).exit_code == 0


@pytest.mark.slow
def test_the_settings_of_a_run_are_those_of_its_advice(folder: Path, elsewhere: Path) -> None:
    root: dict[str, Any] = {"root": str(elsewhere / "cache")}
    settings = ["--config", str(folder / "featstore.toml"), "--root", root["root"]]
    for split in ("train", "val"):
        assert invoke("extract-vit", *settings, "--split", split).exit_code == 0
    place = ["--runs", "here"]
    assert invoke("train", *settings, *place, "--name", "a", "--epochs", "1").exit_code == 0
    missing = invoke("evaluate", "a", *place)
    assert missing.exit_code == 1
    (line,) = advised(missing)
    assert follow(line).exit_code == 0
    assert invoke("evaluate", "a", *place).exit_code == 0


class Finalised:
    """Is interrupted while it is taken apart, where Python drops what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def stop(context: click.Context, option: click.Parameter, value: str | None) -> None:
    if value is not None:
        raise KeyboardInterrupt


@click.group(cls=console.Commands)
@click.option("--stopped", callback=stop, expose_value=False)
def group() -> None:
    """Stand for the program."""


@group.command()
def interrupted() -> None:
    """Go on for long."""
    made = Finalised()
    del made
    for _ in range(1000):
        time.sleep(0.01)
    click.echo("heard nothing")


def test_an_interrupt_that_python_drops_comes_again() -> None:
    earlier = sys.unraisablehook
    done = CliRunner().invoke(group, ["interrupted"], prog_name="python cli.py")
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr.splitlines() == [
        "stopped; what was published is kept, the same command goes on"
    ]
    assert sys.unraisablehook is earlier


def test_an_interrupt_while_the_command_line_is_read_is_one_line() -> None:
    done = CliRunner().invoke(group, ["--stopped", "x", "interrupted"], prog_name="python cli.py")
    assert done.exit_code == 130
    # click ends the line on which a terminal shows ^C.
    assert done.stderr.split("\n", 1)[1] == "stopped; nothing was begun\n"


@group.command()
def compiled() -> None:
    """Be interrupted in compiled code, which says it in its own way."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise SystemError("returned a result with an exception set") from error


def test_an_interrupt_in_compiled_code_is_one_line() -> None:
    done = CliRunner().invoke(group, ["compiled"], prog_name="python cli.py")
    assert done.exit_code == 130
    (line,) = done.stderr.splitlines()
    assert line.startswith("stopped; ")


@group.command()
@json_option
def told(as_json: bool) -> None:
    """Answer."""
    answer({"found": 1})


def test_an_object_that_cannot_be_printed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Answer) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Answer, "print", full)
    done = CliRunner().invoke(group, ["told", "--json"], prog_name="python cli.py")
    assert done.exit_code == 1
    assert done.stderr == "error: standard output: No space left on device\n"
