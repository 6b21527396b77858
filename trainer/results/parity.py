"""Prove on real rows that a run over cached features equals the end-to-end model.

Rows are drawn, and computed twice with the run's weights: from the store, as
in training, and from the photo's bytes and the sentence, through every layer.
The features, the logits and the predictions of both are compared with a
tolerance that follows from the stored number format.

The checksums of the store tell that a row is what was written. Parity tells
that what was written is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.data.images import decode_image, read_bytes
from featstore.encoders.framework import pinned_framework
from featstore.encoders.spec import QUANTISED
from featstore.errors import Advice, Command, ImageError, RunError, counted
from featstore.progress import SILENT, Show, says
from featstore.publish import command_line, package_versions, why_not_kept, write_json
from featstore.store.numbers import Numbers
from featstore.store.shard import digest_bytes
from trainer.batches import CachedRows, IntArray
from trainer.config import Config
from trainer.features import prepare
from trainer.logits import predicted_labels, sigmoid
from trainer.metrics import binary_metrics, class_metrics, log_loss, threshold_of
from trainer.results.models import Models, load_models
from trainer.results.score import Scorer, project_of, some
from trainer.results.tolerance import Floats, arithmetic_noise, feature_tolerance, logit_tolerance
from trainer.run.folder import Run
from trainer.run.step import flat

BATCH_ROWS = 8


class _Quantity:
    """The differences of one quantity, row by row."""

    def __init__(self, name: str, rule: str) -> None:
        self.name, self.rule = name, rule
        self._rows: list[tuple[float, ...]] = []

    def add(self, found: Floats, expected: Floats, tolerance: Floats | float) -> None:
        """Add rows: what the cached path has, what the end-to-end path has."""
        found, expected = found.astype(np.float64), expected.astype(np.float64)
        limits = np.broadcast_to(tolerance, found.shape)
        with np.errstate(invalid="ignore"):
            difference = np.abs(found - expected)
            used = difference / limits
        # A number that is not finite must not pass for a small difference.
        used[np.isnan(used)] = np.inf
        for row in range(len(found)):
            worst = np.unravel_index(int(used[row].argmax()), used[row].shape)
            self._rows.append(
                (
                    float(difference[row].max()),
                    float(difference[row].mean()),
                    float(used[row][worst]),
                    float(expected[row][worst]),
                    float(found[row][worst]),
                )
            )

    def result(self, rows: Sequence[dict[str, str]]) -> dict[str, Any]:
        """Return the figures; `rows` names the rows in the order in which they were added."""
        largest, mean, used, expected, found = np.array(self._rows).T
        worst = int(used.argmax())
        return {
            "name": self.name,
            "largest": _plain(largest.max()),
            "mean": _plain(mean.mean()),
            "largest_over_tolerance": _plain(used.max()),
            "tolerance": self.rule,
            "rows_beyond": int((used > 1).sum()),
            "met": bool((used <= 1).all()),
            "worst": {
                **rows[worst],
                "expected": _plain(expected[worst]),
                "found": _plain(found[worst]),
            },
        }


def _plain(value: float) -> float | None:
    """Return a number as JSON has it; None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def _plain_logit(logit: Any) -> Any:
    """Return a row's logit, or its list of them, as JSON has it."""
    return [_plain(value) for value in logit] if isinstance(logit, list) else _plain(logit)


def _measured(
    labels: NDArray[np.int8], logits: NDArray[Any], threshold: float | None
) -> dict[str, Any]:
    if threshold is None:
        return class_metrics(labels, predicted_labels(logits, None), logits.shape[1])
    return binary_metrics(labels, sigmoid(logits), threshold)


def _shown(value: float | None) -> str:
    return "a number that is not finite" if value is None else f"{value:.6g}"


class _Comparison:
    """Computes rows of a split on both paths, a batch at a time."""

    def __init__(self, scorer: Scorer, split: str, models: Models) -> None:
        project = scorer.project
        store, k_txt = project.config.store, scorer.train.k_txt
        self.dataset, self.k_txt, self.models = project.dataset, k_txt, models
        self.k_vit = scorer.train.k_vit
        self.vision_store, self.text_store = project.images(), project.sentences(k_txt)
        self.rows, _ = project.usable(split)
        self.cached: CachedRows = scorer.rows(split)
        self.precision = store.precision
        self.logit_tolerance = logit_tolerance(store.dtype, store.precision)
        rounding = (
            "half a step of the token's scale"
            if store.dtype == QUANTISED
            else f"half a unit in the last place of {store.dtype}"
        )
        noise = arithmetic_noise(store.precision)
        rule = f"{rounding} + {noise:.2g} of the row's root mean square"
        self.vision = _Quantity("vision features", rule)
        self.text = _Quantity("text hidden states", rule)
        self.logit = _Quantity("logits", f"{self.logit_tolerance:.2g}")
        self.compared: list[int] = []
        # Of each row one logit, or one of each class.
        self.found: list[Any] = []
        self.expected: list[Any] = []
        self.changed: set[str] = set()
        self.unreadable: dict[str, str] = {}

    def name(self, pick: int) -> dict[str, str]:
        """Return what people know a row by."""
        examples, row = self.dataset.examples, self.rows[pick]
        return {"image_id": examples.image_ids[row], "hypothesis": examples.hypotheses[row]}

    def _pixels(self, pick: int) -> NDArray[np.float32] | None:
        """Return the pixels of a row's photo as it is now, or None where it cannot be read."""
        image_id = self.name(pick)["image_id"]
        path = self.dataset.images.lookup(image_id)
        try:
            if path is None:
                raise ImageError(f"{image_id}: no photo of that name")
            data = read_bytes(path)
            stored = self.vision_store.source_digests(self.cached.image_positions[[pick]])[0]
            if digest_bytes(data) != tuple(stored.tolist()):
                self.changed.add(image_id)
            return self.models.vision.to_pixels(decode_image(data, path.name))
        except ImageError as error:
            self.unreadable[image_id] = str(error)
            return None

    def add(self, picks: IntArray) -> None:
        """Compare some rows, `BATCH_ROWS` at most; one whose photo cannot be read is left out."""
        pixels = {pick: self._pixels(pick) for pick in picks.tolist()}
        read = {pick: image for pick, image in pixels.items() if image is not None}
        if not read:
            return
        kept = np.array(list(read))
        batch = self.cached.batch(kept, BATCH_ROWS)
        (found,) = self.models.cached.predict(batch)
        # One shape of batch: each other one would be traced apart.
        filled = [*read, *([kept[0]] * (BATCH_ROWS - len(read)))]
        sentences = [self.name(pick)["hypothesis"] for pick in filled]
        token_ids, mask = self.models.text.tokenize(sentences)
        inputs = {
            "pixel_values": np.stack([read[pick] for pick in filled]),
            "input_ids": token_ids,
            "attention_mask": mask.astype(np.int32),
        }
        outputs = self.models.end_to_end.predict_on_batch(inputs)
        expected = flat(np.asarray(outputs["logits"]))[: len(kept)]
        # Where blocks train, the model's own features are what these made of the stored ones.
        fresh = outputs["features"]
        if self.k_vit:
            fresh = self.models.vision.encode(inputs["pixel_values"], self.k_vit)
        self._add_features(self.vision, batch.features[: len(kept)], np.asarray(fresh)[: len(kept)])
        # Padding is zero in the store and whatever the layers make of it here.
        states = np.asarray(self.models.text.encode(token_ids, mask, self.k_txt))
        states = states * mask[..., None]
        fresh = states[: len(kept)]
        text, positions = self.text_store, self.cached.text_positions[kept]
        stored, _ = text.gather_stored(positions, mask.shape[1])
        self._add_features(self.text, stored, fresh)
        rows = (len(kept), -1)
        self.logit.add(found.reshape(rows), expected.reshape(rows), self.logit_tolerance)
        self.compared += kept.tolist()
        self.found += found.tolist()
        self.expected += expected.tolist()

    def _add_features(self, quantity: _Quantity, stored: Numbers, fresh: Floats) -> None:
        quantity.add(stored.plain(), fresh, feature_tolerance(stored, fresh, self.precision))

    def quantities(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each quantity over all rows that were added."""
        names = [self.name(pick) for pick in self.compared]
        return {
            "vision_features": self.vision.result(names),
            "text_hidden_states": self.text.result(names),
            "logits": self.logit.result(names),
        }

    def predictions(self, threshold: float | None) -> list[dict[str, Any]]:
        """Return the rows whose two predictions differ, and their distance to the threshold.

        Of three classes it is half the distance of the two logits that decide, either of which
        may be off by the tolerance.
        """
        cut = None if threshold is None else float(np.log(threshold) - np.log1p(-threshold))
        differing = []
        for pick, found, expected in zip(self.compared, self.found, self.expected, strict=True):
            pair = np.array([found, expected])
            calls = predicted_labels(pair, threshold)
            if calls[0] != calls[1]:
                if cut is None:
                    distance = float(np.ptp(pair[:, calls], axis=1).max()) / 2
                else:
                    distance = float(np.abs(pair - cut).max())
                differing.append(
                    {
                        **self.name(pick),
                        "cached_logit": _plain_logit(found),
                        "end_to_end_logit": _plain_logit(expected),
                        "threshold_logit": cut,
                        "within_tolerance": bool(distance <= self.logit_tolerance),
                    }
                )
        return differing

    def metrics(self, threshold: float | None) -> dict[str, dict[str, float] | None]:
        """Return accuracy and macro-F1 on both paths; None where a logit is not finite."""
        labels = self.cached.labels[self.compared]
        results: dict[str, dict[str, float] | None] = {}
        for path, logits in (("cached", self.found), ("end_to_end", self.expected)):
            results[path] = None
            if np.isfinite(logits).all():
                measured = _measured(labels, np.array(logits), threshold)
                results[path] = {name: measured[name] for name in ("accuracy", "macro_f1")}
        return results


def _recorded_loss(scorer: Scorer) -> dict[str, Any]:
    """Compare the val loss of the weights with the one that the run wrote down.

    Both paths share the weights, so that those of another run would agree
    with themselves; they do not have this run's loss.
    """
    scores = scorer.score("val")
    finite = np.isfinite(scores.logits).all()
    found = log_loss(scores.labels, scores.logits) if finite else np.nan
    expected = float(scorer.run.metrics["loss"])
    policy = scorer.train.dtype_policy.removeprefix("mixed_")
    tolerance = logit_tolerance("float32", policy)
    return {
        "name": "recorded val loss",
        "rows": len(scores.rows),
        "expected": expected,
        "found": _plain(found),
        "tolerance": tolerance,
        "met": bool(abs(found - expected) <= tolerance),
    }


def _failure(
    scorer: Scorer, comparison: _Comparison, split: str, result: dict[str, Any]
) -> RunError | None:
    """Return the error, for the first cause found from the photo to the metric."""
    run, photos, found = scorer.run, result["photos"], result["quantities"]
    again = scorer.project.vision_spec.command(split=split)
    if photos["unreadable"]:
        reason = next(iter(photos["unreadable"].values()))
        return RunError(
            f"{run.folder}: {len(photos['unreadable'])} of the photos drawn cannot be read any more"
            f" ({some(list(photos['unreadable']))}): {reason}; put them back as they were"
        )
    if photos["changed"]:
        return RunError(
            f"{run.folder}: {len(photos['changed'])} of the photos drawn changed since their"
            f" features were extracted ({some(photos['changed'])})",
            Advice("put them back as they were, or run ", again, " and train again"),
        )

    def error(figures: dict[str, Any], mend: Advice) -> RunError:
        worst, over = figures["worst"], figures["largest_over_tolerance"]
        times = "beyond any" if over is None else f"{over:.3g} times the"
        return RunError(
            f"{run.folder}: {figures['name']} of the cached and the end-to-end model differ in"
            f" {figures['rows_beyond']} of {counted(result['rows'], 'row')}; worst: image"
            f" {worst['image_id']!r}, hypothesis {worst['hypothesis']!r}: expected"
            f" {_shown(worst['expected'])}, found {_shown(worst['found'])}, {times} tolerance",
            mend,
        )

    def filled_wrongly(folder: Path, command: Command) -> Advice:
        return Advice(
            "run ",
            Command("store", "verify"),
            "; if the store is sound by its checksums, it was filled wrongly: move"
            f" {folder} away, run ",
            command,
            " and train again",
        )

    if not found["vision_features"]["met"]:
        mend = filled_wrongly(comparison.vision_store.folder, again)
        return error(found["vision_features"], mend)
    if not found["text_hidden_states"]["met"]:
        command = Command("extract-text", split=split, k_txt=comparison.k_txt)
        mend = filled_wrongly(comparison.text_store.folder, command)
        return error(found["text_hidden_states"], mend)
    if not found["logits"]["met"]:
        return error(
            found["logits"],
            Advice(
                "the features agree, so the two models do not: compare the installed packages with"
                f" those in {run.manifest_path}"
            ),
        )
    recorded = result["recorded_loss"]
    if not recorded["met"]:
        return RunError(
            f"{run.folder}: the val loss of {run.weights_path.name} is not the one that the run"
            f" wrote down: expected {_shown(recorded['expected'])}, found"
            f" {_shown(recorded['found'])}; these are the weights of another run, or the val"
            " features changed",
            Advice("restore the file, run ", Command("store", "verify"), ", or train again"),
        )
    return None


def _notes(config: Config) -> list[str]:
    notes = []
    if config.train.dtype_policy != "float32":
        notes.append(f"the run trained in {config.train.dtype_policy}; both models ran in float32")
    if config.store.precision != "float32":
        notes.append(
            f"the features were extracted in {config.store.precision} arithmetic; the end-to-end"
            " model ran in float32"
        )
    return notes


@pinned_framework()
@says("comparing with the end-to-end model")
def check_parity(
    run: Run, split: str = "test", count: int = 64, seed: int = 0, show: Show = SILENT
) -> tuple[dict[str, Any], RunError | None]:
    """Compare a run with the end-to-end model on rows drawn from a split.

    Both models run in float32 with the weights of the run's best epoch. The
    end-to-end one starts from the photo's bytes and the sentence.

    Args:
        run: A run with weights, trained with control "none".
        split: "train", "val" or "test".
        count: Rows drawn, without repeats; more than there are means all.
        seed: Decides which.
        show: Shows the encoding of sentences that the store lacks, and the rows.

    Returns:
        `quantities` (largest and mean difference, tolerance and whether it is
        met, the worst row), `predictions` that differ at the run's threshold,
        `metrics` on both paths, `recorded_loss`, `photos` that changed or
        cannot be read, `notes`, and `failure`: None, or one line; also written
        into the run's folder. Beside it the failure as an error, or None.

    Raises:
        RunError: The run has a control, its photos or rows are not those it
            was trained on, or no photo drawn can be read.
        StoreError: The features cannot be read.

    Cost: one pass of both encoders over the rows, in batches of `BATCH_ROWS`,
    and one pass of the cached model over the val split.
    """
    config = run.config
    if config.train.control != "none":
        raise RunError(
            f"{run.folder}: trained with control {config.train.control}, whose features are not the"
            " photo's: no end-to-end model equals it; name a run with control none"
        )
    threshold = threshold_of(run.metrics)
    project = project_of(run)
    # It compares the photos of its rows itself, and names those that changed.
    prepare(project, config.train.k_txt, show, compare=False)
    scorer = Scorer(run, project)
    comparison = _Comparison(scorer, split, load_models(scorer))
    total = len(comparison.rows)
    picks = np.random.default_rng(seed).permutation(total)[:count]
    with show.bar(len(picks), "rows") as progress:
        for start in range(0, len(picks), BATCH_ROWS):
            part = picks[start : start + BATCH_ROWS]
            comparison.add(part)
            progress(len(part))
    if not comparison.compared:
        raise RunError(
            f"{run.folder}: none of the photos drawn from split {split!r} can be read"
            f" ({some(list(comparison.unreadable))}); put them back in"
            f" {project.dataset.images.folder}"
        )
    result: dict[str, Any] = {
        "run": run.name,
        "split": split,
        "seed": seed,
        "rows": len(comparison.compared),
        "rows_of_split": total,
        "stored_dtype": config.store.dtype,
        "threshold": threshold,
        "notes": _notes(config),
        "quantities": comparison.quantities(),
        "predictions": comparison.predictions(threshold),
        "metrics": comparison.metrics(threshold),
        "recorded_loss": _recorded_loss(scorer),
        "photos": {
            "changed": sorted(comparison.changed),
            "unreadable": comparison.unreadable,
        },
    }
    failure = _failure(scorer, comparison, split, result)
    result["failure"] = None if failure is None else str(failure)
    about = {"command": command_line(), "versions": package_versions()}
    path = run.folder / f"parity-{split}.json"
    result["not_kept"] = why_not_kept(lambda: write_json(path, {**about, **result}))
    return result, failure
