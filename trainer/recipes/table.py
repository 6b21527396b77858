"""What a recipe's stages came to, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featstore.errors import RunError
from featstore.extract.speed import recorded_speed
from featstore.publish import read_json
from featstore.quantities import MISSING, duration, number, share
from trainer.api import Run
from trainer.metrics import decided
from trainer.recipes.recipe import Stage
from trainer.results.controls import BLIND
from trainer.results.summary import between, gained, table
from trainer.tuning.drive import SearchResults

HEADER = (
    *("stage", "from", "settings", "val accuracy", "test accuracy"),
    *("over the sentence alone", "training", "end to end, at least"),
)
SHOWN_SETTINGS = ("k_txt", "lr", "weight_decay", "dropout")


def stage_row(stage: Stage, made: Run | SearchResults) -> dict[str, Any]:
    """Return what the table says of a stage.

    Args:
        stage: The stage.
        made: Its run, or its search.

    Returns:
        `stage`, `kind`, `init_from`, `run` and `settings` (of a search its best trial's),
        `epochs` (of a search of all trials), `trials` (of a search), `val` and `test`
        (`rows`, `accuracy`, `macro_f1`, the `interval` of the accuracy; None where not
        measured), `gain` (accuracy over the same run trained on the sentence alone, with its
        interval, on the test split where that was measured; None without such a run),
        `seconds` (of training and validation), and `end_to_end_seconds`: the same, had the ViT
        run on each row of every epoch as fast as it did in the extraction; None where that is
        not known.
    """
    if isinstance(made, SearchResults):
        best = made.best_run
        runs = [made.search.run_of(row["trial"]) for row in made.rows()]
    else:
        best, runs = made, [made]
    seconds, visits = 0.0, 0
    for run in runs:
        history, counts = run.history, run.manifest["data"]["counts"]
        seconds += float((history["seconds"] + history["val_seconds"]).sum())
        visits += len(history) * (counts["train"]["rows"] + counts["val"]["rows"])
    project = best.project
    speed = recorded_speed(project.root, project.vision_spec)
    train = best.config.train
    figures = {split: measured_figures(best, split) for split in ("val", "test")}
    return {
        "stage": stage.name,
        "kind": "run" if stage.space is None else "search",
        "init_from": stage.init_from,
        "settings": {name: getattr(train, name) for name in SHOWN_SETTINGS},
        "run": str(best.folder),
        "epochs": sum(len(run.history) for run in runs),
        "trials": len(runs) if stage.space is not None else None,
        "val": figures["val"],
        "test": figures["test"],
        "gain": (figures["test"] or figures["val"] or {}).get("gain"),
        "seconds": round(seconds, 3),
        "end_to_end_seconds": None if speed is None else round(seconds + visits / speed, 3),
    }


def measured_figures(run: Run, split: str) -> dict[str, Any] | None:
    """Return what a stage's run was found to do on a split; None where it was not measured."""
    path = run.folder / f"evaluate-{split}.json"
    try:
        if path.stat().st_mtime < run.weights_path.stat().st_mtime:
            return None
    except OSError:
        return None
    try:
        found = read_json(path)
        at, blind = decided(found), (found.get("controls") or {}).get(BLIND)
        return {
            "rows": found["rows"],
            "accuracy": at["accuracy"],
            "macro_f1": at["macro_f1"],
            "interval": found["intervals"]["accuracy"],
            "gain": None if blind is None else blind["difference"],
        }
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); remove it") from error


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of some stages, and what they took in all."""

    def measured(figures: dict[str, Any] | None) -> str:
        if figures is None:
            return MISSING
        return f"{share(figures['accuracy'])} ({between(figures['interval'])})"

    def settings(row: dict[str, Any]) -> str:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in row["settings"].items())
        return shown if row["trials"] is None else f"best of {row['trials']}: {shown}"

    lines = [
        (
            row["stage"],
            row["init_from"] or "presets",
            settings(row),
            measured(row["val"]),
            measured(row["test"]),
            MISSING if row["gain"] is None else gained(row["gain"]),
            duration(row["seconds"]),
            duration(row["end_to_end_seconds"]),
        )
        for row in rows
    ]
    seconds = sum(row["seconds"] for row in rows)
    known = [row["end_to_end_seconds"] for row in rows if row["end_to_end_seconds"] is not None]
    if rows and len(known) == len(rows):
        ratio = number(sum(known) / seconds, 1) if seconds else MISSING
        whole = f"All stages: {duration(seconds)} of training and validation; end to end at least"
        note = f"\n\n{whole} {duration(sum(known))}, {ratio} × as long."
    else:
        note = f"\n\nAll stages: {duration(seconds)} of training and validation."
    return table(HEADER, lines, left=3) + note
