"""A search on one page: what was tried, what it found, how sure that is, what it cost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.errors import Command, FeatstoreError, RunError, counted
from featstore.project import Project
from featstore.publish import read_json
from featstore.quantities import MISSING, duration, number, share, size
from trainer.pages.drawing import svg
from trainer.pages.page import write_page
from trainer.results.report.cost import cost_of
from trainer.results.report.place import page_path, typed
from trainer.run.folder import SEARCH_FILE, Run
from trainer.tuning.plots import (
    DRAWS,
    WITHIN,
    known_importances,
    no_importance,
    search_figures,
)
from trainer.tuning.space import Parameter, shown
from trainer.tuning.study import Search
from trainer.tuning.table import is_open, ranked, rows_now, without_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def report(search: Search, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Write a search's page, also while it runs.

    Args:
        search: The search.
        path: Of the page; None: `report.html` in the search's folder.

    Returns:
        `page`: its path; `kind`: "search"; `of`: the search's folder; `trials`, `bytes`, and
        `notes`: what could not be drawn, and why.

    Raises:
        RunError: No trial was drawn yet.
        UsageError, WriteError: As of a run's page.
    """
    target = page_path(path, search.folder / "report.html")
    rows = ranked(search, rows_now(search))
    if not rows:
        raise RunError(f"{search.folder}: no page yet: no trial was drawn")
    notes = [
        line.replace("no importance.png", "No importance")
        for line in [no_importance(search, rows)]
        if line
    ]
    content = _content(search, rows, notes)
    gone = without_folder(search, rows)
    num_bytes = write_page(target, "search.html", f"Search {search.name}", gone=gone, **content)
    return {
        "page": str(target),
        "kind": "search",
        "of": str(search.folder),
        "trials": len(rows),
        "bytes": num_bytes,
        "notes": notes + ([gone] if gone else []),
    }


def _content(
    search: Search, rows: Sequence[dict[str, Any]], notes: Sequence[str]
) -> dict[str, Any]:
    shares = known_importances(search, rows)
    figures = search_figures(search, rows, shares)
    best = rows[0] if rows[0]["state"] == "complete" else None
    return {
        "summary": _summary(search, rows, best),
        "facts": _facts(search, rows, best),
        "space": [_range(parameter) for parameter in search.space.parameters],
        "leaderboard": _leaderboard(search, rows),
        "failures": [(row["run"], row["reason"]) for row in rows if row["reason"]],
        "history": _history(search, rows, figures),
        "parallel": _parallel(rows, best, figures),
        "importance": _importance(search, rows, figures, shares, notes),
        "cost": _cost(search, rows),
        "repeat": _repeat(search, best),
    }


def _summary(search: Search, rows: Sequence[dict[str, Any]], best: dict[str, Any] | None) -> str:
    settings = search.space.search
    ended = sum(not is_open(row) for row in rows)
    sampler = {"tpe": "TPE", "cma": "CMA-ES"}.get(settings.sampler, settings.sampler)
    drawn = "of a grid" if sampler == "grid" else f"drawn by {sampler}"
    whole = f"{ended} of {counted(search.space.trials, 'trial')} {drawn} have ended"
    if best is None:
        return f"{whole}; none is complete yet."
    params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
    least = "lowest" if settings.minimises else "highest"
    return (
        f"{whole}; the {least} {settings.metric} is {best['value']:.4f}, of {best['run']}:"
        f" {params}."
    )


def _facts(
    search: Search, rows: Sequence[dict[str, Any]], best: dict[str, Any] | None
) -> list[tuple[str, str, str]]:
    metric = search.space.search.metric
    states = [row["state"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    facts = [("Trials", f"{len(rows)} of {search.space.trials}", counts)]
    if best is not None:
        facts.append(
            (f"Best {metric}", f"{best['value']:.4f}", f"{best['run']}, epoch {best['best_epoch']}")
        )
        values = [row["value"] for row in rows if row["state"] == "complete"]
        if len(values) > 1:
            gap = abs(values[0] - values[1])
            facts.append(("Above the second", f"{gap:.4f}", f"{rows[1]['run']}; one seed each"))
            spread = f"{min(values):.4f} to {max(values):.4f}"
            facts.append(("Median", f"{float(np.median(values)):.4f}", f"all: {spread}"))
    return facts


def _range(parameter: Parameter) -> list[str]:
    kinds = {
        "uniform": "uniform",
        "log_uniform": "uniform in the logarithm",
        "int": "whole numbers",
        "log_int": "whole numbers, uniform in the logarithm",
        "choice": "one of",
    }
    values = ", ".join(map(shown, parameter.values))
    if parameter.kind != "choice":
        values = " to ".join(map(shown, parameter.values))
    step = "" if parameter.step is None else f", in steps of {shown(parameter.step)}"
    return [parameter.name, kinds[parameter.kind], values + step]


def _leaderboard(search: Search, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [parameter.name for parameter in search.space.parameters]
    metric = search.space.search.metric
    kinds = {
        parameter.name: "" if any(isinstance(v, str) for v in parameter.values) else "number"
        for parameter in search.space.parameters
    }
    figures = [
        name
        for name in ("val_accuracy", "val_macro_f1", "val_auc", "val_loss", "threshold")
        if name != metric
    ]
    # What is the same of all trials would only make the table wider.
    told = [
        (name, kind, value)
        for name, kind, value in (
            ("together", "number", lambda row: row["together"]),
            ("memory", "number", lambda row: size(row["memory_bytes"])),
            ("worker", "", lambda row: row["worker"] or MISSING),
        )
        if len({value(row) for row in rows}) > 1
    ]
    columns = [
        ("trial", ""),
        ("rank", "number"),
        ("state", ""),
        (metric, "number"),
        ("best epoch", "number"),
        ("epochs", "number"),
        *((name, kinds[name]) for name in names),
        *((name, "number") for name in figures),
        ("seconds", "number"),
        *((name, kind) for name, kind, _ in told),
    ]
    lines = []
    for rank, row in enumerate(rows, 1):
        lines.append(
            [
                row["run"],
                rank,
                row["state"],
                number(row["value"], 4),
                row["best_epoch"] or MISSING,
                row["epoch"],
                *(shown(row["params"].get(name, MISSING)) for name in names),
                *(number(row[name], 4 if name != "threshold" else 2) for name in figures),
                MISSING if row["seconds"] is None else f"{row['seconds']:.1f}",
                *(value(row) for _, _, value in told),
            ]
        )
    return {"columns": columns, "rows": lines}


def _history(search: Search, rows: Sequence[dict[str, Any]], figures: dict[str, Figure]) -> str:
    if "history" not in figures:
        return ""
    complete = [row for row in rows if row["state"] == "complete"]
    alt = (
        f"{search.space.search.metric} of each trial in the order drawn, from"
        f" {complete[-1]['value']:.4f} to {complete[0]['value']:.4f}; the best is"
        f" {complete[0]['run']}."
    )
    return svg(figures["history"], alt)


def _parallel(
    rows: Sequence[dict[str, Any]], best: dict[str, Any] | None, figures: dict[str, Figure]
) -> str:
    if "parallel_coordinates" not in figures or best is None:
        return ""
    params = ", ".join(f"{key} {shown(value)}" for key, value in best["params"].items())
    alt = f"Each trial as a line through its settings to its value; the best has {params}."
    return svg(figures["parallel_coordinates"], alt)


def _importance(
    search: Search,
    rows: Sequence[dict[str, Any]],
    figures: dict[str, Figure],
    shares: dict[str, NDArray[np.float64]],
    notes: Sequence[str],
) -> dict[str, Any]:
    if "importance" not in figures:
        why = (
            " ".join(f"{line}." for line in notes) or "Not drawn: the trials do not differ enough."
        )
        return {"figure": "", "rows": [], "text": why}
    ends = (1 - WITHIN) / 2, (1 + WITHIN) / 2
    table = [
        [
            name,
            number(float(values.mean()), 2),
            " to ".join(f"{end:.2f}" for end in np.quantile(values, ends)),
        ]
        for name, values in shares.items()
    ]
    first = table[0]
    alt = f"Importance of each setting; the largest is {first[0]} with {first[1]} ({first[2]})."
    trials = sum(row["state"] == "complete" for row in rows)
    return {
        "figure": svg(figures["importance"], alt),
        "rows": table,
        "text": (
            f"fANOVA (Hutter et al. 2014) over {counted(trials, 'complete trial')}: the share of"
            f" the explained variance of {search.space.search.metric} that a setting has alone."
            f" It is computed for {DRAWS} bootstrap draws of the trials: the mean, and between"
            f" which values {share(WITHIN, 0)} of the draws lie. Few trials leave that range wide."
        ),
    }


def _cost(search: Search, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    runs: list[Run] = []
    for row in rows:
        run = search.run_of(row["trial"])
        try:
            if run.history_path.exists() and run.manifest and len(run.history):
                runs.append(run)
        except FeatstoreError:
            continue
    took = [row["seconds"] / row["together"] for row in rows if row["seconds"] is not None]
    facts = [
        (
            "A trial",
            duration(float(np.median(took)) if took else None),
            "median, its share of a pass",
        ),
        ("All trials", duration(sum(took)), "of a worker's time"),
    ]
    if not runs:
        return {"facts": facts, "text": ""}
    try:
        project: Project | None = Project(
            runs[0].config, dry_run=True, file=search.folder / "config.toml"
        )
    except FeatstoreError:
        project = None
    # Trials may vary what is stored; then there is no one speed.
    if len({run.manifest["features"]["vision"]["fingerprint"] for run in runs}) > 1:
        project = None
    cost = cost_of(runs, project)
    together = any(row["together"] > 1 for row in rows)
    known = cost["end_to_end_seconds"] is not None
    facts += [
        ("Epochs", f"{cost['epochs']:,}", f"{cost['visits']:,} rows gone through"),
        (
            "End to end, at least",
            duration(cost["end_to_end_seconds"]) if known else "unknown",
            f"with the ViT on each row of every epoch, at {cost['photos_per_second']:,.0f} a second"
            if known
            else "the extraction's speed was not recorded on this machine",
        ),
    ]
    if known:
        spent = sum(took) + cost["extraction_seconds"]
        facts.append(
            (
                "Saved",
                f"{cost['end_to_end_seconds'] / spent:.1f} ×",
                f"extraction included ({duration(cost['extraction_seconds'])}, once)",
            )
        )
    text = (
        "Trials that are trained together share each pass over the store, and its time."
        if together
        else ""
    )
    return {"facts": facts, "text": text}


def _repeat(search: Search, best: dict[str, Any] | None) -> dict[str, Any]:
    about = read_json(search.folder / SEARCH_FILE)
    storage: dict[str, Any] = {"storage": about["storage"]} if about["storage"] else {}
    folder = str(search.folder)
    commands = [("the search, as it was started", about["command"])]
    if search.unfinished:
        runs: dict[str, Any] = (
            {} if search.folder.parent.name == "runs" else {"runs": str(search.folder.parent)}
        )
        commands.append(
            ("go on with it", typed(Command("search", name=search.name, **runs, **storage)))
        )
    if best is not None:
        commands.append(
            (
                "train the best trial again, with three seeds",
                typed(Command("search", "best", folder, seeds=3, **storage)),
            )
        )
    if best is not None and (run := search.run_of(best["trial"])).exists:
        commands += [
            (
                "train it as a run of its own",
                typed(Command("train", config=run.config_path, name=f"{search.name}-best")),
            ),
            ("measure it on the test split", typed(Command("evaluate", str(run.folder)))),
        ]
    commands.append(("write this page", typed(Command("report", folder, **storage))))
    prints = [
        ("rows", about["rows"]),
        ("split", about["split"]),
        *(("features", fingerprint) for fingerprint in about["features"]),
        ("seed of the draws", search.space.search.seed),
        ("started from", Path(about["init_from"]).name if about["init_from"] else "the presets"),
    ]
    return {"commands": commands, "prints": prints, "versions": list(about["versions"].items())}
