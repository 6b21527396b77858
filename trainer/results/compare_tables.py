"""A comparison of runs as tables, for a terminal and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featstore.errors import counted
from featstore.quantities import MISSING, share
from trainer.results.compare import figures_of
from trainer.results.summary import class_line

# Key, title, and whether it is a share, shown in per cent.
_SHARES = (
    ("accuracy", "accuracy at τ", True),
    ("macro_f1", "macro-F1 at τ", True),
    ("accuracy_at_half", "accuracy at 0.5", True),
    ("macro_f1_at_half", "macro-F1 at 0.5", True),
)
_SHARES_OF_THREE = (("accuracy", "accuracy", True), ("macro_f1", "macro-F1", True))
_SCORES = (
    ("auc", "AUC", False),
    ("average_precision", "average precision", False),
    ("brier", "Brier score ↓", False),
    ("calibration_error", "ECE ↓", False),
    ("loss", "loss ↓", False),
)


@dataclass(frozen=True)
class Table:
    """A titled table of text; the first column is of names, the others of figures."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def text(self) -> str:
        """Return it aligned, for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        shown = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *shown])

    def markdown(self) -> str:
        """Return it as GitHub's Markdown."""
        rule = [":---", *["---:"] * (len(self.header) - 1)]
        lines = [
            "| " + " | ".join(map(_escaped, line)) + " |"
            for line in (self.header, rule, *self.rows)
        ]
        return "\n".join([f"## {self.title}", "", *lines])


def as_text(result: dict[str, Any]) -> str:
    """Return a comparison (see `compare`) for a terminal."""
    parts = [_headline(result), *(table.text() for table in tables(result))]
    parts.append("\n".join([*verdicts(result), *(f"note: {note}" for note in result["notes"])]))
    return "\n\n".join(parts)


def as_markdown(result: dict[str, Any]) -> str:
    """Return a comparison as a Markdown page."""
    verdict = "\n".join(f"- {_escaped(line)}" for line in verdicts(result))
    notes = "\n".join(f"- {_escaped(note)}" for note in result["notes"])
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"# {_escaped(' · '.join(result['runs']))}",
        _escaped(_headline(result)),
        verdict,
        *(table.markdown() for table in tables(result)),
        f"## Notes\n\n{notes}",
        f"Made by `{result['command']}` ({versions}).",
    ]
    return "\n\n".join(parts) + "\n"


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a comparison: figures, differences, calibration, buckets."""
    found = [_figures(result), _differences(result), _calibration(result)]
    return [*found, _buckets(result)] if result["buckets"] else found


def verdicts(result: dict[str, Any]) -> list[str]:
    """Return one sentence on each run against the base."""
    lines = []
    for entry in result["differences"]:
        found = entry["figures"]["accuracy"]
        points = abs(found["difference"]) * 100
        side = "above" if found["difference"] >= 0 else "below"
        p = _p(entry[_tested(result)[0][0]]["permutation"]["p"])
        shown = found["low"] > 0 or found["high"] < 0
        lines.append(
            f"{entry['run']}: accuracy{_at(result)} {points:.1f} points {side} {entry['base']}"
            f" ({share(result['level'], 0)} interval {_points(found['low'])} to"
            f" {_points(found['high'])}; permutation by image p {p}):"
            f" {'a difference' if shown else 'no difference shown'}"
        )
    return lines


def _has_threshold(result: dict[str, Any]) -> bool:
    return all(figures["threshold"] is not None for figures in result["runs"].values())


def _at(result: dict[str, Any]) -> str:
    return " at τ" if _has_threshold(result) else ""


def _tested(result: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return where runs are tested against the base, and how that is said."""
    if _has_threshold(result):
        return ("at_threshold", " at τ"), ("at_half", " at 0.5")
    return (("at_argmax", ""),)


def _figure_rows(result: dict[str, Any]) -> tuple[tuple[str, str, bool], ...]:
    return (_SHARES if _has_threshold(result) else _SHARES_OF_THREE) + _SCORES


def _headline(result: dict[str, Any]) -> str:
    classes = class_line(result)
    lines = [
        f"{result['split']}: {counted(result['rows'], 'row')} of"
        f" {counted(result['images'], 'image')} ({classes});"
        f" {share(result['level'], 0)} intervals by image, {result['draws']} draws"
    ]
    for reason, count in result["left_out"].items():
        lines.append(f"left out: {count} of {counted(result['rows_of_split'], 'row')}, {reason}")
    return "\n".join(lines)


def _figures(result: dict[str, Any]) -> Table:
    runs = result["runs"]
    header = ["run", *(f"{label} (base)" if label == result["base"] else label for label in runs)]
    rows = [
        ["trained on", *(_CONTROLS[figures["control"]] for figures in runs.values())],
    ]
    if _has_threshold(result):
        rows.append(["τ", *(f"{figures['threshold']:.2f}" for figures in runs.values())])
    for key, title, percent in _figure_rows(result):
        cells = []
        for figures in runs.values():
            value, interval = figures_of(figures)[key], figures["intervals"][key]
            cells.append(_within(value, interval, percent))
        rows.append([f"{title}, %" if percent else title, *cells])
    return Table("Figures (↓: less is better)", header, rows)


_CONTROLS = {
    "none": "photos",
    "hypothesis-only": "no photo",
    "shuffled-images": "shuffled photos",
}


def _differences(result: dict[str, Any]) -> Table:
    entries, base = result["differences"], result["base"]
    rows = []
    for key, title, percent in _figure_rows(result):
        cells = [_gap(entry["figures"][key], percent) for entry in entries]
        rows.append([f"{title}, points" if percent else title, *cells])
    for key, at in _tested(result):
        tests = [entry[key] for entry in entries]
        only = [test["mcnemar"] for test in tests]
        rows += [
            [f"right alone{at}: run / base", *(f"{n['only_a']} / {n['only_b']}" for n in only)],
            [f"McNemar p{at}: exact", *(_p(n["exact_p"]) for n in only)],
            [f"McNemar p{at}: corrected χ²", *(_p(n["chi2_p"]) for n in only)],
            [f"permutation by image p{at}", *(_p(test["permutation"]["p"]) for test in tests)],
        ]
    title = f"Difference from {base} (+: more than {base}; ↓: less is better)"
    return Table(title, ["run", *(entry["run"] for entry in entries)], rows)


def _calibration(result: dict[str, Any]) -> Table:
    runs = result["runs"]
    curves = {
        label: {row["low"]: row for row in figures["reliability"]}
        for label, figures in runs.items()
    }
    bins = {row["low"]: row["high"] for curve in curves.values() for row in curve.values()}
    rows = []
    for low in sorted(bins):
        cells = []
        for curve in curves.values():
            row = curve.get(low)
            if row is None:
                cells.append(MISSING)
                continue
            figures = [share(row[key]) for key in ("confidence", "accuracy")]
            cells.append(f"{' → '.join(figures)} ({row['rows']})")
        # Of two classes, the confidence in the one that was called is at least a half.
        least = max(low, 0.5) if _has_threshold(result) else low
        rows.append([f"{share(least, 0)}–{share(bins[low], 0)}", *cells])
    at = " at 0.5" if _has_threshold(result) else ""
    title = f"Calibration{at} (mean confidence → accuracy, rows)"
    return Table(title, ["confidence", *runs], rows)


def _buckets(result: dict[str, Any]) -> Table:
    others = [entry["run"] for entry in result["differences"]]
    header = ["bucket", "rows", "images", "entailment", *result["runs"]]
    header += [f"{label} − {result['base']}" for label in others]
    rows = []
    for name, bucket in result["buckets"].items():
        cells = [str(bucket["rows"]), str(bucket["images"]), share(bucket["entailment"])]
        cells += [_within(found["accuracy"], found, True) for found in bucket["runs"].values()]
        cells += [_gap(bucket["differences"][label], True) for label in others]
        rows.append([name, *cells])
    return Table(f"Accuracy{_at(result)} by bucket, %", header, rows)


def _within(value: float | None, interval: dict[str, Any] | None, percent: bool) -> str:
    """Return a figure with its interval in brackets."""
    if value is None:
        return "undefined"
    scale, digits = (100, 1) if percent else (1, 4)
    shown = f"{value * scale:.{digits}f}"
    if interval is None:
        return shown
    low, high = interval["low"] * scale, interval["high"] * scale
    return f"{shown} ({low:.{digits}f}–{high:.{digits}f})"


def _gap(found: dict[str, Any], percent: bool) -> str:
    """Return a difference with its interval in brackets."""
    if found["difference"] is None:
        return "undefined"
    shown = _points if percent else _signed
    if found["low"] is None:
        return shown(found["difference"])
    return f"{shown(found['difference'])} ({shown(found['low'])} to {shown(found['high'])})"


def _points(share: float) -> str:
    return _minus(f"{share * 100:+.1f}")


def _signed(value: float) -> str:
    return _minus(f"{value:+.4f}")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _escaped(text: str) -> str:
    """Return text of which Markdown makes no markup."""
    for sign in ("\\", "|", "`", "<", "*", "_"):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", "  \n")
