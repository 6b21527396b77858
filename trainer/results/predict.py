"""Predict rows that a run has not seen: from their photos, by its own threshold."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from featstore.data.dataset import rows_to_predict
from featstore.data.labels import LABELS
from featstore.errors import DataError
from featstore.progress import SILENT, Show
from trainer.metrics import sigmoid
from trainer.results.score import Scorer

if TYPE_CHECKING:
    import pandas as pd

NAMES = {label: name for name, label in LABELS.items()}
COLUMNS = ["Image_ID", "Hypothesis", "Label", "probability_entailment", "confidence", "reason"]


def predict(
    scorer: Scorer,
    rows: str | os.PathLike[str] | pd.DataFrame,
    images: str | os.PathLike[str],
    show: Show = SILENT,
) -> pd.DataFrame:
    """Say of each row whether its photo entails its sentence.

    Features that are missing are extracted into the run's store first. The
    run's threshold is applied to the probability of entailment.

    Args:
        scorer: The run over its project.
        rows: A row file or a table with an image id and a sentence; labels are
            not needed and not read.
        images: Folder of the photos.
        show: Shows the extraction.

    Returns:
        One line for each row, in their order: `Image_ID`, `Hypothesis`, `Label`
        ("entailment", "contradiction", or missing), `probability_entailment` (0 to
        1), `confidence` (probability of the label), and `reason`: why a row has
        none, else "".

    Raises:
        RowError, DataError: No row can be used, they cannot be read, or a photo has
            the id of another one that is in the run's store.
        StoreError: The store cannot be written.
    """
    import pandas as pd

    dataset = rows_to_predict(rows, images, scorer.project.root)
    project = scorer.project.with_dataset(dataset)
    if changed := project.plan("vit").changed:
        # Extracted, they would take the place of the photos that the run is measured on.
        raise DataError(
            f"{images}: {changed} photos have the ids of others whose features the run's store"
            f" {scorer.project.root} has; give them other ids"
        )
    project.extract("vit", show=show)
    scores = Scorer(scorer.run, project).score("all", scorer.train.control, show)
    threshold = float(scorer.run.metrics["threshold"])
    examples = dataset.examples
    probability = np.full(len(examples), np.nan)
    probability[scores.rows] = sigmoid(scores.logits)
    lines = [
        (line, image_id, text, *_judged(p, threshold), scores.unread.get(image_id, ""))
        for line, image_id, text, p in zip(
            examples.source_lines.tolist(),
            examples.image_ids,
            examples.hypotheses,
            probability.tolist(),
            strict=True,
        )
    ]
    for issue in dataset.issues:
        if issue.kind == "dropped":
            why = f"{issue.reason}: {issue.detail}" if issue.detail else issue.reason
            lines.append((issue.line, issue.image_id, issue.text, None, np.nan, np.nan, why))
    lines.sort(key=lambda line: line[0])
    return pd.DataFrame([line[1:] for line in lines], columns=COLUMNS)


def _judged(probability: float, threshold: float) -> tuple[str | None, float, float]:
    """Return the label of a row, its probability of entailment, and that of the label."""
    if np.isnan(probability):
        return None, np.nan, np.nan
    entailed = probability >= threshold
    return NAMES[int(entailed)], probability, probability if entailed else 1 - probability
