"""A run on one page: what it does, how it came about, what it cost, how to do it again."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featstore.data.dataset import Dataset
from featstore.errors import Command, FeatstoreError, counted
from featstore.progress import SILENT, Show
from featstore.project import Project
from featstore.quantities import number, share
from featstore.settings import paths_in
from trainer.config import TrainConfig
from trainer.metrics import decided
from trainer.pages.drawing import svg
from trainer.pages.page import write_page
from trainer.results.report import drawings, embedding, parts
from trainer.results.report.cards import CARDS, cards
from trainer.results.report.cost import cost_content, cost_of, epochs_of
from trainer.results.report.measured import Measured, measured, split_of
from trainer.results.report.place import page_path, trained_by, typed
from trainer.results.score import Scorer
from trainer.results.summary import between, gained, title
from trainer.run.curves import learning_curves
from trainer.run.folder import Run
from trainer.run.optimizer import is_scheduled


def report(
    run: Run,
    scorer: Callable[[], Scorer],
    path: str | os.PathLike[str] | None = None,
    split: str | None = None,
    show: Show = SILENT,
) -> dict[str, Any]:
    """Write a run's page.

    Args:
        run: With weights.
        scorer: Opens its model and data, where they are needed.
        path: Of the page; None: `report.html` in the run's folder, of another split than
            that of `split_of` `report-<split>.html`.
        split: "train", "val" or "test"; None: test, or val where there is no test split.
        show: How an evaluation is shown.

    Returns:
        `page`: its path; `kind`: "run"; `of`: the run's folder; `split`, `bytes`, and `notes`:
        what could not be drawn, and why.

    Raises:
        UsageError: The page's name is that of no page.
        RunError: The run has no weights yet.
        WriteError: The page cannot be written.
        FeatstoreError: The run was not measured, and cannot be from here.
    """
    usual = split_of(run)
    split = split or usual
    default = "report.html" if split == usual else f"report-{split}.html"
    target = page_path(path, run.folder / default)
    opened = functools.cache(scorer)
    found = measured(run, split, opened, show)
    page = RunPage(run, found, split, opened)
    content = page.content()
    size = write_page(target, "run.html", f"{run.name} on {title(found.result)}", **content)
    return {
        "page": str(target),
        "kind": "run",
        "of": str(run.folder),
        "split": split,
        "bytes": size,
        "notes": page.notes,
    }


class RunPage:
    """What is put into `run.html`.

    Args:
        run: The run.
        found: Its figures.
        split: Their split.
        scorer: Opens its model and data.

    Attributes:
        notes: What could not be drawn, and why.
    """

    def __init__(self, run: Run, found: Measured, split: str, scorer: Callable[[], Scorer]) -> None:
        self.run, self.found, self.split, self.scorer = run, found, split, scorer
        self.result, self.config, self.manifest = found.result, run.config, run.manifest
        self.at = decided(self.result)
        self.notes: list[str] = []
        self.project, self.dataset = self._project(), None
        if self.project is not None:
            self.dataset = self._dataset(self.project)

    def _project(self) -> Project | None:
        try:
            return self.scorer().project
        except FeatstoreError as error:
            self.notes.append(f"The run's data cannot be opened: {error.message}")
            return None

    def _dataset(self, project: Project) -> Dataset | None:
        """Return the rows and where the photos are; None where they are not those of the run."""
        try:
            if project.dataset.examples.digest() == self.manifest["data"]["rows_digest"]:
                return project.dataset
            self.notes.append("The run's rows changed since: no photo is shown.")
        except FeatstoreError as error:
            self.notes.append(f"The run's rows cannot be read: {error.message}")
        return None

    def content(self) -> dict[str, Any]:
        """Return what the template names."""
        content = {
            "summary": self._summary(),
            "facts": self._facts(),
            "warnings": self._warnings(),
            "settings": self._settings(),
            "curves": self._curves(),
            "confusion": parts.confusion(self.result),
            "calibration": parts.calibration(self.result),
            "sweep": parts.sweep(self.result),
            "buckets": parts.buckets(self.result),
            "maps": self._maps(),
            "errors": self._errors(),
            "controls": parts.controls(self.result, self._controls_line()),
            "cost": self._cost(),
            "repeat": self._repeat(),
        }
        return {**content, "notes": self.notes}

    # --- the head

    def _summary(self) -> str:
        """Return the run in one sentence."""
        result, sure, config = self.result, self.result["intervals"], self.config
        encoders = f"{Path(config.encoders.vit).name} and {Path(config.encoders.text).name}"
        tau = "" if result["threshold"] is None else f" at τ = {result['threshold']:.2f}"
        return (
            f"{self.run.name} ({encoders}; {_trained(config.train)}) is right about"
            f" {share(self.at['accuracy'])} (95 % interval {between(sure['accuracy'])}) of"
            f" {counted(result['rows'], 'row', ',')} of {title(result)}, macro-F1"
            f" {share(self.at['macro_f1'])} ({between(sure['macro_f1'])}){tau}."
        )

    def _facts(self) -> list[tuple[str, str, str]]:
        result, sure = self.result, self.result["intervals"]
        auc = "AUC" if result["threshold"] is not None else "AUC, mean over classes"
        facts = [
            ("Accuracy", share(self.at["accuracy"]), between(sure["accuracy"])),
            ("Macro-F1", share(self.at["macro_f1"]), between(sure["macro_f1"])),
            (auc, number(result["auc"]), between(sure["auc"], 1, 3)),
            (
                "Calibration error",
                number(result["calibration_error"]),
                between(sure["calibration_error"], 1, 3),
            ),
        ]
        for name, found in (result.get("controls") or {}).items():
            label = {"shuffled-images": "Over shuffled photos"}.get(name, "Over the sentence alone")
            value = "not measured" if found is None else f"{gained(found['difference'])}"
            value, _, interval = value.partition(" (")
            points = " points" if found is not None else ""
            facts.append((label, value + points, interval.rstrip(")")))
        return facts

    def _warnings(self) -> list[str]:
        """Return what a reader must know before the figures."""
        from trainer.results.summary import seen_lines

        lines = list(self.found.notes)
        status = self.manifest["status"]
        if status != "finished":
            lines.append(f"This run is {status}: its best epoch so far was measured.")
        lines += [f"{line}." for line in seen_lines(self.result)]
        lost = self.result["rows_of_split"] - self.result["rows"]
        if lost:
            photos = counted(len(self.result["quarantined_photos"]), "photo")
            lines.append(
                f"{counted(lost, 'row', ',')} of {self.result['rows_of_split']:,} left out: of"
                f" {photos} that could not be read, or without a label."
            )
        return lines

    def _settings(self) -> dict[str, Any]:
        config, train = self.config, self.config.train
        files = ", ".join(Path(path).name for path in paths_in(config.data.rows))
        counts = self.manifest["data"].get("counts", {})
        rows = ", ".join(f"{name} {split['rows']:,}" for name, split in counts.items())
        main = [
            ("rows", f"{files or 'the built-in demo'}: {rows}"),
            ("classes", config.data.classes),
            ("vision encoder", Path(config.encoders.vit).name),
            ("text encoder", Path(config.encoders.text).name),
            ("stored", f"{config.store.tokens} tokens in {config.store.dtype}"),
            ("trainable parameters", f"{self.manifest['parameters']['trainable']:,}"),
            ("started from", Path(self.manifest["init_from"] or "the presets").name),
        ]
        if "imported" in self.manifest:
            main.append(("imported from", str(_name_of(self.manifest["imported"]))))
        defaults = dataclasses.asdict(TrainConfig())
        values = dataclasses.asdict(train)
        changed = [
            (name, shown_setting(value), shown_setting(defaults[name]))
            for name, value in values.items()
            if value != defaults[name]
        ]
        return {
            "main": [(name, str(value)) for name, value in main],
            "changed": changed,
            "all": [(name, shown_setting(value)) for name, value in values.items()],
        }

    # --- figures

    def _curves(self) -> dict[str, Any]:
        history = epochs_of(self.run)
        if not history:
            why = (
                "These weights were trained elsewhere: there is no history."
                if "imported" in self.manifest
                else "The run has no history."
            )
            return {"figures": [], "text": why}
        train, val = self.config.train, self.manifest["data"].get("counts", {}).get("val")
        shares = (
            [
                val[name] / val["rows"]
                for name in ("contradiction", "entailment", "neutral")
                if name in val
            ]
            if val
            else []
        )
        options: dict[str, Any] = {
            "monitor": train.monitor,
            "shares": shares,
            "cuts": not is_scheduled(train),
            "size": (drawings.WIDTH, drawings.HEIGHT),
        }
        epoch = self.run.metrics["epoch"]
        last = history[-1]
        said = (
            f"Loss by epoch: on train {last['loss']:.3f} and on val {last['val_loss']:.3f} in the"
            f" last of {counted(len(history), 'epoch')}; the best is epoch {epoch}."
        )
        scored = (
            f"Scores on val by epoch: accuracy {share(last['val_accuracy'])} and macro-F1"
            f" {share(last['val_macro_f1'])} in the last."
        )
        figures = [
            svg(learning_curves(history, panels=[panel], **options), alt)
            for panel, alt in (("loss", said), ("score", scored))
        ]
        how = {"early stop": "stopped early", "all epochs": "all epochs were trained"}
        ended = how.get(self.manifest.get("ended", ""), self.manifest["status"])
        text = (
            f"{counted(len(history), 'epoch')} of at most {train.epochs} ({ended}); epoch {epoch}"
            f" is the best by {train.monitor}, and its weights are measured here."
        )
        return {"figures": figures, "text": text}

    def _maps(self) -> dict[str, Any]:
        labels, right = self.found.labels, self.found.right
        if self.dataset is None:
            return {"maps": [], "text": "Not drawn: the run's rows cannot be opened from here."}
        if len(labels) < embedding.FEWEST_ROWS:
            return {"maps": [], "text": f"Not drawn: fewer than {embedding.FEWEST_ROWS} rows."}
        try:
            drawn, values = embedding.activations(
                self.scorer(), self.split, self.result["control"], len(labels)
            )
        except (FeatstoreError, ValueError) as error:
            why = getattr(error, "message", str(error))
            self.notes.append(f"No map of the rows: {why}")
            return {"maps": [], "text": f"Not drawn: {why}."}
        maps = []
        for method, points in embedding.in_two_dimensions(values).items():
            by_class, by_error = drawings.map_of_rows(points, labels[drawn], right[drawn])
            maps.append(
                {
                    "method": method,
                    "by_class": svg(
                        by_class, f"{method} of {len(drawn):,} rows, coloured by class."
                    ),
                    "by_error": svg(
                        by_error,
                        f"The same map, coloured by right and wrong: {int((~right[drawn]).sum()):,}"
                        " are wrong.",
                    ),
                }
            )
        return {
            "maps": maps,
            "text": "",
            "rows": len(drawn),
            "whole": len(labels),
            "width": values.shape[1],
            "perplexity": embedding.perplexity(len(drawn)),
            "seed": embedding.SEED,
        }

    def _errors(self) -> dict[str, Any]:
        found = self.result["errors"]
        scorer = None if self.dataset is None else self.scorer()
        made, without = cards(self.found, self.split, scorer)
        return {
            "rows": found["rows"],
            "above": found["rows_above"],
            "confident": found["confident"],
            "cards": made,
            "without": without,
            "explain": typed(
                Command("explain", str(self.run.folder), split=self.split, errors=CARDS)
            ),
        }

    def _controls_line(self) -> str:
        """Return the command that trains and measures the control that is missing."""
        words = ["evaluate", str(self.run.folder), "--with-controls"]
        return typed(Command(*words, *(["--split", self.split] if self.split != "test" else [])))

    # --- cost and how to repeat

    def _cost(self) -> dict[str, Any]:
        cost = cost_of([self.run], self.project)
        return cost_content(cost, self.config.train.control == "hypothesis-only")

    def _repeat(self) -> dict[str, Any]:
        manifest, result = self.manifest, self.result
        features, data = manifest["features"], manifest["data"]
        extract = Command("extract-vit", config=str(self.run.config_path), split="all")
        commands = [
            ("extract the photos' features, where they are not in the store", typed(extract)),
            ("import" if "imported" in manifest else "train", trained_by(self.run)),
            ("measured by", result["command"]),
            ("measure again", typed(Command("evaluate", str(self.run.folder), split=self.split))),
            ("write this page", typed(Command("report", str(self.run.folder), split=self.split))),
        ]
        seeds = manifest.get("seeds", {})
        prints = [
            ("vision features", features["vision"]["fingerprint"]),
            ("text features", features["text"]["fingerprint"]),
            ("rows", data["rows_digest"]),
            ("split", data["splits_digest"]),
            ("weights", self.run.weights_digest or "–"),
            ("seeds", ", ".join(f"{name} {seed}" for name, seed in seeds.items()) or "–"),
            ("Keras backend", manifest["backend"]),
        ]
        trained, evaluated = manifest.get("versions", {}), result.get("versions", {})
        versions = [
            [name, trained.get(name, "–"), evaluated.get(name, "–")]
            for name in dict.fromkeys([*trained, *evaluated])
        ]
        return {
            "commands": [(name, line) for name, line in commands if line],
            "prints": prints,
            "versions": versions,
        }


def _trained(train: TrainConfig) -> str:
    """Say what of the model trains."""
    parts = ["the head"]
    if train.k_txt:
        parts.append(
            "the last text layer" if train.k_txt == 1 else f"the last {train.k_txt} text layers"
        )
    if train.k_vit:
        parts.append(
            "the last vision block" if train.k_vit == 1 else f"the last {train.k_vit} vision blocks"
        )
    if len(parts) == 1:
        return "the head trains"
    return f"{', '.join(parts[:-1])} and {parts[-1]} train"


def _name_of(imported: Any) -> str:
    if isinstance(imported, Mapping):
        return Path(str(imported.get("file", "a file"))).name
    return str(imported)


def shown_setting(value: Any) -> str:
    """Return a setting's value for a reader."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items()) or "–"
    return str(value) if value not in ("", None, ()) else "–"
