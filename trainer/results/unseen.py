"""Score rows that a run has not seen: from their photos, in blocks of a bounded size.

Rows of one photo stand in one block, so that what is held of the features does
not grow with the rows. The blocks are the same whether features are kept in the
store or not, and so are the logits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featstore.data.dataset import Dataset, rows_to_predict
from featstore.data.images import ImageIndex
from featstore.errors import Advice, DataError, StoreError, WriteError, counted
from featstore.extract.held import HeldImages, HeldSentences, Holder
from featstore.progress import SILENT, Show
from featstore.project import Project
from featstore.store.folder import read_quarantine
from trainer.batches import CachedRows, ImageFeatures, IntArray, SentenceFeatures, other_images
from trainer.results.score import Scorer, Scores
from trainer.run.step import predict_logits

if TYPE_CHECKING:
    from featstore.data.dataset import RowSource

BLOCK_PHOTOS, BLOCK_ROWS = 128, 512
"""Most photos and rows of a block: 77 MB of ViT-B features in float32."""

Keys = NDArray[np.object_]


def score_rows(
    scorer: Scorer,
    rows: RowSource,
    images: str | os.PathLike[str] | ImageIndex | None,
    *,
    show: Show = SILENT,
    cache: bool = True,
    control: str | None = None,
    encoding: str = "",
) -> tuple[Dataset, Scores]:
    """Compute the logits of rows of a file or a table; see `predict`.

    Args:
        scorer: The run over its store.
        rows: See `predict`.
        images: Folder of the photos, or what was found in it; None: they are in `rows`.
        show: Shows the extraction and the scoring.
        cache: See `predict`.
        control: As in `Scorer.score`, another photo being one of these rows'; None: as the
            run was trained.
        encoding: See `predict`.

    Returns:
        The rows, in order, repeats included; its issues name those that could not be used.
        And the logits of those whose photo could be read, with their labels, which are
        `UNLABELLED` where there is none.

    Raises:
        RowError, DataError, StoreError: See `predict`; also where no photo could be read.
    """
    root, names = scorer.project.root, scorer.run.config.data.label_names
    dataset = rows_to_predict(rows, images, root, encoding, scorer.classes, names)
    return dataset, score_dataset(scorer, dataset, show=show, cache=cache, control=control)


def score_dataset(
    scorer: Scorer,
    dataset: Dataset,
    *,
    show: Show = SILENT,
    cache: bool = True,
    control: str | None = None,
) -> Scores:
    """Compute the logits of rows that were read; see `score_rows`."""
    examples, train = dataset.examples, scorer.train
    project = scorer.project.with_dataset(dataset)
    control = scorer.train.control if control is None else control
    features = (_Stored if cache else _Held)(project, train.k_txt, show)
    shown = examples.image_ids
    if control == "shuffled-images":
        shown, control = _other_photos(features, shown, train.seed), "none"
    logits = np.full((len(examples), *scorer.logit_shape), np.nan, np.float32)
    done = np.zeros(len(examples), bool)
    with show.bar(len(examples), "rows") as progress:
        for block in blocks_of(shown):
            vision, at_image = features.images(shown[block])
            text, at_text = features.sentences(examples.hypotheses[block])
            there = (at_image >= 0) & (at_text >= 0)
            if there.any():
                cached = CachedRows(
                    vision,
                    text,
                    at_image[there],
                    at_text[there],
                    examples.labels[block[there]],
                    whole=train.reads_sentences,
                    control=control,
                )
                (logits[block[there]],) = predict_logits(scorer.predictor, cached, train.batch_size)
                done[block[there]] = True
            progress(len(block))
    if not done.any():
        raise _unreadable(dataset)
    kept = np.flatnonzero(done)
    unread = _reasons(features.failed("vit"), examples.image_ids[~done])
    unfit = _reasons(features.failed("text"), examples.hypotheses[~done])
    return Scores(kept, logits[kept], examples.labels[kept], unread, unfit)


def blocks_of(image_ids: Keys) -> list[IntArray]:
    """Cut rows into blocks, the rows of one photo together as far as a block holds them.

    Args:
        image_ids: object of shape (rows,), str.

    Returns:
        int64 positions in `image_ids`, ascending in each block; every row is in one. A
        block has at most `BLOCK_PHOTOS` photos and `BLOCK_ROWS` rows.
    """
    photos = _numbered(image_ids)
    order = np.argsort(photos, kind="stable")
    photos = photos[order]
    blocks, start = [], 0
    while start < len(order):
        of_photos = int(np.searchsorted(photos, photos[start] + BLOCK_PHOTOS))
        end = min(of_photos, start + BLOCK_ROWS)
        if end < of_photos:
            # Not through a photo, unless it fills the block alone.
            first = int(np.searchsorted(photos, photos[end]))
            end = first if first > start else end
        blocks.append(np.sort(order[start:end]))
        start = end
    return blocks


def _numbered(keys: Keys) -> IntArray:
    """Return the number of each key, in the order of their first appearance."""
    numbers: dict[str, int] = {}
    found = (numbers.setdefault(key, len(numbers)) for key in keys)
    return np.fromiter(found, dtype=np.int64, count=len(keys))


class _Features(Protocol):
    """The features of the rows, a block at a time."""

    def images(self, image_ids: Keys) -> tuple[ImageFeatures, IntArray]:
        """Return features, and in them the positions of the photos, -1 where they failed."""
        ...

    def sentences(self, sentences: Keys) -> tuple[SentenceFeatures, IntArray]: ...

    def failed(self, kind: str) -> dict[str, str]:
        """Return photo or sentence to reason of those that have no features."""
        ...


@contextlib.contextmanager
def _or_without_keeping() -> Iterator[None]:
    """Have a store that cannot be written name the way that needs none."""
    try:
        yield
    except (StoreError, WriteError) as error:
        # Not what is said of features that are damaged or stale.
        if type(error) in (StoreError, WriteError):
            before = (*error.mend.parts, ", ") if error.mend else ()
            error.mend = Advice(*before, "or keep none of the features (`--no-cache`)")
        raise


class _Stored:
    """Features of the store, to which those that are missing are added first."""

    def __init__(self, project: Project, k_txt: int, show: Show) -> None:
        plan = project.plan("vit")
        if plan.changed:
            # Extracted, they would take the place of the photos that the run is measured on.
            raise DataError(
                f"{project.dataset.images.folder}: {counted(plan.changed, 'photo')} with the id of"
                f" another, whose features the run's store {project.root} has",
                Advice("give them other ids, or predict them without keeping them (`--no-cache`)"),
            )
        with _or_without_keeping():
            if plan.keys:
                project.extract("vit", views=1, show=show)
        bad = read_quarantine(plan.folder)
        if all(key in bad for key in plan.job.keys):
            raise _unreadable(project.dataset)
        with _or_without_keeping():
            project.extract("text", k_txt=k_txt, show=show)
        project.forget_encoders()
        self.vision, self.text = project.images(), project.sentences(k_txt)
        self._folders = {"vit": self.vision.folder, "text": self.text.folder}

    def images(self, image_ids: Keys) -> tuple[ImageFeatures, IntArray]:
        return self.vision, self.vision.lookup(image_ids)

    def sentences(self, sentences: Keys) -> tuple[SentenceFeatures, IntArray]:
        return self.text, self.text.lookup(sentences)

    def failed(self, kind: str) -> dict[str, str]:
        quarantine = read_quarantine(self._folders[kind])
        return {key: entry["reason"] for key, entry in quarantine.items()}


class _Held:
    """Features in memory: those of the store, and those that it lacks, which are encoded."""

    def __init__(self, project: Project, k_txt: int, show: Show) -> None:
        self._holders = {
            kind: Holder(project.plan(kind, k_txt=k_txt), show) for kind in ("vit", "text")
        }

    def images(self, image_ids: Keys) -> tuple[ImageFeatures, IntArray]:
        rows, positions = self._find("vit", image_ids)
        return HeldImages(rows, self._holders["vit"].dtype), positions

    def sentences(self, sentences: Keys) -> tuple[SentenceFeatures, IntArray]:
        rows, positions = self._find("text", sentences)
        return HeldSentences(rows, self._holders["text"].dtype), positions

    def _find(self, kind: str, keys: Keys) -> tuple[dict[str, Any], IntArray]:
        rows = self._holders[kind].rows(list(dict.fromkeys(keys)))
        at = {key: i for i, key in enumerate(rows)}
        return rows, np.array([at.get(key, -1) for key in keys], np.int64)

    def failed(self, kind: str) -> dict[str, str]:
        return self._holders[kind].failed


def _other_photos(features: _Features, image_ids: Keys, seed: int) -> Keys:
    """Return for each row the id of another row's photo; see `other_images`.

    A photo that cannot be read is shown to no other row, so that the same rows have
    logits as without the control.
    """
    readable = np.zeros(len(image_ids), bool)
    for block in blocks_of(image_ids):
        _, positions = features.images(image_ids[block])
        readable[block] = positions >= 0
    shown = image_ids.copy()
    distinct = np.array(list(dict.fromkeys(image_ids[readable])), dtype=object)
    shown[readable] = distinct[other_images(_numbered(image_ids[readable]), seed)]
    return shown


def _unreadable(dataset: Dataset) -> DataError:
    return DataError(f"{dataset.images.folder}: no row whose photo could be read")


def _reasons(failed: dict[str, str], keys: Iterable[str]) -> dict[str, str]:
    """Return key to reason of the keys that failed."""
    return {key: failed[key] for key in keys if key in failed}
