"""Projects, stores, photos and runs at other places than they were; stores that are read-only."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import trainer
from featstore.progress import SILENT
from featstore.project import Project
from tests.tiny_runs import worker_here, write_data
from tests.unprivileged import read_only
from trainer.commands.main import cli

SPACE = "[search]\ntrials = 1\n[train]\nlr = {choice = [1e-3]}\nk_txt = 0\n"


def invoke(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="python cli.py")


def succeed(*args: str | Path) -> str:
    done = invoke(*args)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*args: str | Path) -> str:
    done = invoke(*args)
    assert done.exit_code == 1, done.output
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return line


def write_settings(home: Path, vit: Path, text: Path, more: str = "") -> None:
    """Write a project's file, whose paths are relative but for the encoders'."""
    (home / "featstore.toml").write_text(
        '[data]\nrows = "data/rows.jsonl"\nimages = "data/images"\nsplit_file = "data/split.json"\n'
        f'[encoders]\nvit = "{vit}"\ntext = "{text}"\n[store]\ndtype = "float32"\n'
        "[train]\nk_txt = 0\nlr = 3e-3\nepochs = 1\nnum_heads = 2\nhead_dim = 4\nmlp_dim = 8\n"
        + more
    )


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Path:
    """A project with a run and a search; where it was made there is nothing any more."""
    home = tmp_path_factory.mktemp("moved") / "home"
    write_data(home / "data")
    write_settings(home, tiny_vit, tiny_text)
    (home / "space.toml").write_text(SPACE)
    config = ("--config", home / "featstore.toml")
    succeed("extract-vit", "--split", "all", *config)
    succeed("train", "--name", "first", "--lr", "0.002", "--keep-state", *config)
    succeed("train", "--name", "next", "--init-from", "first", "--keep-state", *config)
    start = ("--init-from", "first")
    with worker_here():
        succeed("search", "--name", "s", "--space", home / "space.toml", *start, *config)
    return home.rename(home.with_name("left"))


@pytest.fixture
def moved(left: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project in another folder, which is the working directory."""
    home = Path(shutil.copytree(left, tmp_path / "there"))
    monkeypatch.chdir(home)
    return home


@pytest.mark.slow
def test_a_moved_project_goes_on(moved: Path) -> None:
    recorded = trainer.load_run("first").metrics
    found = trainer.load_run("first").evaluate("val", show=SILENT)
    assert found["loss"] == recorded["loss"]
    assert found["at_threshold"] == recorded["at_threshold"]
    succeed("parity", "first", "--rows", "2")
    succeed("evaluate", "next")
    # Its own learning rate, which no file but the run's has.
    succeed("train", "--name", "first", "--epochs", "2")
    assert trainer.load_run("first").config.train.lr == 0.002
    succeed("train", "--name", "next", "--epochs", "2")
    assert "trial-0000" in succeed("search", "show", "s")
    succeed("search", "best", "s", "--seeds", "1")
    succeed("search", "--name", "s", "--trials", "2")
    assert "0 B can go" in succeed("store", "gc")
    assert 'rows = "../../data/rows.jsonl"' in (moved / "runs/first/config.toml").read_text()


def test_a_moved_project_needs_no_working_directory(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("evaluate", moved / "runs" / "first")
    succeed("evaluate", "first", "--config", moved / "featstore.toml")
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


@pytest.mark.slow
def test_a_store_alone_that_was_moved(moved: Path, tmp_path: Path) -> None:
    store = (moved / "cache").rename(tmp_path / "store")
    for command in (("evaluate",), ("parity", "--rows", "2"), ("train", "--epochs", "2", "--name")):
        line = refused(*command, "first")
        assert "--root" in line
        assert "extract-vit" not in line or "train" in command
    expected = trainer.load_run("first", root=store).evaluate(show=SILENT)
    found = json.loads(succeed("evaluate", "first", "--root", store, "--json").splitlines()[-1])
    assert found["at_threshold"] == expected["at_threshold"]
    succeed("parity", "first", "--rows", "2", "--root", store)
    succeed("train", "--name", "first", "--epochs", "2", "--root", store)
    # Where it is now was recorded.
    succeed("evaluate", "first")


def test_data_that_were_moved(moved: Path, tmp_path: Path) -> None:
    data = (moved / "data").rename(tmp_path / "data")
    line = refused("evaluate", "first")
    for option in ("--data-rows", "--data-images", "--split-file"):
        assert option in line
    places = ("--data-rows", data / "rows.jsonl", "--data-images", data / "images")
    assert "--split-file" in refused("evaluate", "first", *places)
    places = (*places, "--split-file", data / "split.json")
    succeed("evaluate", "first", *places)
    succeed("parity", "first", "--rows", "2", *places)
    succeed("search", "best", "s", "--seeds", "1", *places)
    # Other rows are not taken for the run's.
    rows = (data / "rows.jsonl").read_text().replace("a dog", "a cat")
    (data / "rows.jsonl").write_text(rows)
    assert "rows" in refused("evaluate", "first", *places)


def test_a_run_alone_that_was_moved(moved: Path, tmp_path: Path) -> None:
    run = (moved / "runs" / "first").rename(tmp_path / "alone")
    assert "--config" in refused("evaluate", run)
    succeed("evaluate", run, "--config", moved / "featstore.toml")
    succeed("predict", run, "--rows", moved / "data/rows.jsonl", "--config", "featstore.toml")


def test_a_run_that_was_copied_reads_what_it_was_trained_on(
    left: Path, tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    home = Path(shutil.copytree(left, tmp_path / "home"))
    succeed("train", "--name", "here", "--config", home / "featstore.toml")
    succeed("evaluate", Path(shutil.copytree(home / "runs" / "here", tmp_path / "elsewhere")))


def test_a_copied_project_starts_from_its_own_runs(left: Path, moved: Path) -> None:
    """Though those that it was copied from are still where they were."""
    home = Path(shutil.copytree(left, left.with_name("home")))
    try:
        own = (moved / "runs" / "first").resolve()
        assert trainer.load_run("next").source == str(own)
        succeed("train", "--name", "next", "--init-from", "first", "--epochs", "2")
        space = ("--space", "space.toml", "--init-from", "first")
        with worker_here():
            succeed("search", "--name", "s", *space, "--trials", "2")
        assert json.loads((moved / "runs/s/search.json").read_text())["init_from"] == str(own)
        # What was copied alone has none beside it.
        alone = shutil.copytree(moved / "runs" / "next", moved / "elsewhere" / "next")
        assert trainer.load_run(alone).source == str(own)
        shutil.rmtree(moved / "runs" / "first")
        assert trainer.load_run("next").source == str(own)
    finally:
        shutil.rmtree(home)


def test_runs_have_a_folder_of_their_own(
    moved: Path, tiny_vit: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_settings(moved, tiny_vit, tiny_text, '[runs]\nfolder = "kept/here"\n')
    monkeypatch.chdir(tmp_path)
    config = ("--config", moved / "featstore.toml")
    succeed("train", "--name", "third", *config)
    assert (moved / "kept" / "here" / "third" / "best.weights.h5").is_file()
    succeed("evaluate", "third", *config)
    assert "third" in refused("evaluate", "thirt", *config)
    project = Project.load(moved / "featstore.toml")
    assert trainer.train(project, name="fourth", show=SILENT).folder.parent == moved / "kept/here"
    shown = succeed("init", "--config", tmp_path / "new.toml") and (tmp_path / "new.toml")
    assert "[runs]" in shown.read_text()
    for wrong, said in (("runs = 3", "a section: \\[runs\\]"), ("[runs]\nfoldr = 'x'", "foldr")):
        shown.write_text(wrong)
        done = invoke("train", "--config", shown)
        assert done.exit_code == 2
        assert re.search(said, done.stderr)
    # Of the run's own file, the folder is the one that it is in.
    succeed("train", "--name", "fifth", "--config", moved / "kept/here/third/config.toml")
    assert (moved / "kept" / "here" / "fifth").is_dir()
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()


# --- read-only


@pytest.fixture
def second(moved: Path, tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> Path:
    """Another user's folder, of another split, with a row that has no photo."""
    mine = tmp_path / "mine"
    (mine / "data").mkdir(parents=True)
    rows = (moved / "data" / "rows.jsonl").read_text()
    gone = json.dumps({"Image_ID": "gone", "Hypothesis": "a dog", "Label": "entailment"})
    (mine / "data" / "rows.jsonl").write_text(rows + gone + "\n")
    (mine / "data" / "images").symlink_to(moved / "data" / "images")
    write_settings(mine, tiny_vit, tiny_text)
    text = (mine / "featstore.toml").read_text()
    text = text.replace('split_file = "data/split.json"', "split_seed = 3")
    text = text.replace("[store]", f'[store]\nroot = "{moved / "cache"}"')
    (mine / "featstore.toml").write_text(text)
    return mine


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file below a folder, with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def test_a_second_user_trains_from_a_store_that_he_may_not_write(
    moved: Path, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(second)
    before = contents(moved)
    with read_only(moved):
        said = succeed("train", "--name", "mine")
        assert "the split is kept in runs/mine" in said
        (split,) = (second / "runs" / "mine" / "splits").iterdir()
        (report,) = (second / "runs" / "mine" / "reports").iterdir()
        assert "gone" in report.read_text()
        succeed("evaluate", "mine")
        succeed("parity", "mine", "--rows", "2")
        succeed("predict", "mine", "--rows", "data/rows.jsonl", "--out", "p.csv")
        # Nor is what others may not write needed for rows that are new to it.
        Path("new.csv").write_text("Image_ID,Hypothesis\nphoto001,a new sentence\n")
        assert "`--no-cache`" in refused("predict", "mine", "--rows", "new.csv")
        succeed("predict", "mine", "--rows", "new.csv", "--no-cache")
        succeed("store", "info")
        succeed("store", "verify", "--source")
        assert "nothing to do" in succeed("extract-vit", "--split", "all")
        # Nothing is left where features are missing, in the store or in a folder of runs.
        line = refused("train", "--name", "deep", "--k-txt", "2")
        assert "cannot be written" in line
        assert not (second / "runs" / "deep").exists()
    assert contents(moved) == before
    assert len(json.loads(split.read_text())["splits"]["train"]) > 1


def test_what_was_measured_is_shown_where_it_cannot_be_kept(
    moved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with read_only(moved):
        done = invoke("evaluate", "first", "--json")
        assert done.exit_code == 1
        found = json.loads(done.stdout)
        assert "predictions-test.csv" in found["not_kept"]
        assert "--out FOLDER" in found["error"]["mend"]
        assert "accuracy" in invoke("evaluate", "first").stdout
        succeed("evaluate", "first", "--out", out)
        assert {path.name for path in out.iterdir()} == {
            *("evaluate-test.json", "predictions-test.csv", "summary.md")
        }
        done = invoke("parity", "first", "--rows", "2")
        assert done.exit_code == 1
        assert "parity-test.json" in done.stderr
        assert "then run the command again" in done.stderr
        assert "end to end" in done.stdout
        (tmp_path / "file").write_text("")
        done = invoke(
            "explain", "first", "--rows", "1", "--sample", "2", "--png", tmp_path / "file"
        )
        assert done.exit_code == 1
        assert "rank correlation" in done.stdout
        done = invoke("search", "show", "s")
        assert done.exit_code == 1
        assert "trial-0000" in done.stdout
        succeed("search", "best", "s")
    kept = json.loads((out / "evaluate-test.json").read_text())
    assert kept["at_threshold"] == found["at_threshold"]


def test_what_could_not_be_kept_is_said_before_the_work(
    moved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr("trainer.results.export.export.load_models", never)
    monkeypatch.setattr("trainer.exploration.explore._looks", never)
    monkeypatch.setattr("trainer.api.Run.explain", never)
    monkeypatch.setattr("trainer.api.Run.compare", never)
    with read_only(moved):
        for command in (("export", "first", "m.keras"), ("export", "first", "new/m.keras")):
            assert "m.keras: cannot be written (no right to write into" in refused(*command)
        assert "--out" in refused("eda")
        assert "--out FILE.html" in refused("report", "first", "--out", "new/page.html")
        for place in (("--npz", "a.npz"), ("--png", "new"), ("--out", "page.html")):
            assert "no right to write into" in refused("explain", "first", *place)
        assert "no right to write into" in refused("compare", "first", "next", "--out", "c.md")


# --- dry runs


@pytest.mark.parametrize("stored", [False, True])
def test_a_dry_run_writes_nothing(moved: Path, stored: bool) -> None:
    if stored:
        os.utime(next((moved / "data" / "images").iterdir()), (1, 1))
    else:
        shutil.rmtree(moved / "cache")
        shutil.rmtree(moved / "runs")
    with (moved / "data" / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"Image_ID": "gone", "Hypothesis": "a", "Label": "entailment"}))
    before = contents(moved)
    for command in (
        ("extract-vit", "--split", "all"),
        ("extract-text", "--split", "all", "--k-txt", "2"),
        ("search", "--space", "space.toml", "--name", "t"),
    ):
        said = succeed(*command, "--dry-run")
        assert "1 no photo" in said
        assert "named in" not in said
        assert contents(moved) == before, command


@pytest.mark.slow
def test_a_dry_run_of_the_demo_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "to do        2400, 3 shards" in succeed("extract-vit", "--dry-run")
    assert contents(tmp_path) == {}
