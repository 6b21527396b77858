"""The features that a run reads: both stores, and each split's rows in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore.config import SPLITS
from featstore.data.dataset import Dataset
from featstore.data.examples import require_both_classes
from featstore.encoders.spec import TextSpec, VisionSpec, text_spec, vision_spec
from featstore.errors import Command, DataError, MissingFeaturesError
from featstore.extract.extract import ProgressBar, bring_text, no_progress
from featstore.store.folder import read_quarantine
from featstore.store.store import TextStore, VisionStore, open_features_of
from trainer.batches import CachedRows, IntArray
from trainer.config import Config


def extract_command(what: str, split: str) -> Command:
    """Return the command that makes missing features."""
    return Command(f"extract-{what}", split=split)


def usable_rows(
    dataset: Dataset, vision: VisionStore, split: str
) -> tuple[IntArray, dict[str, str]]:
    """Return a split's rows whose photo has features; see `Features.usable`."""
    rows = dataset.rows(split)
    if not len(rows):
        raise DataError(f"split {split!r} has no rows; give it a share in [data] fractions")
    ids = dataset.examples.image_ids[rows]
    present = vision.lookup(ids) >= 0
    absent = dict.fromkeys(ids[~present])
    quarantine = read_quarantine(vision.folder) if absent else {}
    missing = [image_id for image_id in absent if image_id not in quarantine]
    if missing:
        raise MissingFeaturesError(
            f"{vision.folder}: {len(missing)} of {len(set(ids))} photos of split"
            f" {split!r} have no features (first: {missing[0]!r})",
            extract_command("vit", split),
        )
    if not present.any():
        raise DataError(f"split {split!r} has no row whose photo could be read")
    return rows[present], {key: quarantine[key]["reason"] for key in absent}


@dataclass
class Features:
    """Both stores of a configuration and the rows of its dataset."""

    config: Config
    dataset: Dataset
    vision_spec: VisionSpec
    text_spec: TextSpec
    vision: VisionStore
    text: TextStore

    def usable(self, split: str) -> tuple[IntArray, dict[str, str]]:
        """Return a split's rows whose photo has features.

        Args:
            split: "train", "val", "test" or "all".

        Returns:
            int64 rows of the dataset's examples, and image id to reason of the
            split's photos that are quarantined.

        Raises:
            MissingFeaturesError: A photo was never extracted.
            DataError: No row is left.
        """
        return usable_rows(self.dataset, self.vision, split)

    def rows(self, split: str, control: str = "none") -> CachedRows:
        """Return a split's rows, ready to be read in batches.

        Raises:
            MissingFeaturesError: A photo or a sentence was never extracted.
        """
        rows, _ = self.usable(split)
        examples = self.dataset.examples
        sentences = self.text.lookup(examples.hypotheses[rows])
        if (sentences < 0).any():
            missing = examples.hypotheses[rows][sentences < 0][0]
            raise MissingFeaturesError(
                f"{self.text.folder}: {(sentences < 0).sum()} sentences of split {split!r} have"
                f" no features (first: {missing!r})",
                extract_command("text", split),
            )
        return CachedRows(
            self.vision,
            self.text,
            self.vision.lookup(examples.image_ids[rows]),
            sentences,
            examples.labels[rows],
            k_txt=self.config.train.k_txt,
            control=control,
            control_seed=self.config.train.seed,
        )


def open_features(config: Config, dataset: Dataset, bar: ProgressBar = no_progress) -> Features:
    """Open the stores that a configuration asks for; encode sentences that are missing.

    Images are left to `extract-vit`: they take long, and are asked for by name.

    Args:
        config: The settings.
        dataset: Its rows.
        bar: Shows the encoding of sentences.

    Raises:
        MissingFeaturesError: A photo of the train or val split was not extracted.
        StaleFeaturesError: What was extracted is of other specs.
        DataError: The train or val split has rows of one class only.
    """
    root = Path(config.store.root)
    image_spec = vision_spec(config.encoders, config.store)
    sentence_spec = text_spec(config.encoders, config.store, config.train.k_txt)
    for split in ("train", "val"):
        rows = dataset.rows(split)
        require_both_classes(dataset.examples.select(rows), f"split {split!r}")
    vision = open_features_of(root, image_spec, extract_command("vit", "all"))
    for split in ("train", "val"):
        # Before the sentences are encoded, which would be for nothing.
        usable_rows(dataset, vision, split)
    sentences = dataset.examples.hypotheses.tolist()
    bring_text(config.encoders, config.store, sentences, config.train.k_txt, bar)
    text = open_features_of(root, sentence_spec, extract_command("text", "all"))
    return Features(config, dataset, image_spec, sentence_spec, vision, text)


def row_counts(features: Features) -> dict[str, dict[str, int]]:
    """Return rows, images and class counts of each split, as they are read."""
    counts = {}
    for split in SPLITS:
        rows = features.dataset.rows(split)
        if not len(rows):
            continue
        examples = features.dataset.examples.select(rows)
        labels = np.asarray(examples.labels)
        counts[split] = {
            "rows": len(rows),
            "images": len(set(examples.image_ids)),
            "entailment": int((labels == 1).sum()),
            "contradiction": int((labels == 0).sum()),
        }
    return counts
