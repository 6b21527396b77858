"""What `evaluate` leaves: every figure again from its CSV, the controls, rows of a file."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from scipy.optimize import minimize_scalar
from sklearn import metrics as oracle
from tiny_runs import SENTENCES, prepared, tiny_config

import trainer
from featstore.errors import DataError, RunError, StoppedError, UsageError
from featstore.progress import SILENT
from trainer.buckets import load_buckets
from trainer.commands.main import cli
from trainer.results import controls
from trainer.results.score import Scorer, Scores
from trainer.results.summary import LONGEST, escaped, table
from trainer.run.folder import Run
from trainer.run.training import Reporter

QUIET: dict[str, Any] = {"reporter": Reporter(), "show": SILENT}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Run:
    folder = tmp_path_factory.mktemp("evaluation")
    project = prepared(tiny_config(folder / "data", tiny_vit, tiny_text, epochs=1))
    return trainer.train(project, name="first", runs=folder / "runs", **QUIET)


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> trainer.Run:
    """The run in a folder of its own, its threshold well away from 0.5."""
    copy = trainer.Run(Path(shutil.copytree(trained.folder, tmp_path / "runs" / "first")))
    copy.metrics_path.write_text(json.dumps({**copy.metrics, "threshold": 0.3}))
    return copy


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Logits that are wrong now and then, in place of the model's.

    `by` has the noise of each control, `add` what the named photos are given more.
    """
    said: dict[str, Any] = {"by": {"none": 1.5, "shuffled-images": 4, "hypothesis-only": 4}}
    original = Scorer.score

    def score(self: Scorer, split: str, control: str = "none", *args: Any) -> Scores:
        found = original(self, split, control, *args)
        seed = ["train", "val", "test"].index(split)
        noise = np.random.default_rng([seed, len(control)]).normal(size=len(found.rows))
        # Rows of one photo err together.
        noise = np.repeat(noise[:: len(SENTENCES)], len(SENTENCES)) + noise / 2
        logits = 2.5 * found.labels - 1 + said["by"][control] * noise
        return dataclasses.replace(found, logits=said.get("logits", logits).astype(np.float32))

    monkeypatch.setattr(Scorer, "score", score)
    return said


def rows_of(run: Run, name: str = "predictions-test.csv") -> pd.DataFrame:
    rows = pd.read_csv(run.folder / name, dtype=str, keep_default_na=False)
    # Python's own reading is exact; that of older pandas is not.
    numbers = ("probability_entailment", "confidence", "logit")
    return rows.assign(**{number: [float(text) for text in rows[number]] for number in numbers})


def test_every_figure_follows_from_the_rows_that_are_left(run: trainer.Run, spoken: Any) -> None:
    found = run.evaluate(show=SILENT)
    run.evaluate("val", show=SILENT)
    rows, val = rows_of(run), rows_of(run, "predictions-val.csv")
    examples = run.project.dataset.examples.select(run.project.dataset.rows("test"))
    assert rows["Image_ID"].tolist() == examples.image_ids.tolist()
    assert rows["Hypothesis"].tolist() == examples.hypotheses.tolist()
    truth = (rows["Label"] == "entailment").to_numpy()
    assert truth.tolist() == (examples.labels == 1).tolist()
    logit = rows["logit"].to_numpy()
    probability = rows["probability_entailment"].to_numpy()
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-logit)), rtol=1e-14)
    assert np.array_equal(logit, logit.astype(np.float32))

    tau = run.metrics["threshold"]
    for threshold, at in ((tau, found["at_threshold"]), (0.5, found["at_half"])):
        called = probability >= threshold
        tn, fp, fn, tp = oracle.confusion_matrix(truth, called).ravel()
        assert [at[key] for key in ("tn", "fp", "fn", "tp")] == [tn, fp, fn, tp]
        assert min(tn, fp, fn, tp) > 0
        assert at["accuracy"] == pytest.approx(oracle.accuracy_score(truth, called))
        assert at["macro_f1"] == pytest.approx(oracle.f1_score(truth, called, average="macro"))
        report = oracle.classification_report(
            truth, called, target_names=["contradiction", "entailment"], output_dict=True
        )
        for name in ("contradiction", "entailment"):
            theirs = report[name]
            assert at[name]["rows"] == theirs["support"]
            for ours, key in (("precision",) * 2, ("recall",) * 2, ("f1", "f1-score")):
                assert at[name][ours] == pytest.approx(theirs[key])
    called = probability >= tau
    assert (rows["predicted"] == "entailment").tolist() == called.tolist()
    confidence = np.where(called, probability, 1 - probability)
    assert rows["confidence"].tolist() == confidence.tolist()
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(truth, logit))
    assert found["average_precision"] == pytest.approx(
        oracle.average_precision_score(truth, probability)
    )

    def figures(probability: np.ndarray) -> dict[str, float]:
        sure = np.maximum(probability, 1 - probability)
        hit = (probability >= 0.5) == truth
        bins = np.ceil(sure * 15)
        gaps = [abs((hit - sure)[bins == i].sum()) for i in np.unique(bins)]
        return {
            "brier": oracle.brier_score_loss(truth, probability),
            "loss": oracle.log_loss(truth, probability),
            "calibration_error": sum(gaps) / len(truth),
        }

    calibration = found["calibration"]
    assert calibration["before"] == pytest.approx(figures(probability))
    assert {key: found[key] for key in calibration["before"]} == calibration["before"]
    val_truth, val_logit = (val["Label"] == "entailment"), val["logit"].to_numpy()
    best = minimize_scalar(
        lambda t: oracle.log_loss(val_truth, 1 / (1 + np.exp(-val_logit / t))),
        bounds=(0.05, 20),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert calibration["temperature"] == pytest.approx(best.x, rel=1e-4)
    assert calibration["fitted_rows"] == len(val)
    tempered = 1 / (1 + np.exp(-logit / calibration["temperature"]))
    assert calibration["after"] == pytest.approx(figures(tempered))
    assert ((tempered >= calibration["threshold_after"]) == called).all()
    assert sum(line["rows"] for line in calibration["reliability"]) == len(rows)

    correct = called == truth
    for name, word in (("gender", "man"), ("negation", "not"), ("counting", "two")):
        inside = rows["Hypothesis"].str.contains(rf"\b(?:wo)?{word}\b", regex=True)
        bucket = found["buckets"][name]
        assert bucket["rows"] == inside.sum() > 0
        assert bucket["entailment"] == pytest.approx(truth[inside].mean())
        assert bucket["accuracy"] == pytest.approx(correct[inside].mean())
        assert bucket["interval"]["low"] <= bucket["accuracy"] <= bucket["interval"]["high"]
        assert bucket["images"] == rows["Image_ID"][inside].nunique()
    assert found["buckets"]["clothing"]["accuracy"] is None
    assert found["in_no_bucket"]["rows"] == (rows["Hypothesis"] == "a dog").sum()

    wrong = rows[~correct].sort_values("confidence", ascending=False, kind="stable")
    errors = found["errors"]
    assert (errors["rows"], errors["rows_above"]) == (len(wrong), (wrong["confidence"] > 0.7).sum())
    assert errors["share_above"] == pytest.approx((wrong["confidence"] > 0.7).mean())
    named = ["Image_ID", "Hypothesis", "Label", "predicted", "confidence"]
    assert [[line[key] for key in named] for line in errors["most_confident"]] == (
        wrong[named].head(10).values.tolist()
    )
    for name, interval in found["intervals"].items():
        value = found["at_half"] if name.endswith("_at_half") else found | found["at_threshold"]
        assert interval["low"] < value[name.removesuffix("_at_half")] < interval["high"]


def test_the_controls_stand_beside_the_headline(run: trainer.Run, spoken: Any) -> None:
    found = run.evaluate(show=SILENT)
    assert found["controls"]["hypothesis-only"] is None
    assert "no finished run" in found["controls_missing"]["hypothesis-only"]
    assert "was not measured" in found["verdict"]
    blind = copy_of(run, "blind", control="hypothesis-only")
    metrics = {**blind.metrics, "threshold": 0.8}
    blind.metrics_path.write_text(json.dumps(metrics))
    found = run.evaluate(show=SILENT)
    assert found["controls_missing"] == {}
    rows = rows_of(run)
    truth = rows["Label"] == "entailment"
    correct = rows["predicted"] == rows["Label"]
    for name, tau in (("shuffled-images", run.metrics["threshold"]), ("hypothesis-only", 0.8)):
        logits = run.scorer.score("test", name).logits.astype(float)
        right = ((1 / (1 + np.exp(-logits))) >= tau) == truth
        control = found["controls"][name]
        assert control["accuracy"] == pytest.approx(right.mean())
        assert control["auc"] == pytest.approx(oracle.roc_auc_score(truth, logits))
        gap = control["difference"]
        assert gap["difference"] == pytest.approx(correct.mean() - right.mean())
        assert gap["low"] < gap["difference"] < gap["high"]
    assert found["controls"]["hypothesis-only"]["run"] == "blind"
    summary = (run.folder / "summary.md").read_text()
    assert found["verdict"] in summary
    assert "blind" in summary
    written = json.loads((run.folder / "evaluate-test.json").read_text())
    assert {key: written[key] for key in found} == found


def test_a_damaged_control_costs_nothing_else(run: trainer.Run, spoken: Any) -> None:
    blind = copy_of(run, "blind", control="hypothesis-only")
    blind.weights_path.write_bytes(b"not HDF5")
    found = run.evaluate(show=SILENT)
    assert found["controls"]["hypothesis-only"] is None
    assert "best.weights.h5" in found["controls_missing"]["hypothesis-only"]
    assert "--with-controls" not in (run.folder / "summary.md").read_text().split("## ")[0]


def test_a_run_that_was_stopped_says_so(run: trainer.Run, spoken: Any) -> None:
    run.write_manifest({**run.manifest, "status": "stopped"})
    run.evaluate(show=SILENT)
    assert "This run is stopped: its best epoch" in (run.folder / "summary.md").read_text()


def test_measuring_again_leaves_the_same_bytes(run: trainer.Run, spoken: Any) -> None:
    names = ("evaluate-test.json", "predictions-test.csv", "summary.md")
    run.evaluate(show=SILENT)
    first = [(run.folder / name).read_bytes() for name in names]
    trainer.load_run(run.folder).evaluate(show=SILENT)
    assert [(run.folder / name).read_bytes() for name in names] == first


def test_a_control_leaves_the_summary_alone(run: trainer.Run, spoken: Any) -> None:
    run.evaluate(show=SILENT)
    before = (run.folder / "summary.md").read_bytes()
    found = run.evaluate(control="shuffled-images", show=SILENT)
    assert "summary" not in found["files"]
    assert "controls" not in found
    assert (run.folder / "summary.md").read_bytes() == before
    rows = rows_of(run, "predictions-test-shuffled-images.csv")
    assert (rows["predicted"] == rows["Label"]).mean() == found["at_threshold"]["accuracy"]
    # The temperature is that of the run as it was trained.
    assert found["calibration"]["temperature"] == pytest.approx(
        run.evaluate(show=SILENT)["calibration"]["temperature"]
    )


def test_a_blind_run_has_a_summary_without_controls(run: trainer.Run, spoken: Any) -> None:
    blind = copy_of(run, "blind", control="hypothesis-only")
    found = blind.evaluate(show=SILENT)
    assert "controls" not in found
    assert "control `hypothesis-only`" in (blind.folder / "summary.md").read_text()
    with pytest.raises(UsageError, match="trained with hypothesis-only"):
        blind.evaluate(with_controls=True, show=SILENT)


def test_a_logit_that_is_no_number_is_refused(run: trainer.Run, spoken: Any) -> None:
    spoken["logits"] = np.full(48, np.nan)
    with pytest.raises(RunError, match="48 of 48 logits are not finite"):
        run.evaluate(show=SILENT)
    assert not list(run.folder.glob("evaluate-*"))


def test_without_val_there_is_no_temperature(
    run: trainer.Run, spoken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.score

    def refuse(self: Scorer, split: str, *args: Any) -> Scores:
        if split == "val":
            raise DataError("split 'val' has no rows")
        return score(self, split, *args)

    monkeypatch.setattr(Scorer, "score", refuse)
    found = run.evaluate(show=SILENT)
    assert found["without_val"] == "split 'val' has no rows"
    assert found["calibration"]["temperature"] is found["threshold_interval"] is None
    summary = (run.folder / "summary.md").read_text()
    assert "No temperature was fitted, and τ has no interval: split 'val' has no rows." in summary


# --- the run on the sentence alone ---------------------------------------------------------


def copy_of(run: Run, name: str, manifest: Any = None, **train: Any) -> trainer.Run:
    """Return a copy of a run beside it with other settings, or another manifest."""
    copy = trainer.Run(Path(shutil.copytree(run.folder, run.folder.parent / name)))
    config = run.config
    train_config = dataclasses.replace(config.train, **train)
    copy.write_config(dataclasses.replace(config, train=train_config))
    if manifest is not None:
        copy.write_manifest(manifest(copy.manifest))
    return copy


def test_only_a_run_of_the_same_settings_is_a_control(run: trainer.Run) -> None:
    blind = {"control": "hypothesis-only"}
    copy_of(run, "other-rate", lr=1e-5, **blind)
    copy_of(run, "sees")
    copy_of(run, "running", lambda found: {**found, "status": "running"}, **blind)
    copy_of(
        run,
        "other-split",
        lambda found: {**found, "data": {**found["data"], "splits_digest": "0" * 32}},
        **blind,
    )
    copy_of(
        run,
        "other-features",
        lambda found: {
            **found,
            "features": {
                **found["features"],
                "text": {**found["features"]["text"], "fingerprint": "0" * 32},
            },
        },
        **blind,
    )
    copy_of(run, "other-start", lambda found: {**found, "init_from": "runs/warm"}, **blind)
    copy_of(run, "no-weights", **blind).weights_path.unlink()
    copy_of(run, "damaged", **blind).config_path.write_text("[train")
    assert controls.find_blind(run) is None
    copy_of(run, "by-hand", **blind)
    assert controls.find_blind(run).name == "by-hand"
    copy_of(run, "first-hypothesis-only", **blind)
    assert controls.find_blind(run).name == "first-hypothesis-only"


def test_a_start_is_the_same_where_both_runs_were_moved(run: trainer.Run) -> None:
    copy_of(run, "warm")

    def start(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "init_from": "/elsewhere/runs/warm"}

    seeing = copy_of(run, "tuned", start)
    assert seeing.source == str((run.folder.parent / "warm").resolve())
    blind = copy_of(seeing, "tuned-blind", control="hypothesis-only")
    assert controls.find_blind(seeing).name == blind.name


def test_the_control_is_named_after_the_run_and_takes_nobodys_name(run: trainer.Run) -> None:
    runs = run.folder.parent
    assert controls.blind_place(run) == (runs, "first-hypothesis-only")
    copy_of(run, "first-hypothesis-only", lr=1.0, control="hypothesis-only")
    assert controls.blind_place(run) == (runs, "first-hypothesis-only-2")
    stopped = {"manifest": lambda found: {**found, "status": "stopped"}}
    copy_of(run, "first-hypothesis-only-2", **stopped, control="hypothesis-only")
    assert controls.blind_place(run) == (runs, "first-hypothesis-only-2")
    # A search's folder holds its trials and nothing else.
    (runs / "search.json").write_text("{}")
    assert controls.blind_place(run) == (runs.parent, "runs-first-hypothesis-only")


@pytest.mark.slow
def test_with_controls_trains_it_once_and_goes_on(run: trainer.Run) -> None:
    with pytest.raises(StoppedError, match="first-hypothesis-only: stopped; the same command"):
        run.train_control(Reporter(stopping=lambda: True), SILENT)
    found = run.evaluate(with_controls=True, show=SILENT)
    control = found["controls"]["hypothesis-only"]
    assert control["run"] == "first-hypothesis-only"
    # Each sentence is right for half its photos.
    assert control["accuracy"] == 0.5
    weights = run.folder.parent / "first-hypothesis-only" / "best.weights.h5"
    before = weights.stat().st_mtime_ns
    assert run.evaluate(with_controls=True, show=SILENT) == found
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("low", "gap", "high", "verdict"),
    [
        (0.031, 0.052, 0.073, "worth 5.2 points of accuracy (95 % interval 3.1 to 7.3) over the"
         " sentence alone."),
        (-0.004, 0.012, 0.028, "worth 1.2 points of accuracy (95 % interval −0.4 to 2.8) over the"
         " sentence alone: not shown."),
        (-0.03, -0.02, -0.01, "(95 % interval −3.0 to −1.0) over the sentence alone: the sentence"
         " alone does better."),
        (0.0, 0.0, 0.0, "0.0 points of accuracy (95 % interval 0.0 to 0.0) over the sentence alone:"
         " not shown."),
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_the_interval(
    low: float, gap: float, high: float, verdict: str
) -> None:
    found = {"difference": {"difference": gap, "low": low, "high": high}}
    assert verdict in controls.verdict({"hypothesis-only": found, "shuffled-images": None})


# --- rows of a file ------------------------------------------------------------------------


@pytest.fixture
def place(run: trainer.Run, tmp_path: Path) -> Callable[..., Path]:
    """Writes a row file of photos of the run."""

    def write(name: str, *rows: tuple[str, str, str]) -> Path:
        path = tmp_path / name
        pd.DataFrame(rows, columns=["Image_ID", "Hypothesis", "Label"]).to_csv(path, index=False)
        return path

    return write


def test_rows_of_a_file_have_files_of_their_own(
    run: trainer.Run, place: Callable[..., Path]
) -> None:
    ids = {
        split: list(dict.fromkeys(run.project.keys("vit", split))) for split in ("train", "test")
    }
    rows = [(image_id, "a dog", "entailment") for image_id in ids["test"][:4]]
    rows += [(image_id, "the man sits", "contradiction") for image_id in ids["train"][:3]]
    rows += [(ids["train"][0], "a dog", "contradiction")]
    rows += [(ids["test"][5], "a dog", "perhaps"), ("absent", "a dog", "entailment")]
    path = place("mine.csv", *rows)
    found = run.evaluate(rows=path, show=SILENT)
    assert (found["split"], found["rows_file"]) == (None, str(path))
    assert (found["rows"], found["rows_of_split"]) == (8, 10)
    assert found["rows_left_out"] == {"no photo": 1, "no label": 1}
    assert found["seen_photos"] == {
        "train": {"photos": 3, "rows": 4},
        "val": {"photos": 0, "rows": 0},
    }
    assert list(found["files"].values()) == [
        "evaluate-mine.json",
        "predictions-mine.csv",
        "summary-mine.md",
    ]
    written = rows_of(run, "predictions-mine.csv")
    assert [*zip(written["Image_ID"], written["Hypothesis"], written["Label"], strict=True)] == (
        rows[:8]
    )
    summary = (run.folder / "summary-mine.md").read_text()
    assert summary.startswith("# first on mine.csv\n")
    assert "The run's train split has 3 photos of 4 of these rows" in summary
    assert "Left out: 2 of 10 rows (1 no photo, 1 no label)." in summary
    # The same rows of the split have the same logits.
    run.evaluate(show=SILENT)
    both = written.merge(rows_of(run), on=["Image_ID", "Hypothesis"])
    assert len(both) == 4
    np.testing.assert_allclose(both["logit_x"], both["logit_y"], atol=1e-5)
    frame = run.evaluate(rows=pd.read_csv(path), show=SILENT)
    assert frame["at_threshold"] == found["at_threshold"]
    assert frame["files"]["summary"] == "summary-rows.md"


def test_a_file_named_as_a_split_does_not_take_its_files(
    run: trainer.Run, place: Callable[..., Path], tmp_path: Path
) -> None:
    photo, other = run.project.keys("vit", "test")[:2]
    path = place("test.csv", (photo, "a dog", "entailment"), (other, "a dog", "contradiction"))
    # Nor are the run's own rows needed.
    config = run.config
    data = dataclasses.replace(config.data, rows=str(tmp_path / "gone.jsonl"))
    run.write_config(dataclasses.replace(config, data=data))
    found = trainer.load_run(run.folder).evaluate(rows=path, show=SILENT)
    assert found["files"]["figures"] == "evaluate-rows-test.json"
    assert found["seen_photos"] is None
    assert "gone.jsonl" in found["without_val"]
    assert "may have been trained on these" in (run.folder / "summary-rows-test.md").read_text()


def test_rows_of_one_photo_have_no_interval(run: trainer.Run, place: Callable[..., Path]) -> None:
    photo = run.project.keys("vit", "test")[0]
    path = place("one.csv", (photo, "a dog", "entailment"), (photo, "two cat in the park", "0"))
    found = run.evaluate(rows=path, show=SILENT)
    assert found["intervals"]["accuracy"] is None
    assert "two images" in found["controls_missing"]["shuffled-images"]
    assert "| – |" in (run.folder / "summary-one.md").read_text()


def test_rows_without_labels_are_refused(run: trainer.Run, place: Callable[..., Path]) -> None:
    path = place("bare.csv", (run.project.keys("vit", "test")[0], "a dog", ""))
    with pytest.raises(DataError, match=r"none of 1 row has a label .*featstore predict first"):
        run.evaluate(rows=path, show=SILENT)


# --- the summary ---------------------------------------------------------------------------


@given(st.lists(st.text(max_size=40), min_size=2, max_size=4))
def test_any_text_is_read_as_itself_in_a_table(texts: list[str]) -> None:
    text = table(("first", "second"), [(escaped(text), "end") for text in texts])
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [token for token in tokens if token.type == "inline"][2:]
    kinds = {child.type for cell in cells for child in cell.children or []}
    assert kinds <= {"text", "text_special"}
    shown = ["".join(child.content for child in cell.children or []) for cell in cells]
    lines = [" ".join(text.split()) for text in texts]
    printable = ["".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines]
    assert shown == [cell for line in printable for cell in (line, "end")]


@pytest.mark.parametrize(
    "text",
    ["a | b", "`code`", "<b>", "a\nb", r"back\|slash", "*x* _y_ ~z~", "[a](b)", "&lt;", "$x$"],
)
def test_what_markdown_would_take_for_more_is_text(text: str) -> None:
    shown = MarkdownIt("commonmark").enable("table").render(table(("a",), [(escaped(text),)]))
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f'<td style="text-align:left">{plain}</td>' in shown


def test_a_word_stays_readable_and_a_long_sentence_is_cut() -> None:
    assert escaped("vit_small_patch14 isn't") == "vit_small_patch14 isn't"
    assert len(escaped("word " * 200)) == LONGEST


# --- the command ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--split", "val", "--rows", "x.csv"), "--split and --rows exclude each other"),
        (("--images", "x"), "--images, --encoding and --no-cache belong to --rows"),
        (("--no-cache",), "--images, --encoding and --no-cache belong to --rows"),
        (("--with-controls", "--control", "shuffled-images"), "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(args: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(cli, ["evaluate", "first", *args])
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_the_command_prints_a_screenful(run: trainer.Run, spoken: Any) -> None:
    copy_of(run, "blind", control="hypothesis-only")
    args = ["evaluate", "first", "--runs", str(run.folder.parent)]
    found = json.loads(CliRunner().invoke(cli, [*args, "--json"]).stdout)
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.stderr
    for words in (
        *found["verdict"].split(". "),
        f"{found['auc']:.4f}",
        "blind",
        "confidence above 0.7",
    ):
        assert words in done.stdout
    assert len(done.stdout.splitlines()) <= 20
    for name in found["files"].values():
        assert str(run.folder / name) in done.stderr
        assert (run.folder / name).exists()


def test_a_bucket_file_of_the_users(run: trainer.Run, spoken: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('animals = ["dog", "cat"]\n')
    args = ["evaluate", "first", "--runs", str(run.folder.parent), "--buckets"]
    found = json.loads(CliRunner().invoke(cli, [*args, str(path), "--json"]).stdout)
    assert list(found["buckets"]) == ["animals"]
    assert found["buckets"]["animals"]["rows"] == 36
    assert "mine.toml" in (run.folder / "summary.md").read_text()
    path.write_text("animals = 3")
    done = CliRunner().invoke(cli, [*args, str(path)])
    assert done.exit_code == 2
    assert "bucket 'animals'" in done.stderr


def test_the_description_names_every_field(run: trainer.Run, spoken: Any, tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "EVALUATION.md").read_text()
    described = {
        name
        for line in text.split("## Every figure")[1].split("\n## ")[0].splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    copy_of(run, "blind", control="hypothesis-only")
    of_file = {"rows_file", "rows_left_out", "rows_notes", "seen_photos"}
    assert described - of_file == set(run.evaluate(show=SILENT))
    example = text.split("```toml\n")[1].split("```")[0]
    (tmp_path / "buckets.toml").write_text(example)
    assert list(load_buckets(tmp_path / "buckets.toml")) == ["animals", "years"]
