"""`report`: the page of a run, of a search and of several runs; whose figures stand on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from browser import check_page, opened_browser
from click.testing import CliRunner, Result
from tiny_runs import prepared, tiny_config
from unprivileged import read_only

import trainer
from featstore.errors import FeatstoreError, RunError, UsageError, WriteError
from featstore.progress import SILENT
from trainer.commands.main import cli
from trainer.results.report import embedding, measured, place
from trainer.results.report.cards import cards
from trainer.results.report.cost import cost_of
from trainer.results.report.measured import Measured
from trainer.run.training import Reporter
from trainer.tuning.drive import SearchResults
from trainer.tuning.search_file import start_search
from trainer.tuning.space_file import read_space

QUIET: dict[str, Any] = {"reporter": Reporter(), "show": SILENT}
SPACE = {
    "search": {"trials": 14, "metric": "val_loss"},
    "train": {"lr": {"log_uniform": [1e-4, 1e-2]}, "dropout": {"uniform": [0.0, 0.5]}},
}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path
) -> trainer.Run:
    folder = tmp_path_factory.mktemp("report")
    project = prepared(tiny_config(folder / "data", tiny_vit, tiny_text, epochs=1, k_txt=1))
    run = trainer.train(project, name="first", runs=folder / "runs", **QUIET)
    run.evaluate(show=SILENT)
    return run


@pytest.fixture
def run(trained: trainer.Run, tmp_path: Path) -> trainer.Run:
    """The run, measured, in a folder of its own."""
    return trainer.Run(Path(shutil.copytree(trained.folder, tmp_path / "runs" / "first")))


@pytest.fixture
def opened(run: trainer.Run, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are evaluated."""
    asked: list[str] = []
    evaluate = measured.evaluate

    def count(scorer: Any, split: str, **options: Any) -> Any:
        asked.append(split)
        return evaluate(scorer, split, **options)

    monkeypatch.setattr(measured, "evaluate", count)
    return asked


def text_of(found: dict[str, Any]) -> str:
    text = Path(found["page"]).read_text()
    assert found["bytes"] == len(text.encode()) < 5e6
    return text


def typed(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="python cli.py")


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- whose figures


def test_what_evaluate_left_is_shown_and_not_measured_again(
    run: trainer.Run, opened: list[str]
) -> None:
    found = run.report(show=SILENT)
    assert opened == []
    assert (found["split"], found["page"]) == ("test", str(run.folder / "report.html"))
    left = json.loads((run.folder / "evaluate-test.json").read_text())
    text = text_of(found)
    at = f"{100 * left['at_threshold']['accuracy']:.1f}\N{NO-BREAK SPACE}%"
    assert f"is right about {at} (95\N{NO-BREAK SPACE}% interval" in text
    assert left["weights_digest"] == run.weights_digest
    assert run.weights_digest in text
    manifest = run.manifest
    for digest in (manifest["data"]["rows_digest"], manifest["features"]["text"]["fingerprint"]):
        assert digest in text


@pytest.mark.parametrize("what", ["weights", "threshold", "version", "rows", "control"])
def test_stale_figures_are_measured_again(
    run: trainer.Run, opened: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = run.folder / "evaluate-test.json"
    if what == "weights":
        # Another time of change alone says nothing; other bytes do.
        os.utime(run.weights_path, (time.time() + 99,) * 2)
        measured.measured(run, "test", lambda: run.scorer, SILENT)
        assert opened == []
        changed(figures, weights_digest="0" * 32)
    elif what == "threshold":
        run.metrics_path.write_text(json.dumps({**run.metrics, "threshold": 0.31}))
    elif what == "version":
        old = json.loads(figures.read_text())
        del old["threshold_sweep"]
        figures.write_text(json.dumps(old))
    elif what == "rows":
        path = run.folder / "predictions-test.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    else:
        monkeypatch.setattr(measured, "find_blind", lambda run: run)
    measured.measured(run, "test", lambda: run.scorer, SILENT)
    assert opened == ["test"]
    assert json.loads(figures.read_text())["weights_digest"] == run.weights_digest


def test_without_its_data_a_run_shows_what_it_holds(
    run: trainer.Run, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(run: Any) -> Any:
        raise RunError("the store is gone")

    monkeypatch.setattr("trainer.api.opened", lost)
    found = run.report(show=SILENT)
    assert found["notes"] == ["The run's data cannot be opened: the store is gone"]
    assert "Not drawn: the run" in text_of(found)
    # Figures that may be of this run are shown with a warning, those of another never.
    old = json.loads((run.folder / "evaluate-test.json").read_text())
    (run.folder / "evaluate-test.json").write_text(
        json.dumps({key: value for key, value in old.items() if key != "weights_digest"})
    )
    assert "could not be measured again (an older version" in text_of(run.report(show=SILENT))
    changed(run.folder / "evaluate-test.json", weights_digest="0" * 32)
    with pytest.raises(RunError, match="the store is gone"):
        run.report(show=SILENT)
    run.metrics_path.unlink()
    with pytest.raises(RunError, match="no page yet: the run has no finished epoch"):
        run.report(show=SILENT)


def test_where_a_page_goes(run: trainer.Run, tmp_path: Path, opened: list[str]) -> None:
    with pytest.raises(UsageError, match=r"ends with \.html"):
        run.report(tmp_path / "page.pdf")
    assert Path(run.report(split="val", show=SILENT)["page"]).name == "report-val.html"
    # Nothing is written into a folder that is only read.
    (run.folder / "evaluate-test.json").unlink()
    with read_only(run.folder):
        with pytest.raises(WriteError, match=r"no right to write.*--out FILE\.html"):
            run.report(show=SILENT)
        found = run.report(tmp_path / "new" / "page.html", show=SILENT)
    assert (opened[-1], Path(found["page"])) == ("test", tmp_path / "new" / "page.html")
    assert not (run.folder / "evaluate-test.json").exists()


# --- what stands there


def test_the_surest_errors_stand_there_with_photo_and_attention(run: trainer.Run) -> None:
    found = measured.measured(run, "test", lambda: run.scorer, SILENT)
    mixed = np.where(np.arange(len(found.labels)) % 2, found.labels, 1 - found.called)
    some = Measured(
        found.result, found.image_ids, found.hypotheses, mixed.astype(np.int8), found.logits
    )
    made, without = cards(some, "test", run.scorer)
    assert (without, len(made)) == ("", 24)
    sure = [card.confidence for card in made]
    assert sure == sorted(sure, reverse=True)
    assert sure[0] == max(some.confidence[~some.right])
    assert all(card.truth != card.called for card in made)
    assert all(card.style.startswith("--photo: url(data:image/jpeg") for card in made)
    assert all(card.overlay.startswith("data:image/png") for card in made)
    blind, without = cards(some, "test", None)
    assert (blind[0].hypothesis, blind[0].style) == (made[0].hypothesis, "")
    assert "cannot be reached" in blind[0].note
    assert without
    # A photo that is gone is said, and stops nothing.
    photo = run.project.dataset.images.lookup(made[0].image_id)
    assert isinstance(photo, Path)
    data = photo.read_bytes()
    photo.write_bytes(b"")
    try:
        again, _ = cards(some, "test", run.scorer)
    finally:
        photo.write_bytes(data)
    assert "the file is empty" in again[0].note
    assert (again[0].style, bool(again[-1].style)) == ("", again[-1].image_id != made[0].image_id)


def test_activations_are_those_of_the_rows_that_were_measured(
    run: trainer.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MOST_ROWS", 20)
    drawn, values = embedding.activations(run.scorer, "test", "none", 48)
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert values.shape == (20, 8)
    logit = run.model.get_layer("logit")
    found = measured.measured(run, "test", lambda: run.scorer, SILENT)
    kernel, bias = (np.asarray(weight) for weight in (logit.kernel, logit.bias))
    np.testing.assert_allclose((values @ kernel + bias)[:, 0], found.logits[drawn], atol=1e-5)
    with pytest.raises(ValueError, match="expected 7 labelled rows, found 48"):
        embedding.activations(run.scorer, "test", "none", 7)
    one, two = (embedding.in_two_dimensions(values)["t-SNE"] for _ in range(2))
    assert one.shape == (20, 2)
    assert (one == two).all()


def test_the_cost_follows_from_the_history_and_the_extraction(
    run: trainer.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (epoch,) = run.history.to_dict("records")
    monkeypatch.setattr("trainer.results.report.cost.recorded_speed", lambda root, spec: 8.0)
    cost = cost_of([run, run], run.project)
    seconds = 2 * (epoch["seconds"] + epoch["val_seconds"])
    # 32 and 12 photos, four sentences each.
    assert (cost["photos"], cost["rows"], cost["visits"]) == (44, 176, 352)
    assert cost["extraction_seconds"] == 44 / 8
    assert cost["seconds"] == pytest.approx(seconds)
    assert cost["end_to_end_seconds"] == pytest.approx(seconds + 352 / 8)
    assert cost["break_even_epochs"] == 0.25
    assert cost["step_seconds"] == pytest.approx(epoch["seconds"] / epoch["steps"])
    unknown = cost_of([run], None)
    assert unknown["extraction_seconds"] is unknown["end_to_end_seconds"] is None


# --- a search


@pytest.fixture
def search(run: trainer.Run, tmp_path: Path) -> SearchResults:
    """Eleven trials that ended well, one that failed, one that runs and one nobody is at."""
    config = run.config
    space = read_space(SPACE, {}, {})
    found = start_search(
        tmp_path / "runs" / "s", space.base(config), space, None, None, run.project
    )
    found.study.sampler = optuna.samplers.RandomSampler(seed=3)
    for number in range(14):
        trial = found.study.ask({p.name: p.distribution() for p in space.parameters})
        folder = found.run_of(number).folder
        folder.mkdir()
        trial.set_user_attr("seconds", 2.0 + number)
        trial.set_user_attr("together", 2)
        if number < 11:
            for name in ("manifest.json", "history.csv", "config.toml"):
                shutil.copy(run.folder / name, folder)
            found.study.tell(trial, np.log(trial.params["lr"]))
        elif number == 11:
            trial.set_user_attr("reason", "training <diverged>")
            found.study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return SearchResults(found)


def test_a_search_that_runs_has_a_page(search: SearchResults, tmp_path: Path) -> None:
    with search.search.run_of(12).writing():
        found = search.report()
    assert (found["kind"], found["trials"], found["notes"]) == ("search", 14, [])
    text = text_of(found)
    assert "12 of 14 trials drawn by random have ended; the lowest val_loss is" in text
    assert "11 complete, 1 running, 1 stopped, 1 fail" in text
    assert "training &lt;diverged&gt;" in text
    best = search.rows()[0]
    assert f"train --config {search.folder / best['run'] / 'config.toml'}" in text
    assert "featstore search --name s" in text
    first = re.search(r"<th scope=\"row\">(\w+)</th><td class=\"number\">0\.\d\d</td>", text)
    assert first is not None
    assert first[1] == "lr"


def test_a_search_of_few_trials_says_what_is_not_drawn(run: trainer.Run, tmp_path: Path) -> None:
    space = read_space(SPACE, {}, {})
    found = start_search(
        tmp_path / "runs" / "s", space.base(run.config), space, None, None, run.project
    )
    with pytest.raises(RunError, match="no trial was drawn"):
        SearchResults(found).report()
    found.study.ask({p.name: p.distribution() for p in space.parameters})
    text = text_of(SearchResults(found).report())
    assert "none is complete yet" in text
    assert "0 complete trials, expected at least 10" in text


# --- the command


def test_the_command_tells_runs_from_searches(
    run: trainer.Run, search: SearchResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ["--runs", str(tmp_path / "runs")]
    done = typed("report", "first", *runs)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"run {run.folder}: {run.folder}/report.html (")
    assert done.stdout.endswith(" kB)\n")
    assert typed("report", "s", *runs).stdout.startswith(f"search {search.folder}: ")
    for line, said in (
        ("absent", "no such run or search"),
        ("first s", "--compare takes several"),
        ("s --split val", "--split is of a run"),
        ("first --storage sqlite://", "--storage is of a search; first is none"),
        ("--compare first", "expected two runs or more, the base first, found 1"),
    ):
        done = typed("report", *line.split(), *runs)
        assert done.exit_code in (1, 2)
        assert said in done.stderr
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.folder, tmp_path / "s")
    done = typed("report", "s", *runs)
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.search(r"s: a search \(.*\) and a run \(s\); name the folder itself", done.stderr)


def test_runs_are_compared_on_a_page(run: trainer.Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "runs" / "second")
    runs = ["--runs", str(tmp_path / "runs")]
    done = typed("report", "--compare", "first", "second", *runs, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["page"] == str(run.folder / "compare-second.html")
    text = text_of(found)
    assert "second: accuracy at τ 0.0 points above first" in text
    assert "no difference shown" in text
    assert "permutation by image p" in text


def test_advice_is_typed_as_the_program_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.errors import Command

    for called, expected in (
        ("cli.py", "python cli.py train"),
        ("/usr/bin/featstore", "featstore train"),
        ("/x/ipykernel_launcher.py", "featstore train"),
        ("-c", "featstore train"),
    ):
        monkeypatch.setattr("sys.argv", [called])
        assert place.typed(Command("train")) == expected


# --- in a browser


@pytest.mark.slow
def test_pages_in_a_browser(
    run: trainer.Run, search: SearchResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder, tmp_path / "runs" / "second")
    # Errors to show, whatever the run has learnt.
    monkeypatch.setattr(Measured, "called", property(lambda self: 1 - self.labels))
    pages = [
        run.report(show=SILENT),
        search.report(),
        trainer.report([run, trainer.Run(tmp_path / "runs" / "second")], show=SILENT),
    ]
    for found in pages:
        text_of(found)
        check_page(Path(found["page"]))
    assert text_of(pages[0]).count('<li class="card"') == 24
    with opened_browser() as browser:
        tab = browser.new_page()
        tab.goto(Path(pages[1]["page"]).as_uri())
        tab.get_by_role("button", name="trial").click()
        names = "[...document.querySelectorAll('#leaderboard tbody th')].map(x => x.textContent)"
        assert tab.evaluate(names) == [f"trial-{number:04d}" for number in range(14)]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"classes": 3}, {"control": "hypothesis-only"}, {"k_vit": 1}])
def test_runs_of_other_kinds_have_pages(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path, settings: dict[str, Any]
) -> None:
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, epochs=1, **settings)
    split = Path(str(config.data.split_file))
    ids = json.loads(split.read_text())
    split.write_text(
        json.dumps({"train": ids["train"] + ids["test"], "val": ids["val"], "test": []})
    )
    run = trainer.train(prepared(config), name="one", runs=tmp_path / "runs", **QUIET)
    found = run.report(show=SILENT)
    assert found["split"] == "val"
    text = " ".join(text_of(found).split())
    if "classes" in settings:
        assert "Three classes have no threshold" in text
    elif "control" in settings:
        assert "it is a control itself, and has none" in text
        assert "This run reads no photo" in text
    else:
        assert "the last vision block train" in text
    with pytest.raises(FeatstoreError):
        run.report(split="test", show=SILENT)
