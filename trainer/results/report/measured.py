"""A run's figures on a split, of its present weights: what `evaluate` left, or measured now."""

from __future__ import annotations

import contextlib
import csv
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.labels import ALL_LABELS
from featstore.errors import FeatstoreError, RunError
from featstore.progress import Show
from featstore.publish import check_kept, may_write, read_json
from trainer.logits import confidence_of, predicted_labels
from trainer.metrics import log_loss, threshold_of
from trainer.results.controls import BLIND, NO_BLIND, find_blind
from trainer.results.evaluate import evaluate
from trainer.results.score import Scorer
from trainer.run.folder import Run

FIELDS = ("threshold_sweep", "calibration", "buckets", "errors", "intervals", "command")


@dataclass(frozen=True, eq=False)
class Measured:
    """What `evaluate` found of a run, and the rows of its predictions.

    Attributes:
        result: Every figure of docs/EVALUATION.md, with `command` and `versions`.
        image_ids: object of shape (rows,), str.
        hypotheses: object of shape (rows,), str.
        labels: int8 of shape (rows,).
        logits: float64 of shape (rows,), of three classes (rows, 3).
        notes: Lines that a reader should know.
    """

    result: dict[str, Any]
    image_ids: NDArray[np.object_]
    hypotheses: NDArray[np.object_]
    labels: NDArray[np.int8]
    logits: NDArray[np.float64]
    notes: list[str] = field(default_factory=list)

    @property
    def called(self) -> NDArray[np.int8]:
        """What each row is called."""
        return predicted_labels(self.logits, self.result["threshold"])

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each row is called what it is."""
        return self.called == self.labels

    @property
    def confidence(self) -> NDArray[np.float64]:
        """The probability of what each row is called."""
        return confidence_of(self.logits, self.result["threshold"])


def split_of(run: Run) -> str:
    """Return the split that a run's page is of: test, or val where there is no test split."""
    counts = run.manifest["data"].get("counts", {})
    return "test" if (counts.get("test") or {}).get("rows") or not counts else "val"


def measured(run: Run, split: str, scorer: Callable[[], Scorer], show: Show) -> Measured:
    """Return what `evaluate` left of a run's present weights; without it, evaluate.

    Args:
        run: The run.
        split: "train", "val" or "test".
        scorer: Opens the run's model and data, where they are needed.
        show: How an evaluation is shown.

    Raises:
        RunError: The run has no weights yet.
        FeatstoreError: It was not measured, and cannot be from here.
    """
    if not run.metrics_path.exists() or not run.weights_path.exists():
        raise RunError(
            f"{run.folder}: no page yet: the run has no"
            f" {'weights' if run.metrics_path.exists() else 'finished epoch'} to be measured"
        )
    control = run.config.train.control
    stem = split if control == "none" else f"{split}-{control}"
    stale = _why_stale(run, run.folder / f"evaluate-{stem}.json")
    if not stale:
        found = _read(run.folder, stem)
        if found is not None:
            return found
        stale = "its predictions are not beside it, or of another time"
    try:
        opened = scorer()
        with contextlib.ExitStack() as stack:
            folder = run.folder
            if not may_write(folder):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            not_kept = evaluate(opened, split, show=show, out=folder)["not_kept"]
            # What is there instead would be of earlier weights.
            check_kept(f"{run.folder}: measured, but ", not_kept)
            found = _read(folder, stem)
    except FeatstoreError as error:
        left = None if _is_older(run, stem) else _read(run.folder, stem)
        if left is None:
            raise
        left.notes.append(
            f"These figures were measured earlier and could not be measured again ({stale};"
            f" {error.message})."
        )
        return left
    if found is None:
        raise RunError(f"{run.folder}: evaluate-{stem}.json cannot be read back; remove it")
    return found


def _is_older(run: Run, stem: str) -> bool:
    """Tell whether an evaluation is not there, or certainly of earlier weights."""
    try:
        found = read_json(run.folder / f"evaluate-{stem}.json")
        digest = found.get("weights_digest")
    except (OSError, ValueError, AttributeError):
        return True
    return digest is not None and digest != run.weights_digest


def _why_stale(run: Run, path: Path) -> str:
    """Return why an evaluation that was left is not that of the run as it is now; "" if it is."""
    try:
        found = read_json(path)
        if any(name not in found for name in (*FIELDS, "weights_digest")):
            return "an older version measured them"
    except FileNotFoundError:
        return "they were never measured"
    except (OSError, ValueError, TypeError):
        return f"{path.name} cannot be read"
    if found["weights_digest"] != run.weights_digest:
        return "the weights changed since"
    if found["threshold"] != threshold_of(run.metrics):
        return "τ changed since"
    if "controls" not in found:
        return ""
    blind = find_blind(run)
    known = found["controls"].get(BLIND)
    if known is None:
        missing = found["controls_missing"].get(BLIND) == NO_BLIND
        return "a control was trained since" if missing and blind is not None else ""
    if blind is None or blind.weights_digest != known.get("weights_digest"):
        return "the control is another, or gone"
    return ""


def _read(folder: Path, stem: str) -> Measured | None:
    """Return an evaluation and its predictions; None where they are not of each other."""
    try:
        result = read_json(folder / f"evaluate-{stem}.json")
        with (folder / f"predictions-{stem}.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        names = ["logit"] if "logit" in lines[0] else [f"logit_{name}" for name in ALL_LABELS]
        columns = [np.array([float(line[name]) for line in lines]) for name in names]
        logits = columns[0] if len(names) == 1 else np.stack(columns, axis=1)
        labels = np.array([ALL_LABELS[line["Label"]] for line in lines], np.int8)
        if not math.isclose(log_loss(labels, logits), result["loss"], rel_tol=1e-6):
            return None
        return Measured(
            result, _texts(lines, "Image_ID"), _texts(lines, "Hypothesis"), labels, logits
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
        return None


def _texts(lines: Sequence[dict[str, str]], name: str) -> NDArray[np.object_]:
    return np.array([line[name] for line in lines], object)
