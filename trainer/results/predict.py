"""Predict rows that a run has not seen: by its own threshold, on probabilities, each row once."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featstore.data.dataset import Dataset
from featstore.data.examples import RowIssue, summarise
from featstore.data.labels import LABELS, UNLABELLED
from featstore.data.values import read_hypothesis
from featstore.errors import DataError
from featstore.extract.encode import encoding_of
from featstore.extract.held import HeldImages, HeldSentences
from featstore.progress import SILENT, Show
from trainer.batches import CachedRows
from trainer.metrics import evaluate_logits, sigmoid
from trainer.results.score import Scorer, Scores
from trainer.results.unseen import score_rows
from trainer.run.step import predict_logits

if TYPE_CHECKING:
    import pandas as pd

    from featstore.data.dataset import RowSource

NAMES = {label: name for name, label in LABELS.items()}
UNREADABLE = "unreadable photo"
UNFIT = "unfit sentence"
NOT_FINITE = "the run's logit is not finite"


class Line(NamedTuple):
    """What is said of one row; without a prediction the three figures are None."""

    Image_ID: str
    Hypothesis: str
    Label: str | None
    probability_entailment: float | None
    confidence: float | None
    reason: str


@dataclass(frozen=True)
class Predictions:
    """What a run says of rows, each of them.

    Attributes:
        dataset: The rows, and in its issues those that could not be scored.
        scores: The logits.
        threshold: The run's τ, on the probability of entailment.
        seconds: Wall time.
    """

    dataset: Dataset
    scores: Scores
    threshold: float
    seconds: float

    @functools.cached_property
    def _finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.scores.logits)

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
            issues.append(RowIssue("dropped", file, line, image_id, reason, text, detail))
        return sorted(issues, key=lambda issue: issue.line)

    def lines(self) -> Iterator[Line]:
        """Say of each row what the run says of it, in the order in which they came."""
        numbered = heapq.merge(self._predicted(), self._without(), key=lambda pair: pair[0])
        return (line for _, line in numbered)

    def _predicted(self) -> Iterator[tuple[int, Line]]:
        examples, rows = self.dataset.examples, self.scores.rows[self._finite]
        probabilities = sigmoid(self.scores.logits[self._finite]).tolist()
        for row, probability in zip(rows.tolist(), probabilities, strict=True):
            image_id, text = examples.image_ids[row], examples.hypotheses[row]
            line = int(examples.source_lines[row])
            yield line, _judged(image_id, text, probability, self.threshold)

    def _without(self) -> Iterator[tuple[int, Line]]:
        for issue in self.left_out:
            why = (
                issue.reason if issue.detail in issue.reason else f"{issue.reason}: {issue.detail}"
            )
            # A lone surrogate may be the very reason; what is said is text for every reader.
            image_id, text = (
                given.encode(errors="backslashreplace").decode()
                for given in (issue.image_id, issue.text)
            )
            yield issue.line, Line(image_id, text, None, None, None, why)

    def frame(self) -> pd.DataFrame:
        """Return the lines as a table; `attrs["metrics"]` has the metrics."""
        import pandas as pd

        table = pd.DataFrame(list(self.lines()), columns=list(Line._fields))
        for name in ("probability_entailment", "confidence"):
            table[name] = table[name].astype(np.float64)
        table.attrs["metrics"] = self.metrics
        return table

    @functools.cached_property
    def metrics(self) -> dict[str, Any] | None:
        """`evaluate_logits` of the rows that have a label, at τ; None where none has."""
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
        probabilities = sigmoid(self.scores.logits[self._finite])
        entailed = int((probabilities >= self.threshold).sum())
        rows, predicted = len(probabilities) + len(self.left_out), len(probabilities)
        return {
            "rows": rows,
            "predicted": predicted,
            "labels": {"entailment": entailed, "contradiction": predicted - entailed},
            "not_predicted": summarise(self.left_out),
            "kept_with_warning": summarise(i for i in self.dataset.issues if i.kind == "kept"),
            "threshold": self.threshold,
            "metrics": self.metrics,
            "seconds": self.seconds,
            "rows_per_second": rows / self.seconds,
        }


def predict(
    scorer: Scorer,
    rows: RowSource,
    images: str | os.PathLike[str],
    show: Show = SILENT,
    cache: bool = True,
) -> Predictions:
    """Say of each row whether its photo entails its sentence.

    The run's threshold is applied to the probability of entailment. A run that was
    trained without the picture predicts without it; one that was trained on shuffled
    photos is shown the row's own.

    Args:
        scorer: The run over its store; the rows that it was trained on are not needed.
        rows: A row file, an open one, or a table with an image id and a sentence. Labels
            are not needed; those that are there are measured.
        images: Folder of the photos.
        show: Shows the extraction and the scoring.
        cache: Keep the features that are missing in the run's store. False computes them
            in memory and writes nothing; the predictions are the same.

    Raises:
        RowError, DataError: No row can be used, they cannot be read, or (with `cache`) a
            photo has the id of another one that is in the run's store.
        StoreError: The store cannot be written or read.
    """
    started = time.perf_counter()
    blind = scorer.train.control == "hypothesis-only"
    control = "hypothesis-only" if blind else "none"
    dataset, scores = score_rows(scorer, rows, images, show=show, cache=cache, control=control)
    threshold = float(scorer.run.metrics["threshold"])
    return Predictions(dataset, scores, threshold, time.perf_counter() - started)


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
        `image`, `text`, `label` ("entailment" or "contradiction"),
        `probability_entailment`, `confidence` (of the label), `threshold`, `logit`, `run`.

    Raises:
        DataError: The photo cannot be read, or the sentence cannot be used.
    """
    sentence, reason, detail = read_hypothesis(text)
    if reason:
        raise DataError(f"the sentence {text!a} cannot be used: {reason} ({detail})")
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
    blind = scorer.train.control == "hypothesis-only"
    rows = CachedRows(
        HeldImages(held[0], store.dtype),
        HeldSentences(held[1], store.dtype),
        first,
        first,
        np.full(1, UNLABELLED, np.int8),
        k_txt=k_txt,
        control="hypothesis-only" if blind else "none",
    )
    logit = float(predict_logits(scorer.predictor, rows, 1)[0, 0])
    threshold = float(scorer.run.metrics["threshold"])
    said = _judged(str(path), sentence, float(sigmoid(logit)), threshold)
    return {
        "run": scorer.run.name,
        "image": said.Image_ID,
        "text": said.Hypothesis,
        "label": said.Label,
        "probability_entailment": said.probability_entailment,
        "confidence": said.confidence,
        "threshold": threshold,
        "logit": logit,
    }


def _judged(image_id: str, text: str, probability: float, threshold: float) -> Line:
    """Return the line of a row: entailment where its probability is at least the threshold."""
    entailed = probability >= threshold
    confidence = probability if entailed else 1 - probability
    return Line(image_id, text, NAMES[int(entailed)], probability, confidence, "")
