"""The study's search on the user's own rows: cached, by workers, against end to end.

`cli.py search` runs as a user types it, in a store and a folder of runs of its
own, extraction included. End to end is scaled from measured steps of the same
presets.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measuring import seconds_of, spread
from benchmarks.tables import table

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "study-search.toml"


def search(folder: Path, config: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Run a search in a process of its own.

    Args:
        folder: Holds its store and its runs.
        config: The settings of the data and the encoders.
        name: The search.
        arguments: Further arguments of the command.

    Returns:
        What `--json` prints, and `wall_seconds` of the whole command.
    """
    command = [sys.executable, str(ROOT / "cli.py"), "search", "--json", "--name", name]
    command += ["--config", str(config), "--root", str(folder / "cache")]
    command += ["--runs", str(folder / "runs"), *arguments]
    found: dict[str, Any] = {}

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        found.update(json.loads(done.stdout.splitlines()[-1]))

    seconds = seconds_of(run)
    return {**found, "wall_seconds": round(seconds, 1)}


def end_to_end_seconds(run: Path, ks: Sequence[int], rounds: int = 3) -> dict[int, dict[str, Any]]:
    """Time the end-to-end model of a run's presets, one training step and one prediction.

    Args:
        run: A trial's folder: its presets and settings are used.
        ks: Values of k_txt.
        rounds: Steps of each kind that are timed, after one that is not.

    Returns:
        For each k_txt and `plain` and `xla`: seconds of a step and of a
        prediction of one batch.
    """
    import dataclasses

    import tensorflow as tf

    from featstore.encoders.presets import resolve_preset
    from featstore.encoders.tower import load_backbone
    from trainer.model.end_to_end import build_end_to_end
    from trainer.run.folder import Run
    from trainer.run.optimizer import make_optimizer
    from trainer.run.step import cross_entropy

    config = Run(run).config
    rng = np.random.default_rng(0)
    found: dict[int, dict[str, Any]] = {}
    for k_txt in ks:
        vision = load_backbone(resolve_preset(config.encoders.vit), "float32")
        text = load_backbone(resolve_preset(config.encoders.text), "float32")
        train = dataclasses.replace(config.train, k_txt=k_txt)
        model = build_end_to_end(vision, text, train)
        optimizer = make_optimizer(train)
        optimizer.build(model.trainable_variables)
        rows, length = train.batch_size, config.encoders.sequence_length
        shape = model.inputs[0].shape[1:] if len(model.inputs[0].shape) == 4 else vision.image_shape
        inputs = {
            "pixel_values": tf.constant(rng.normal(size=(rows, *shape)), tf.float32),
            "input_ids": tf.constant(
                rng.integers(1, text.vocabulary_size, (rows, length)), tf.int32
            ),
            "attention_mask": tf.ones((rows, length), tf.int32),
        }
        labels = tf.constant(rng.integers(0, 2, rows), tf.float32)

        def step(
            model: Any = model, optimizer: Any = optimizer, inputs: Any = inputs, y: Any = labels
        ) -> Any:
            with tf.GradientTape() as tape:
                loss = cross_entropy(y, model(inputs, training=True)[:, 0], tf.ones_like(y))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)
            return loss

        def predict(model: Any = model, inputs: Any = inputs) -> Any:
            return model(inputs, training=False)

        found[k_txt] = {}
        for name, compiled in (("plain", False), ("xla", True)):
            timed = {}
            for what, function in (("step", step), ("predict", predict)):
                call = tf.function(function, jit_compile=compiled)
                call()
                timed[what] = spread([_call_seconds(call) for _ in range(rounds)])
            found[k_txt][name] = timed
    return found


def _call_seconds(call: Callable[[], Any]) -> float:
    return seconds_of(lambda: call().numpy())


def work_seconds(folder: Path) -> float:
    """Return the seconds of all steps and validations of the trials of a search's folder."""
    histories = [pd.read_csv(path) for path in sorted(folder.glob("trial-*/history.csv"))]
    return float(sum((found["seconds"] + found["val_seconds"]).sum() for found in histories))


def measure(config: Path, workers: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Run the study's search with each number of workers, and time end to end beside it.

    Args:
        config: Settings of the data and the encoders.
        workers: How many processes. The first search runs twice: from nothing, which
            includes the extraction, and with features present, as the others do.

    Returns:
        Wall seconds of whole commands, from nothing and with features present, the seconds of
        their steps and validations, trials an hour, and the seconds that end to end would take
        for the same steps.
    """
    figures: dict[str, Any] = {"recipe": RECIPE.name, "workers": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def of(count: int, name: str) -> dict[str, Any]:
            return search(folder, config, name, "--space", str(RECIPE), "--workers", str(count))

        figures["from_nothing_seconds"] = of(workers[0], "nothing")["wall_seconds"]
        for count in workers:
            found = of(count, f"w{count}")
            figures["workers"][str(count)] = {
                "wall_seconds": found["wall_seconds"],
                "work_seconds": round(work_seconds(folder / "runs" / f"w{count}"), 1),
                "trials_per_hour": round(3600 * len(found["trials"]) / found["wall_seconds"], 1),
                "peak_memory_gb": round(found["peak_memory_bytes"] / 1e9, 2),
                "best": found["best"]["value"],
            }
        runs = folder / "runs" / f"w{workers[0]}"
        steps = end_to_end_seconds(runs / "trial-0000", (2, 3))
        figures["end_to_end"] = {str(k): value for k, value in steps.items()}
        manifest = json.loads((runs / "trial-0000" / "manifest.json").read_text())
        counts = {split: found["rows"] for split, found in manifest["data"]["counts"].items()}
        figures["rows"] = counts
        figures["trials"] = len(found["trials"])
        for name in ("plain", "xla"):
            total = 0.0
            for trial in found["trials"]:
                one = steps[trial["params"]["k_txt"]][name]
                total += trial["epoch"] * (
                    math.ceil(counts["train"] / 32) * one["step"]["median"]
                    + math.ceil(counts["val"] / 32) * one["predict"]["median"]
                )
            figures[f"end_to_end_{name}_seconds"] = round(total, 1)
    return figures


def report(figures: dict[str, Any]) -> str:
    """Return the search's figures as Markdown: what a user waits for, then its parts."""
    counts, trials = figures["rows"], figures["trials"]
    nothing = figures["from_nothing_seconds"]
    first, *_ = figures["workers"].values()
    extraction = nothing - first["wall_seconds"]
    plain, xla = (figures[f"end_to_end_{way}_seconds"] for way in ("plain", "xla"))
    rows = []
    for count, found in figures["workers"].items():
        wall = found["wall_seconds"]
        rows.append(
            [
                f"cached, {count} worker{'s' if count != '1' else ''}",
                f"{extraction + wall:.0f} s",
                f"{wall:.0f} s",
                f"{found['work_seconds']:.0f} s",
                f"{found['trials_per_hour']:.0f}",
                f"{first['wall_seconds'] / wall:.2f}×",
                f"{plain / (extraction + wall):.1f}×",
                f"{xla / (extraction + wall):.1f}×",
            ]
        )
    for seconds, title in ((plain, "end to end"), (xla, "end to end, XLA")):
        an_hour = f"{3600 * trials / seconds:.1f}"
        rows.append([title, f"{seconds:.0f} s", "", f"{seconds:.0f} s", an_hour, "", "", ""])
    header = [
        *(f"{trials} trials", "from nothing", "features present", "steps and validation"),
        *("trials an hour", "to 1 worker", "against plain", "against XLA"),
    ]
    steps = ", ".join(
        f"{1e3 * found[way]['step']['median']:,.0f} ms{title} at k_txt {k_txt}"
        for k_txt, found in figures["end_to_end"].items()
        for way, title in (("plain", ""), ("xla", " with XLA"))
    )
    head = (
        f"From nothing to the best of {trials} trials on {sum(counts.values()):,} rows:"
        f" {nothing / 60:.1f} minutes cached, against {min(plain, xla) / 60:.0f} minutes end to end"
        f" at least, {min(plain, xla) / nothing:.1f} times as long. Cached is one command on an"
        f" empty store, everything included: its start, {extraction:.0f} s of extraction, trials,"
        " validation, plots. End to end is its steps alone, scaled from measured ones"
        f" ({steps}); it does not pay for its start, for building its model or for reading its"
        " photos."
    )
    note = (
        f"`recipes/{figures['recipe']}` on {counts['train']:,} training and {counts['val']:,}"
        " validation rows. Seconds are those of whole commands; with two workers, the seconds of"
        " steps are those of both."
    )
    return f"{head}\n\n{note}\n\n{table(header, rows)}"
