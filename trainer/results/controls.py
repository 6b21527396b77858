"""The controls beside a run's figures: is it the picture, or does the sentence give it away?

A run that sees is compared with itself on shuffled photos, and with a run of the same
settings that was trained on the sentence alone (Gururangan et al. 2018, arXiv:1803.02324;
Poliak et al. 2018, arXiv:1805.01042).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from featstore.config import material
from featstore.errors import DataError, FeatstoreError
from trainer.config import SECTIONS, Config
from trainer.metrics import decided, evaluate_logits, threshold_of
from trainer.results.labelled import Labelled, Scored
from trainer.results.measure import right
from trainer.results.score import Scorer
from trainer.run.folder import SEARCH_FILE, Run
from trainer.statistics import Clustered, paired_difference, proportion_interval

SHUFFLED, BLIND = "shuffled-images", "hypothesis-only"
NO_BLIND = "there is no finished run of the same settings with that control"


def blind_config(run: Run) -> Config:
    """Return a run's settings for a run that is trained on the sentence alone."""
    config = run.config
    return Config.of(config, dataclasses.replace(config.train, control=BLIND))


def find_blind(run: Run) -> Run | None:
    """Return a finished run that was trained as this one, but on the sentence alone.

    It stands beside it, has the same rows, split and features, the same settings in
    `[train]` but `control`, and started from the same run, if from any.

    Args:
        run: A run that sees.
    """
    wanted = blind_config(run).train
    home, stem = _home(run)
    # Those named after the run first.
    names = sorted(
        (path.parent.name for path in home.glob("*/manifest.json")),
        key=lambda name: (not name.startswith(f"{stem}-{BLIND}"), name),
    )
    for name in names:
        other = Run(home / name, run.elsewhere)
        # One that cannot be read is not a control.
        with contextlib.suppress(FeatstoreError):
            train = dataclasses.replace(other.config.train, keep_state=wanted.keep_state)
            if train == wanted and _same_start(run, other):
                return other
    return None


def blind_place(run: Run) -> tuple[Path, str]:
    """Return the folder of the runs, and the name there, for the run that `find_blind` lacks.

    An unfinished one goes on; another run of that name is left alone.
    """
    home, stem = _home(run)
    for number in itertools.count(1):
        name = f"{stem}-{BLIND}" if number == 1 else f"{stem}-{BLIND}-{number}"
        other = Run(home / name, run.elsewhere)
        if not other.exists and not (other.folder / SEARCH_FILE).exists():
            return home, name
        with contextlib.suppress(FeatstoreError):
            if other.manifest["status"] != "finished" and _same(other.config, blind_config(run)):
                return home, name
    raise AssertionError("unreachable")


def _same(one: Config, other: Config) -> bool:
    """Tell whether two runs have the same settings, wherever their data are."""
    ours, theirs = (material(SECTIONS, dataclasses.asdict(config)) for config in (one, other))
    return ours == theirs


def compare_controls(
    scorer: Scorer, rows: Labelled, scored: Scored, threshold: float | None, clustered: Clustered
) -> dict[str, Any]:
    """Measure the controls on the rows on which a run was measured.

    Args:
        scorer: The run that sees.
        rows: The rows.
        scored: What it says of them.
        threshold: Its τ.
        clustered: Says how many draws are made.

    Returns:
        `controls`: for each control its figures, each run at its own τ, and the paired
        `difference` in accuracy (this run's above the control's) with its interval; None
        where it cannot be measured. `controls_missing`: why. `verdict`: a sentence.
    """
    found: dict[str, Any] = {SHUFFLED: None, BLIND: None}
    missing = {}
    try:
        other = rows.score(scorer, SHUFFLED)
        found[SHUFFLED] = _against(scored, threshold, other, threshold, scorer.run, clustered)
    except DataError as error:
        missing[SHUFFLED] = error.message
    blind = find_blind(scorer.run)
    if blind is None:
        missing[BLIND] = NO_BLIND
    else:
        try:
            own = threshold_of(blind.metrics)
            other = rows.score(Scorer(blind, scorer.project), BLIND)
            found[BLIND] = _against(scored, threshold, other, own, blind, clustered)
        except FeatstoreError as error:
            # A damaged run beside it is no reason to lose this one's figures.
            missing[BLIND] = error.message
    return {"controls": found, "controls_missing": missing, "verdict": verdict(found)}


def _against(
    scored: Scored,
    threshold: float | None,
    other: Scored,
    other_threshold: float | None,
    run: Run,
    clustered: Clustered,
) -> dict[str, Any]:
    """Return a control's figures, and how far the run is above it on the rows of both."""
    _, ours, theirs = np.intersect1d(scored.rows, other.rows, return_indices=True)
    images = Clustered(scored.image_ids[ours], clustered.draws, clustered.seed)
    correct = right(other, other_threshold)[theirs]
    logits, labels = other.logits[theirs], other.labels[theirs]
    figures = evaluate_logits(labels, logits, other_threshold)
    interval = proportion_interval(correct, images)
    del interval["images"]
    at, half = decided(figures), figures["at_half"] or {}
    return {
        "run": run.name,
        "weights_digest": run.weights_digest,
        "rows": len(ours),
        "threshold": other_threshold,
        "accuracy": at["accuracy"],
        "interval": interval,
        "macro_f1": at["macro_f1"],
        "accuracy_at_half": half.get("accuracy"),
        "macro_f1_at_half": half.get("macro_f1"),
        "auc": figures["auc"],
        "difference": paired_difference(right(scored, threshold)[ours], correct, images),
    }


def verdict(controls: dict[str, Any]) -> str:
    sentences = []
    if blind := controls[BLIND]:
        gap = blind["difference"]
        worth = f"{points(gap['difference'])} of accuracy{_interval(gap)} over the sentence alone"
        if gap["high"] < 0:
            sentences.append(f"The picture is worth {worth}: the sentence alone does better.")
        else:
            shown = "" if gap["low"] > 0 else ": not shown"
            sentences.append(f"The picture is worth {worth}{shown}.")
    if shuffled := controls[SHUFFLED]:
        gap = shuffled["difference"]
        shown = "" if gap["low"] > 0 else ": that the run looks at it is not shown"
        sentences.append(
            f"The right photo is worth {points(gap['difference'])}{_interval(gap)} over a"
            f" shuffled one{shown}."
        )
    if not blind:
        sentences.append("What the sentence alone is worth was not measured.")
    return " ".join(sentences)


def points(share: float) -> str:
    """Return a difference of two shares in percentage points."""
    return f"{signed(share)} points"


def signed(share: float) -> str:
    """Return a share times 100, with a true minus sign."""
    number = f"{100 * share:.1f}"
    return "0.0" if number == "-0.0" else number.replace("-", "−")


def _interval(gap: dict[str, Any]) -> str:
    return f" (95 % interval {signed(gap['low'])} to {signed(gap['high'])})"


def _home(run: Run) -> tuple[Path, str]:
    """Return the folder of the runs, and what to name a run after this one there."""
    parent = run.folder.absolute().parent
    if (parent / SEARCH_FILE).exists():
        # A search's folder holds its trials and nothing else.
        return parent.parent, f"{parent.name}-{run.name}"
    return run.folder.parent, run.name


def _same_start(run: Run, other: Run) -> bool:
    ours, theirs = run.manifest, other.manifest
    return (
        theirs["status"] == "finished"
        and other.weights_path.exists()
        and all(
            ours["data"][key] == theirs["data"][key] for key in ("rows_digest", "splits_digest")
        )
        and all(
            ours["features"][key]["fingerprint"] == theirs["features"][key]["fingerprint"]
            for key in ("vision", "text")
        )
        and run.source == other.source
    )
