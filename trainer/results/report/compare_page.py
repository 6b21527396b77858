"""Runs compared on one page: what one has over another, how sure that is, and where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from featstore.errors import Command, counted
from featstore.progress import SILENT, Show
from featstore.quantities import duration, share
from trainer.config import TrainConfig
from trainer.metrics import decided
from trainer.pages.drawing import svg
from trainer.pages.page import write_page
from trainer.results.compare import compare
from trainer.results.compare_tables import Table, tables, verdicts
from trainer.results.report import drawings
from trainer.results.report.cost import cost_of, epochs_of
from trainer.results.report.place import page_path, trained_by, typed
from trainer.results.report.run_page import shown_setting
from trainer.results.summary import class_line
from trainer.run.folder import Run

LONGEST_NAME = 100


def report_compared(
    runs: Sequence[Run],
    path: str | os.PathLike[str] | None = None,
    split: str = "test",
    show: Show = SILENT,
    **options: Any,
) -> dict[str, Any]:
    """Write the page of a comparison.

    Args:
        runs: Two or more; the first is the base.
        path: Of the page; None: `compare-<others>.html` in the base's folder.
        split: "test", "val" or "train".
        show: Shows the runs done.
        options: Of `trainer.results.compare.compare`.

    Returns:
        `page`: its path; `kind`: "comparison"; `of`: the runs' names; `split`, `bytes`, `notes`.

    Raises:
        UsageError, WriteError: As of a run's page, and of `compare`.
        RunError: The runs cannot be compared.
    """
    others = "-".join(run.name for run in runs[1:])[:LONGEST_NAME] or "nothing"
    target = page_path(path, runs[0].folder / f"compare-{others}.html")
    # Before the work, which a run whose history is damaged would lose.
    histories = [epochs_of(run) for run in runs]
    result = compare(runs, split, show=show, **options)
    labels = list(result["runs"])
    names = " · ".join(labels)
    content = _content(runs, labels, histories, result)
    num_bytes = write_page(target, "compare.html", f"{names} on {result['split']}", **content)
    return {
        "page": str(target),
        "kind": "comparison",
        "of": names,
        "split": result["split"],
        "bytes": num_bytes,
        "notes": [],
    }


def _content(
    runs: Sequence[Run],
    labels: Sequence[str],
    epochs: Sequence[list[dict[str, Any]]],
    result: dict[str, Any],
) -> dict[str, Any]:
    found = [_table(table) for table in tables(result)]
    histories = {label: one for label, one in zip(labels, epochs, strict=True) if one}
    said = verdicts(result)
    gaps = [
        (
            entry["run"],
            entry["figures"]["accuracy"]["difference"],
            entry["figures"]["accuracy"]["low"],
            entry["figures"]["accuracy"]["high"],
        )
        for entry in result["differences"]
    ]
    of_two = all(figures["threshold"] is not None for figures in result["runs"].values())
    curves = {label: figures["reliability"] for label, figures in result["runs"].items()}
    accuracies = ", ".join(
        f"{label} {share(decided(figures)['accuracy'])}"
        for label, figures in result["runs"].items()
    )
    base = result["base"]
    left_out = [
        f"{count:,} of {counted(result['rows_of_split'], 'row', ',')} left out: {reason}."
        for reason, count in result["left_out"].items()
    ]
    return {
        "summary": [f"{line}." for line in said],
        "rows": (
            f"{counted(result['rows'], 'row', ',')} of {counted(result['images'], 'photo', ',')}"
            f" ({class_line(result, ',')}); {share(result['level'], 0)} intervals by photo,"
            f" {counted(result['draws'], 'draw', ',')}."
        ),
        "warnings": left_out,
        "notes": [f"{note}." for note in result["notes"]],
        "figures": found[0],
        "differences": found[1],
        "gaps": svg(drawings.differences(gaps, base), " ".join(f"{line}." for line in said)),
        "settings": _settings(runs, labels),
        "curves": [
            svg(
                drawings.overlaid(histories, key, label),
                f"{label} by epoch of {', '.join(histories)}.",
            )
            for key, label in (
                ("val_loss", "val loss (nats a row)"),
                ("val_accuracy", "val accuracy"),
            )
            if histories
        ],
        "no_history": [label for label in labels if label not in histories],
        "reliability": svg(
            drawings.reliability(curves, of_two),
            f"Accuracy by confidence of {', '.join(labels)}; accuracies: {accuracies}.",
        ),
        "calibration": found[2],
        "buckets": found[3] if len(found) > 3 else None,
        "bucket_figure": svg(
            drawings.buckets(
                result["buckets"], decided(result["runs"][base])["accuracy"], list(labels)
            ),
            f"Accuracy of each run by kind of sentence; all rows: {accuracies}.",
        )
        if result["buckets"]
        else "",
        "cost": [_cost_row(label, run) for label, run in zip(labels, runs, strict=True)],
        "repeat": _repeat(runs, labels, result),
    }


def _table(table: Table) -> dict[str, Any]:
    first, *others = table.header
    return {
        "title": table.title,
        "columns": [(first, ""), *((name, "number") for name in others)],
        "rows": table.rows,
    }


def _settings(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    """Return the settings in which the runs differ."""
    values = [
        {
            "vision encoder": os.path.basename(run.config.encoders.vit),
            "text encoder": os.path.basename(run.config.encoders.text),
            "stored": f"{run.config.store.tokens} in {run.config.store.dtype}",
            **{name: getattr(run.config.train, name) for name in vars(TrainConfig())},
            "started from": os.path.basename(run.manifest["init_from"] or "the presets"),
            "trainable parameters": f"{run.manifest['parameters']['trainable']:,}",
        }
        for run in runs
    ]
    rows = [
        [name, *(shown_setting(one[name]) for one in values)]
        for name in values[0]
        if len({repr(one[name]) for one in values}) > 1
    ]
    return {"columns": [("setting", ""), *((label, "") for label in labels)], "rows": rows}


def _cost_row(label: str, run: Run) -> list[str]:
    cost = cost_of([run], None)
    if not cost["epochs"]:
        return [label, "–", "–", "–"]
    step = "–" if cost["step_seconds"] is None else f"{1000 * cost['step_seconds']:.1f} ms"
    return [label, f"{cost['epochs']}", step, duration(cost["seconds"])]


def _repeat(runs: Sequence[Run], labels: Sequence[str], result: dict[str, Any]) -> dict[str, Any]:
    folders = [str(run.folder) for run in runs]
    split = {"split": result["split"]} if result["split"] != "test" else {}
    options: dict[str, Any] = split
    commands = [
        (f"train {label}", trained_by(run)) for label, run in zip(labels, runs, strict=True)
    ]
    commands += [
        ("the figures alone", typed(Command("compare", *folders, **options))),
        ("this page", typed(Command("report", "--compare", *folders, **options))),
    ]
    prints = [
        [
            label,
            run.manifest["features"]["vision"]["fingerprint"],
            run.manifest["features"]["text"]["fingerprint"],
            run.weights_digest or "–",
        ]
        for label, run in zip(labels, runs, strict=True)
    ]
    data = runs[0].manifest["data"]
    return {
        "commands": [(name, line) for name, line in commands if line],
        "prints": prints,
        "data": [("rows", data["rows_digest"]), ("split", data["splits_digest"])],
        "versions": list(result["versions"].items()),
    }
