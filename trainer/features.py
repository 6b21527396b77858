"""The features that a run reads: a project's rows, each with its place in both stores."""

from __future__ import annotations

import numpy as np

from featstore.config import SPLITS
from featstore.data.examples import require_both_classes
from featstore.errors import Command, MissingFeaturesError, counted
from featstore.progress import SILENT, Show
from featstore.project import Project
from trainer.batches import CachedRows
from trainer.config import TrainConfig


def prepare(project: Project, k_txt: int, show: Show = SILENT) -> None:
    """See that a run on a project can start; encode sentences that are missing.

    Photos are left to `extract-vit`: they take long, and are asked for by name.

    Args:
        project: Its rows and stores.
        k_txt: Last text layers that train.
        show: Shows the encoding of sentences.

    Raises:
        MissingFeaturesError: A photo of the train or val split was not extracted.
        StaleFeaturesError: What was extracted is of other specs.
        DataError: The train or val split has rows of one class only.
    """
    fingerprint = project.text_spec(k_txt).fingerprint
    key = f"prepared {fingerprint} {project.vision_spec.fingerprint} {project.config.data!r}"
    project.once(key, lambda: _prepare(project, k_txt, show))


def _prepare(project: Project, k_txt: int, show: Show) -> None:
    for split in ("train", "val"):
        rows = project.dataset.rows(split)
        require_both_classes(project.dataset.examples.select(rows), f"split {split!r}")
    for split in ("train", "val"):
        # Before the sentences are encoded, which would be for nothing.
        project.usable(split)
    project.extract("text", k_txt=k_txt, show=show)
    project.forget_encoders()


def cached_rows(
    project: Project, train: TrainConfig, split: str, control: str = "none"
) -> CachedRows:
    """Return the rows of a split that have features, ready to be read in batches.

    Args:
        project: Its rows and stores.
        train: `k_txt` and `seed` are used.
        split: "train", "val" or "test".
        control: See `CachedRows`.

    Raises:
        MissingFeaturesError: A photo or a sentence was never extracted.
        DataError: No row is left.
    """
    rows, _ = project.usable(split)
    examples = project.dataset.examples.select(rows)
    vision, text = project.images(), project.sentences(train.k_txt)
    sentences = text.lookup(examples.hypotheses)
    if (sentences < 0).any():
        missing = examples.hypotheses[sentences < 0][0]
        raise MissingFeaturesError(
            f"{text.folder}: no features of {counted(int((sentences < 0).sum()), 'sentence')} of"
            f" split {split!r} (first: {missing!r})",
            Command("extract-text", split=split, k_txt=train.k_txt),
        )
    return CachedRows(
        vision,
        text,
        vision.lookup(examples.image_ids),
        sentences,
        examples.labels,
        k_txt=train.k_txt,
        control=control,
        control_seed=train.seed,
    )


def row_counts(project: Project) -> dict[str, dict[str, int]]:
    """Return rows, images and class counts of each split."""
    counts = {}
    for split in SPLITS:
        rows = project.dataset.rows(split)
        if not len(rows):
            continue
        examples = project.dataset.examples.select(rows)
        labels = np.asarray(examples.labels)
        counts[split] = {
            "rows": len(rows),
            "images": len(set(examples.image_ids)),
            "entailment": int((labels == 1).sum()),
            "contradiction": int((labels == 0).sum()),
        }
    return counts
