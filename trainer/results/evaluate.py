"""Measure a run on a split: the run's own threshold, on probabilities, each row once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featstore.data.dataset import Dataset, load_dataset
from featstore.encoders.spec import text_spec, vision_spec
from featstore.errors import RunError
from featstore.extract.extract import ProgressBar, no_progress
from featstore.publish import command_line, package_versions, write_json
from trainer.config import Config
from trainer.features import Features, open_features
from trainer.metrics import evaluate_logits
from trainer.run.checkpoint import load_best
from trainer.run.folder import Run
from trainer.run.step import make_predictor, predict_logits


def check_same_data(run: Run, dataset: Dataset) -> None:
    """Refuse to measure a run on a split that is not the one it was trained with.

    Raises:
        RunError: The rows or the split differ from the run's.
    """
    found = {
        "rows_digest": dataset.examples.digest(),
        "splits_digest": dataset.splits.digest(),
    }
    expected = run.manifest()["data"]
    for name, value in found.items():
        if expected[name] != value:
            what = name.removesuffix("_digest")
            raise RunError(
                f"{run.folder}: the {what} changed since the run was trained (expected"
                f" {expected[name]}, found {value}); its test split could hold training rows;"
                " restore them or train again"
            )


def check_same_features(run: Run, config: Config) -> None:
    """Refuse features of another spec than the run was trained on.

    Raises:
        RunError: A fingerprint differs.
    """
    expected = run.manifest()["features"]
    for name, spec in (
        ("vision", vision_spec(config.encoders, config.store)),
        ("text", text_spec(config.encoders, config.store, config.train.k_txt)),
    ):
        if expected[name]["fingerprint"] != spec.fingerprint:
            raise RunError(
                f"{run.folder}: trained on {name} features {expected[name]['fingerprint']},"
                f" the configuration asks for {spec.fingerprint}; the encoder's files changed"
            )


def open_run_features(run: Run, bar: ProgressBar = no_progress) -> Features:
    """Open the very features that a run was trained on.

    Args:
        run: The run; its settings name the rows, photos and encoders.
        bar: Shows the encoding of sentences, where some are missing.

    Raises:
        RunError: The rows, the split or an encoder changed since.
    """
    config = run.config()
    dataset = load_dataset(config.data, Path(config.store.root))
    # Before the stores are opened: that would encode the sentences of changed rows.
    check_same_data(run, dataset)
    check_same_features(run, config)
    return open_features(config, dataset, bar)


def evaluate(run: Run, features: Features, split: str, control: str = "none") -> dict[str, Any]:
    """Compute a run's metrics over exactly the rows of a split.

    Args:
        run: A run with weights.
        features: Its features, from `open_run_features`.
        split: "train", "val" or "test".
        control: Measure without the picture: "hypothesis-only" or
            "shuffled-images".

    Returns:
        `evaluate_logits` at the run's threshold, with run, split, control and
        photos that could not be read. Also written into the run's folder.

    Raises:
        RunError: The run, its data or its features do not fit together.
    """
    check_same_data(run, features.dataset)
    check_same_features(run, features.config)
    threshold = float(run.metrics()["threshold"])
    predictor = make_predictor([load_best(run)])
    rows = features.rows(split, control)
    logits = predict_logits(predictor, rows, features.config.train.batch_size)[0]
    _, unread = features.usable(split)
    result = {
        "run": run.name,
        "split": split,
        "control": control,
        "rows_of_split": len(features.dataset.rows(split)),
        "quarantined_photos": unread,
        **evaluate_logits(rows.labels, logits, threshold),
    }
    suffix = "" if control == "none" else f"-{control}"
    write_json(
        run.folder / f"evaluate-{split}{suffix}.json",
        {"command": command_line(), "versions": package_versions(), **result},
    )
    return result
