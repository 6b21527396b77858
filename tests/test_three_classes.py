"""Runs that tell neutral from the other two, from the row file to every report of them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from on_jax import run_on_jax
from scipy.optimize import minimize_scalar
from sklearn import metrics as oracle
from tiny_runs import (
    SENTENCES,
    prepared,
    read_again_here,
    tiny_config,
    with_train,
    worker_here,
)

import trainer
from featstore.data.labels import labels_of
from featstore.errors import DataError, FeatstoreError, RunError, UsageError
from featstore.progress import SILENT
from featstore.quantities import share
from trainer.commands.main import cli
from trainer.config import Config, render_config
from trainer.metrics import evaluate_logits
from trainer.results.score import Scorer, Scores
from trainer.run.training import Reporter

NAMES = list(labels_of(3))
QUIET: dict[str, Any] = {"reporter": Reporter(), "show": SILENT}


@dataclasses.dataclass
class Made:
    """A project of three classes, and its runs."""

    folder: Path
    config: Config

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def train(self, name: str, **options: Any) -> trainer.Run:
        project = prepared(self.config)
        return trainer.train(project, name=name, runs=self.runs, **QUIET, **options)

    def rows_file(self, name: str, labels: Any, extra: str = "") -> Path:
        """Write test rows with other labels: a function of the label that is there."""
        rows = list(map(json.loads, Path(str(self.config.data.rows)).read_text().splitlines()))
        path = self.folder / name
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(("Image_ID", "Hypothesis", "Label"))
        for row in rows[-len(SENTENCES) * 12 :]:
            writer.writerow((row["Image_ID"], row["Hypothesis"], labels(row["Label"])))
        path.write_text(text.getvalue() + extra)
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Made:
    folder = tmp_path_factory.mktemp("three")
    config = tiny_config(folder / "data", tiny_vit, tiny_text, classes=3, epochs=4, lr=1e-2)
    return Made(folder, config)


@pytest.fixture(scope="module")
def run(made: Made) -> trainer.Run:
    return made.train("first", k_txt=1)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the model wrong now and then."""
    original = Scorer.score

    def score(self: Scorer, split: str, *args: Any) -> Scores:
        found = original(self, split, *args)
        noise = np.random.default_rng(len(split)).normal(size=found.logits.shape)
        return dataclasses.replace(found, logits=(found.logits / 3 + noise).astype(np.float32))

    monkeypatch.setattr(Scorer, "score", score)


def command(made: Made, *args: str | Path) -> str:
    """Run a command on the runs; return what it prints."""
    given = [*map(str, args), "--runs", str(made.runs)]
    result = CliRunner().invoke(cli, given, prog_name="featstore")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


def one_line(error: FeatstoreError) -> str:
    line = str(error)
    assert "\n" not in line
    return line


# --- training


@pytest.mark.slow
def test_it_learns_three_classes(made: Made, run: trainer.Run) -> None:
    metrics, history = run.metrics, run.history
    assert metrics["threshold"] is metrics["at_threshold"] is metrics["at_half"] is None
    assert "threshold_interval" not in metrics
    at = metrics["at_argmax"]
    assert at["accuracy"] > 0.6 > 1 / 3
    assert sum(sum(line.values()) for line in at["confusion"].values()) == metrics["rows"]
    assert list(at["confusion"]) == NAMES
    assert {name: metrics[name] for name in NAMES} == dict.fromkeys(NAMES, metrics["rows"] // 3)
    best = history.iloc[metrics["epoch"] - 1]
    assert best["val_accuracy"] == pytest.approx(at["accuracy"])
    assert history["threshold"].isna().all()
    assert history["loss"].iloc[-1] < history["loss"].iloc[0] < 1.5
    assert run.model.output.shape == (None, 3)
    counts = run.manifest["data"]["counts"]["train"]
    assert sum(counts[name] for name in NAMES) == counts["rows"] == 32 * len(SENTENCES)
    assert run.config.data.classes == 3
    val = run.scorer.score("val")
    found = evaluate_logits(val.labels, val.logits)
    assert found["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert f"val accuracy {share(at['accuracy'], 2)}" in repr(run)


def test_two_classes_of_the_same_rows_leave_neutral_out(made: Made) -> None:
    config = dataclasses.replace(made.config, data=dataclasses.replace(made.config.data, classes=2))
    two = trainer.train(prepared(config), name="two", runs=made.runs, **QUIET)
    data = two.manifest["data"]
    assert data["rows_left_out"]["neutral"] == 18 * len(SENTENCES)
    assert "neutral" not in data["counts"]["train"]
    assert two.model.output.shape == (None, 1)
    assert 0 < two.metrics["threshold"] < 1
    # It may start from the other kind; the last layer cannot.
    notes: list[str] = []
    reporter = Reporter(note=notes.append)
    started = trainer.train(
        prepared(made.config),
        name="from-two",
        runs=made.runs,
        init_from="two",
        epochs=1,
        reporter=reporter,
        show=SILENT,
    )
    assert started.manifest["initialised_layers"] == ["xattn", "xattn_norm", "mlp_1"]
    assert "layer logit is not taken" in " ".join(notes)


def test_rows_of_two_classes_are_refused(made: Made) -> None:
    path = made.rows_file("two.csv", {"neutral": "entailment"}.get)
    path.write_text(path.read_text().replace("\r\n", "\n").replace(",\n", ",contradiction\n"))
    data = dataclasses.replace(made.config.data, rows=str(path), split_file="")
    with pytest.raises(DataError) as error:
        prepared(dataclasses.replace(made.config, data=data))
    line = one_line(error.value)
    assert "expected rows of all three classes" in line
    assert "0 neutral" in line
    assert "--classes 2" in line


@pytest.mark.slow
@pytest.mark.parametrize("dtype_policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_near_float32(
    made: Made, run: trainer.Run, dtype_policy: str
) -> None:
    name = f"{dtype_policy}-all"
    heads = {"queries": "all", "fusion_layers": 2}
    mixed = made.train(name, k_txt=1, dtype_policy=dtype_policy, **heads)
    exact = made.train(f"{name}-float32", k_txt=1, **heads)
    losses = mixed.history["loss"] - exact.history["loss"]
    assert losses.abs().max() < 0.05
    assert (losses != 0).any()


# --- evaluation


def test_every_figure_follows_from_the_rows_that_are_left(
    made: Made, run: trainer.Run, noisy: None
) -> None:
    found = json.loads(command(made, "evaluate", "first", "--json"))
    command(made, "evaluate", "first", "--split", "val")
    rows = pd.read_csv(run.folder / "predictions-test.csv")
    assert list(rows.columns) == [
        *("Image_ID", "Hypothesis", "Label", "predicted"),
        *(f"probability_{name}" for name in NAMES),
        "confidence",
        *(f"logit_{name}" for name in NAMES),
    ]
    logits = rows[[f"logit_{name}" for name in NAMES]].to_numpy()
    shares = rows[[f"probability_{name}" for name in NAMES]].to_numpy()
    np.testing.assert_allclose(
        shares, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-12
    )
    truth = np.array([NAMES.index(name) for name in rows["Label"]])
    called = logits.argmax(axis=1)
    assert rows["predicted"].tolist() == [NAMES[i] for i in called]
    np.testing.assert_allclose(rows["confidence"], shares.max(axis=1))
    at = found["at_argmax"]
    matrix = oracle.confusion_matrix(truth, called, labels=[0, 1, 2])
    assert [[at["confusion"][a][b] for b in NAMES] for a in NAMES] == matrix.tolist()
    assert 0 < np.trace(matrix) < len(rows)
    assert at["accuracy"] == pytest.approx(oracle.accuracy_score(truth, called))
    assert at["macro_f1"] == pytest.approx(oracle.f1_score(truth, called, average="macro"))
    each = oracle.precision_recall_fscore_support(truth, called, labels=[0, 1, 2], zero_division=0)
    for i, name in enumerate(NAMES):
        figures = [at[name][key] for key in ("precision", "recall", "f1", "rows")]
        assert figures == pytest.approx([column[i] for column in each])
    one_hot = np.eye(3)[truth]

    def measured(shares: np.ndarray) -> dict[str, float]:
        sure, hit = shares.max(axis=1), shares.argmax(axis=1) == truth
        bins = np.ceil(sure * 15)
        return {
            "loss": oracle.log_loss(truth, shares),
            "brier": ((shares - one_hot) ** 2).sum(axis=1).mean() / 2,
            "calibration_error": sum(abs((hit - sure)[bins == i].sum()) for i in np.unique(bins))
            / len(truth),
        }

    assert {key: found[key] for key in ("loss", "brier", "calibration_error")} == pytest.approx(
        measured(shares)
    )
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(truth, shares, multi_class="ovr"))
    assert found["average_precision"] == pytest.approx(
        oracle.average_precision_score(one_hot, shares, average="macro")
    )
    assert found["threshold"] is found["threshold_interval"] is found["at_half"] is None
    assert found["intervals"].keys() == {
        *("accuracy", "macro_f1", "auc", "average_precision", "brier", "calibration_error"),
        "loss",
    }
    for name, interval in found["intervals"].items():
        assert interval["low"] <= (found | at)[name] <= interval["high"], name
    val = pd.read_csv(run.folder / "predictions-val.csv")
    val_truth = [NAMES.index(name) for name in val["Label"]]
    val_logits = val[[f"logit_{name}" for name in NAMES]].to_numpy()

    def loss_at(temperature: float) -> float:
        scaled = np.exp(val_logits / temperature)
        return float(oracle.log_loss(val_truth, scaled / scaled.sum(axis=1, keepdims=True)))

    best = minimize_scalar(loss_at, bounds=(0.02, 50), method="bounded", options={"xatol": 1e-9})
    calibration = found["calibration"]
    assert calibration["temperature"] == pytest.approx(best.x, rel=1e-3)
    assert calibration["threshold_after"] is None
    tempered = np.exp(logits / calibration["temperature"])
    tempered /= tempered.sum(axis=1, keepdims=True)
    assert calibration["after"] == pytest.approx(measured(tempered))
    correct = called == truth
    inside = rows["Hypothesis"].str.contains("not")
    bucket = found["buckets"]["negation"]
    assert bucket["rows"] == inside.sum() > 0
    assert bucket["accuracy"] == pytest.approx(correct[inside].mean())
    assert found["errors"]["rows"] == (~correct).sum()
    for line in found["errors"]["most_confident"]:
        assert line["Label"] != line["predicted"]
        assert line["confidence"] == max(line[f"probability_{name}"] for name in NAMES)


def test_the_reports_say_no_threshold(made: Made, run: trainer.Run, noisy: None) -> None:
    shown = command(made, "evaluate", "first")
    assert "τ" not in shown
    assert re.search(r"contradiction +\d+ +\d+ +\d+ +\d", shown)
    summary = (run.folder / "summary.md").read_text()
    assert "τ" not in summary
    assert "| truth | called entailment | called contradiction | called neutral |" in summary
    assert "each called the class of the largest probability" in summary
    assert "| photo | sentence | truth | called | confidence |" in summary


def test_the_controls_of_three_classes(made: Made, run: trainer.Run) -> None:
    found = run.evaluate(show=SILENT)
    assert found["controls"]["shuffled-images"]["threshold"] is None
    assert found["controls"]["shuffled-images"]["difference"]["difference"] > 0.1
    assert "over a shuffled one" in found["verdict"]


@pytest.mark.slow
def test_compare_tests_what_the_runs_call(made: Made, run: trainer.Run) -> None:
    made.train("worse", k_txt=1, epochs=1)
    found = json.loads(command(made, "compare", "first", "worse", "--json"))
    (entry,) = found["differences"]
    assert {"at_argmax"} == entry.keys() - {"run", "base", "figures"}
    accuracies = [found["runs"][name]["at_argmax"]["accuracy"] for name in ("worse", "first")]
    gap = accuracies[0] - accuracies[1]
    assert entry["figures"]["accuracy"]["difference"] == pytest.approx(gap)
    test = entry["at_argmax"]["mcnemar"]
    assert (test["only_a"] - test["only_b"]) / found["rows"] == pytest.approx(gap)
    assert sum(found[name] for name in NAMES) == found["rows"]
    shown = command(made, "compare", "first", "worse")
    assert "τ" not in shown
    assert "at 0.5" not in shown
    assert "McNemar p: exact" in shown
    assert "16 neutral" in shown


# --- predictions


def test_predictions_have_each_classs_probability(made: Made, run: trainer.Run) -> None:
    path = made.rows_file("new.csv", str, extra="nowhere,a dog,neutral\n")
    images = made.config.data.images
    out = made.folder / "found.csv"
    said = json.loads(
        command(
            made, "predict", "first", "--rows", path, "--images", images, "--out", out, "--json"
        )
    )
    rows = pd.read_csv(out)
    columns = [f"probability_{name}" for name in NAMES]
    assert list(rows.columns) == [
        *("Image_ID", "Hypothesis", "Label"),
        *columns,
        *("confidence", "reason"),
    ]
    assert rows["Label"].isna().sum() == 1
    known = rows.dropna(subset=["Label"])
    np.testing.assert_allclose(known[columns].sum(axis=1), 1)
    assert known["Label"].tolist() == [NAMES[i] for i in known[columns].to_numpy().argmax(axis=1)]
    np.testing.assert_allclose(known["confidence"], known[columns].max(axis=1))
    assert said["labels"] == known["Label"].value_counts().to_dict() | {
        name: 0 for name in NAMES if name not in set(known["Label"])
    }
    assert said["threshold"] is None
    expected = json.loads(command(made, "evaluate", "first", "--json"))
    assert said["metrics"]["at_argmax"] == expected["at_argmax"]
    for suffix, read in (("jsonl", lambda p: pd.read_json(p, lines=True)), ("parquet", None)):
        other = made.folder / f"found.{suffix}"
        command(made, "predict", "first", "--rows", path, "--images", images, "--out", other)
        again = pd.read_parquet(other) if read is None else read(other)
        assert list(again.columns) == list(rows.columns)
        np.testing.assert_allclose(again[columns].astype(float), rows[columns])


def test_one_pair(made: Made, run: trainer.Run) -> None:
    photo = next(Path(made.config.data.images).iterdir())
    found = json.loads(
        command(made, "predict", "first", "--image", photo, "--text", "a dog", "--json")
    )
    assert found["threshold"] is found["logit"] is None
    assert list(found["probabilities"]) == list(found["logits"]) == NAMES
    assert found["label"] == max(found["logits"], key=found["logits"].get)
    assert found["confidence"] == found["probabilities"][found["label"]]
    assert found["probability_entailment"] == found["probabilities"]["entailment"]
    shown = command(made, "predict", "first", "--image", photo, "--text", "a dog")
    assert "neutral" in shown
    assert "τ" not in shown


JAX = """
import sys
from pathlib import Path
import numpy as np
import trainer
from featstore.progress import SILENT
from featstore.project import Project
from trainer.config import load_config
from trainer.run.training import Reporter
for config in map(Path, sys.argv[1:]):
    project, losses = Project(load_config(config)), []
    for fast in (True, False):
        run = trainer.train(
            project,
            name=f"jax-{config.stem}-{fast}",
            runs=config.parent,
            reporter=Reporter(),
            show=SILENT,
            fast_path=fast,
        )
        losses.append(run.history[["loss", "val_loss"]].to_numpy())
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)
    assert run.evaluate(show=SILENT)["at_argmax"]["rows"] == 48
    assert run.parity(rows=8, show=SILENT)["failure"] is None
    print("same")
"""


@pytest.mark.slow
def test_on_jax_the_fast_form_is_the_plain_one(made: Made, tmp_path: Path) -> None:
    """With dropout in every fusion layer, every token asking, three classes."""
    pytest.importorskip("jax")
    paths = []
    for k_txt in (0, 1):
        config = with_train(
            made.config, k_txt=k_txt, queries="all", fusion_layers=2, epochs=2, dropout=0.3
        )
        prepared(config)
        paths.append(tmp_path / f"{k_txt}.toml")
        paths[-1].write_text(render_config(config))
    assert run_on_jax("-c", JAX, *map(str, paths)).splitlines()[-2:] == ["same", "same"]


@pytest.mark.slow
def test_a_search_over_heads_shares_models(made: Made) -> None:
    space = {
        "search": {"sampler": "grid"},
        "train": {"queries": {"choice": ["cls", "all"]}, "fusion_layers": {"int": [1, 2]}},
    }
    project = prepared(with_train(made.config, epochs=1))
    with worker_here():
        found = trainer.search(project, space=space, name="heads", runs=made.runs, show=SILENT)
    trials = found.trials
    assert len(trials) == 4
    assert trials["val_accuracy"].notna().all()
    assert trials["threshold"].isna().all()
    for trial in range(4):
        alone = trainer.load_run(found.folder / f"trial-{trial:04d}")
        assert alone.metrics["at_argmax"]["rows"] == 48


# --- from pixels


def test_parity_holds_over_all_three_logits(made: Made, run: trainer.Run) -> None:
    shown = command(made, "parity", "first", "--rows", "12")
    assert "0 differ" in shown
    found = json.loads((run.folder / "parity-test.json").read_text())
    assert found["failure"] is found["threshold"] is None
    assert 0 < found["quantities"]["logits"]["largest"] < 1e-4
    assert found["metrics"]["cached"] == found["metrics"]["end_to_end"]


@pytest.mark.slow
@pytest.mark.parametrize("queries", ["cls", "all"])
def test_an_export_of_any_head_comes_back(made: Made, queries: str) -> None:
    name = f"to-export-{queries}"
    head = {"queries": queries, "fusion_layers": 2}
    run = made.train(name, k_txt=1, epochs=1, **head)
    for file in (f"{name}.keras", f"{name}.weights.h5"):
        with read_again_here():
            result = run.export(made.folder / file, rows=8, show=SILENT)
        assert result["check"]["end_to_end"]["largest_difference"] < 1e-4
    card = json.loads((made.folder / f"{name}.keras.json").read_text())
    assert (card["labels"], card["threshold"]) == (labels_of(3), None)
    assert {key: card["head"][key] for key in head} == head
    expected = run.scorer.score("test").logits
    project = prepared(with_train(made.config, **head))
    for file in (f"{name}.keras", f"{name}.weights.h5", f"{name}.safetensors"):
        back = trainer.import_weights(
            made.folder / file,
            project,
            name=f"back-{Path(file).suffix[1:]}-{queries}",
            runs=made.runs,
            show=SILENT,
        )
        np.testing.assert_allclose(back.scorer.score("test").logits, expected, atol=1e-6)
    other = prepared(with_train(made.config, **{**head, "fusion_layers": 1}))
    with pytest.raises(RunError) as error:
        trainer.import_weights(
            made.folder / f"{name}.safetensors", other, name="no", runs=made.runs, show=SILENT
        )
    assert "fusion_layers" in one_line(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["saved_model", "onnx"])
def test_served_forms_give_three_logits(made: Made, run: trainer.Run, format: str) -> None:
    pytest.importorskip("tf2onnx" if format == "onnx" else "tensorflow_text")
    path = made.folder / ("served" if format == "saved_model" else "model.onnx")
    with read_again_here():
        result = run.export(path, format, rows=6, show=SILENT)
    assert result["check"]["end_to_end"]["largest_difference"] < 1e-4


def test_an_import_reorders_the_logits_as_is_said(made: Made, run: trainer.Run) -> None:
    """A file whose logits are in SNLI's order gives the run's own again."""
    path = made.folder / "ordered.weights.h5"
    run.export(path, rows=4, show=SILENT)
    # No card: a file that another program made.
    path.with_name(f"{path.name}.json").unlink()
    order = ["entailment", "neutral", "contradiction"]
    back = trainer.import_weights(
        path,
        prepared(made.config),
        name="ordered",
        runs=made.runs,
        labels=",".join(order),
        show=SILENT,
    )
    assert back.manifest["imported"]["labels"] == ",".join(order)
    expected = run.scorer.score("test").logits
    found = back.scorer.score("test").logits
    for column, name in enumerate(order):
        np.testing.assert_allclose(found[:, NAMES.index(name)], expected[:, column], atol=1e-5)
    for wrong in ("contradiction=1", "entailment,neutral", "a,b,c"):
        with pytest.raises(UsageError) as error:
            trainer.import_weights(
                path,
                prepared(made.config),
                name="no",
                runs=made.runs,
                labels=wrong,
                show=SILENT,
            )
        assert "contradiction,entailment,neutral" in one_line(error.value)


# --- what does not fit


def test_classes_that_do_not_fit_are_one_line(made: Made, run: trainer.Run) -> None:
    config = dataclasses.replace(made.config, data=dataclasses.replace(made.config.data, classes=2))
    two = trainer.train(prepared(config), name="pair", runs=made.runs, epochs=1, **QUIET)
    with pytest.raises(RunError) as error:
        run.compare(two, show=SILENT)
    assert "tells 2 classes apart" in one_line(error.value)
    with pytest.raises(UsageError) as refused:
        trainer.train(prepared(config), name="first", runs=made.runs, k_txt=1, **QUIET)
    assert "finished run" in one_line(refused.value)
    # A file of the other kind.
    two.export(made.folder / "pair.weights.h5", rows=4, show=SILENT)
    for path in (made.folder / "pair.weights.h5", made.folder / "pair.safetensors"):
        for project, apart in ((made.config, 2), (config, None)):
            if apart is None:
                continue
            with pytest.raises(RunError) as wrong:
                trainer.import_weights(
                    path, prepared(project), name="no", runs=made.runs, show=SILENT
                )
            assert "classes" in one_line(wrong.value)
    (made.folder / "pair.weights.h5.json").unlink()
    with pytest.raises(RunError) as wrong:
        trainer.import_weights(
            made.folder / "pair.weights.h5",
            prepared(made.config),
            name="no",
            runs=made.runs,
            show=SILENT,
        )
    assert "1 logit, --classes 2" in one_line(wrong.value)


def test_rows_of_the_other_kind_are_measured_and_said(made: Made, run: trainer.Run) -> None:
    images = made.config.data.images
    without = made.rows_file("without.csv", lambda label: "" if label == "neutral" else label)
    found = run.evaluate(rows=without, images=images, show=SILENT)
    assert found["neutral"] == 0
    assert found["auc"] is None
    assert any("no row is neutral" in note for note in found["rows_notes"])
    assert found["at_argmax"]["neutral"]["rows"] == 0
    two = trainer.load_run(shutil.copytree(run.folder.parent / "pair", made.folder / "copy"))
    whole = made.rows_file("whole.csv", str)
    found = two.evaluate(rows=whole, images=images, show=SILENT)
    assert found["rows_left_out"] == {"neutral": 16}
    assert found["rows"] == 32
    assert found["rows_notes"] == []
