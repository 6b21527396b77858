"""Random input of every kind that a user can hand over: rows, settings, command lines.

What is promised is the same everywhere: a result, or one line and an exit code
of 0, 1, 2 or 130; never a traceback.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from featstore.data.rows import read_examples
from featstore.data.splits import read_split_file
from featstore.errors import ConfigError, FeatstoreError, RowError, SplitError
from featstore.settings import toml_value
from trainer.commands.main import cli
from trainer.config import SECTIONS, load_config, render_config
from trainer.tuning.space_file import read_space

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["entailment", "contradiction", "neutral", "-", "0", "1", 10**400, 1e308]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
COLUMNS = [
    "Image_ID", "Hypothesis", "Label", "Flickr30K_ID", "sentence2", "gold_label",
    "image", "caption", "answer", "filename", "text", "image id", "IMAGE-ID",
]  # fmt: skip


def one_line(error: FeatstoreError, path: Path) -> None:
    text = str(error)
    assert "\n" not in text
    assert str(path) in text
    assert len(text) < 2000


def check_rows(content: bytes, name: str) -> None:
    """Read rows: either every row is whole, or one line says what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        for labelled in (True, False):
            try:
                found = read_examples(path, labelled=labelled).examples
            except RowError as error:
                one_line(error, path)
            else:
                assert len(found)
                assert {type(value) for value in [*found.image_ids, *found.hypotheses]} == {str}
                assert set(found.labels.tolist()) <= ({0, 1} if labelled else {-1, 0, 1})
                assert all(text == text.strip() != "" for text in found.hypotheses)
                found.digest()


records = st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=6), anything, max_size=7)
likely = st.fixed_dictionaries(
    {"Image_ID": anything, "Hypothesis": anything, "Label": anything},
    optional={"gold_label": anything, "sentence2": anything},
)
snli_ve = st.fixed_dictionaries(
    {"Flickr30K_ID": anything, "sentence2": anything, "gold_label": anything},
    optional={"annotator_labels": anything, "pairID": anything},
)


@given(
    st.lists(records | likely | snli_ve | anything, max_size=5), st.binary(max_size=8), st.data()
)
def test_jsonl_of_any_structure(values: list[Any], noise: bytes, data: st.DataObject) -> None:
    lines = [json.dumps(value).encode() for value in values]
    if lines and noise:
        at = data.draw(st.integers(0, len(lines) - 1))
        cut = data.draw(st.integers(0, len(lines[at])))
        lines[at] = lines[at][:cut] + noise + lines[at][cut:]
    end = data.draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r"]))
    check_rows(end.join(lines), data.draw(st.sampled_from(["rows.jsonl", "rows", "rows.csv"])))


@pytest.mark.parametrize(
    "line",
    [
        '{"Image_ID": ' + "[" * 50_000,
        '{"Image_ID": ' + "9" * 6000 + ', "Hypothesis": "a", "Label": 1}',
        '{"Image_ID": "a", "Hypothesis": "\\ud800", "Label": 1}',
        '{"Image_ID": "\\udfff", "Hypothesis": "a", "Label": 1}',
        '{"Image_ID": "a\\u0000b", "Hypothesis": "a", "Label": 1}',
        '{"Image_ID": NaN, "Hypothesis": "a", "Label": Infinity}',
        '{"Image_ID": "../../etc/passwd", "Hypothesis": "a", "Label": 1}',
    ],
    ids=range(7),
)
def test_lines_that_trip_parsers(line: str) -> None:
    check_rows(line.encode(), "rows.jsonl")
    good = '{"Image_ID": "x", "Hypothesis": "a", "Label": "entailment"}\n'
    check_rows((good + line).encode(), "rows.jsonl")


cells = st.text(max_size=8) | st.sampled_from(["entailment", "contradiction", "1", "0", "2", '"'])


@given(
    st.lists(st.sampled_from(COLUMNS) | cells, max_size=5),
    st.lists(st.lists(cells, max_size=5), max_size=5),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "cp1252", "utf-16", "latin-1"]),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.binary(max_size=6),
)
def test_csv_of_any_structure(
    header: list[str],
    rows: list[list[str]],
    delimiter: str,
    encoding: str,
    quoting: Any,
    noise: bytes,
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerows([header, *rows])
    check_rows(text.getvalue().encode(encoding, "replace") + noise, "rows.csv")


@given(st.binary(max_size=400), st.sampled_from(["r.jsonl", "r.csv", "r.json", "r.tsv", "r"]))
def test_rows_of_any_bytes(content: bytes, name: str) -> None:
    check_rows(content, name)


@given(st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"train": ["\\ud800"], "val": [], "test": []}')
@example(b'{"train": [' + b"9" * 5000 + b"]}")
def test_split_files_of_any_content(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        record = {"Image_ID": "x", "Hypothesis": "a", "Label": "entailment"}
        rows.write_text(json.dumps(record))
        for name in ("split.json", "split.csv"):
            path = Path(folder, name)
            path.write_bytes(content)
            try:
                read_split_file(path, read_examples(rows).examples)
            except SplitError as error:
                one_line(error, path)


# --- settings ---------------------------------------------------------------------------

NAMES = [(name, field.name) for name in SECTIONS for field in dataclasses.fields(SECTIONS[name])]
toml_text = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Z"]), max_size=9)
toml_values = st.recursive(
    st.booleans() | st.integers() | st.floats() | toml_text.map(toml_value),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
).map(lambda value: value if isinstance(value, str) else json.dumps(value).replace("NaN", "nan"))


def check_settings(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.toml")
        path.write_bytes(content)
        try:
            found = load_config(path)
        except ConfigError as error:
            one_line(error, path)
        else:
            path.write_text(render_config(found), encoding="utf-8")
            assert load_config(path) == found
        with contextlib.suppress(FeatstoreError):
            read_space(path, {}, {}, False)


@given(st.lists(st.tuples(st.sampled_from(NAMES), toml_values), max_size=6))
def test_settings_of_any_value(chosen: list[tuple[tuple[str, str], str]]) -> None:
    sections: dict[str, dict[str, str]] = {}
    for (section, name), value in chosen:
        sections.setdefault(section, {})[name] = value
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{name} = {value}" for name, value in values.items())]
    check_settings("\n".join(lines).encode())


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode()))
@example(b"x = " + b"[" * 100_000)
@example(b"[train]\nlr = " + b"9" * 5000)
@example(b"[space]\nlr = " + b"[" * 100_000)
@example(b"\xff\xfe[\x00t\x00")
def test_settings_of_any_bytes(content: bytes) -> None:
    check_settings(content)


# --- the command line -------------------------------------------------------------------


def walk(group: click.Group, names: tuple[str, ...] = ()) -> Iterator[tuple[Any, click.Command]]:
    for name, command in group.commands.items():
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from walk(command, (*names, name))


COMMANDS = dict(walk(cli))
OPTIONS = sorted(
    {
        name
        for command in COMMANDS.values()
        for option in command.params
        if isinstance(option, click.Option)
        for name in option.opts
    }
)
# Without rows the built-in demo would be rendered and encoded; these keep to absent files.
VALUES = [
    "absent", "absent.toml", "rows.jsonl", "images", "split.json", "other.toml", "0", "1", "-1",
    "3", "1e-3", "nan", "inf", "9" * 30, "0.8,0.1,0.1", "a,b", "train", "val", "float16", "ümläut",
    "--", "-", "../..", "a/b", "x" * 300, "\udc80", "none", "drop", "=", "sqlite://", "out.npy",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with settings that lead to rows without photos."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "featstore.toml").write_text(
        "[data]\nrows = 'rows.jsonl'\nimages = 'images'\n"
        "[encoders]\nvit = 'absent'\ntext = 'absent'\n"
    )
    (folder / "images").mkdir()
    (folder / "rows.jsonl").write_text('{"Image_ID": "x", "Hypothesis": "a", "Label": "1"}\n')
    (folder / "split.json").write_text("{}")
    (folder / "other.toml").write_text("[data]\nrows = 'absent'\n[train]\nk_txt = -3\n")
    return folder


def run_command(arguments: list[str], place: Path) -> None:
    before = Path.cwd()
    os.chdir(place)
    try:
        result = CliRunner().invoke(cli, arguments, prog_name="python cli.py")
    finally:
        os.chdir(before)
    told = (arguments, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in (0, 1, 2, 130), told
    assert "Traceback" not in result.output, told
    if result.exit_code and "Commands:" not in result.output:
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert errors or "problems" in result.output, told
        assert len(errors) <= 1 or arguments[:2] == ["store", "repair"], told


pieces = st.sampled_from(OPTIONS) | st.sampled_from(VALUES) | st.text(min_size=1, max_size=5)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(COMMANDS)), st.lists(pieces, max_size=6))
def test_command_lines_of_any_pieces(place: Path, name: tuple[str, ...], rest: list[str]) -> None:
    run_command([*name, *rest], place)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_command_lines_that_parse(place: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    arguments = [*name]
    for option in COMMANDS[name].params:
        if isinstance(option, click.Argument):
            arguments.append(data.draw(st.sampled_from(VALUES)))
        elif data.draw(st.booleans()) and data.draw(st.booleans()):
            arguments.append(option.opts[0])
            if not option.is_flag:
                choices = getattr(option.type, "choices", None)
                arguments.append(str(data.draw(st.sampled_from(list(choices or VALUES)))))
    run_command(arguments, place)
