"""A small data set with a rule that only the picture tells, and runs on it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featstore.config import DataConfig, EncodersConfig, StoreConfig
from featstore.data.dataset import Dataset
from featstore.progress import SILENT
from featstore.project import Project
from trainer.config import Config, TrainConfig
from trainer.features import prepare

SENTENCES = (
    "a dog",
    "the man sits",
    "two cat in the park",
    "the woman is not sleeping , the dog runs in the park .",
)
IMAGES_OF_SPLIT = {"train": 32, "val": 12, "test": 12}
# What the colour of a photo says.
CHANNELS = {"contradiction": 2, "entailment": 0, "neutral": 1}


def write_data(folder: Path, seed: int = 0, classes: int = 2) -> dict[str, Any]:
    """Write photos, rows and a split; return the `[data]` settings.

    A row is entailment exactly where its photo is red rather than blue, and of
    three classes neutral where it is green. Each photo has every sentence, and
    each split as many red photos as blue: a model of the sentence alone is right
    for exactly half the rows.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True)
    rows, splits = [], {}
    numbers = itertools.count()
    for split, count in IMAGES_OF_SPLIT.items():
        splits[split] = []
        for i in range(count):
            image_id = f"photo{next(numbers):03d}"
            pixels = rng.integers(0, 90, (40, 48, 3), np.uint8)
            label = list(CHANNELS)[i % classes]
            pixels[..., CHANNELS[label]] += 150
            Image.fromarray(pixels).save(images / f"{image_id}.png")
            splits[split].append(image_id)
            rows += [
                {"Image_ID": image_id, "Hypothesis": text, "Label": label} for text in SENTENCES
            ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines)
    (folder / "split.json").write_text(json.dumps(splits))
    return {
        "rows": str(folder / "rows.jsonl"),
        "images": str(images),
        "split_file": str(folder / "split.json"),
    }


def tiny_config(folder: Path, vit: Path, text: Path, classes: int = 2, **train: Any) -> Config:
    """Write a data set into `folder` and return the settings of a run on it."""
    settings = {
        "k_txt": 0,
        "lr": 3e-3,
        "batch_size": 16,
        "epochs": 2,
        "num_heads": 2,
        "head_dim": 4,
        "mlp_dim": 8,
    }
    return Config(
        data=DataConfig(**write_data(folder, classes=classes), classes=classes),
        encoders=EncodersConfig(vit=str(vit), text=str(text), sequence_length=24),
        store=StoreConfig(
            root=str(folder / "cache"), dtype="float32", shard_rows=20, encode_batch_size=8
        ),
        train=TrainConfig(**{**settings, **train}),
    )


def extracted(config: Config) -> Dataset:
    """Extract the image features of a configuration; return its dataset."""
    project = Project(config)
    project.extract("vit", show=SILENT)
    return project.dataset


def prepared(config: Config) -> Project:
    """Extract what a configuration needs; return its project."""
    project = Project(config)
    project.extract("vit", show=SILENT)
    prepare(project, config.train.k_txt)
    return project


@contextlib.contextmanager
def worker_here() -> Iterator[None]:
    """Have a search's one worker run in this process: its own would import Keras first."""
    from trainer.tuning import drive
    from trainer.tuning.study import Search
    from trainer.tuning.trials import work_in
    from trainer.tuning.workers import Watched

    def run_workers(search: Search, workers: int, deadline: float, *_: Any) -> Watched:
        assert workers == 1
        work_in(search.folder, search.url, lambda: False, deadline)
        return Watched()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "run_workers", run_workers)
        yield


@contextlib.contextmanager
def read_again_here() -> Iterator[None]:
    """Have exports read again in this process: one of its own would import Keras first.

    test_export.py has the real process.
    """
    from trainer.results.export import export, fresh

    def run(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        *_, program, format, model, folder = command
        assert program == fresh.__file__
        if format == "keras":
            assert_keras_alone(cwd / model)
        with pytest.MonkeyPatch.context() as patch:
            # This project is here, of course.
            patch.setattr(fresh, "OURS", ())
            patch.setattr(sys, "meta_path", [*sys.meta_path])
            fresh.main(format, str(cwd / model), cwd / folder)
        return subprocess.CompletedProcess(command, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "subprocess", SimpleNamespace(run=run))
        yield


def assert_keras_alone(path: Path) -> None:
    """Check that a .keras file names classes of Keras and keras-hub only."""
    found: set[str] = set()

    def collect(pairs: list[tuple[str, Any]]) -> None:
        found.update(value for name, value in pairs if name == "module" and value)

    with zipfile.ZipFile(path) as file:
        json.loads(file.read("config.json"), object_pairs_hook=collect)
    assert {module.partition(".")[0] for module in found} == {"keras", "keras_hub"}


def with_train(config: Config, **changes: Any) -> Config:
    """Return the configuration with other `[train]` settings."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
