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


def measure(config: Path, workers: Sequence[int] = (1, 2)) -> dict[str, Any]:
    """Run the study's search with each number of workers, and time end to end beside it.

    Args:
        config: Settings of the data and the encoders.
        workers: How many processes; the first search includes the extraction.

    Returns:
        Wall seconds of extraction and search, trials an hour, and the seconds
        that end to end would take for the same steps.
    """
    figures: dict[str, Any] = {"recipe": RECIPE.name, "workers": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        common = ["--config", str(config), "--root", str(folder / "cache")]

        def extract() -> None:
            command = [sys.executable, str(ROOT / "cli.py")]
            subprocess.run([*command, "extract-vit", *common], check=True, capture_output=True)
            for k_txt in ("2", "3"):
                subprocess.run(
                    [*command, "extract-text", "--k-txt", k_txt, *common],
                    check=True,
                    capture_output=True,
                )

        figures["extraction_seconds"] = round(seconds_of(extract), 1)
        for count in workers:
            arguments = ["--space", str(RECIPE), "--workers", str(count)]
            found = search(folder, config, f"w{count}", *arguments)
            figures["workers"][str(count)] = {
                "wall_seconds": found["wall_seconds"],
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
    """Return the search's figures as Markdown."""
    rows = []
    extraction = figures["extraction_seconds"]
    for count, found in figures["workers"].items():
        whole = extraction + found["wall_seconds"]
        rows.append(
            [
                f"cached, {count} worker{'s' if count != '1' else ''}",
                f"{extraction:.0f} s",
                f"{found['wall_seconds']:.0f} s",
                f"{found['trials_per_hour']:.0f}",
                f"{figures['end_to_end_plain_seconds'] / whole:.1f}×",
                f"{figures['end_to_end_xla_seconds'] / whole:.1f}×",
            ]
        )
    for name, title in (("plain", "end to end"), ("xla", "end to end, XLA")):
        seconds = figures[f"end_to_end_{name}_seconds"]
        rows.append(
            [title, "", f"{seconds:.0f} s", f"{3600 * figures['trials'] / seconds:.1f}", "", ""]
        )
    header = [
        f"{figures['trials']} trials",
        "extraction",
        "search",
        "trials an hour",
        "against plain",
        "against XLA",
    ]
    counts = figures["rows"]
    steps = ", ".join(
        f"{1e3 * found[way]['step']['median']:,.0f} ms{title} at k_txt {k_txt}"
        for k_txt, found in figures["end_to_end"].items()
        for way, title in (("plain", ""), ("xla", " with XLA"))
    )
    head = (
        f"`recipes/{figures['recipe']}` on {counts['train']:,} training and {counts['val']:,}"
        f" validation rows. End to end is scaled from its measured steps ({steps}) and does not pay"
        " for reading its photos."
    )
    return f"{head}\n\n{table(header, rows)}"
