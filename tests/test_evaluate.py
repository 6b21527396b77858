"""A run's figures on a split: each row once, the val threshold, and nothing that changed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, tiny_config

from featstore.data.images import decode_image
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import DataError, RunError
from featstore.progress import SILENT
from featstore.project import Project
from trainer.batches import other_images
from trainer.config import Config
from trainer.features import cached_rows, prepare
from trainer.model.end_to_end import build_end_to_end
from trainer.model.weights import transfer_weights
from trainer.results.evaluate import evaluate
from trainer.results.parity import check_parity
from trainer.results.score import Scorer, project_of
from trainer.run.checkpoint import load_best
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.optimizer import make_optimizer
from trainer.run.training import Training


def trained(config: Config, folder: Path) -> Run:
    project = Project(config)
    project.extract("vit", show=SILENT)
    prepare(project, config.train.k_txt)
    fit(Training(Run(folder), project, config.train))
    return Run(folder)


def measure(run: Run, split: str = "test", control: str | None = None) -> dict[str, Any]:
    return evaluate(Scorer(run, project_of(run)), split, control)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def run(folder: Path, tiny_vit: Path, tiny_text: Path) -> Run:
    # Presets of its own, which a test may change and put back.
    vit = shutil.copytree(tiny_vit, folder / "vit")
    text = shutil.copytree(tiny_text, folder / "text")
    config = tiny_config(folder / "data", vit, text, k_txt=1, epochs=4)
    return trained(config, folder / "runs" / "first")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_row_of_the_split_counts_once(run: Run, split: str) -> None:
    result = measure(run, split)
    rows = IMAGES_OF_SPLIT[split] * len(SENTENCES)
    assert result["rows"] == result["rows_of_split"] == rows
    for figures in (result["at_threshold"], result["at_half"]):
        assert sum(figures[key] for key in ("tp", "fp", "fn", "tn")) == rows
    assert result["entailment"] == result["contradiction"] == rows // 2
    written = json.loads((run.folder / f"evaluate-{split}.json").read_text())
    assert {key: written[key] for key in result} == result
    assert written["command"]


def test_val_figures_are_those_of_training(run: Run) -> None:
    result, metrics = measure(run, "val"), run.metrics
    assert result["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert result["at_threshold"] == metrics["at_threshold"]


def test_predictions_are_the_end_to_end_models_at_the_val_threshold(run: Run) -> None:
    """Pixels and words through the whole model, metrics by hand."""
    config = run.config
    dataset = project_of(run).dataset
    vision = VisionEncoder(config.encoders.vit, config.store.tokens)
    text = TextEncoder(config.encoders.text, config.encoders.sequence_length)
    whole = build_end_to_end(vision.backbone, text.backbone, config.train, config.store.tokens)
    transfer_weights(load_best(run), whole)
    rows = dataset.rows("test")
    examples = dataset.examples.select(rows)
    paths = [dataset.images.lookup(image_id) for image_id in examples.image_ids]
    images = [decode_image(path.read_bytes(), path.name) for path in paths if path is not None]
    ids, mask = text.tokenize(examples.hypotheses.tolist())
    inputs = {
        "pixel_values": np.stack([vision.to_pixels(image) for image in images]),
        "input_ids": ids,
        "attention_mask": mask.astype(np.int32),
    }
    logits = np.asarray(whole(inputs, training=False), np.float64)[:, 0]
    probabilities = 1 / (1 + np.exp(-logits))
    result = measure(run)
    tau = run.metrics["threshold"]
    assert result["threshold"] == tau
    # No row so near the threshold that rounding could move it across.
    assert np.abs(probabilities - tau).min() > 1e-4
    called, truth = probabilities >= tau, examples.labels == 1
    expected = {
        "tp": int((called & truth).sum()),
        "fp": int((called & ~truth).sum()),
        "fn": int((~called & truth).sum()),
        "tn": int((~called & ~truth).sum()),
    }
    assert {key: result["at_threshold"][key] for key in expected} == expected
    loss = -np.mean(np.where(truth, np.log(probabilities), np.log(1 - probabilities)))
    assert result["loss"] == pytest.approx(loss, rel=1e-4)


def test_no_optimizer_is_made_to_measure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an optimizer's variables were allocated")

    monkeypatch.setattr(keras.optimizers.Optimizer, "build", refuse)
    with pytest.raises(AssertionError, match="allocated"):
        make_optimizer(run.config.train).build(load_best(run).trainable_variables)
    assert measure(run, "val")["loss"] == pytest.approx(run.metrics["loss"], rel=1e-5)
    result, failure = check_parity(run, "test", 8)
    assert failure is None
    assert result["recorded_loss"]["met"]


def test_the_threshold_is_a_probability_not_a_logit(run: Run) -> None:
    earlier = run.metrics_path.read_text()
    rows = Scorer(run, project_of(run)).rows("test")
    batch = rows.batch(np.arange(len(rows)), len(rows))
    logits = np.asarray(load_best(run)(batch.inputs()), np.float64)[:, 0]
    probabilities = 1 / (1 + np.exp(-logits))
    # A threshold that tells the two readings apart: in the middle of the lower half.
    tau = float(np.median(probabilities[logits < 0]))
    positives = int((probabilities >= tau).sum())
    assert positives != int((logits >= tau).sum())
    try:
        run.metrics_path.write_text(json.dumps({**json.loads(earlier), "threshold": tau}))
        found = measure(run)["at_threshold"]
    finally:
        run.metrics_path.write_text(earlier)
    # The median itself may fall on either side by rounding.
    assert abs(found["tp"] + found["fp"] - positives) <= 1


def test_controls_take_the_picture_away(run: Run) -> None:
    assert measure(run)["at_half"]["accuracy"] > 0.9
    blind = measure(run, control="hypothesis-only")
    # Each sentence is right for half its photos.
    assert blind["at_half"]["accuracy"] == 0.5
    assert blind["control"] == "hypothesis-only"
    assert (run.folder / "evaluate-test-hypothesis-only.json").exists()
    shuffled = measure(run, control="shuffled-images")
    rows = Scorer(run, project_of(run)).rows("test")
    label_of = dict(zip(rows.image_positions.tolist(), rows.labels.tolist(), strict=True))
    others = other_images(rows.image_positions, run.config.train.seed)
    logits = np.array([label_of[other] for other in others.tolist()])
    # A model that sees the rule says of a row what is true of the other picture.
    expected = float((logits == rows.labels).mean())
    assert shuffled["at_half"]["accuracy"] == pytest.approx(expected, abs=0.1)


def edited(run: Run, folder: Path, name: str, **data: Any) -> Run:
    """Return a copy of a run whose settings name other data."""
    config = run.config
    copy = Run(Path(shutil.copytree(run.folder, folder / name)))
    copy.write_config(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
    return copy


def test_changed_rows_are_refused_before_anything_is_encoded(run: Run, tmp_path: Path) -> None:
    config = run.config
    lines = Path(str(config.data.rows)).read_text().splitlines(keepends=True)
    row = {**json.loads(lines[0]), "Hypothesis": "a sentence that was never seen"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + "".join(lines[1:]))
    changed = edited(run, tmp_path, "changed", rows=str(tmp_path / "rows.jsonl"))
    before = sorted(Path(config.store.root).glob("text/*/*"))
    with pytest.raises(RunError, match="the rows changed since the run was trained") as caught:
        measure(changed)
    assert "\n" not in str(caught.value)
    assert sorted(Path(config.store.root).glob("text/*/*")) == before


def test_another_split_is_refused(run: Run, tmp_path: Path) -> None:
    changed = edited(run, tmp_path, "split", split_file="", split_seed=3)
    with pytest.raises(RunError, match=r"the splits changed .* could hold training rows"):
        measure(changed)


@pytest.mark.parametrize(("tower", "name"), [("vit", "vision"), ("text", "text")])
def test_changed_encoder_weights_are_refused(run: Run, folder: Path, tower: str, name: str) -> None:
    path = folder / tower / "model.weights.h5"
    whole = path.read_bytes()
    try:
        with h5py.File(path, "r+") as file:
            found: list[h5py.Dataset] = []
            file.visititems(
                lambda _, item: (
                    found.append(item)
                    if isinstance(item, h5py.Dataset) and item.dtype.kind == "f"
                    else None
                )
            )
            found[-1][...] = found[-1][...] + 0.5
        with pytest.raises(RunError, match=f"trained on {name} features .* encoder's files"):
            measure(run)
    finally:
        path.write_bytes(whole)
    assert measure(run)["rows"] == 48


def test_a_run_without_weights_is_refused(run: Run, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(run.folder, tmp_path / "copy")))
    copy.weights_path.unlink()
    with pytest.raises(RunError, match=r"best\.weights\.h5: not there"):
        measure(copy)
    copy.weights_path.write_bytes(b"not HDF5")
    with pytest.raises(RunError, match="cannot be read") as caught:
        measure(copy)
    assert "\n" not in str(caught.value)


def test_photos_that_cannot_be_read_are_left_out_and_counted(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, epochs=1)
    ids = json.loads(Path(config.data.split_file).read_text())
    for image_id in (ids["val"][0], ids["test"][0]):
        broken = Path(config.data.images) / f"{image_id}.png"
        broken.write_bytes(broken.read_bytes()[:60])
    run = trained(config, tmp_path / "run")
    result = measure(run)
    assert list(result["quarantined_photos"]) == [ids["test"][0]]
    assert result["rows_of_split"] == 48
    assert result["rows"] == 48 - len(SENTENCES)
    assert list(run.manifest["data"]["quarantined_photos"]) == [ids["val"][0]]
    assert run.metrics["rows"] == 48 - len(SENTENCES)


def test_an_empty_split_says_so(tmp_path: Path, tiny_vit: Path, tiny_text: Path) -> None:
    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, epochs=1)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, split_file="", fractions=(0.5, 0.5, 0.0))
    )
    project = Project(config)
    project.extract("vit", show=SILENT)
    with pytest.raises(DataError, match="split 'test' has no rows"):
        cached_rows(project, config.train, "test")
