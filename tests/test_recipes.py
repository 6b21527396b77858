"""Recipes: what the file may say, stages that are done once, the table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_config

import trainer
from featstore.errors import ConfigError, StoppedError, UsageError, WriteError
from featstore.progress import SILENT
from trainer.config import load_config, render_config
from trainer.recipes.chain import Outcome, plan
from trainer.recipes.recipe import Recipe, read_recipe
from trainer.recipes.table import as_markdown
from trainer.run.training import Reporter

ROOT = Path(__file__).resolve().parent.parent
SPACE = """
[search]
trials = 2
together = 2
[train]
k_txt = 0
epochs = 1
lr = {log_uniform = [1e-3, 1e-2]}
dropout = {uniform = [0.0, 0.5]}
"""
STAGES = """
[recipe]
name = "chain"

[[stage]]
name = "warm-up"
train = {epochs = 1, lr = 1e-2}

[[stage]]
name = "search"
init_from = "warm-up"
space = "space.toml"

[[stage]]
name = "final"
init_from = "warm-up"
settings_from = "search"
test = true
controls = true
train = {epochs = 2, weight_decay = 0.01}
predict = {rows = "new.jsonl", images = "data/images", out = "out/new.csv"}
"""


@pytest.fixture
def home(tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> Path:
    """A folder with a configuration, photos and rows."""
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text)
    (tmp_path / "featstore.toml").write_text(render_config(config))
    (tmp_path / "space.toml").write_text(SPACE)
    rows = (tmp_path / "data" / "rows.jsonl").read_text().splitlines()[:6]
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    return tmp_path


def read(home: Path, text: str) -> Recipe:
    file = home / "recipe.toml"
    file.write_text(text)
    return read_recipe(file, home / "featstore.toml")


def run(home: Path, text: str = STAGES, **options: Any) -> Outcome:
    read(home, text)
    options = {"reporter": Reporter(), "show": SILENT, **options}
    return trainer.run_recipe(
        home / "recipe.toml", config=home / "featstore.toml", runs=home / "runs", **options
    )


def files(folder: Path) -> dict[str, int]:
    """Return when each file of runs was last written, but for what each call writes anew."""
    kept = ("*.h5", "*.csv")
    found = {p for kind in kept for p in folder.rglob(kind) if p.name != "leaderboard.csv"}
    return {str(p): p.stat().st_mtime_ns for p in found}


@pytest.mark.slow
def test_a_recipe_is_run_once_and_a_line_each(home: Path) -> None:
    states = [stage["state"] for stage in plan(read(home, STAGES), show=SILENT)]
    assert states == ["to do"] * 3
    done = run(home)
    warm_up, search, final = done.rows
    best = done.stages["search"].best
    assert final["settings"]["lr"] == best["params"]["lr"]
    assert final["settings"]["dropout"] == best["params"]["dropout"]
    assert (final["settings"]["k_txt"], final["settings"]["weight_decay"]) == (0, 0.01)
    assert (warm_up["epochs"], search["epochs"], search["trials"], final["epochs"]) == (1, 2, 2, 2)
    manifest = trainer.load_run("final", home / "runs" / "chain").manifest
    assert Path(manifest["init_from"]).name == "warm-up"
    assert final["test"]["rows"] == 48
    assert final["gain"]["difference"] > 0.2, "the picture alone tells"
    assert warm_up["test"] is None
    assert warm_up["gain"] is None
    assert all(row["seconds"] > 0 for row in done.rows)
    assert len((home / "out" / "new.csv").read_text().splitlines()) == 7
    assert json.loads((home / "runs" / "chain" / "recipe.json").read_text())["stages"] == done.rows
    assert done.table in (home / "runs" / "chain" / "summary.md").read_text()

    before = files(home / "runs") | files(home / "out")
    again = run(home)
    assert again.rows == done.rows
    assert files(home / "runs") | files(home / "out") == before
    assert [s["state"] for s in plan(done.recipe, show=SILENT)] == ["finished"] * 3
    with pytest.raises(UsageError, match=r"final: a run with other settings \(.*weight_decay"):
        run(home, STAGES.replace("0.01", "0.02"))
    with pytest.raises(UsageError, match=r"finished, but started from .*warm-up, not from none"):
        run(home, STAGES.replace('init_from = "warm-up"\nsettings_from', "settings_from"))


def test_a_stage_whose_figures_are_not_kept_is_not_done(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = STAGES[: STAGES.index('[[stage]]\nname = "search"')]

    def full(*args: Any, **options: Any) -> None:
        raise WriteError("full; there is no space")

    with monkeypatch.context() as patched:
        patched.setattr("trainer.results.evaluate.write_text", full)
        with pytest.raises(WriteError, match="warm-up: measured on val, but full; free space"):
            run(home, stages)
    assert run(home, stages).rows[0]["val"]["rows"] == 48


def test_a_table_that_is_not_kept_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise WriteError("full; there is no space")

    monkeypatch.setattr("trainer.recipes.chain.write_json", full)
    notes: list[str] = []
    show = dataclasses.replace(SILENT, note=notes.append)
    run(home, STAGES[: STAGES.index('[[stage]]\nname = "search"')], show=show)
    assert "the table is not kept: full" in notes


@pytest.mark.slow
def test_a_stopped_stage_goes_on(home: Path) -> None:
    stages = STAGES[: STAGES.index('[[stage]]\nname = "search"')].replace(
        "epochs = 1", "epochs = 2"
    )
    whole = run(home, stages.replace('"chain"', '"whole"'))
    asked = iter(range(100))
    with pytest.raises(StoppedError):
        run(home, stages, stopping=lambda: next(asked) >= 9)
    assert [s["state"] for s in plan(read(home, stages), show=SILENT)] == ["begun"]
    after = run(home, stages)
    assert after.rows[0]["val"] == whole.rows[0]["val"]
    assert run(home, stages, until="warm-up").rows == after.rows


def test_settings_win_from_the_file_to_the_command_line(home: Path) -> None:
    text = '[train]\nlr = 0.5\nepochs = 7\n[[stage]]\nname = "a"\ntrain = {epochs = 8}\n'
    recipe = read(home, text)
    train = recipe.stages[0].config.train
    base = load_config(home / "featstore.toml").train
    assert (train.lr, train.epochs, train.mlp_dim) == (0.5, 8, base.mlp_dim)
    assert recipe.name == "recipe"
    file = home / "recipe.toml"
    over = read_recipe(file, home / "featstore.toml", {"train": {"epochs": 1}}).stages[0]
    assert over.config.train.epochs == 1
    assert over.own["train"] == {"epochs"}


def test_rows_of_a_stage_are_taken_from_the_recipes_folder(home: Path) -> None:
    recipe = read(home, '[[stage]]\nname = "a"\ndata = {rows = "new.jsonl"}\n')
    assert recipe.stages[0].config.data.rows == str(home / "new.jsonl")
    assert recipe.stages[0].config.data.images == str(home / "data" / "images")


ONE = '[[stage]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no stages"),
        ("[stage]\nname = 'a'", "no stages"),
        ("[stages]\n", r"unknown section 'stages' \(did you mean 'stage'\?\)"),
        ("[recipe]\nnam = 'a'", r"\[recipe\]: unknown key 'nam' \(did you mean 'name'\?\)"),
        ("[recipe]\nname = '../a'\n" + ONE, r"\[recipe\] name: '../a': expected letters"),
        ("[[stage]]\ntest = true", "stage 1: no name"),
        (ONE + ONE, "stage 'a': two stages of that name"),
        (ONE + "trian = {}", r"stage 1: unknown key 'trian' \(did you mean 'train'\?\)"),
        (ONE + "test = 1", "stage 1: test: expected true or false, found 1"),
        (ONE + "train = {lrr = 1}", r"stage 'a': unknown setting 'lrr' in \[train\]"),
        (ONE + "train = {lr = -1}", r"stage 'a'.*lr"),
        (ONE + "init_from = 'b'", "init_from = 'b': expected the name of an earlier stage"),
        (ONE + "settings_from = 'a'", "settings_from = 'a': .* of which there is none"),
        (ONE + "search = {trials = 2}", "search settings without a space"),
        (ONE + "space = 's.toml'\ntest = true", "test is of a run; a search has none"),
        (ONE + "predict = {rows = 'r'}", "predict has no out; expected rows and out"),
    ],
)
def test_what_a_recipe_may_not_say(home: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(home, text)


def test_until_names_a_stage(home: Path) -> None:
    with pytest.raises(UsageError, match=r"--until 'b': no stage of .*recipe.toml: a"):
        run(home, ONE, until="b")


def test_the_table_says_what_is_not_known() -> None:
    row = {
        "stage": "a",
        "kind": "run",
        "init_from": None,
        "trials": None,
        "run": "r",
        "settings": {"lr": 1e-3},
        "epochs": 1,
        "val": None,
        "test": None,
        "gain": None,
        "seconds": 2.0,
        "end_to_end_seconds": None,
    }
    assert "| a | presets | lr 0.001 | – | – | – | 2.0 s | – |" in as_markdown([row])
    known = as_markdown([{**row, "end_to_end_seconds": 20.0}])
    assert "end to end at least 20 s, 10.0 × as long" in known


@pytest.mark.parametrize("name", ["demo", "shared", "study"])
def test_the_recipes_that_ship_are_read(name: str) -> None:
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml")
    assert recipe.name == name
    assert all(stage.space is None or stage.space.is_file() for stage in recipe.stages)
