"""The store's number formats on the user's own rows: size, speed, and what they change.

Every format is extracted and trained on as a user would, in a store of its own.
Reading is timed in rounds in which each format reads the same rows. Logits are
compared for the run that was trained on float32 features, over the same test
rows in each format.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loop import new_training
from benchmarks.measuring import ratios, seconds_of, spread, written
from benchmarks.steps import release
from benchmarks.tables import table
from featstore.config import SPLITS
from featstore.progress import SILENT
from featstore.project import Project
from featstore.store.numbers import token_bytes
from featstore.store.store import VisionStore
from trainer.config import Config, TrainConfig, load_config
from trainer.features import cached_rows, prepare
from trainer.metrics import evaluate_logits
from trainer.run.checkpoint import build_model
from trainer.run.fit import fit
from trainer.run.step import make_predictor, predict_logits

EXACT = "float32"
USUAL = "float16"
DTYPES = (EXACT, USUAL, "bfloat16", "int8")
LAYERS = (0, 3)
GATHERED_ROWS = 32


def logits_of(
    weights: Path, project: Project, train: TrainConfig, split: str
) -> NDArray[np.float32]:
    """Return the logits of a split's rows under a weights file of a run in any format."""
    model = build_model(Config.of(project.config, train), project.images().row_shape)
    model.load_weights(weights)
    rows = cached_rows(project, train, split)
    return predict_logits(make_predictor([model]), rows, train.batch_size)[0]


def _reader(store: VisionStore) -> Callable[[NDArray[np.int64]], None]:
    out = store.empty(GATHERED_ROWS)

    def read(positions: NDArray[np.int64]) -> None:
        if store.quantised:
            store.gather_stored(positions)
        else:
            store.gather(positions, out=out)

    return read


def gather_seconds(
    stores: dict[str, VisionStore], rounds: int, batches: int
) -> dict[str, list[float]]:
    """Time random batches of the same rows from each store.

    Args:
        stores: By format, with the same images.
        rounds: In each, every store reads all batches once.
        batches: Of `GATHERED_ROWS` rows.

    Returns:
        Seconds a batch of each round by format.
    """
    readers = {dtype: _reader(store) for dtype, store in stores.items()}
    live = {dtype: store.live() for dtype, store in stores.items()}
    for dtype, read in readers.items():  # the first reading compares checksums
        for start in range(0, len(live[dtype]) - GATHERED_ROWS + 1, GATHERED_ROWS):
            read(live[dtype][start : start + GATHERED_ROWS])
    rng = np.random.default_rng(0)
    number = min(len(rows) for rows in live.values())
    seconds: dict[str, list[float]] = {dtype: [] for dtype in stores}
    for _ in range(rounds):
        picked = [rng.integers(0, number, GATHERED_ROWS) for _ in range(batches)]
        for dtype, read in readers.items():

            def gather(
                read: Callable[[NDArray[np.int64]], None] = read,
                rows_of: NDArray[np.int64] = live[dtype],
                picked: Sequence[NDArray[np.int64]] = picked,
            ) -> None:
                for rows in picked:
                    read(rows_of[rows])

            seconds[dtype].append(seconds_of(gather) / batches)
    return seconds


def measure(
    config_file: Path,
    dtypes: Sequence[str] = DTYPES,
    layers: Sequence[int] = LAYERS,
    rounds: int = 7,
    batches: int = 20,
    scratch: str | None = None,
) -> dict[str, Any]:
    """Extract, train and read in each number format.

    Args:
        config_file: Settings of the data, the encoders and the training.
        dtypes: Formats, float32 the first and float16 among them.
        layers: Values of k_txt.
        rounds: Of timed reading.
        batches: Read in each round.
        scratch: Folder for the stores; None takes the system's temporary one.

    Returns:
        By format: bytes of an image, seconds a batch of 32 rows and its ratio
        to float16, and for each k_txt the test accuracy of a
        run trained on it, the largest difference of a logit to float32 under
        the same weights, and the predictions that this changes.
    """
    given = load_config(config_file)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder)
        whole = Project(given)
        projects: dict[str, Project] = {}
        for dtype in dtypes:
            settings = dataclasses.replace(given.store, root=str(root / "cache"), dtype=dtype)
            projects[dtype] = whole.with_config(dataclasses.replace(given, store=settings))
            projects[dtype].extract("vit", show=SILENT)
        whole.forget_encoders()
        found: dict[str, Any] = {dtype: {"k_txt": {}} for dtype in dtypes}
        for k_txt in layers:
            train = dataclasses.replace(given.train, k_txt=k_txt)
            exact: NDArray[np.float32] | None = None
            weights: Path | None = None
            for dtype, project in projects.items():
                prepare(project, k_txt)
                training = new_training(root, f"{dtype}-{k_txt}", project, train)
                threshold = float(fit(training)["threshold"])
                weights = weights or training.run.weights_path  # of the first format, float32
                own = logits_of(training.run.weights_path, project, train, "test")
                labels = cached_rows(project, train, "test").labels
                logits = logits_of(weights, project, train, "test")
                exact = logits if exact is None else exact
                cut = math.log(threshold / (1 - threshold))
                metrics = evaluate_logits(labels, own, threshold)
                found[dtype]["k_txt"][str(k_txt)] = {
                    "test_accuracy": metrics["at_threshold"]["accuracy"],
                    "largest_logit_difference": float(np.abs(logits - exact).max()),
                    "predictions_changed": int(((logits > cut) != (exact > cut)).sum()),
                }
                release()
        stores = {dtype: project.images() for dtype, project in projects.items()}
        seconds = gather_seconds(stores, rounds, batches)
        for dtype, store in stores.items():
            tokens, width = store.row_shape
            found[dtype] |= {
                "row_bytes": tokens * token_bytes(dtype, width),
                "gather_seconds": spread(seconds[dtype], 7),
                "speed_to_float16": ratios(seconds[USUAL], seconds[dtype]),
            }
        rows = {split: len(project.usable(split)[0]) for split in SPLITS}
    return {"rows": rows, "row_shape": [tokens, width], "rounds": rounds, "dtypes": found}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown tables."""
    tokens, width = figures["row_shape"]
    rows = figures["rows"]
    read, learnt = [], []
    exact = figures["dtypes"][EXACT]["k_txt"]
    for dtype, found in figures["dtypes"].items():
        rate = GATHERED_ROWS * found["row_bytes"] / found["gather_seconds"]["median"]
        read.append(
            [
                dtype,
                f"{found['row_bytes'] / 1e3:.1f} kB",
                written(found["gather_seconds"], " ms", 2, 1e3),
                f"{rate / 1e9:.1f} GB/s",
                written(found["speed_to_float16"], "×", 2),
            ]
        )
        cells = [dtype]
        for k_txt, one in found["k_txt"].items():
            change = 100 * (one["test_accuracy"] - exact[k_txt]["test_accuracy"])
            cells += [
                f"{one['largest_logit_difference']:.1e}",
                str(one["predictions_changed"]),
                f"{100 * one['test_accuracy']:.2f} % ({change:+.2f})",
            ]
        learnt.append(cells)
    header = ["format", "an image", f"reading {GATHERED_ROWS} images", "rate", "speed to float16"]
    learnt_header = ["format"]
    for k_txt in exact:
        learnt_header += [
            f"k_txt {k_txt}: largest logit difference",
            "predictions changed",
            "accuracy of a run trained on it",
        ]
    head = (
        f"Images of {tokens}×{width} numbers; {rows['train']:,} training, {rows['val']:,}"
        f" validation and {rows['test']:,} test rows. Differences are to float32 features under the"
        " same weights; accuracies are of test rows, at each run's own threshold."
    )
    return f"{head}\n\n{table(header, read)}\n\n{table(learnt_header, learnt)}"
