"""Settings: what a file may say, what is refused, and that a written file is read back."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.config import DEFAULT_FILE, StoreConfig
from featstore.errors import ConfigError
from featstore.settings import hints, plain_path, suggest, toml_value
from trainer.config import SECTIONS, Config, load_config, render_config

ALL = [(name, field) for name, section in SECTIONS.items() for field in dataclasses.fields(section)]
IDS = [f"{name}.{field.name}" for name, field in ALL]


def load(folder: Path, text: str, **overrides: Any) -> Config:
    path = folder / "f.toml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(("name", "field"), ALL, ids=IDS)
def test_every_setting_has_a_help_text(name: str, field: dataclasses.Field[Any]) -> None:
    text = field.metadata["help"]
    assert len(text) > 10
    assert "\n" not in text
    assert f"# {text}" in render_config(Config(), comments=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[stor]", r"unknown section 'stor' \(did you mean 'store'\?\); known: data, encoders"),
        ("[train]\nlearning_rat = 1", r"unknown setting 'learning_rat' in \[train\].*known: k_txt"),
        ("[train]\nbatchsize = 1", r"\(did you mean 'batch_size'\?\)"),
        ("[store]\nshards_rows = 1", r"\(did you mean 'shard_rows'\?\)"),
        ("train = 3", "train must be a section"),
        ("[train]\nk_txt = 1.0", "k_txt must be int, found 1.0"),
        ("[train]\nk_txt = true", "k_txt must be int, found True"),
        ("[train]\nlr = false", "lr must be float, found False"),
        ('[train]\nlr = "1e-4"', "lr must be float, found '1e-4'"),
        ("[train]\nlr = nan", "lr must be float, found nan"),
        ("[train]\nlr = inf", "lr must be float, found inf"),
        ("[train]\nlr = -inf", "lr must be float, found -inf"),
        ("[train]\nlr = 1" + "0" * 400, "lr must be float, found 10000"),
        ("[train]\nlr = 0", "lr must be above 0, found 0"),
        ("[train]\nlr = -1e-3", "lr must be above 0"),
        ("[train]\nk_txt = -1", "k_txt must be at least 0, found -1"),
        ("[train]\ndropout = 1.0", "dropout must be at most 0.95, found 1.0"),
        ("[train]\nmonitor = 'val_los'", r"must be one of val_loss, .*\(did you mean 'val_loss'"),
        ("[train]\noversample = 'a=x'", "oversample must be a table of numbers .*; found 'a=x'"),
        ("[train]\noversample = {a = true}", "oversample must be dict"),
        ("[train]\noversample = {a = 0.5}", "oversample must be at least 1, found 0.5"),
        ("[train]\nclass_weights = 'equal'", "2 or 'balanced'; found 'equal'"),
        ("[train]\nclass_weights = {a = 0}", "class_weights must be above 0, found 0"),
        ("[store]\ndtype = 'float64'", "dtype must be one of float16, .*, int8; found"),
        ("[store]\nroot = 3", "root must be str, found 3"),
        ("[encoders]\nsequence_length = 2", "sequence_length must be at least 3"),
        ("[data]\nfractions = 0.8", "fractions must be tuple"),
        ("[data]\nfractions = [0.8, 'a']", "fractions must be tuple"),
        ("[data]\nfractions = [0.8, nan]", "fractions must be tuple"),
        ("[data]\nfractions = [1.5, 0.1]", "fractions must be at most 1, found 1.5"),
        ("[data]\nrows = [1]", "rows must be str | tuple"),
        ("[data]\nrows = {train = 1}", "rows must be str | tuple"),
        ("[data\n", "not a TOML file: .*line 1"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "f.toml"))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read .No such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"cannot be read .Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(tmp_path / "latin.toml")


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bom.toml").write_bytes("\ufeff[train]\nk_txt = 1\n".encode())
    assert load_config(tmp_path / "bom.toml").train.k_txt == 1


def test_a_table_is_typed_with_commas(tmp_path: Path) -> None:
    train = load(tmp_path, "[train]\noversample = {a = 2}", train={"class_weights": "b=1, c=2.5"})
    assert train.train.oversample == {"a": 2.0}
    assert train.train.class_weights == {"b": 1.0, "c": 2.5}
    flag = load(tmp_path, "[train]\noversample = {a = 2}", train={"oversample": "b=3"})
    assert flag.train.oversample == {"b": 3.0}


def test_an_integer_is_a_float(tmp_path: Path) -> None:
    lr = load(tmp_path, "[train]\nlr = 1").train.lr
    assert (lr, type(lr)) == (1.0, float)


def test_file_paths_are_from_its_folder_and_flags_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    text = "[data]\nrows = 'r.jsonl'\nimages = '/abs/photos'\n[store]\nroot = '../s'"
    config = load(there, text, data={"split_file": "mine.csv"})
    assert config.data.rows == str(there / "r.jsonl")
    assert config.data.images == "/abs/photos"
    assert Path(config.store.root).resolve() == tmp_path / "s"
    assert config.data.split_file == str(here / "mine.csv")
    assert load(there, text, data={"rows": "x"}).data.rows == str(here / "x")
    assert load(there, "").store.root == str(there / "cache")


def test_a_file_named_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.toml").write_text("[data]\nrows = 'r'\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("sub/c.toml").data.rows == str(tmp_path / "sub" / "r")
    (tmp_path / DEFAULT_FILE).write_text("[train]\nk_txt = 2\n")
    assert load_config().train.k_txt == 2


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load(tmp_path, "[data]\nrows = '~/r.jsonl'\n[store]\nroot = '~/s'\n")
    assert config.data.rows == "/home/someone/r.jsonl"
    assert config.store.root == "/home/someone/s"


def test_preset_names_stay_names_and_folders_become_paths(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    text = "[encoders]\nvit = 'mine'\ntext = 'distil_bert_base_en_uncased'"
    encoders = load(tmp_path, text).encoders
    assert encoders.vit == str(tmp_path / "mine")
    assert encoders.text == "distil_bert_base_en_uncased"
    assert load(tmp_path, "[encoders]\nvit = 'hf://a/b'").encoders.vit == "hf://a/b"


def test_rows_as_one_file_per_split(tmp_path: Path) -> None:
    rows = load(tmp_path, "[data]\nrows = {train = 'a.csv', test = '/b.csv'}").data.rows
    assert rows == {"train": str(tmp_path / "a.csv"), "test": "/b.csv"}


def test_a_flag_goes_before_the_file_and_is_checked(tmp_path: Path) -> None:
    text = "[train]\nk_txt = 1\nlr = 0.5"
    config = load(tmp_path, text, train={"k_txt": 2})
    assert (config.train.k_txt, config.train.lr) == (2, 0.5)
    with pytest.raises(ConfigError, match=r"command line: \[train\] k_txt must be at least 0"):
        load(tmp_path, text, train={"k_txt": -2})


def test_without_rows_the_demo_fills_what_is_not_given(tmp_path: Path) -> None:
    demo = load(tmp_path, "[train]\nlr = 0.5")
    own = load(tmp_path, "[train]\nlr = 0.5\n[data]\nrows = 'r'")
    assert demo.is_demo
    assert not own.is_demo
    assert demo.train.lr == own.train.lr == 0.5
    assert demo.encoders.vit != own.encoders.vit
    assert own.train.num_heads == Config().train.num_heads != demo.train.num_heads


def test_what_an_older_version_wrote_keeps_its_meaning(tmp_path: Path) -> None:
    """A run's file has every setting of its time; the default of a later one is not for it."""
    lines = render_config(Config()).splitlines()
    later = [line for line in lines if line.startswith("attention_dropout")]
    assert len(later) == 1
    old = "\n".join(line for line in lines if line not in later)
    assert load(tmp_path, old).train.attention_dropout == 0
    some = "\n".join(line for line in old.splitlines() if not line.startswith("seed"))
    assert load(tmp_path, some).train.attention_dropout == Config().train.attention_dropout == -1
    assert load(tmp_path, "\n".join(lines)).train.attention_dropout == -1
    flag = load(tmp_path, old, train={"attention_dropout": 0.3})
    assert flag.train.attention_dropout == 0.3


def test_suggest() -> None:
    assert suggest("stor", ["store", "train"]) == " (did you mean 'store'?)"
    assert suggest("zzz", ["store", "train"]) == ""


def test_backslashes_in_paths_are_said_to_be_the_cause(tmp_path: Path) -> None:
    for line in (r'rows = "C:\data\rows.csv"', r'rows = "D:\Users\me"', r'split_file = "..\x"'):
        with pytest.raises(ConfigError, match="a backslash begins an escape: write paths with / "):
            load(tmp_path, f"[data]\n{line}\n")
    for line in (r'images = "C:\new"', r'rows = {train = "a.csv", val = "D:\temp\b"}'):
        with pytest.raises(ConfigError, match=r"\[data\] .* has a control character, .*'C:.data"):
            load(tmp_path, f"[data]\n{line}\n")
    with pytest.raises(ConfigError, match=r"\[encoders\] vit has a control"):
        load(tmp_path, "[encoders]\n" r'vit = "C:\base"')
    assert load(tmp_path, r"[data]" "\n" r"rows = 'C:\new\t.csv'").data.rows.endswith(
        r"C:\new\t.csv"
    )
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, '[data]\nrows = "a\n')
    assert "begins an escape" not in str(caught.value)


letters = st.text(st.characters(codec="utf-8"), max_size=6)
escaped = str.maketrans("", "", "\b\t\n\f\r")
paths = st.just("") | letters.map(
    lambda text: plain_path("/none/" + text.translate(escaped).replace("://", ""))
)


def values_of(section: str, field: dataclasses.Field[Any], hint: Any) -> st.SearchStrategy[Any]:
    meta = field.metadata
    if field.name == "to":
        return st.lists(st.sampled_from(meta["choices"]), max_size=3).map(tuple)
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    if field.name == "rows":
        files = paths | st.lists(paths, max_size=2).map(tuple)
        return files | st.dictionaries(letters, files, min_size=1, max_size=3)
    if field.name == "root":
        return st.just("/none/root")
    if meta["preset"]:
        return paths | st.just("a_preset_name")
    if meta["path"]:
        return paths
    if field.name == "fractions":
        return st.lists(st.floats(0, 1), max_size=4).map(tuple)
    if field.name == "row_weights":
        return st.lists(st.floats(0, 9, exclude_min=True), max_size=3).map(tuple)
    if field.name == "label_names":
        return st.lists(letters, max_size=3).map(tuple)
    low = meta["minimum"] if meta["minimum"] is not None else meta["above"]
    if hint is int:
        return st.integers(low, meta["maximum"] or 2**63)
    if hint is bool:
        return st.booleans()
    if hint is str:
        return letters
    numbers = st.floats(
        low,
        meta["maximum"],
        allow_nan=False,
        allow_infinity=False,
        exclude_min=bool(meta["above"] is not None),
    )
    if hint is float:
        return numbers
    words = st.sampled_from(["", *meta["words"]])
    return words | st.dictionaries(letters, numbers, max_size=3)


configs = st.builds(
    Config,
    **{
        name: st.builds(
            section,
            **{
                field.name: values_of(name, field, hints(section)[field.name])
                for field in dataclasses.fields(section)
            },
        )
        for name, section in SECTIONS.items()
    },
)


@settings(max_examples=30, deadline=None)
@given(configs, st.booleans())
def test_what_is_written_is_read_back(config: Config, comments: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert load(Path(folder), render_config(config, comments)) == config


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (1e-5, "1e-05"), (("a", 'b"\n'), '["a", "b\\"\\n"]'), ("\x7f", '"\\u007f"')],
)
def test_toml_values(value: Any, text: str) -> None:
    assert toml_value(value) == text


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        StoreConfig().dtype = "float32"  # type: ignore[misc]
