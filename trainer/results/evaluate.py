"""Measure a run: at its own threshold, on probabilities, each row once, beside its controls.

In the run's folder it leaves, for the test split,

    evaluate-test.json      every figure; docs/EVALUATION.md says what each one is
    predictions-test.csv    one line a row, with its logit: every figure follows from it
    summary.md              the same to read, where the run is measured as it was trained

Another split, or rows of a file, have their name in place of `test` (`summary-val.md`).
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.data.labels import LABEL_NAMES
from featstore.errors import DataError, FeatstoreError, MissingFeaturesError
from featstore.progress import SILENT, Show, says
from featstore.publish import command_line, package_versions, why_not_kept, write_json, write_text
from trainer.buckets import load_buckets
from trainer.logits import by_class, confidence_of, predicted_labels, probabilities_of
from trainer.metrics import threshold_of
from trainer.results.controls import compare_controls
from trainer.results.labelled import Labelled, Scored, SplitRows, UnseenRows, seen_photos
from trainer.results.measure import measure
from trainer.results.score import Scorer, check_same_data
from trainer.results.summary import render_summary
from trainer.statistics import Clustered

if TYPE_CHECKING:
    import pandas as pd


@says("measuring")
def evaluate(
    scorer: Scorer,
    split: str,
    control: str | None = None,
    show: Show = SILENT,
    *,
    rows: str | os.PathLike[str] | pd.DataFrame | None = None,
    images: str | os.PathLike[str] | None = None,
    cache: bool = True,
    buckets: str | os.PathLike[str] | None = None,
    encoding: str = "",
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Compute a run's metrics over exactly the rows of a split, or of a file.

    Args:
        scorer: The run over its own project, see `trainer.results.score.project_of`.
        split: "train", "val" or "test"; not used with `rows`.
        control: Measure without the picture: "hypothesis-only" or
            "shuffled-images"; None: as the run was trained.
        show: Shows the encoding of what the store lacks, and passes that take long.
        rows: Labelled rows in place of a split's: a file or a table.
        images: Folder of the photos of `rows`; None: the run's own.
        cache: Keep the features of `rows` in the store.
        buckets: A bucket file; None: the ten that ship. See `trainer.buckets`.
        encoding: Of the text of `rows`; "": UTF-8, or told from the bytes and shown.
        out: Folder for what it leaves; None: the run's own.

    Returns:
        `evaluate_logits` at the run's threshold, with run, split, control and photos that
        could not be read; intervals, calibration, buckets, errors, and the controls where
        the run sees. Also left in `folder`, as `files`; where that cannot be written,
        `not_kept` says why. See docs/EVALUATION.md.

    Raises:
        RunError: The run, its data or its features do not fit together.
        MissingFeaturesError: The split was not extracted.
        ConfigError: The bucket file cannot be used.
        RowError, DataError: None of `rows` can be measured.
    """
    run, project = scorer.run, scorer.project
    without_data = None
    try:
        check_same_data(run, project)
    except FeatstoreError as error:
        # Other rows can be measured without those of the run.
        if rows is None:
            raise
        without_data = error.message
    own = scorer.train.control
    control = control or own
    threshold = threshold_of(run.metrics)
    patterns = load_buckets(buckets)
    source: Labelled = SplitRows(project, split, show)
    if rows is not None:
        photos = scorer.photos(images, rows)
        source = UnseenRows(run, project.root, rows, photos, show, cache, encoding)
    scored = source.score(scorer, control)
    clustered = Clustered(scored.image_ids)
    val: Scored | None = scored
    without_val = without_data
    if without_data is not None:
        val = None
    elif (source.name, control) != ("val", own):
        val, without_val = _val(scorer, show)
    result: dict[str, Any] = {
        "run": run.name,
        "weights_digest": run.weights_digest,
        "split": split if rows is None else None,
        "control": control,
        "rows_of_split": scored.total,
        "quarantined_photos": scored.unread,
        **measure(scored, threshold, val, patterns, clustered),
        "without_val": without_val,
        "bucket_file": None if buckets is None else Path(buckets).name,
    }
    if isinstance(source, UnseenRows):
        result["rows_file"] = source.file
        result["rows_left_out"] = scored.left_out
        result["rows_notes"] = source.notes
        result["seen_photos"] = (
            None if without_data is not None else seen_photos(project, scored.image_ids)
        )
    if control == own == "none":
        result |= compare_controls(scorer, source, scored, threshold, clustered)
    suffix = "" if control == "none" else f"-{control}"
    stem = f"{source.name}{suffix}"
    files = {"figures": f"evaluate-{stem}.json", "predictions": f"predictions-{stem}.csv"}
    if control == own:
        files["summary"] = "summary.md" if source.name == "test" else f"summary-{source.name}.md"
    folder = run.folder if out is None else Path(out)
    result |= {"folder": str(folder), "files": files, "not_kept": None}
    about = {"command": command_line(), "versions": package_versions()}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / files["predictions"], _table(scored, threshold))
        if "summary" in files:
            summary = render_summary(result, about, run.config, run.manifest)
            write_text(folder / files["summary"], summary)
        write_json(folder / files["figures"], {**about, **result})

    result["not_kept"] = why_not_kept(write)
    return result


def _val(scorer: Scorer, show: Show) -> tuple[Scored | None, str | None]:
    """Return the val rows as the run was trained to see them, or why they cannot be read."""
    try:
        return SplitRows(scorer.project, "val", show).score(scorer, scorer.train.control), None
    except (MissingFeaturesError, DataError) as error:
        return None, error.message


def _table(scored: Scored, threshold: float | None) -> str:
    """Return the rows as CSV; its numbers are the float64 ones, digit for digit."""
    logits = scored.logits
    called = predicted_labels(logits, threshold).tolist()
    columns = {
        "Image_ID": scored.image_ids,
        "Hypothesis": scored.hypotheses,
        "Label": [LABEL_NAMES[label] for label in scored.labels.tolist()],
        "predicted": [LABEL_NAMES[label] for label in called],
        **by_class("probability", probabilities_of(logits)),
        "confidence": confidence_of(logits, threshold),
        **({"logit": logits} if logits.ndim == 1 else by_class("logit", logits)),
    }
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    # Lists, so that numbers are Python's own.
    writer.writerows(zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True))
    return text.getvalue()
