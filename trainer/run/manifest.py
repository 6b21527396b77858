"""What a run's manifest says from the start: of what rows and features it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from featstore.encoders.framework import threads_of_operation
from featstore.project import Project
from featstore.publish import command_line, package_versions
from trainer.config import TrainConfig
from trainer.features import row_counts, views_of


def new_manifest(
    name: str,
    project: Project,
    train: TrainConfig,
    model: keras.Model,
    row_shape: tuple[int, int],
    splits: Sequence[str] = ("train", "val"),
) -> dict[str, Any]:
    """Return the manifest of a run that starts.

    Args:
        name: Of the run.
        project: Its rows and features.
        train: Its settings.
        model: Its cached model.
        row_shape: Tokens and width of the image features.
        splits: Those that it reads. Of others, such as the test split, the photos need
            not be extracted yet.

    Raises:
        MissingFeaturesError: A photo of these splits was not extracted.
    """
    dataset, text = project.dataset, project.text_spec(train.k_txt)
    # Not of other runs: those that were started before there were such must go on.
    cut: dict[str, Any] = {"boundary": project.vision_spec.boundary} if train.k_vit else {}
    if train.views > 1 and "train" in splits:
        views = [project.view_spec(view).fingerprint for view in range(train.views)]
        cut["views"] = views
    unread: dict[str, str] = {}
    for split in splits:
        unread |= project.usable(split, views_of(split, train.views))[1]
    trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
    return {
        "name": name,
        "status": "running",
        "command": command_line(),
        "versions": package_versions(),
        "backend": keras.backend.backend(),
        "seeds": {"train": train.seed, "split": dataset.splits.seed},
        "data": {
            "rows_digest": dataset.examples.digest(),
            "splits_digest": dataset.splits.digest(),
            "splits_file": str(dataset.splits_path),
            "counts": row_counts(project, train.k_txt, splits, train.views),
            "rows_left_out": dataset.counts()["dropped"],
            "quarantined_photos": unread,
            "cut_sentences": project.cut_sentences(k_txt=train.k_txt).to_dict(),
        },
        "features": {
            "vision": {
                "fingerprint": project.vision_spec.fingerprint,
                "row_shape": list(row_shape),
                **cut,
            },
            "text": {"fingerprint": text.fingerprint, "boundary": text.boundary},
        },
        "parameters": {"trainable": trainable},
        "init_from": None,
        "initialised_layers": [],
        "wall_seconds": {},
        "keeps_state": train.keep_state,
        "threads": threads_of_operation(),
    }
