"""What training the last vision blocks brings: 0, 1 and 2 of them, from one warmed-up run.

    python -m benchmarks.vision_blocks ../shared FOLDER

Captions of photos, true or another photo's, so that the sentence alone tells nothing. A run with
frozen photos is trained on one part of the photos; from it each number of blocks goes on, on
photos that are new to it, with the same rows, steps and rates. Test photos are in neither part.
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
from featstore.progress import SILENT
from featstore.project import Project
from trainer.logits import sigmoid
from trainer.metrics import evaluate_logits, row_losses
from trainer.statistics import Clustered, middle

PHOTOS = {"warm": 1100, "train": 160, "val": 60, "test": 200}
BLOCKS, SEEDS = (0, 1, 2), (0, 1, 2)
WARM: dict[str, Any] = {"k_txt": 1, "lr": 2e-4, "epochs": 4}
TUNED: dict[str, Any] = {"k_txt": 1, "lr": 5e-5, "epochs": 2}


def project_of(shared: Path, home: Path, part: str, photos: Mapping[str, int]) -> Project:
    """Return a project that trains on one part of the photos, with the common val and test.

    Args:
        shared: Has `data/warmup.jsonl`, `data/images` and `presets`.
        home: Where its rows, split and store go.
        part: "warm" or "train".
        photos: Photos of each part and split, in one order that is drawn once.
    """
    lines = (shared / "data" / "warmup.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    order = np.random.default_rng(0).permutation(sorted({row["Image_ID"] for row in rows}))
    ends = np.cumsum(list(photos.values()))
    parts = dict(zip(photos, np.split(order, ends), strict=False))
    split = {"train": parts[part], "val": parts["val"], "test": parts["test"]}
    wanted = set(np.concatenate(list(split.values())))
    home.mkdir(parents=True, exist_ok=True)
    file, split_file = home / f"{part}.jsonl", home / f"{part}-split.json"
    kept = [line for line, row in zip(lines, rows, strict=True) if row["Image_ID"] in wanted]
    file.write_text("\n".join(kept) + "\n")
    split_file.write_text(json.dumps({name: ids.tolist() for name, ids in split.items()}))
    presets = shared / "presets"
    return Project(
        rows=str(file),
        images=str(shared / "data" / "images"),
        split_file=str(split_file),
        vit=str(presets / "vit_small_patch14_196_dinov2"),
        text=str(presets / "distil_bert_minilm_l6_en_uncased"),
        root=str(home / "cache"),
    )


def measure(
    shared: Path,
    home: Path,
    photos: Mapping[str, int] = PHOTOS,
    blocks: Sequence[int] = BLOCKS,
    seeds: Sequence[int] = SEEDS,
) -> dict[str, Any]:
    """Train and score; a run that is there already is only scored.

    Returns:
        By number of blocks: `accuracy`, `auc` and `loss` of each seed on the test rows, `seconds`
        and `parameters` of a run; of more than none also `gain`: accuracy and loss less those of
        none, as a mean over the seeds, with the 95 % interval over test photos.
    """
    warm, tuned = (project_of(shared, home, part, photos) for part in ("warm", "train"))
    runs = home / "runs"
    warm.extract("vit", show=SILENT)
    if not (runs / "warm" / "metrics.json").exists():
        trainer.train(warm, name="warm", runs=runs, show=SILENT, seed=0, **WARM)
    found: dict[str, Any] = {}
    rows: dict[int, dict[str, list[NDArray[np.float64]]]] = {}
    for k_vit in blocks:
        started = time.perf_counter()
        tuned.extract("vit", k_vit=k_vit, show=SILENT)
        found[str(k_vit)] = {"extraction_seconds": time.perf_counter() - started, "runs": []}
        rows[k_vit] = {"accuracy": [], "loss": []}
    for seed in seeds:
        for k_vit in blocks:
            name = f"k{k_vit}-s{seed}"
            if not (runs / name / "metrics.json").exists():
                options = {**TUNED, "k_vit": k_vit, "seed": seed, "init_from": "warm"}
                trainer.train(tuned, name=name, runs=runs, show=SILENT, **options)
            run = trainer.load_run(name, runs)
            scores = run.scorer.score("test")
            threshold, logits = float(run.metrics["threshold"]), scores.logits.astype(np.float64)
            figures = evaluate_logits(scores.labels, logits, threshold)
            called = sigmoid(logits) >= threshold
            rows[k_vit]["accuracy"].append((called == scores.labels).astype(float))
            rows[k_vit]["loss"].append(row_losses(scores.labels, logits))
            seconds = run.manifest["wall_seconds"]["training"]
            one = {
                "seed": seed,
                "accuracy": float(rows[k_vit]["accuracy"][-1].mean()),
                "auc": figures["auc"],
                "loss": figures["loss"],
                "seconds": seconds,
                "parameters": run.manifest["parameters"]["trainable"],
            }
            found[str(k_vit)]["runs"].append(one)
            print(name, one, flush=True)
    examples = tuned.dataset.examples.select(tuned.dataset.rows("test"))
    clustered = Clustered(examples.image_ids)
    for k_vit in blocks[1:]:
        found[str(k_vit)]["gain"] = {
            figure: _gain(rows[k_vit][figure], rows[blocks[0]][figure], clustered)
            for figure in ("accuracy", "loss")
        }
    return {"blocks": found, "photos": dict(photos), "test_rows": clustered.rows}


def _gain(
    ours: Sequence[NDArray[np.float64]],
    base: Sequence[NDArray[np.float64]],
    clustered: Clustered,
) -> dict[str, Any]:
    difference = np.mean(ours, axis=0) - np.mean(base, axis=0)
    ones = clustered.sums(clustered.by_image(np.ones(clustered.rows)))
    drawn = (clustered.sums(clustered.by_image(difference)) / ones)[:, 0]
    return {"mean": float(difference.mean()), "interval": middle(drawn, clustered)}


def report(figures: Mapping[str, Any]) -> str:
    """Return the figures as a table."""
    lines = []
    for k_vit, found in figures["blocks"].items():
        runs = found["runs"]
        mean = {key: np.mean([run[key] for run in runs]) for key in ("accuracy", "auc", "loss")}
        seeds = ", ".join(f"{run['accuracy']:.1%}" for run in runs)
        gain = "–"
        if "gain" in found:
            over, interval = found["gain"]["accuracy"], found["gain"]["accuracy"]["interval"]
            gain = (
                f"{100 * over['mean']:+.1f} ({100 * interval['low']:+.1f} to"
                f" {100 * interval['high']:+.1f})"
            )
        seconds = np.median([run["seconds"] for run in runs])
        lines.append(
            [
                k_vit,
                f"{runs[0]['parameters']:,}",
                f"{mean['accuracy']:.1%} ({seeds})",
                f"{mean['auc']:.3f}",
                f"{mean['loss']:.3f}",
                gain,
                f"{seconds:.0f} s",
            ]
        )
    head = ["k_vit", "parameters", "accuracy (by seed)", "AUC", "loss", "points gained", "training"]
    return table(head, lines)


def main() -> None:
    """Measure, print the table, and leave the figures in the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shared", type=Path)
    parser.add_argument("home", type=Path)
    given = parser.parse_args()
    figures = measure(given.shared, given.home)
    (given.home / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(report(figures))


if __name__ == "__main__":
    main()
