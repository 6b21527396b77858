"""Measure a run on a split: the run's own threshold, on probabilities, each row once."""

from __future__ import annotations

from typing import Any

from featstore.dataset import Dataset
from featstore.errors import RunError
from featstore.publish import command_line, package_versions, write_json
from trainer.checkpoint import load_best
from trainer.features import Features
from trainer.fit import predict_logits
from trainer.metrics import evaluate_logits
from trainer.run import Run
from trainer.step import make_optimizer, make_stepper


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


def check_same_features(run: Run, features: Features) -> None:
    """Refuse features of another spec than the run was trained on.

    Raises:
        RunError: A fingerprint differs.
    """
    expected = run.manifest()["features"]
    for name, spec in (("vision", features.vision_spec), ("text", features.text_spec)):
        if expected[name]["fingerprint"] != spec.fingerprint:
            raise RunError(
                f"{run.folder}: trained on {name} features {expected[name]['fingerprint']},"
                f" the configuration asks for {spec.fingerprint}; the encoder's files changed"
            )


def evaluate(run: Run, features: Features, split: str, control: str = "none") -> dict[str, Any]:
    """Compute a run's metrics over exactly the rows of a split.

    Args:
        run: A run with weights.
        features: Its features, opened from its own configuration.
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
    check_same_features(run, features)
    threshold = float(run.metrics()["threshold"])
    model = load_best(run)
    stepper = make_stepper(model, make_optimizer(features.config.train))
    rows = features.rows(split, control)
    logits = predict_logits(stepper, rows, features.config.train.batch_size)
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
