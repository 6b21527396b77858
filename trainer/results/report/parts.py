"""The parts of a run's page that follow from its evaluation alone: figures, tables, sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featstore.quantities import number, share
from trainer.metrics import confusion_matrix, decided
from trainer.pages.drawing import svg
from trainer.results.controls import NO_BLIND
from trainer.results.report import drawings
from trainer.results.summary import CONTROL_NAMES, between, gained


def confusion(result: dict[str, Any]) -> dict[str, Any]:
    """Return the confusion matrix, and how well each class is told.

    Args:
        result: Of `trainer.results.evaluate.evaluate`, here and below.
    """
    at = decided(result)
    matrix = confusion_matrix(at)
    parts = [
        f"of {sum(line.values()):,} rows of {truth}"
        f" {', '.join(f'{rows:,} are called {name}' for name, rows in line.items())}"
        for truth, line in matrix.items()
    ]
    classes = [
        [
            name,
            *(share(at[name][key]) for key in ("precision", "recall", "f1")),
            f"{at[name]['rows']:,}",
        ]
        for name in matrix
    ]
    thresholds = []
    if result["threshold"] is not None:
        sure = result["intervals"]
        thresholds = [
            [
                name,
                f"{share(found['accuracy'])} ({between(sure['accuracy' + suffix])})",
                f"{share(found['macro_f1'])} ({between(sure['macro_f1' + suffix])})",
            ]
            for name, found, suffix in (
                (f"τ = {result['threshold']:.2f}", at, ""),
                ("0.50", result["at_half"], "_at_half"),
            )
        ]
    return {
        "figure": svg(drawings.confusion(matrix), f"Confusion matrix: {'; '.join(parts)}."),
        "classes": classes,
        "thresholds": thresholds,
    }


def calibration(result: dict[str, Any]) -> dict[str, Any]:
    """Return the reliability before and after the temperature, and what it changes."""
    found, of_two = result["calibration"], result["threshold"] is not None
    curves = {"as it is": found["reliability"]}
    before = found["before"]["calibration_error"]
    said = f"Reliability: the expected calibration error is {before:.3f}"
    if found["temperature"] is None:
        why = f": {result['without_val']}" if result["without_val"] else ""
        text = f"No temperature was fitted{why}."
    else:
        curves[f"at temperature {found['temperature']:.2f}"] = found["reliability_after"]
        after = found["after"]["calibration_error"]
        sureness = "too sure" if found["temperature"] > 1 else "not sure enough"
        where = " at 0.5" if of_two else ""
        text = (
            f"The temperature that val asks for is {found['temperature']:.3f}: the run is"
            f" {sureness} of itself. Dividing the logits by it takes the calibration error from"
            f" {before:.3f} to {after:.3f}, and changes no label{where}."
        )
        said += f", and {after:.3f} after the temperature"
    names = (
        ("calibration error", "calibration_error"),
        ("Brier score", "brier"),
        ("loss", "loss"),
    )
    table = [
        [label, *(number(found[when][key], 4) for _, key in names)]
        for label, when in (("as it is", "before"), ("with the temperature", "after"))
        if when in found
    ]
    return {
        "figure": svg(drawings.reliability(curves, of_two), f"{said}."),
        "text": text,
        "columns": [("logits", ""), *((name, "number") for name, _ in names)],
        "table": table,
    }


def sweep(result: dict[str, Any]) -> dict[str, Any]:
    """Return how val chose τ, and how sure that is."""
    tau, found = result["threshold"], result.get("threshold_sweep")
    if tau is None:
        return {
            "figure": "",
            "text": "Three classes have no threshold: the most probable one is called.",
        }
    if found is None:
        why = result["without_val"] or "an older version measured it"
        return {"figure": "", "text": f"τ is {tau:.2f}. How val chose it is not known: {why}."}
    interval = result["threshold_interval"]
    tried, scores = found["threshold"], found["macro_f1"]
    best = max(scores)
    nearest = min(range(len(tried)), key=lambda i: abs(tried[i] - tau))
    text = f"τ = {tau:.2f} gives val its best macro-F1, {share(best)}"
    if scores[nearest] < best:
        # A threshold that was given.
        text = (
            f"τ = {tau:.2f} gives val a macro-F1 of {share(scores[nearest])}; the best,"
            f" {share(best)}, is at {tried[scores.index(best)]:.2f}"
        )
    text += f"; 0.5 gives {share(scores[tried.index(0.5)])}."
    if interval is not None:
        ends = between(interval, 1, 2)
        text += f" On 95 % of draws of val's photos the best one lies at {ends}."
    return {
        "figure": svg(drawings.sweep(found, tau, interval), f"Threshold sweep: {text}"),
        "text": text,
    }


def buckets(result: dict[str, Any]) -> dict[str, Any]:
    """Return the accuracy by kind of sentence."""
    at = decided(result)
    every = {**result["buckets"], "in no bucket": result["in_no_bucket"]}
    known = {name: found for name, found in every.items() if found["rows"]}
    rows = [
        [
            name,
            f"{found['rows']:,}",
            share(found["share"]),
            share(found["entailment"]),
            share(found["accuracy"]),
            between(found["interval"]),
        ]
        for name, found in every.items()
    ]
    low = min(known, key=lambda name: known[name]["accuracy"])
    high = max(known, key=lambda name: known[name]["accuracy"])
    alt = (
        f"Accuracy by kind of sentence, from {share(known[low]['accuracy'])} ({low}) to"
        f" {share(known[high]['accuracy'])} ({high}); all rows {share(at['accuracy'])}."
    )
    return {
        "figure": svg(drawings.buckets(known, at["accuracy"]), alt),
        "rows": rows,
        "file": result["bucket_file"],
    }


def controls(result: dict[str, Any], command: str) -> dict[str, Any]:
    """Return the run beside its controls.

    Args:
        result: See `confusion`.
        command: Trains and measures the one on the sentence alone.
    """
    at = decided(result)
    if "controls" not in result:
        return {
            "text": f"This run was trained and measured with the control"
            f" {result['control']}: it is a control itself, and has none.",
            "figure": "",
            "rows": [],
            "missing": [],
        }
    sure = result["intervals"]["accuracy"]
    bars: list[tuple[str, float, Mapping[str, float] | None]] = [("this run", at["accuracy"], sure)]
    rows = [["this run", share(at["accuracy"]), between(sure), number(result["auc"]), ""]]
    for name, found in result["controls"].items():
        if found is None:
            continue
        short = {"shuffled-images": "shuffled\nphotos", "hypothesis-only": "sentence\nalone"}
        bars.append((short[name], found["accuracy"], found["interval"]))
        label = CONTROL_NAMES[name]
        if name == "hypothesis-only":
            label += f" ({found['run']})"
        rows.append(
            [
                label,
                share(found["accuracy"]),
                between(found["interval"]),
                number(found["auc"]),
                gained(found["difference"]),
            ]
        )
    missing = [
        (CONTROL_NAMES[name], why, command if why == NO_BLIND else "")
        for name, why in result["controls_missing"].items()
    ]
    return {
        "text": result["verdict"],
        "figure": svg(
            drawings.controls(bars), f"Accuracy beside the controls. {result['verdict']}"
        ),
        "rows": rows,
        "missing": missing,
    }
