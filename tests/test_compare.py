"""Runs on the same rows: the first sees the picture, the second does not."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, tiny_config, with_train, write_data

import trainer
import trainer.results.score
from featstore.errors import DataError, MissingFeaturesError, RunError, UsageError
from featstore.progress import SILENT
from featstore.project import Project
from trainer.api import Run
from trainer.commands.main import cli
from trainer.config import Config
from trainer.features import prepare
from trainer.results.compare_tables import Table, as_markdown, as_text
from trainer.run.fit import fit
from trainer.run.training import Training

TEST_ROWS = IMAGES_OF_SPLIT["test"] * len(SENTENCES)


def trained(config: Config, folder: Path) -> Run:
    project = Project(config)
    project.extract("vit", show=SILENT)
    prepare(project, config.train.k_txt)
    fit(Training(Run(folder), project, config.train))
    return Run(folder)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Config:
    folder = tmp_path_factory.mktemp("compare")
    return tiny_config(folder / "data", tiny_vit, tiny_text, epochs=4)


@pytest.fixture(scope="module")
def runs(config: Config) -> Path:
    folder = Path(config.store.root).parent.parent / "runs"
    trained(config, folder / "sees")
    trained(with_train(config, control="hypothesis-only", epochs=1), folder / "blind")
    return folder


@pytest.fixture(scope="module")
def compared(runs: Path) -> dict[str, Any]:
    return Run(runs / "sees").compare("blind", draws=300, show=SILENT)


def invoke(runs: Path, *args: str) -> Result:
    return CliRunner().invoke(cli, ["compare", *args, "--runs", str(runs)], prog_name="featstore")


@pytest.mark.slow
def test_each_run_is_measured_as_it_was_trained(runs: Path, compared: dict[str, Any]) -> None:
    assert compared["base"] == "sees"
    assert (compared["rows"], compared["images"]) == (TEST_ROWS, IMAGES_OF_SPLIT["test"])
    assert compared["left_out"] == {}
    for name, figures in compared["runs"].items():
        alone = Run(runs / name).evaluate("test", show=SILENT)
        for key in ("control", "at_threshold", "at_half", "threshold"):
            assert figures[key] == alone[key]
        assert figures["loss"] == pytest.approx(alone["loss"])
    assert compared["runs"]["sees"]["at_half"]["accuracy"] > 0.9
    assert compared["runs"]["blind"]["at_half"]["accuracy"] == 0.5


def test_the_difference_is_of_the_run_and_the_base(compared: dict[str, Any]) -> None:
    (found,) = compared["differences"]
    sees, blind = compared["runs"]["sees"], compared["runs"]["blind"]
    assert (found["run"], found["base"]) == ("blind", "sees")
    gap = blind["at_half"]["accuracy"] - sees["at_half"]["accuracy"]
    accuracy = found["figures"]["accuracy_at_half"]
    assert accuracy["difference"] == pytest.approx(gap)
    assert accuracy["low"] <= gap <= accuracy["high"] < 0
    loss = found["figures"]["loss"]
    assert loss["difference"] == pytest.approx(blind["loss"] - sees["loss"])
    assert 0 < loss["low"] <= loss["difference"] <= loss["high"]
    tests = found["at_half"]
    only = tests["mcnemar"]
    assert (only["only_a"] - only["only_b"]) / TEST_ROWS == pytest.approx(gap)
    assert only["exact_p"] < 0.001
    # All flips of at most twelve images were tried.
    assert tests["permutation"]["exact"]
    assert tests["permutation"]["p"] < 0.05


def test_buckets_are_of_the_same_rows(compared: dict[str, Any]) -> None:
    # "the man sits", and "the woman … dog … runs in the park".
    bucket = compared["buckets"]["gender"]
    assert bucket["rows"] == 2 * IMAGES_OF_SPLIT["test"]
    assert bucket["entailment"] == 0.5
    gap = bucket["runs"]["blind"]["accuracy"] - bucket["runs"]["sees"]["accuracy"]
    assert bucket["differences"]["blind"]["difference"] == pytest.approx(gap)
    assert "vehicles" not in compared["buckets"]


def test_own_buckets(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('animals = ["dog", "cat"]\n')
    found = trainer.compare(
        [Run(runs / "sees"), Run(runs / "blind")],
        buckets=tmp_path / "mine.toml",
        draws=20,
        show=SILENT,
    )
    assert {name: bucket["rows"] for name, bucket in found["buckets"].items()} == {
        "animals": 3 * IMAGES_OF_SPLIT["test"]
    }


def edited(runs: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Run:
    copy = Run(Path(shutil.copytree(runs / "blind", folder / "edited")))
    manifest = copy.manifest
    edit(manifest)
    copy.write_manifest(manifest)
    return copy


def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(trainer.results.score, "load_best", refuse)


@pytest.mark.parametrize("what", ["rows", "splits"])
def test_other_rows_are_refused_before_anything_is_computed(
    runs: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["data"][f"{what}_digest"] = "0" * 32

    other = edited(runs, tmp_path, edit)
    scored(monkeypatch)
    with pytest.raises(RunError, match=f"its {what} are not those of .*sees .*files changed"):
        Run(runs / "sees").compare(other, show=SILENT)


def test_settings_that_differ_are_named(runs: Path, tmp_path: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["data"]["splits_digest"] = "0" * 32

    other = edited(runs, tmp_path, edit)
    text = other.config_path.read_text()
    other.config_path.write_text(text.replace("split_seed = 0", "split_seed = 7"))
    result = invoke(runs, "sees", str(other.folder))
    assert result.exit_code == 1
    assert "split_seed: 0 there, here 7" in result.stderr
    assert f"featstore compare {runs / 'sees'} {other.folder} --rows FILE" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_rows_that_one_run_could_not_read_count_for_none(
    config: Config, runs: Path, tmp_path: Path
) -> None:
    """Another store, made while a photo was damaged: encoders and stores may differ."""
    store = dataclasses.replace(config.store, root=str(tmp_path / "cache"), dtype="float16")
    other = with_train(dataclasses.replace(config, store=store), epochs=1)
    broken = json.loads(Path(config.data.split_file).read_text())["test"][3]
    photo = Path(config.data.images) / f"{broken}.png"
    whole = photo.read_bytes()
    try:
        photo.write_bytes(whole[:60])
        run = trained(other, tmp_path / "other")
    finally:
        photo.write_bytes(whole)
    found = Run(runs / "sees").compare(run, draws=20, show=SILENT)
    assert found["rows_of_split"] == TEST_ROWS
    assert found["left_out"] == {"not read by every run": len(SENTENCES)}
    assert list(found["runs"]["other"]["quarantined_photos"]) == [broken]
    for figures in found["runs"].values():
        assert figures["rows"] == TEST_ROWS - len(SENTENCES)
    assert f"left out: {len(SENTENCES)} of {TEST_ROWS} rows" in as_text(found)


@pytest.mark.slow
def test_rows_of_a_file(runs: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "new", seed=5)
    lines = Path(data["rows"]).read_text().splitlines()[: 8 * len(SENTENCES)]
    unlabelled = {**json.loads(lines[0]), "Hypothesis": "a cat sits"}
    del unlabelled["Label"]
    # Ids of their own: the store has others of the same names.
    lines = [line.replace("photo", "new") for line in [*lines, json.dumps(unlabelled)]]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "photos").mkdir()
    for at in range(8):
        source = Path(data["images"]) / f"photo{at:03d}.png"
        shutil.copy(source, tmp_path / "photos" / f"new{at:03d}.png")
    result = invoke(
        runs,
        *("sees", "blind", "--rows", str(tmp_path / "rows.jsonl")),
        *("--images", str(tmp_path / "photos"), "--draws", "20", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["rows"], found["images"]) == (8 * len(SENTENCES), 8)
    assert found["left_out"] == {"no label": 1}
    assert found["runs"]["sees"]["at_half"]["accuracy"] > 0.9
    assert found["runs"]["blind"]["at_half"]["accuracy"] == 0.5


@pytest.mark.slow
def test_one_model_at_a_time(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = trainer.results.score.load_best

    def watched(run: Run) -> Any:
        assert [ref() for ref in loaded] == [None] * len(loaded)
        model = load(run)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(trainer.results.score, "load_best", watched)
    Run(runs / "sees").compare("blind", draws=5, show=SILENT)
    assert len(loaded) == 2


def test_missing_features_are_mended_with_the_settings_of_the_run_that_lacks_them(
    config: Config, runs: Path, tmp_path: Path
) -> None:
    other = Run(Path(shutil.copytree(runs / "blind", tmp_path / "moved")))
    store = dataclasses.replace(config.store, root=str(tmp_path / "empty"))
    (tmp_path / "empty").mkdir()
    other.write_config(dataclasses.replace(other.config, store=store))
    with pytest.raises(MissingFeaturesError) as caught:
        Run(runs / "sees").compare(other, draws=5, show=SILENT)
    assert f"--config {other.config_path}" in str(caught.value)


@pytest.mark.parametrize("names", [("sees",), ("sees", "sees"), ("sees", "blind", "blind")])
def test_two_runs_that_differ_are_wanted(runs: Path, names: tuple[str, ...]) -> None:
    result = invoke(runs, *names)
    assert result.exit_code == 2
    assert re.search("expected (two or more|runs that differ)", result.stderr)
    assert result.stderr.count("\n") == 1


def test_runs_of_one_name_are_told_apart(runs: Path, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(runs / "sees", tmp_path / "sees")))
    found = Run(runs / "sees").compare(copy, draws=20, show=SILENT)
    assert set(found["runs"]) == {str((runs / "sees").resolve()), str(copy.folder.resolve())}
    (difference,) = found["differences"]
    assert difference["figures"]["loss"] == {"difference": 0, "low": 0, "high": 0}
    # That twelve images show no difference does not make it nought on all.
    accuracy = difference["figures"]["accuracy"]
    assert accuracy["low"] < accuracy["difference"] == 0 < accuracy["high"]
    assert difference["at_threshold"]["permutation"]["p"] == 1


@pytest.mark.slow
def test_the_command_prints_and_writes(
    runs: Path, compared: dict[str, Any], tmp_path: Path
) -> None:
    args = ("sees", "blind", "--draws", "300")
    result = invoke(runs, *args, "--out", str(tmp_path / "found.md"))
    assert result.exit_code == 0, result.stderr
    for table in ("Figures", "Difference from sees", "Calibration", "Accuracy at τ by bucket"):
        assert table in result.stdout
    assert re.search(r"blind: accuracy at τ .* below sees .*: a difference\n", result.stdout)
    page = (tmp_path / "found.md").read_text()
    assert page.startswith("# sees · blind\n")
    tables = re.findall(r"(?:^\|.*\|\n)+", page, re.M)
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    result = invoke(runs, *args, "--out", str(tmp_path / "found.json"), "--json")
    printed = json.loads(result.stdout)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written.items() <= printed.items()
    # The same draws, so the same figures to the last digit.
    assert printed["runs"] == compared["runs"]
    assert printed["differences"] == compared["differences"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--out", "found.html"), "expected a name that ends with .md or .json"),
        (("--images", "photos"), "--images and --encoding belong to --rows"),
        (("--rows", "rows.csv", "--split", "test"), "--split and --rows exclude each other"),
        (("--buckets", "none.toml"), "none.toml"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_computed(
    runs: Path, args: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(monkeypatch)
    result = invoke(runs, "sees", "blind", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_split_without_labels_or_logits_that_are_not_finite(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = trainer.results.score.Scorer.score

    def spoilt(self: Any, *args: Any) -> Any:
        found = score(self, *args)
        logits = found.logits.copy()
        logits[1] = np.nan
        return dataclasses.replace(found, logits=logits)

    monkeypatch.setattr(trainer.results.score.Scorer, "score", spoilt)
    with pytest.raises(RunError, match="1 of 48 logits are not finite"):
        Run(runs / "sees").compare("blind", draws=5, show=SILENT)

    def nothing(self: Any, *args: Any) -> Any:
        found = score(self, *args)
        half = slice(None, 24) if self.run.name == "sees" else slice(24, None)
        columns = {name: getattr(found, name)[half] for name in ("rows", "logits", "labels")}
        return dataclasses.replace(found, **columns)

    monkeypatch.setattr(trainer.results.score.Scorer, "score", nothing)
    with pytest.raises(DataError, match="no labelled row that all of sees, blind could read"):
        Run(runs / "sees").compare("blind", draws=5, show=SILENT)


def test_cells_of_a_markdown_table_are_no_markup() -> None:
    table = Table("Buckets", ["bucket", "rows"], [["a|b*c_`d`<e>", "3"]])
    assert table.markdown().splitlines()[-1] == r"| a\|b\*c\_\`d\`\<e> | 3 |"
    assert table.text().splitlines()[-1] == "a|b*c_`d`<e>     3"


def test_a_page_of_one_class_says_undefined(compared: dict[str, Any]) -> None:
    run = {**compared["runs"]["sees"], "auc": None}
    run["intervals"] = {**run["intervals"], "auc": None}
    page = as_markdown({**compared, "runs": {**compared["runs"], "sees": run}})
    assert re.search(r"^\| AUC \| undefined \|", page, re.M)


def test_no_run_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="expected two or more runs"):
        trainer.compare([])
