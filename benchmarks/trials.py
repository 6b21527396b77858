"""What a trial costs beside its steps: time, disk, memory of its worker.

`cli.py search` runs as a user types it, one worker, features present, on photos and encoders of
random numbers at the study's size. A trial's overhead is the time from the end of the trial before
it to its own end, less its steps and its validation: drawing, building, resetting, saving, reports.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import spread
from benchmarks.sizes import STUDY, Size, word
from benchmarks.study_search import ROOT, search
from benchmarks.tables import table

PHOTOS, ROWS_A_PHOTO = 12, 10
SMALL = 200_000
"""Bytes that a trial without weights may leave."""


def write_project(folder: Path, size: Size, layers: Iterable[int]) -> Path:
    """Write encoders, photos, rows and their settings; extract all features.

    Args:
        folder: Empty; holds all that is made.
        size: Of the encoders.
        layers: Values of k_txt that the sentences are encoded for.

    Returns:
        The settings file: 96 rows to train on, 12 for val and for test, at the study's size.
    """
    from PIL import Image

    presets = folder / "presets"
    size.write_vision_preset(presets / "vit")
    size.write_text_preset(presets / "text")
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    rows = []
    for photo in range(PHOTOS):
        pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{photo}.png")
        for row in range(ROWS_A_PHOTO):
            words = [word(int(n)) for n in rng.integers(0, size.vocabulary - 5, 4 + row)]
            label = ("entailment", "contradiction")[row % 2]
            rows.append({"Image_ID": str(photo), "Hypothesis": " ".join(words), "Label": label})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = size.train(0)
    config = folder / "featstore.toml"
    config.write_text(
        '[data]\nrows = "rows.jsonl"\nimages = "photos"\n'
        '[encoders]\nvit = "presets/vit"\ntext = "presets/text"\n'
        f"[train]\nbatch_size = {train.batch_size}\nepochs = 1\nhead_dim = {train.head_dim}\n"
        f"mlp_dim = {train.mlp_dim}\n"
    )
    command = [sys.executable, str(ROOT / "cli.py")]
    texts = (("extract-text", "--k-txt", str(k_txt)) for k_txt in sorted(set(layers)))
    for extract in (("extract-vit",), *texts):
        subprocess.run(
            [*command, *extract, "--split", "all", "--config", str(config)],
            check=True,
            capture_output=True,
        )
    return config


def one_search(folder: Path, config: Path, k_txt: int, trials: int) -> dict[str, Any]:
    """Run a search over learning rate, decay and dropout, as the study's, one trial at a time.

    Returns:
        Seconds of the command, of all steps and validations, of a trial's overhead; bytes of the
        search's folder, and of its largest trial without weights; bytes of the worker's own
        memory; how often the worker was replaced.
    """
    from trainer.tuning.drive import load_search

    name = f"k{k_txt}-{trials}"
    space = folder / "space.toml"
    space.write_text(
        f"[search]\ntrials = {trials}\ntogether = 1\n[train]\nk_txt = {k_txt}\n"
        "lr = {log_uniform = [2e-5, 1e-4]}\nweight_decay = {log_uniform = [5e-6, 5e-5]}\n"
        "dropout = {uniform = [0.05, 0.30]}\n"
    )
    found = search(folder, config, name, "--space", str(space))
    opened = load_search(folder / "runs" / name).search
    studied = opened.study.get_trials(deepcopy=False)
    ends = [trial.datetime_complete.timestamp() for trial in studied if trial.datetime_complete]
    work, sizes = [], []
    for number in range(len(studied)):
        run = opened.run_of(number)
        epochs = run.history
        work.append(float((epochs["seconds"] + epochs["val_seconds"]).sum()))
        sizes.append(sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file()))
    gaps = [end - before for before, end in itertools.pairwise(ends)]
    overheads = [gap - own for gap, own in zip(gaps, work[1:], strict=True)]
    weightless = [size for size in sizes if size < SMALL]
    memory = [trial.user_attrs["memory_bytes"] for trial in studied]
    workers = [trial.user_attrs["worker"] for trial in studied]
    return {
        "k_txt": k_txt,
        "trials": trials,
        "wall_seconds": found["wall_seconds"],
        "work_seconds": round(sum(work), 3),
        "overhead_seconds": spread(overheads),
        "search_bytes": sum(p.stat().st_size for p in opened.folder.rglob("*") if p.is_file()),
        "weightless_trials": len(weightless),
        "weightless_bytes": max(weightless, default=0),
        "memory_bytes": {"after_5": memory[min(4, len(memory) - 1)], "last": memory[-1]},
        "workers_replaced": len(dict.fromkeys(workers)) - 1,
    }


def measure(
    folder: Path,
    runs: Sequence[tuple[int, int]] = ((0, 24), (2, 24), (3, 24), (2, 100)),
    size: Size = STUDY,
) -> dict[str, Any]:
    """Run searches of so many trials at each k_txt.

    Args:
        folder: Empty; holds all that is made.
        runs: k_txt and trials of each search.
        size: Of the encoders.
    """
    config = write_project(folder, size, (k for k, _ in runs))
    return {"searches": [one_search(folder, config, k, trials) for k, trials in runs]}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    rows = [
        [
            f"{found['trials']} trials, k_txt {found['k_txt']}",
            f"{found['wall_seconds']:.0f} s",
            f"{found['work_seconds']:.0f} s",
            f"{found['overhead_seconds']['median']:.2f} s",
            f"{found['overhead_seconds']['spread'][1]:.2f} s",
            f"{found['search_bytes'] / 1e6:.0f} MB",
            f"{found['weightless_trials']}, at most {found['weightless_bytes'] / 1e3:.0f} kB",
            f"{found['memory_bytes']['after_5'] / 1e9:.2f} GB",
            f"{found['memory_bytes']['last'] / 1e9:.2f} GB",
            str(found["workers_replaced"]),
        ]
        for found in figures["searches"]
    ]
    header = [
        *("search", "whole command", "steps and validation", "overhead", "at most", "on disk"),
        *("without weights", "memory after 5", "at the end", "workers replaced"),
    ]
    return table(header, rows)
