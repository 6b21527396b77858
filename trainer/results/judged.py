"""Score the same rows with several runs, one after another."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore.encoders.spec import differing_fields
from featstore.errors import (
    Advice,
    Command,
    DataError,
    FeatstoreError,
    MissingFeaturesError,
    RunError,
)
from featstore.progress import Show
from featstore.project import Project
from trainer.metrics import threshold_of
from trainer.results.labelled import Labelled, Scored, SplitRows, UnseenRows, seen_photos
from trainer.results.score import Scorer, check_same_data, opened
from trainer.run.folder import Run

if TYPE_CHECKING:
    import pandas as pd

    RowSource = str | os.PathLike[str] | pd.DataFrame

DATA_DIGESTS = ("rows", "splits")


@dataclass(frozen=True, eq=False)
class Judged:
    """What a run says of the rows.

    Attributes:
        run: The run.
        label: What it is called.
        threshold: Its own, on the probability; None of three classes.
        scored: The rows that it could read; of `judge`, those that all of the runs could.
        seen: Photos and rows of them that it was trained on; None where that is unknown.
    """

    run: Run
    label: str
    threshold: float | None
    scored: Scored
    seen: dict[str, int] | None


def check_same_classes(runs: Sequence[Run]) -> None:
    """Refuse runs that tell apart another number of classes than the first.

    Raises:
        RunError: A figure of one has another meaning than that of the other.
    """
    expected = runs[0].config.data.classes
    for run in runs[1:]:
        if (found := run.config.data.classes) != expected:
            raise RunError(
                f"{run.folder}: tells {found} classes apart, {runs[0].folder} {expected}: no figure"
                " of one can be compared with that of the other; expected runs of one number of"
                " classes"
            )


def check_same_rows(runs: Sequence[Run]) -> None:
    """Refuse runs that were trained on other rows or splits than the first.

    Raises:
        RunError: The message says what differs.
    """
    base = runs[0]
    expected = base.manifest["data"]
    for run in runs[1:]:
        found = run.manifest["data"]
        differ = [name for name in DATA_DIGESTS if _digest(found, name) != _digest(expected, name)]
        if not differ:
            continue
        ours, theirs = (dataclasses.asdict(one.config.data) for one in (base, run))
        settings = "; ".join(
            line.replace("wanted ", "").replace(", stored ", " there, here ")
            for line in differing_fields(ours, theirs)
        )
        why = f"[data] {settings}" if settings else "the settings are the same, the files changed"
        digests = ", ".join(
            f"{name} {_digest(expected, name)[:8]}… there, {_digest(found, name)[:8]}… here"
            for name in differ
        )
        raise RunError(
            f"{run.folder}: its {' and '.join(differ)} are not those of {base.folder} ({digests};"
            f" {why}); a difference would be the rows', not the runs'",
            Advice(
                "to compare them on rows that neither has seen, run ",
                Command("compare", str(base.folder), str(run.folder), rows="FILE"),
            ),
        )


def _digest(data: dict[str, Any], name: str) -> str:
    return str(data[f"{name}_digest"])


def judge(
    runs: Sequence[Run],
    labels: Sequence[str],
    split: str,
    rows: RowSource | None,
    images: str | os.PathLike[str] | None,
    show: Show,
    encoding: str = "",
) -> tuple[list[Judged], dict[str, int]]:
    """Score the rows with one run after another; each lets go of its model.

    Returns:
        What each run says of the rows that all of them could read, and the number of the
        other rows by reason.
    """
    judged: list[Judged] = []
    project: Project | None = None
    with show.bar(len(runs), "runs") as progress:
        for run, label in zip(runs, labels, strict=True):
            # Rows, specs and stores that runs have in common are opened once.
            project = opened(run) if project is None else project.with_config(run.config)
            if rows is None:
                check_same_data(run, project)
            scorer = Scorer(run, project)
            source: Labelled = SplitRows(project, split, show)
            if rows is not None:
                photos = scorer.photos(images, rows)
                source = UnseenRows(run, project.root, rows, photos, show, encoding=encoding)
            threshold = threshold_of(run.metrics)
            try:
                scored = source.score(scorer, scorer.train.control)
            except MissingFeaturesError as error:
                error.mend = _with_settings(error.mend, run)
                raise
            seen = None if rows is None else _seen(run, project, scored)
            judged.append(Judged(run, label, threshold, scored, seen))
            del scorer
            gc.collect()
            progress(1)
    return _in_common(judged)


def _seen(run: Run, project: Project, scored: Scored) -> dict[str, int] | None:
    """Count the rows' photos that a run was trained on; None where its own rows are gone."""
    try:
        check_same_data(run, project)
        return seen_photos(project, scored.image_ids)["train"]
    except FeatstoreError:
        return None


def _in_common(judged: Sequence[Judged]) -> tuple[list[Judged], dict[str, int]]:
    """Keep the rows that every run could read; see `judge`."""
    first = judged[0].scored
    common = first.rows
    for one in judged[1:]:
        common = np.intersect1d(common, one.scored.rows)
    if not len(common):
        raise DataError(
            f"no labelled row that all of {', '.join(one.label for one in judged)} could read"
        )
    kept = []
    for one in judged:
        scored = one.scored
        at = np.searchsorted(scored.rows, common)
        columns = ("rows", "image_ids", "hypotheses", "labels", "logits")
        cut = dataclasses.replace(scored, **{name: getattr(scored, name)[at] for name in columns})
        kept.append(dataclasses.replace(one, scored=cut))
        ours = kept[0].scored
        for name in ("image_ids", "hypotheses", "labels"):
            if scored.total != first.total or (getattr(cut, name) != getattr(ours, name)).any():
                raise DataError(
                    f"{one.label}: finds other rows than {judged[0].label} in what is compared"
                    " on; expected one file and one folder of photos, name it with --images"
                )
    unread = first.total - sum(first.left_out.values()) - len(common)
    left_out = first.left_out | {"not read by every run": unread}
    return kept, {reason: count for reason, count in left_out.items() if count}


def _with_settings(mend: Advice | None, run: Run) -> Advice:
    """Return what mends missing features, with the settings of the run that lacks them."""
    settings: dict[str, Any] = {"config": run.config_path}
    return Advice(
        *(
            Command(*part.words, **(settings | part.options)) if isinstance(part, Command) else part
            for part in (mend.parts if mend else ())
        )
    )
