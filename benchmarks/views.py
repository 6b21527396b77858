"""What photometric views do to the gap between train and validation: 1, 2, 4 and 8 of them.

    python -m benchmarks.views ../shared FOLDER

For each row file of the shared data, each number of views is trained with each seed, over the same
rows for as many epochs. The weights of the best epoch, which are kept, are then measured on train
and val rows alike, from the plain photos and without dropout; the gap is the loss of val less that
of train. It grows with the epoch, so the best epochs stand beside it, and the gap of the last epoch
as it was trained: under the views, with dropout. A run that is in the folder already is only
measured, so a stopped comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import trainer
from benchmarks.tables import table
from featstore.progress import SHOWN
from featstore.project import Project
from trainer.logits import sigmoid
from trainer.metrics import row_losses
from trainer.statistics import Clustered, middle

Draws = NDArray[np.float64]

ROWS = ("a2.jsonl", "warmup.jsonl")
VIEWS, SEEDS = (1, 2, 4, 8), (0, 1, 2)
TRAIN: dict[str, Any] = {"k_txt": 3, "lr": 5e-5}


def project_of(shared: Path, home: Path, rows: str, photos: int | None = None) -> Project:
    """Return a project over rows of the shared data.

    Args:
        shared: Has `data/<rows>`, `data/images` and `presets`.
        home: Where the rows and the store go.
        rows: Name of the row file.
        photos: Take so many photos, in an order that is drawn once; None: all.
    """
    lines = (shared / "data" / rows).read_text().splitlines()
    ids = [json.loads(line)["Image_ID"] for line in lines]
    order = np.random.default_rng(0).permutation(sorted(set(ids)))
    wanted = set(order[:photos].tolist())
    home.mkdir(parents=True, exist_ok=True)
    file = home / f"{len(wanted)}-{rows}"
    kept = [line for line, image_id in zip(lines, ids, strict=True) if image_id in wanted]
    file.write_text("\n".join(kept) + "\n")
    presets = shared / "presets"
    return Project(
        rows=str(file),
        images=str(shared / "data" / "images"),
        vit=str(presets / "vit_small_patch14_196_dinov2"),
        text=str(presets / "distil_bert_minilm_l6_en_uncased"),
        root=str(home / "cache"),
    )


class _Measured:
    """Rows of a split, and their figures in each draw of its photos; means over the seeds."""

    def __init__(self, images: NDArray[Any], seed: int) -> None:
        self.clustered = Clustered(images, seed=seed)
        self.seed_losses: list[Draws] = []
        self.seed_scores: list[Draws] = []
        self.losses: list[float] = []
        self.macro_f1: list[float] = []

    def add(self, labels: NDArray[Any], logits: NDArray[Any], threshold: float) -> None:
        """Add a seed's logits."""
        losses = row_losses(labels, logits.astype(np.float64))
        called = sigmoid(logits.astype(np.float64)) >= threshold
        # By truth, then by what it is called.
        cells = 2 * labels.astype(int) + called
        clustered = self.clustered
        counts = clustered.sums(clustered.by_image(np.ones(clustered.rows), 4, cells))
        sums = clustered.sums(clustered.by_image(losses))[:, 0]
        self.losses.append(float(losses.mean()))
        self.seed_losses.append(sums / counts.sum(axis=1))
        self.macro_f1.append(float(_macro_f1(np.bincount(cells, minlength=4)[None])[0]))
        self.seed_scores.append(_macro_f1(counts))

    @property
    def drawn_loss(self) -> Draws:
        return np.asarray(np.mean(self.seed_losses, axis=0))

    @property
    def drawn_f1(self) -> Draws:
        return np.asarray(np.mean(self.seed_scores, axis=0))


def _macro_f1(counts: NDArray[Any]) -> Draws:
    """Return macro-F1 of (draws, 4) counts: tn, fp, fn, tp."""
    tn, fp, fn, tp = counts.T
    wrong = fp + fn
    scores = [2 * hits / np.maximum(2 * hits + wrong, 1) for hits in (tn, tp)]
    return np.asarray(np.mean(scores, axis=0))


def measure(
    project: Project,
    runs: Path,
    views: Sequence[int] = VIEWS,
    seeds: Sequence[int] = SEEDS,
    **settings: Any,
) -> dict[str, Any]:
    """Extract, train and measure.

    Args:
        project: Its rows; the features of train photos are made under all views.
        runs: Folder of the runs.
        views: Numbers of views to compare; the first is what the others are compared with.
        seeds: Of the trainings.
        settings: `[train]` settings of all runs.

    Returns:
        `views`: by number of views the runs of each seed, and `train_loss`, `val_loss`, `gap`
        and `macro_f1` (of val, at each run's own threshold): the mean over the seeds with its
        95 % interval over photos, train's and val's drawn apart; of all but the first number
        also `gap_change` and `macro_f1_change` against it, over the same draws. `extraction`:
        seconds and bytes of one view. `rows` and `photos` of each split.
    """
    extraction = _extract(project, max(views))
    images = {
        split: project.dataset.examples.select(project.usable(split)[0]).image_ids
        for split in ("train", "val")
    }
    found: dict[int, dict[str, Any]] = {number: {"runs": []} for number in views}
    measured = {
        number: {split: _Measured(ids, i) for i, (split, ids) in enumerate(images.items())}
        for number in views
    }
    for seed in seeds:
        for number in views:
            name = f"v{number}-s{seed}"
            if not (runs / name / "metrics.json").exists():
                options = {**settings, "views": number, "seed": seed}
                trainer.train(project, name=name, runs=runs, **options)
            one = _score(trainer.load_run(name, runs), measured[number])
            found[number]["runs"].append({"seed": seed, **one})
            print(name, one, flush=True)
    first = measured[views[0]]
    for number in views:
        found[number] |= _figures(measured[number], None if number == views[0] else first)
    return {
        "views": {str(number): figures for number, figures in found.items()},
        "settings": settings,
        "extraction": extraction,
        "rows": {split: len(ids) for split, ids in images.items()},
        "photos": {split: len(set(ids)) for split, ids in images.items()},
    }


def _extract(project: Project, views: int) -> dict[str, float]:
    """Make what the runs read; return the seconds and bytes of one view of a train photo."""
    project.extract("vit", "val", views=1, show=SHOWN)
    started = time.perf_counter()
    _, summary = project.extract("vit", "train", views=views, show=SHOWN)
    store = project.images(views - 1)
    folder_bytes = sum(path.stat().st_size for path in store.folder.glob("*.h5"))
    return {
        "rows": summary.extracted,
        "seconds": time.perf_counter() - started,
        "row_bytes": folder_bytes / store.rows,
    }


def _score(run: trainer.Run, measured: Mapping[str, _Measured]) -> dict[str, Any]:
    """Score a run on both splits; return its own figures."""
    threshold = float(run.metrics["threshold"])
    for split, rows in measured.items():
        scores = run.scorer.score(split)
        rows.add(scores.labels, scores.logits, threshold)
    last = run.history.iloc[-1]
    return {
        "train_loss": measured["train"].losses[-1],
        "val_loss": measured["val"].losses[-1],
        "macro_f1": measured["val"].macro_f1[-1],
        "epoch": int(run.metrics["epoch"]),
        "epochs": len(run.history),
        # As trained: under views and with dropout.
        "last_gap": float(last["val_loss"] - last["loss"]),
        "seconds": float(run.manifest["wall_seconds"]["training"]),
    }


def _figures(
    measured: Mapping[str, _Measured], first: Mapping[str, _Measured] | None
) -> dict[str, Any]:
    train, val = measured["train"], measured["val"]

    def with_interval(mean: float, drawn: Draws) -> dict[str, Any]:
        return {"mean": mean, "interval": middle(drawn, val.clustered)}

    def gap(of: Mapping[str, _Measured]) -> tuple[float, Draws]:
        losses = [float(np.mean(of[split].losses)) for split in ("val", "train")]
        return losses[0] - losses[1], of["val"].drawn_loss - of["train"].drawn_loss

    mean, drawn = gap(measured)
    score = float(np.mean(val.macro_f1))
    found = {
        "train_loss": with_interval(float(np.mean(train.losses)), train.drawn_loss),
        "val_loss": with_interval(float(np.mean(val.losses)), val.drawn_loss),
        "gap": with_interval(mean, drawn),
        "macro_f1": with_interval(score, val.drawn_f1),
    }
    if first is not None:
        base, base_drawn = gap(first)
        base_score, base_f1 = float(np.mean(first["val"].macro_f1)), first["val"].drawn_f1
        found["gap_change"] = with_interval(mean - base, drawn - base_drawn)
        found["macro_f1_change"] = with_interval(score - base_score, val.drawn_f1 - base_f1)
    return found


def report(figures: Mapping[str, Any]) -> str:
    """Return the figures as a table of each row file."""
    return "\n\n".join(_report(name, of_rows) for name, of_rows in figures.items())


def _report(name: str, figures: Mapping[str, Any]) -> str:
    lines = []
    for number, found in figures["views"].items():
        runs = found["runs"]
        lines.append(
            [
                number,
                f"{found['train_loss']['mean']:.3f}",
                f"{found['val_loss']['mean']:.3f}",
                _shown(found["gap"]),
                _shown(found.get("gap_change"), "+"),
                _shown(found["macro_f1"], scale=100),
                _shown(found.get("macro_f1_change"), "+", 100),
                f"{np.mean([run['last_gap'] for run in runs]):.3f}",
                ", ".join(str(run["epoch"]) for run in runs),
                f"{np.median([run['seconds'] for run in runs]):.0f} s",
            ]
        )
    head = ["views", "train loss", "val loss", "gap", "change of gap", "val macro-F1, %"]
    head += ["change, points", "gap as trained, last epoch", "best epochs", "training"]
    rows, photos = figures["rows"], figures["photos"]
    counts = ", ".join(f"{split} {rows[split]} rows, {photos[split]} photos" for split in rows)
    seeds = ", ".join(str(run["seed"]) for run in next(iter(figures["views"].values()))["runs"])
    one = figures["extraction"]
    return (
        f"{name}: {counts}; seeds {seeds}; {one['row_bytes'] / 1e3:.0f} kB a photo and view\n\n"
        + table(head, lines)
    )


def _shown(found: Mapping[str, Any] | None, sign: str = "", scale: float = 1) -> str:
    """Return a figure with its interval."""
    if found is None:
        return "–"
    form = f"{sign}.{3 if scale == 1 else 1}f"
    interval = found["interval"]
    values = [found["mean"], interval["low"], interval["high"]]
    mean, low, high = (format(scale * value, form) for value in values)
    return f"{mean} ({low} to {high})"


def main() -> None:
    """Measure, print the tables, and leave the figures in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="row files of the shared data")
    parser.add_argument("--photos", type=int, help="of each row file; default: all")
    parser.add_argument("--views", nargs="+", type=int, default=VIEWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--k-txt", type=int, default=TRAIN["k_txt"])
    parser.add_argument("--lr", type=float, default=TRAIN["lr"])
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    settings = {**TRAIN, "k_txt": given.k_txt, "lr": given.lr, "epochs": given.epochs}
    # All runs to the last epoch.
    settings["early_stop_patience"] = given.epochs
    figures = {}
    for rows in given.rows:
        project = project_of(given.shared, given.home, rows, given.photos)
        runs = given.home / "runs" / Path(str(project.config.data.rows)).stem
        figures[rows] = measure(project, runs, given.views, given.seeds, **settings)
        (given.home / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(report(figures))


if __name__ == "__main__":
    main()
