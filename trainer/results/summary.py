"""A run's evaluation as Markdown that reads well in a repository (GitHub's flavour)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from featstore.errors import Command, counted
from featstore.quantities import MISSING, number, share
from featstore.settings import paths_in
from trainer.config import Config
from trainer.metrics import confusion_matrix, decided
from trainer.results.controls import NO_BLIND

LONGEST = 300
# What Markdown, HTML, a table or GitHub's formulas would read as more than text.
# An underscore within a word is none of it.
_MEANT = re.compile(r"[\\`*{}\[\]<>|~&$#]|(?<![^\W_])_|_(?![^\W_])")
_SHOWN_ORDER = ("entailment", "contradiction", "neutral")
CONTROL_NAMES = {
    "shuffled-images": "the same run on shuffled photos",
    "hypothesis-only": "trained on the sentence alone",
}


def escaped(text: str) -> str:
    """Return any text as a cell of a Markdown table, on one line, read as itself."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    line = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
    return _MEANT.sub(lambda found: f"&#{ord(found[0])};", line)


def class_line(result: dict[str, Any], form: str = "") -> str:
    """Return how many rows of each class there are, entailment first; neutral last, of three."""
    names = [name for name in _SHOWN_ORDER if name in result]
    return ", ".join(f"{result[name]:{form}} {name}" for name in names)


def between(interval: dict[str, Any] | None, scale: float = 100, digits: int = 1) -> str:
    """Return an interval's ends, a dash where there is none."""
    if interval is None:
        return MISSING
    low, high = (f"{scale * interval[end]:.{digits}f}" for end in ("low", "high"))
    return f"{low} to {high}".replace("-", "−")


def gained(gap: dict[str, Any]) -> str:
    """Return a paired difference of shares in points, with its interval."""
    return f"{100 * gap['difference']:+.1f} ({between(gap)})".replace("-", "−")


def table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """Return a Markdown table, the first `left` columns aligned to the left."""
    rule = [":--" if at < left else "--:" for at in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def render_summary(
    result: dict[str, Any], about: dict[str, Any], config: Config, manifest: dict[str, Any]
) -> str:
    """Return the summary of one evaluation.

    Args:
        result: Of `trainer.results.evaluate.evaluate`.
        about: `command` and `versions`.
        config: The run's settings.
        manifest: The run's manifest.

    Returns:
        The file's text.
    """
    parts = [
        _headline(result, manifest),
        _figures(result),
        _classes(result),
        _calibration(result),
        _buckets(result),
        _errors(result),
        _repeat(result, about, manifest),
        _settings(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def title(result: dict[str, Any]) -> str:
    """Return what a run was measured on, in a few words."""
    if result["split"] is not None:
        return f"the {result['split']} split"
    return Path(result["rows_file"]).name if result["rows_file"] else "a table of rows"


def _headline(result: dict[str, Any], manifest: dict[str, Any]) -> str:
    at, sure = decided(result), result["intervals"]
    rows: list[Sequence[str]] = [
        (
            "**this run**",
            f"**{share(at['accuracy'])}**",
            between(sure["accuracy"]),
            share(at["macro_f1"]),
            number(result["auc"], 3),
            "",
        )
    ]
    for name, found in result.get("controls", {}).items():
        words = CONTROL_NAMES[name]
        if found is None:
            rows.append((f"{words}: not measured", *[MISSING] * 5))
            continue
        if name == "hypothesis-only":
            words += f" (`{found['run']}`)"
        rows.append(
            (
                words,
                share(found["accuracy"]),
                between(found["interval"]),
                share(found["macro_f1"]),
                number(found["auc"], 3),
                gained(found["difference"]),
            )
        )
    head = ("", "accuracy", "95 % interval", "macro-F1", "AUC", "this run above it, in points")
    lines = [
        f"# {escaped(result['run'])} on {escaped(title(result))}",
        f"> {result['verdict']}"
        if "verdict" in result
        else f"Measured with the control `{result['control']}`: this run was trained so.",
        table(head, rows),
        f"{counted(result['rows'], 'row', ',')} of {counted(result['images'], 'photo', ',')}"
        f" ({class_line(result, ',')}), {_rule(result)}. Intervals are bootstrapped over photos"
        f" ({counted(result['bootstrap']['draws'], 'draw', ',')}): they hold for these weights, not"
        " for another seed of training.",
        *_notes(result, manifest),
    ]
    return "\n\n".join(lines)


def _rule(result: dict[str, Any]) -> str:
    """Say by what a row is called what it is called."""
    if result["threshold"] is None:
        return "each called the class of the largest probability"
    return f"at τ = {result['threshold']:.2f} on the probability of entailment, the positive class"


def _notes(result: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    notes = []
    if manifest["status"] != "finished":
        notes.append(f"This run is {manifest['status']}: its best epoch so far was measured.")
    notes += [
        f"Not measured, {CONTROL_NAMES[name]}: {escaped(why)}."
        + (f" `{train_controls(result).line()}` trains it." if why == NO_BLIND else "")
        for name, why in result.get("controls_missing", {}).items()
    ]
    if manifest["init_from"] and result.get("controls", {}).get("hypothesis-only"):
        source = escaped(Path(manifest["init_from"]).name)
        notes.append(f"Both this run and the one on the sentence alone started from {source}.")
    lost = result["rows_of_split"] - result["rows"]
    if lost:
        why = dict(result.get("rows_left_out", {}))
        if photos := len(result["quarantined_photos"]):
            why[f"of {counted(photos, 'photo')} that could not be read"] = lost - sum(why.values())
        reasons = ", ".join(f"{count} {escaped(reason)}" for reason, count in why.items())
        whole = counted(result["rows_of_split"], "row", ",")
        notes.append(f"Left out: {lost:,} of {whole} ({reasons}).")
    notes += [f"**{line}.**" for line in seen_lines(result)]
    return notes


def train_controls(result: dict[str, Any]) -> Command:
    """Return the command that trains the control that is missing."""
    words = ["evaluate", result["run"], "--with-controls"]
    if result["split"] is None:
        words += ["--rows", result["rows_file"] or "FILE"]
    elif result["split"] != "test":
        words += ["--split", result["split"]]
    return Command(*words)


def seen_lines(result: dict[str, Any]) -> list[str]:
    """Return why the figures are too good: what the run was trained or chosen on."""
    if result["split"] is not None:
        chosen = "epoch was" if result["threshold"] is None else "epoch and τ were"
        known = {
            "train": "The run was trained on these rows: the figures are too good",
            "val": f"The run's {chosen} chosen on these rows: the figures are too good",
        }
        return [known[result["split"]]] if result["split"] in known else []
    if result["seen_photos"] is None:
        return ["The run's own rows cannot be read: it may have been trained on these photos"]
    return [
        f"The run's {split} split has {counted(found['photos'], 'photo', ',')} of"
        f" {found['rows']:,} of these rows: the figures are too good for those"
        for split, found in result["seen_photos"].items()
        if found["rows"]
    ]


def _figures(result: dict[str, Any]) -> str:
    sure = result["intervals"]
    of_three = result["threshold"] is None
    scores = [
        (name, number(result[key], 4), between(sure[key], 1, 4))
        for name, key in (
            ("AUC, mean of each class against the rest" if of_three else "AUC", "auc"),
            ("average precision", "average_precision"),
            ("Brier score", "brier"),
            ("expected calibration error", "calibration_error"),
            ("loss (nats a row)", "loss"),
        )
    ]
    if of_three:
        shares = [
            (name, share(result["at_argmax"][key]), between(sure[key]))
            for name, key in (("accuracy", "accuracy"), ("macro-F1", "macro_f1"))
        ]
        rows = [*shares, *scores]
        return f"## Figures\n\n{table(('figure', 'value', '95 % interval'), rows)}"
    parts = [
        "## Figures",
        _at_thresholds(result),
        table(("figure", "value", "95 % interval"), scores),
    ]
    return "\n\n".join(parts)


def _at_thresholds(result: dict[str, Any]) -> str:
    sure = result["intervals"]
    tau = f"τ = {result['threshold']:.2f}"
    if result["threshold_interval"]:
        tau += f" ({between(result['threshold_interval'], 1, 2)})"
    rows = [
        (
            name,
            f"{share(found['accuracy'])} ({between(sure[f'accuracy{suffix}'])})",
            f"{share(found['macro_f1'])} ({between(sure[f'macro_f1{suffix}'])})",
            *(f"{found[key]:,}" for key in ("tp", "fp", "fn", "tn")),
        )
        for name, found, suffix in (
            (tau, result["at_threshold"], ""),
            ("0.50", result["at_half"], "_at_half"),
        )
    ]
    head = ("threshold (95 %)", "accuracy (95 %)", "macro-F1 (95 %)", "tp", "fp", "fn", "tn")
    return table(head, rows)


def _classes(result: dict[str, Any]) -> str:
    at = decided(result)
    names = [name for name in _SHOWN_ORDER if name in at]
    matrix = confusion_matrix(at)
    counts = [(name, *(f"{matrix[name][other]:,}" for other in names)) for name in names]
    classes = [
        (
            name,
            *(share(at[name][key]) for key in ("precision", "recall", "f1")),
            f"{at[name]['rows']:,}",
        )
        for name in names
    ]
    at_tau = "" if result["threshold"] is None else ", at τ"
    return "\n\n".join(
        [
            f"## Confusion matrix and classes{at_tau}",
            table(("truth", *(f"called {name}" for name in names)), counts),
            table(("class", "precision", "recall", "F1", "rows"), classes),
        ]
    )


def _calibration(result: dict[str, Any]) -> str:
    found = result["calibration"]
    if found["temperature"] is None:
        why = f": {escaped(result['without_val'])}" if result["without_val"] else ""
        tau = "" if result["threshold"] is None else ", and τ has no interval"
        text = f"No temperature was fitted{tau}{why}."
    else:
        where = "on these rows" if result["split"] == "val" else "on the val split"
        verdict = "too sure" if found["temperature"] > 1 else "not sure enough"
        same = "the same labels"
        if found["threshold_after"] is not None:
            same += f" at 0.5, and those of τ at {found['threshold_after']:.3f}"
        text = (
            f"The temperature fitted {where} is {found['temperature']:.3f}"
            f" (the run is {verdict} of itself). The logits divided by it give {same}."
        )
    names = (("ECE", "calibration_error"), ("Brier score", "brier"), ("loss", "loss"))
    effect = [
        (label, *(number(found[when][key], 4) for _, key in names))
        for label, when in (("as it is", "before"), ("with the temperature", "after"))
        if when in found
    ]
    bins = [
        (
            f"{line['low']:.2f}–{line['high']:.2f}",
            f"{line['rows']:,}",
            share(line["confidence"]),
            share(line["accuracy"]),
        )
        for line in found["reliability"]
    ]
    confidence = "confidence" if result["threshold"] is None else "confidence at 0.5"
    return "\n\n".join(
        [
            "## Calibration",
            text,
            table(("", *(name for name, _ in names)), effect),
            table((confidence, "rows", "mean confidence", "accuracy"), bins),
        ]
    )


def _buckets(result: dict[str, Any]) -> str:
    rows = [
        (
            escaped(name),
            f"{found['rows']:,}",
            share(found["share"]),
            share(found["entailment"]),
            share(found["accuracy"]),
            between(found["interval"]),
        )
        for name, found in (
            *result["buckets"].items(),
            ("*in no bucket*", result["in_no_bucket"]),
        )
    ]
    rows[-1] = ("*in no bucket*", *rows[-1][1:])
    accuracy = "accuracy" if result["threshold"] is None else "accuracy at τ"
    head = ("bucket", "rows", "share", "entailment among them", accuracy, "95 % interval")
    source = escaped(result["bucket_file"] or "the ten that ship")
    text = f"Sentences by their words ({source}); one may be in several."
    return f"## By bucket\n\n{text}\n\n{table(head, rows)}"


def _errors(result: dict[str, Any]) -> str:
    found = result["errors"]
    if not found["rows"]:
        return "## Errors\n\nThere are none."
    of_three = result["threshold"] is None
    rows = [
        (
            escaped(line["Image_ID"]),
            escaped(line["Hypothesis"]),
            line["Label"],
            *([line["predicted"]] if of_three else []),
            share(line["confidence"]),
        )
        for line in found["most_confident"]
    ]
    said = ("called", "confidence") if of_three else ("confidence in the opposite",)
    return "\n\n".join(
        [
            "## The most confident errors",
            f"{found['rows_above']:,} of {found['rows']:,} errors"
            f" ({share(found['share_above'])}) have a confidence above {found['confident']}.",
            table(("photo", "sentence", "truth", *said), rows, left=2 + len(said)),
        ]
    )


def _settings(config: Config) -> str:
    files = ", ".join(Path(path).name for path in paths_in(config.data.rows))
    shown: dict[str, Any] = {
        "rows": files or "the built-in demo",
        "classes": config.data.classes,
        "vision encoder": Path(config.encoders.vit).name,
        "text encoder": Path(config.encoders.text).name,
        "stored": f"{config.store.tokens} tokens in {config.store.dtype}",
        **dataclasses.asdict(config.train),
    }
    lines = [(escaped(name), escaped(str(value))) for name, value in shown.items()]
    return _folded("Settings", table(("setting", "value"), lines, left=2))


def _folded(name: str, text: str) -> str:
    return f"<details>\n<summary>{name}</summary>\n\n{text}\n\n</details>"


def _repeat(result: dict[str, Any], about: dict[str, Any], manifest: dict[str, Any]) -> str:
    features, data = manifest["features"], manifest["data"]
    rows = [
        ("vision features", f"`{features['vision']['fingerprint']}`"),
        ("text features", f"`{features['text']['fingerprint']}`"),
        ("rows", f"`{data['rows_digest']}`"),
        ("split", f"`{data['splits_digest']}`"),
        *((name, version) for name, version in about["versions"].items()),
    ]
    files = ", ".join(f"`{result['files'][key]}`" for key in ("predictions", "figures"))
    return "\n\n".join(
        [
            "## How to repeat",
            f"    {' '.join(about['command'].split())}",
            f"Beside this file: {files}; the run's `config.toml` has every setting.",
            _folded(
                "Fingerprints and versions",
                table(("what", "fingerprint, digest or version"), rows, left=2),
            ),
        ]
    )
