"""Predict rows that a run has not seen: by its own threshold, on probabilities, each row once."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featstore.data.dataset import Dataset
from featstore.data.examples import RowIssue, class_counts, summarise
from featstore.data.images import ImageIndex
from featstore.data.labels import LABEL_NAMES, UNLABELLED, labels_of
from featstore.data.values import read_hypothesis
from featstore.errors import DataError
from featstore.extract.encode import encoding_of
from featstore.extract.held import HeldImages, HeldSentences
from featstore.progress import SILENT, Show, says
from trainer.batches import CachedRows
from trainer.logits import by_class, confidence_of, finite_rows, predicted_labels, probabilities_of
from trainer.metrics import evaluate_logits, threshold_of
from trainer.results.score import Scorer, Scores
from trainer.results.unseen import score_rows
from trainer.run.step import predict_logits

if TYPE_CHECKING:
    import pandas as pd

    from featstore.data.dataset import RowSource

UNREADABLE = "unreadable photo"
UNFIT = "unfit sentence"
NOT_FINITE = "the run's logit is not finite"


class Line(NamedTuple):
    """What a run of two classes says of a row; without a prediction its figures are None."""

    Image_ID: str
    Hypothesis: str
    Label: str | None
    probability_entailment: float | None
    confidence: float | None
    reason: str


class LineOfThree(NamedTuple):
    """What a run of three classes says of a row."""

    Image_ID: str
    Hypothesis: str
    Label: str | None
    probability_contradiction: float | None
    probability_entailment: float | None
    probability_neutral: float | None
    confidence: float | None
    reason: str


AnyLine = Line | LineOfThree


def line_type(classes: int) -> type[AnyLine]:
    """Return what is said of a row by a run of so many classes."""
    return Line if classes == 2 else LineOfThree


@dataclass(frozen=True)
class Predictions:
    """What a run says of rows, each of them.

    Attributes:
        dataset: The rows, and in its issues those that could not be scored.
        scores: The logits.
        threshold: The run's τ, on the probability of entailment; None of three classes.
        seconds: Wall time.
    """

    dataset: Dataset
    scores: Scores
    threshold: float | None
    seconds: float

    @property
    def classes(self) -> int:
        """How many classes the run tells apart."""
        logits = self.scores.logits
        return 2 if logits.ndim == 1 else logits.shape[1]

    @functools.cached_property
    def _finite(self) -> NDArray[np.bool_]:
        return finite_rows(self.scores.logits)

    @functools.cached_property
    def _called(self) -> NDArray[np.int8]:
        return predicted_labels(self.scores.logits[self._finite], self.threshold)

    @functools.cached_property
    def left_out(self) -> list[RowIssue]:
        """Why rows have no prediction, in their order."""
        examples, scores = self.dataset.examples, self.scores
        rest = np.ones(len(examples), bool)
        rest[scores.rows[self._finite]] = False
        issues = [issue for issue in self.dataset.issues if issue.kind == "dropped"]
        for row in np.flatnonzero(rest).tolist():
            image_id, text = examples.image_ids[row], examples.hypotheses[row]
            reason, detail = NOT_FINITE, ""
            if image_id in scores.unread:
                reason, detail = UNREADABLE, scores.unread[image_id]
            elif text in scores.unfit:
                reason, detail = UNFIT, scores.unfit[text]
            line, file = int(examples.source_lines[row]), examples.sources[row]
            written = examples.written_ids[row]
            issues.append(RowIssue("dropped", file, line, written, reason, text, detail))
        return sorted(issues, key=lambda issue: issue.line)

    def lines(self) -> Iterator[AnyLine]:
        """Say of each row what the run says of it, in the order in which they came."""
        numbered = heapq.merge(self._predicted(), self._without(), key=lambda pair: pair[0])
        return (line for _, line in numbered)

    def _predicted(self) -> Iterator[tuple[int, AnyLine]]:
        examples, rows = self.dataset.examples, self.scores.rows[self._finite]
        logits, kind = self.scores.logits[self._finite], line_type(self.classes)
        columns: tuple[NDArray[Any], ...] = (
            self._called,
            *by_class("probability", probabilities_of(logits)).values(),
            confidence_of(logits, self.threshold),
        )
        figures = zip(*(column.tolist() for column in columns), strict=True)
        for row, (label, *numbers) in zip(rows.tolist(), figures, strict=True):
            image_id, text = examples.written_ids[row], examples.hypotheses[row]
            line = int(examples.source_lines[row])
            yield line, kind._make((image_id, text, LABEL_NAMES[label], *numbers, ""))

    def _without(self) -> Iterator[tuple[int, AnyLine]]:
        kind = line_type(self.classes)
        nothing = [None] * (len(kind._fields) - 3)
        for issue in self.left_out:
            why = (
                issue.reason if issue.detail in issue.reason else f"{issue.reason}: {issue.detail}"
            )
            # A lone surrogate may be the very reason; what is said is text for every reader.
            image_id, text = (
                given.encode(errors="backslashreplace").decode()
                for given in (issue.image_id, issue.text)
            )
            yield issue.line, kind._make((image_id, text, *nothing, why))

    def frame(self) -> pd.DataFrame:
        """Return the lines as a table; `attrs["metrics"]` has the metrics."""
        import pandas as pd

        names = line_type(self.classes)._fields
        table = pd.DataFrame(list(self.lines()), columns=list(names))
        for name in numbers_of(names):
            table[name] = table[name].astype(np.float64)
        table.attrs["metrics"] = self.metrics
        return table

    @functools.cached_property
    def metrics(self) -> dict[str, Any] | None:
        """`evaluate_logits` of the rows that have a label; None where none has."""
        labels, logits = self.scores.labels, self.scores.logits
        usable = (labels != UNLABELLED) & self._finite
        if not usable.any():
            return None
        return evaluate_logits(labels[usable], logits[usable], self.threshold)

    def summary(self) -> dict[str, Any]:
        """Return JSON-able figures.

        `rows`, `predicted`, `labels` (label to rows), `not_predicted` and
        `kept_with_warning` (reason to rows), `threshold`, `metrics`, `seconds`,
        `rows_per_second`.
        """
        predicted = len(self._called)
        rows = predicted + len(self.left_out)
        return {
            "rows": rows,
            "predicted": predicted,
            "labels": class_counts(self._called, self.classes),
            "not_predicted": summarise(self.left_out),
            "kept_with_warning": summarise(i for i in self.dataset.issues if i.kind == "kept"),
            "threshold": self.threshold,
            "metrics": self.metrics,
            "seconds": self.seconds,
            "rows_per_second": rows / self.seconds,
        }


@says("predicting")
def predict(
    scorer: Scorer,
    rows: RowSource,
    images: str | os.PathLike[str] | ImageIndex | None,
    show: Show = SILENT,
    cache: bool = True,
    encoding: str = "",
) -> Predictions:
    """Say of each row whether its photo entails its sentence.

    The run's threshold is applied to the probability of entailment; of three classes the most
    probable is taken. A run that was
    trained without the picture predicts without it; one that was trained on shuffled
    photos is shown the row's own.

    Args:
        scorer: The run over its store; the rows that it was trained on are not needed.
        rows: A row file, an open one, or a table with an image id and a sentence. Labels
            are not needed; those that are there are measured.
        images: Folder of the photos, or what was found in it; None: they are in `rows`.
        show: Shows the extraction and the scoring.
        cache: Keep the features that are missing in the run's store. False computes them
            in memory and writes nothing; the predictions are the same.
        encoding: Of a row file's text, such as "gbk"; "": UTF-8, or told from the bytes.

    Raises:
        RowError, DataError: No row can be used, they cannot be read, or (with `cache`) a
            photo has the id of another one that is in the run's store.
        StoreError: The store cannot be written or read.
    """
    started = time.perf_counter()
    # Before the work, which a run that is damaged would lose.
    threshold, control = threshold_of(scorer.run.metrics), _control(scorer)
    dataset, scores = score_rows(
        scorer, rows, images, show=show, cache=cache, control=control, encoding=encoding
    )
    return Predictions(dataset, scores, threshold, time.perf_counter() - started)


@says("predicting")
def predict_pair(
    scorer: Scorer, image: str | os.PathLike[str], text: str, show: Show = SILENT
) -> dict[str, Any]:
    """Say whether one photo entails one sentence; no store is needed or touched.

    Args:
        scorer: The run.
        image: The photo's file.
        text: The sentence.
        show: Is told of smaller batches.

    Returns:
        `image`, `text`, `label` ("entailment", "contradiction", or of three classes
        "neutral"), `probability_entailment`, `confidence` (of the label), `threshold`,
        `logit`, `run`. Of three classes `threshold` and `logit` are None, and there are
        `probabilities` and `logits`, by name.

    Raises:
        DataError: The photo cannot be read, or the sentence cannot be used.
    """
    sentence, reason, detail = read_hypothesis(text)
    if reason:
        raise DataError(f"the sentence {text!a} cannot be used: {reason} ({detail})")
    threshold = threshold_of(scorer.run.metrics)
    project, k_txt, path = scorer.project, scorer.train.k_txt, Path(image)
    store = dataclasses.replace(project.config.store, encode_batch_size=1)
    held = []
    for spec, key, paths in (
        (project.vision_spec, str(path), [path]),
        (project.text_spec(k_txt), sentence, []),
    ):
        encoding = encoding_of(spec, project.encoder(spec), store, show.halved)
        (item,) = encoding.rows([key], paths)
        if item.numbers is None:
            raise DataError(f"{key}: {item.reason}" if spec.kind == "text" else item.reason)
        held.append({key: item.numbers})
    first = np.zeros(1, np.int64)
    rows = CachedRows(
        HeldImages(held[0], store.dtype),
        HeldSentences(held[1], store.dtype),
        first,
        first,
        np.full(1, UNLABELLED, np.int8),
        whole=scorer.train.reads_sentences,
        control=_control(scorer),
    )
    (logits,) = predict_logits(scorer.predictor, rows, 1).astype(np.float64)
    found = {
        "run": scorer.run.name,
        "image": str(path),
        "text": sentence,
        "label": LABEL_NAMES[int(predicted_labels(logits, threshold)[0])],
        "probability_entailment": float(
            by_class("probability", probabilities_of(logits))["probability_entailment"][0]
        ),
        "confidence": float(confidence_of(logits, threshold)[0]),
        "threshold": threshold,
    }
    if logits.ndim == 1:
        return {**found, "logit": float(logits[0])}
    names = labels_of(scorer.classes)
    return {
        **found,
        "logit": None,
        "probabilities": dict(zip(names, probabilities_of(logits)[0].tolist(), strict=True)),
        "logits": dict(zip(names, logits[0].tolist(), strict=True)),
    }


def _control(scorer: Scorer) -> str:
    """Return what a run is shown to predict: no photo where it learnt without, else the row's."""
    return "hypothesis-only" if scorer.train.control == "hypothesis-only" else "none"


def numbers_of(names: Sequence[str]) -> list[str]:
    """Return which columns of the lines are numbers; the others are text."""
    return [name for name in names if name.startswith("probability_") or name == "confidence"]
