"""What the commands print: one JSON object of one shape, "1 row", plain paths, whole help."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from featstore import demo
from featstore.errors import counted
from featstore.settings import plain_path
from featstore.store.folder import shard_paths
from trainer.commands.help import SettingOption
from trainer.commands.main import cli

SHAPE = {"ok", "command", "warnings", "error"}
ERROR = {"kind", "message", "mend", "commands", "exit_code"}
# One of something in the plural; what ends in "s" in the singular is let through.
ONE_OF_MANY = re.compile(r"(?<![\w.,:/-])1 (?!(?:pass|loss|is|as|has|was)\b)(?:[a-z]+ )?[a-z]+s\b")
SPACE = "[search]\ntrials = 1\n[train]\nlr = {choice = [1e-3]}\nk_txt = 0\n"


def leaves(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return every command that can be typed, as its words."""
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*path, name)
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))


ALL = sorted(leaves())


def command_of(words: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for word in words:
        assert isinstance(command, click.Group)
        command = command.commands[word]
    return command


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="python cli.py")


def answered(*args: str, exit_code: int = 0) -> dict[str, Any]:
    """Return the one object that a command printed, its shape checked."""
    return object_of(invoke(*args, "--json"), exit_code)


def quietly(*args: str) -> dict[str, Any]:
    """Return the object of a command; on stderr it may say its warnings and nothing else."""
    done = invoke(*args, "--json", "--quiet")
    found = object_of(done, 0)
    said = tuple(line for warning in found["warnings"] for line in warning.splitlines())
    assert [line for line in done.stderr.splitlines() if not line.endswith(said)] == []
    return found


def object_of(done: Result, exit_code: int) -> dict[str, Any]:
    assert done.exit_code == exit_code, done.output
    (line,) = done.stdout.splitlines()
    found = json.loads(line, parse_constant=pytest.fail)
    assert found.keys() >= SHAPE
    assert found["ok"] is (exit_code == 0) is (found["error"] is None)
    assert all(isinstance(warning, str) for warning in found["warnings"])
    if found["error"] is not None:
        assert found["error"].keys() == ERROR
        assert found["error"]["exit_code"] == exit_code
    return found


# --- help


@pytest.mark.parametrize("words", [(), ("store",), *ALL], ids=" ".join)
def test_help_is_whole_sentences(words: tuple[str, ...]) -> None:
    command = command_of(words)
    text = invoke(*words, "--help").stdout
    flat = " ".join(text.split())
    for option in command.params:
        if isinstance(option, click.Option):
            said = (option.help or "").partition("  [")[0]
            assert re.fullmatch(r"(-|[A-Z]).*\.", said, re.DOTALL), (option.name, option.help)
            assert " ".join(said.split()) in flat
    if isinstance(command, click.Group):
        for one in command.commands.values():
            assert one.get_short_help_str() in flat


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_has_each_settings_default_under_its_section(words: tuple[str, ...]) -> None:
    text = invoke(*words, "--help").stdout
    blocks = dict(re.findall(r"^(\S[^\n]*):\n((?:(?:  .*)?\n)+)", text, re.MULTILINE))
    for option in command_of(words).params:
        if isinstance(option, SettingOption):
            (title,) = (title for title in blocks if f"[{option.section}]" in title)
            _, _, after = blocks[title].partition(f"  {option.opts[0]} ")
            mine = " ".join(re.split(r"\n  --", after)[0].split())
            default = option.field.default
            typed = {"": "none", (): "none", (0.8, 0.1, 0.1): "0.8,0.1,0.1"}
            typed |= {("tensorboard",): "tensorboard"}
            if isinstance(default, bool):
                shown = (option.opts if default else option.secondary_opts)[0][2:]
            elif isinstance(default, float):
                shown = f"{default:g}"
            else:
                shown = typed.get(default, default)
            assert f"[default: {shown}" in mine
            own = demo.SETTINGS.get(option.section, {}).get(option.field.name, default)
            assert ("the demo's: " in mine) is (own != default)
            if own != default and not isinstance(own, str):
                assert f"the demo's: {own:g}" in mine


def test_counted() -> None:
    assert [counted(n, "row") for n in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert counted(2400, "photo", ",") == "2,400 photos"


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_quiet_is_the_last_of_its_own_options(words: tuple[str, ...]) -> None:
    text = invoke(*words, "--help").stdout
    (own,) = re.findall(r"^Options:\n((?:(?:  .*)?\n)+)", text, re.MULTILINE)
    flags = re.findall(r"^  (-[^\s,]+(?:, -[^\s,]+)*)", own, re.MULTILINE)
    assert flags[-2:] == ["-q, --quiet", "-h, --help"]


# --- paths


def test_a_plain_path_is_the_same_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "f").write_text("")
    (tmp_path / "a" / "f").write_text("")
    for typed, plain in (
        ("a/../f", "f"),
        ("a//b/./..//f", "a/f"),
        ("nowhere/../f", "f"),
        ("linked/../f", "a/f"),  # the parent of what the link means
    ):
        found = plain_path(f"{tmp_path}/{typed}")
        assert found == os.path.realpath(tmp_path / plain)
        assert plain_path(found) == found
    assert plain_path("../f") == "../f"
    assert plain_path("./f") == "f"
    assert plain_path("//f") == "/f"


# --- every command, on one row


def write_project(folder: Path, vit: Path, text: Path) -> Path:
    """Write settings of one photo and two sentences a split, one sentence in test."""
    (folder / "data" / "photos").mkdir(parents=True)
    rows, splits = [], {}
    for value, split in enumerate(("train", "val", "test")):
        pixels = np.full((40, 48, 3), 60 * value, np.uint8)
        Image.fromarray(pixels).save(folder / "data" / "photos" / f"{split}.png")
        splits[split] = [split]
        for sentence, label in (("a dog", "entailment"), ("a cat", "contradiction")):
            rows.append({"Image_ID": split, "Hypothesis": sentence, "Label": label})
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (folder / "data" / "split.json").write_text(json.dumps(splits))
    (folder / "space.toml").write_text(SPACE)
    file = folder / "settings" / "featstore.toml"
    file.parent.mkdir()
    file.write_text(
        "[data]\nrows = '../data/rows.jsonl'\nimages = '../data//photos'\n"
        "split_file = '../data/./split.json'\n"
        f"[encoders]\nvit = '{vit}'\ntext = '{text}'\n[store]\nroot = '../cache'\n"
        "[train]\nk_txt = 0\nepochs = 1\nnum_heads = 2\nhead_dim = 4\nmlp_dim = 8\n"
    )
    return file


class Typed:
    """The commands in an order in which each finds what it needs."""

    def __init__(self, folder: Path, vit: Path, text: Path) -> None:
        self.folder, self.file = folder, write_project(folder, vit, text)
        config = f"--config {self.file.parent}/../settings/featstore.toml"
        self.runs = f"--runs {folder}//x/../runs"
        self.lines = {
            "init": f"--force --config {folder}/x/../new.toml",
            "eda": f"--out {folder}/x/../eda-NAME --draws 20 {config}",
            "extract-vit": config,
            "extract-text": f"--split train --k-txt 0 {config}",
            "train": f"--name NAME {config} {self.runs}",
            "evaluate": f"first {self.runs}",
            "predict": f"first --rows {folder}/data/../data/rows.jsonl --out {folder}/x/../p.csv"
            f" {self.runs}",
            "compare": f"first first-json --draws 20 {self.runs}",
            "report": f"first --out {folder}/x/../NAME-page.html {self.runs}",
            "explain": f"first --rows 1 --sample 1 --out {folder}/x/../NAME.html {self.runs}",
            "parity": f"first --rows 1 {self.runs}",
            "export": f"first {folder}/x/../NAME.weights.h5 --rows 1 {self.runs}",
            "import": f"{folder}/x/../first.weights.h5 --as i-NAME {config} {self.runs}",
            "search": f"--name s-NAME --trials 1 --space {folder}/space.toml {config} {self.runs}",
            "search show": f"s-NAME {self.runs}",
            "search best": f"s-NAME {self.runs}",
            "run": f"{folder}/x/../NAME.toml {config} {self.runs}",
            "store info": config,
            "store verify": f"--source {config}",
            "store repair": config,
            "store gc": f"{config} {self.runs}",
            "store export": f"--out {folder}/x/../NAME.npy --split test {config}",
        }

    def args(self, name: str, run: str) -> list[str]:
        return [*name.split(), *shlex.split(self.lines[name].replace("NAME", run))]


@pytest.fixture(scope="module")
def printed(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path
) -> tuple[Path, dict[str, str], dict[str, dict[str, Any]]]:
    """The folder, and what each command printed on one row: for people, and as its object."""
    folder = tmp_path_factory.mktemp("output")
    typed = Typed(folder, tiny_vit, tiny_text)
    for name in ("first", "first-json"):
        (folder / f"{name}.toml").write_text(
            f'[recipe]\nname = "r-{name}"\n[[stage]]\nname = "one"\n'
        )
    shown: dict[str, str] = {}
    objects: dict[str, dict[str, Any]] = {}
    for name in typed.lines:
        if name in ("extract-vit", "extract-text", "search", "run"):
            shown[f"{name} --dry-run"] = succeed(*typed.args(name, "first"), "--dry-run")
            objects[f"{name} --dry-run"] = quietly(*typed.args(name, "first"), "--dry-run")
        shown[name] = succeed(*typed.args(name, "first"))
        objects[name] = quietly(*typed.args(name, "first-json"))
    (features,) = (folder / "cache" / "vit").iterdir()
    path = shard_paths(features)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for name in ("store verify", "store repair"):
        done = invoke(*typed.args(name, "first"), *(["--dry-run"] if "repair" in name else []))
        shown[f"{name}, damaged"] = done.output
        objects[f"{name}, damaged"] = answered(
            *typed.args(name, "first"), exit_code=int("verify" in name)
        )
    return folder, shown, objects


def succeed(*args: str) -> str:
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_every_command_says_one_row(printed: tuple[Path, dict[str, str], Any]) -> None:
    _, shown, objects = printed
    assert {" ".join(words) for words in ALL} <= shown.keys()
    for name, text in shown.items():
        assert not ONE_OF_MANY.search(text), f"{name}: {text}"
    for name, found in objects.items():
        for line in found["warnings"]:
            assert not ONE_OF_MANY.search(line), f"{name}: {line}"


@pytest.mark.slow
def test_no_path_goes_up_and_down(printed: tuple[Path, dict[str, str], Any]) -> None:
    folder, shown, objects = printed
    for name, found in objects.items():
        # The command is as it was typed.
        text = json.dumps(found | {"command": ""}) + shown[name]
        for path in re.findall(r"(?<![:\w])/[\w./-]+", text.replace("`", " ")):
            if str(folder) in path or "/../" in path:
                assert plain_path(path) == path.rstrip("/"), f"{name}: {path}"
    assert objects["train"]["run"] == str(folder / "runs" / "first-json")
    assert objects["extract-vit"]["folder"].startswith(str(folder / "cache" / "vit"))
    assert str(folder / "settings" / "featstore.toml") in shown["store verify, damaged"]


@pytest.mark.slow
def test_quiet_commands_still_print_what_they_found(printed: tuple[Path, Any, Any]) -> None:
    folder = printed[0]
    config = f"--config {folder}/settings/featstore.toml --k-txt 0"
    for line in (f"store info {config}", f"search show s-first --runs {folder}/runs"):
        plain, quiet = invoke(*shlex.split(line)), invoke(*shlex.split(line), "-q")
        assert quiet.stdout == plain.stdout != ""
        assert quiet.stderr == ""
    before = invoke("search", "-q", "show", "s-first", "--runs", f"{folder}/runs")
    assert (before.exit_code, before.stderr) == (0, "")


@pytest.mark.slow
def test_every_field_is_documented(printed: tuple[Path, Any, dict[str, Any]]) -> None:
    docs = Path(__file__).resolve().parent.parent / "docs"
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (docs / "JSON.md").read_text(), re.MULTILINE)
    documented: dict[str, set[str]] = {}
    for names, fields in rows:
        for name in re.findall(r"`([a-z -]+)`", names):
            documented.setdefault(name, set()).update(re.findall(r"`(\w+)`", fields))
    documented["evaluate"] = set(re.findall(r"`(\w+)`", (docs / "EVALUATION.md").read_text()))
    documented["import"] |= documented["train"]
    for command in ("extract-vit", "extract-text"):
        documented[f"{command} --dry-run"] |= documented[command]
    for name, found in printed[2].items():
        assert found.keys() - SHAPE <= documented[name.partition(",")[0]], name


@pytest.mark.slow
def test_warnings_of_what_people_are_told(printed: tuple[Path, Any, dict[str, Any]]) -> None:
    _, shown, objects = printed
    (warning,) = (w for w in objects["evaluate"]["warnings"] if "hypothesis-only" in w)
    assert warning in shown["evaluate"]
    damaged = objects["store verify, damaged"]
    assert not damaged["sound"]
    assert damaged["error"]["message"] == "1 problem in 1 of 2 folders of features"


# --- errors


@pytest.mark.parametrize(
    ("line", "kind", "exit_code"),
    [
        ("--nonsense", "UsageError", 2),
        ("nonsense", "UsageError", 2),
        ("store nonsense", "UsageError", 2),
        ("train --epoch 3", "UsageError", 2),
        ("train --lr many", "UsageError", 2),
        ("evaluate", "UsageError", 2),
        ("train --config absent.toml", "ConfigError", 2),
        ("evaluate absent --runs nowhere", "RunError", 1),
    ],
)
def test_an_error_is_an_object_too(line: str, kind: str, exit_code: int) -> None:
    found = answered(*shlex.split(line), exit_code=exit_code)
    assert found.keys() == SHAPE
    error = found["error"]
    assert error["kind"] == kind
    plain = invoke(*shlex.split(line))
    assert (plain.stdout, plain.exit_code) == ("", exit_code)
    said = error["message"] + (f"; {error['mend']}" if error["mend"] else "")
    assert plain.stderr == f"error: {said}\n"
    for command in error["commands"]:
        assert command.startswith("python cli.py ")
        assert f"`{command}`" in error["mend"]


def test_an_error_names_commands_to_type(tmp_path: Path) -> None:
    found = answered("evaluate", "absent", "--runs", str(tmp_path), exit_code=1)
    assert found["error"]["commands"] == [f"python cli.py train --runs {tmp_path}"]


@pytest.mark.parametrize(
    ("raised", "kind", "exit_code"),
    [
        (KeyboardInterrupt(), "StoppedError", 130),
        (OSError(28, "No space left on device", "/x/f"), "FeatstoreError", 1),
    ],
)
def test_what_ends_a_command_is_an_object(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    raised: BaseException,
    kind: str,
    exit_code: int,
) -> None:
    def end(*args: object) -> None:
        raise raised

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("featstore.publish.write_text", end)
    found = answered("init", exit_code=exit_code)
    assert (found["error"]["kind"], found["error"]["commands"]) == (kind, [])


def test_a_defect_is_an_object_and_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def end(*args: object) -> None:
        raise ZeroDivisionError("by nought")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("featstore.publish.write_text", end)
    done = invoke("init", "--json")
    assert isinstance(done.exception, ZeroDivisionError)
    assert "ZeroDivisionError: by nought" in json.loads(done.stdout)["error"]["message"]


def test_help_is_no_object() -> None:
    assert invoke("train", "--json", "--help").stdout.startswith("Usage:")
