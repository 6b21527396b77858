"""A real search on the user's rows: against end to end, by workers, and by sampler.

Both parts run `cli.py search` as a user does, in a store and a folder of runs
of their own, extraction included.
"""

from __future__ import annotations

import json
import math
import statistics
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

QUALITY_SPACE = """
[search]
trials = {trials}
sampler = "{sampler}"
pruner = "{pruner}"
seed = {seed}
together = 1

[train]
k_txt = 0
epochs = {epochs}
lr = {{log_uniform = [1e-5, 3e-3]}}
weight_decay = {{log_uniform = [1e-6, 1e-2]}}
dropout = {{uniform = [0.0, 0.6]}}
clipnorm = {{log_uniform = [0.01, 3.0]}}
"""


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

    from featstore.encoders import load_backbone
    from featstore.presets import resolve_preset
    from trainer.end_to_end import build_end_to_end
    from trainer.run import Run
    from trainer.step import binary_cross_entropy, make_optimizer

    config = Run(run).config()
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
            "input_ids": tf.constant(rng.integers(1, 1000, (rows, length)), tf.int32),
            "attention_mask": tf.ones((rows, length), tf.int32),
        }
        labels = tf.constant(rng.integers(0, 2, rows), tf.float32)

        def step(
            model: Any = model, optimizer: Any = optimizer, inputs: Any = inputs, y: Any = labels
        ) -> Any:
            with tf.GradientTape() as tape:
                loss = binary_cross_entropy(y, model(inputs, training=True)[:, 0], tf.ones_like(y))
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


def measure_study(config: Path, workers: Sequence[int] = (1, 2)) -> dict[str, Any]:
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


def report_study(figures: dict[str, Any]) -> str:
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
        rows.append([title, "", f"{seconds:.0f} s", f"{3600 * 6 / seconds:.1f}", "", ""])
    header = [
        "six trials",
        "extraction",
        "search",
        "trials an hour",
        "against plain",
        "against XLA",
    ]
    return table(header, rows)


def measure_quality(
    config: Path, seeds: int = 3, trials: int = 16, epochs: int = 4
) -> dict[str, Any]:
    """Compare TPE with pruning and random search, by the best value for a budget.

    Args:
        config: Settings of the data and the encoders.
        seeds: Searches of each kind.
        trials: Trials of a search.
        epochs: Most epochs of a trial.

    Returns:
        For each kind and seed: the best value after each epoch that was spent,
        in the order in which the trials ran.
    """
    figures: dict[str, Any] = {"trials": trials, "epochs": epochs, "searches": {}}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, sampler, pruner in (("random", "random", "none"), ("tpe", "tpe", "median")):
            curves = []
            for seed in range(seeds):
                space = folder / f"{name}-{seed}.toml"
                space.write_text(
                    QUALITY_SPACE.format(
                        trials=trials, sampler=sampler, pruner=pruner, seed=seed, epochs=epochs
                    )
                )
                found = search(folder, config, f"{name}-{seed}", "--space", str(space))
                best, spent, curve = -math.inf, 0, []
                for trial in found["trials"]:
                    spent += trial["epoch"]
                    best = max(best, -math.inf if trial["value"] is None else trial["value"])
                    curve.append([spent, round(best, 5)])
                curves.append({"curve": curve, "wall_seconds": found["wall_seconds"]})
            figures["searches"][name] = curves
    return figures


def best_after(curve: Sequence[Sequence[float]], budget: float) -> float:
    """Return the best value of the trials that ended within a budget of epochs."""
    return max((value for spent, value in curve if spent <= budget), default=math.nan)


def report_quality(figures: dict[str, Any]) -> str:
    """Return best value against budget as Markdown: mean over seeds, and their spread."""
    most = figures["trials"] * figures["epochs"]
    budgets = [most // 4, most // 2, 3 * most // 4, most]
    rows = []
    for name, searches in figures["searches"].items():
        cells = []
        for budget in budgets:
            values = [best_after(found["curve"], budget) for found in searches]
            cells.append(f"{statistics.fmean(values):.4f} ({min(values):.4f}–{max(values):.4f})")
        spent = statistics.fmean(found["curve"][-1][0] for found in searches)
        seconds = statistics.fmean(found["wall_seconds"] for found in searches)
        title = {"random": "random", "tpe": "TPE, median pruning"}[name]
        rows.append([title, *cells, f"{spent:.0f}", f"{seconds:.0f} s"])
    header = [
        f"best val macro-F1 of {len(searches)} seeds",
        *(f"{budget} epochs" for budget in budgets),
        "epochs spent",
        "wall time",
    ]
    return table(header, rows)
