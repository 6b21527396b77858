"""Compare runs on the same rows: what one has over another, and how sure that is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.examples import class_counts
from featstore.errors import UsageError, counted
from featstore.progress import SILENT, Show, says
from featstore.publish import command_line, package_versions
from trainer.buckets import bucket_rows, load_buckets
from trainer.logits import predicted_labels, probabilities_of
from trainer.metrics import decided, evaluate_logits
from trainer.results.judged import Judged, check_same_classes, check_same_rows, judge
from trainer.run.folder import Run
from trainer.statistics import (
    LEVEL,
    Clustered,
    bootstrap,
    intervals_of,
    mcnemar,
    middle,
    paired_difference,
    percentiles,
    permutation,
    proportion_interval,
    reliability,
)

if TYPE_CHECKING:
    from trainer.results.judged import RowSource

DRAWS = 2000


@says("comparing")
def compare(
    runs: Sequence[Run],
    split: str = "test",
    rows: RowSource | None = None,
    images: str | os.PathLike[str] | None = None,
    *,
    encoding: str = "",
    buckets: str | os.PathLike[str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    show: Show = SILENT,
) -> dict[str, Any]:
    """Measure runs on the same rows, and each against the first.

    Each run is measured as it was trained (a control on what it is a control of), at its
    own threshold and at 0.5. Rows that one of them could not read are left out for all.
    Encoders and stores may differ; rows and splits may not.

    Args:
        runs: Two or more; the first is the base.
        split: "test", "val" or "train".
        rows: Labelled rows to compare on in place of a split, a file or a table; the runs
            may then be of other rows.
        images: Folder of their photos; None: each run's own.
        encoding: Of the rows' text; "": UTF-8, or told from the bytes and shown.
        buckets: Bucket file; None: the one that ships. See `trainer.buckets`.
        draws: Of the bootstrap.
        seed: Of the draws and of the permutations.
        show: Shows the runs done.

    Returns:
        `split`, `rows_of_split`, `rows`, `images`, `entailment`, `contradiction`, `left_out`
        (rows by reason), `level`, `draws`, `seed`, `base`, `notes`;
        `runs`: by label, `evaluate_logits` with `run`, `folder`, `status`, `control`,
        `quarantined_photos`, `seen_photos` (of a file's rows, those that the run was trained
        on), `intervals` and `reliability`;
        `differences`: for each run but the first `run`, `base`, `figures` (by name
        `difference`, run minus base, with `low` and `high`), and at `at_threshold` and
        `at_half` (of three classes at `at_argmax`) the tests `mcnemar` and `permutation`;
        `buckets`: by name `rows`, `images`, `entailment` (their share), and by run `accuracy`
        of what it calls them, and `differences` with their intervals.

    Raises:
        UsageError: Fewer than two runs, or one of them twice.
        RunError: A run is of other classes, rows or splits than the first, or cannot be
            measured.
        DataError: No row is left.
    """
    labels = _labels(runs)
    # Before anything is computed: a file with a fault would spoil it.
    patterns = load_buckets(None if buckets is None else Path(buckets))
    check_same_classes(runs)
    if rows is None:
        check_same_rows(runs)
    judged, left_out = judge(runs, labels, split, rows, images, show, encoding)
    of_rows = judged[0].scored
    truth, image_ids = of_rows.labels, of_rows.image_ids
    clustered = Clustered(image_ids, draws, seed)
    found = {one.label: _measured(one, clustered) for one in judged}
    right = {one.label: _right(one) for one in judged}
    return {
        "command": command_line(),
        "versions": package_versions(),
        "split": split if rows is None else _named(rows),
        "rows_of_split": of_rows.total,
        "rows": len(of_rows),
        "images": clustered.images,
        **class_counts(truth, runs[0].config.data.classes),
        "left_out": left_out,
        "level": LEVEL,
        "draws": draws,
        "seed": seed,
        "base": labels[0],
        "runs": {label: figures for label, (figures, _) in found.items()},
        "differences": [
            _difference(label, labels[0], found, right, clustered) for label in labels[1:]
        ],
        "buckets": {
            name: _bucket(there, image_ids, truth, labels, right, draws, seed)
            for name, there in bucket_rows(patterns, of_rows.hypotheses).items()
            if there.any()
        },
        "notes": _notes(judged, split, rows),
    }


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return what each run is called: its name, or its folder where names are the same."""
    if len(runs) < 2:
        raise UsageError(
            f"expected two or more runs to compare, found {len(runs)}; name the base first, such"
            " as `compare first second`"
        )
    folders = [run.folder.resolve() for run in runs]
    for at, folder in enumerate(folders):
        if folder in folders[:at]:
            raise UsageError(f"{runs[at].folder}: named twice; expected runs that differ")
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else str(folder)
        for run, folder in zip(runs, folders, strict=True)
    ]


def _measured(
    one: Judged, clustered: Clustered
) -> tuple[dict[str, Any], dict[str, NDArray[np.float64]]]:
    """Return a run's figures, and those of each draw."""
    truth, logits = one.scored.labels, one.scored.logits
    drawn = bootstrap(truth, logits, one.threshold, clustered)
    figures = {
        "run": one.run.name,
        "folder": str(one.run.folder),
        "status": one.run.manifest["status"],
        "control": one.run.config.train.control,
        "quarantined_photos": one.scored.unread,
        "seen_photos": one.seen,
        **evaluate_logits(truth, logits, one.threshold),
        "intervals": intervals_of(drawn, clustered),
        "reliability": reliability(truth, probabilities_of(logits)),
    }
    return figures, drawn


def _right(one: Judged) -> dict[str, NDArray[np.bool_]]:
    """Return which rows a run has right, at its threshold and at 0.5; or of three classes."""
    logits, truth = one.scored.logits, one.scored.labels
    cuts: dict[str, float | None] = (
        {"at_argmax": None}
        if one.threshold is None
        else {"at_threshold": one.threshold, "at_half": 0.5}
    )
    return {name: predicted_labels(logits, tau) == truth for name, tau in cuts.items()}


def figures_of(measured: dict[str, Any]) -> dict[str, float | None]:
    """Return a run's figures under the names of their intervals; see `bootstrap`."""
    at, half = decided(measured), measured["at_half"]
    shares = ("accuracy", "macro_f1")
    return {
        **{name: at[name] for name in shares},
        **({f"{name}_at_half": half[name] for name in shares} if half else {}),
        **{
            name: measured[name]
            for name in ("auc", "average_precision", "brier", "calibration_error", "loss")
        },
    }


def _difference(
    label: str,
    base: str,
    found: dict[str, tuple[dict[str, Any], dict[str, NDArray[np.float64]]]],
    right: dict[str, dict[str, NDArray[np.bool_]]],
    clustered: Clustered,
) -> dict[str, Any]:
    """Compare a run with the base."""
    (theirs, drawn), (ours, drawn_of_base) = found[label], found[base]
    known, known_of_base = figures_of(theirs), figures_of(ours)
    figures: dict[str, Any] = {}
    # The same model differs nowhere; of two that are, say, both always right that is not known.
    alike = np.array_equal(drawn["loss"], drawn_of_base["loss"])
    for name, values in drawn.items():
        a, b = known[name], known_of_base[name]
        between = (middle if alike else percentiles)(values - drawn_of_base[name], clustered)
        figures[name] = {
            "difference": None if a is None or b is None else a - b,
            **(between or {"low": None, "high": None}),
        }
    tests = {}
    for key in right[label]:
        name = "accuracy_at_half" if key == "at_half" else "accuracy"
        pair = right[label][key], right[base][key]
        figures[name] = paired_difference(*pair, clustered)
        tests[key] = {"mcnemar": mcnemar(*pair), "permutation": permutation(*pair, clustered)}
    return {"run": label, "base": base, "figures": figures, **tests}


def _bucket(
    there: NDArray[np.bool_],
    image_ids: NDArray[np.object_],
    truth: NDArray[np.int8],
    labels: Sequence[str],
    right: dict[str, dict[str, NDArray[np.bool_]]],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Measure the rows of a bucket, its images being drawn."""
    clustered = Clustered(image_ids[there], draws, seed)
    # At its own threshold, or the most probable class.
    of = {label: next(iter(right[label].values()))[there] for label in labels}
    return {
        "rows": clustered.rows,
        "images": clustered.images,
        "entailment": float((truth[there] == 1).mean()),
        "runs": {
            label: {
                "accuracy": float(of[label].mean()),
                **proportion_interval(of[label], clustered),
            }
            for label in labels
        },
        "differences": {
            label: paired_difference(of[label], of[labels[0]], clustered) for label in labels[1:]
        },
    }


def _notes(judged: Sequence[Judged], split: str, rows: RowSource | None) -> list[str]:
    """Return what a reader should know of the comparison."""
    notes = []
    for one in judged:
        status = one.run.manifest["status"]
        if status != "finished":
            notes.append(f"{one.label} is {status}: its best epoch so far is measured")
        if rows is not None and one.seen is None:
            notes.append(
                f"{one.label}: its own rows cannot be read; it may have been trained on photos"
                " of these"
            )
        elif one.seen and one.seen["photos"]:
            notes.append(
                f"{one.label} was trained on {one.seen['photos']} of these photos"
                f" ({counted(one.seen['rows'], 'row')}): they flatter it"
            )
    if rows is None and split == "val":
        chose = "epoch" if judged[0].threshold is None else "epoch and threshold"
        notes.append(f"val chose each run's {chose}: its figures flatter all of them")
    if rows is None and split == "train":
        notes.append("the runs were trained on these rows")
    seeds = sorted({one.run.config.train.seed for one in judged})
    notes.append(
        "intervals and tests are of these trained weights on other images; another seed of"
        f" training moves a run too (here: seed {', '.join(map(str, seeds))})"
    )
    if len(judged) > 2:
        notes.append("each run is compared with the base alone: p is not corrected for several")
    return notes


def _named(rows: RowSource) -> str:
    return os.fspath(rows) if isinstance(rows, str | os.PathLike) else "rows"
