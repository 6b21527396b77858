"""One training step: cached against end to end, at the study's size.

ViT-B/16 at 224 and DistilBERT base with random weights, a batch of synthetic
pixels and of hypotheses of a usual length. Both sides run in one process, in
turns, so that a machine that slows down meanwhile slows both.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from benchmarks.tables import table
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.end_to_end import build_end_to_end
from trainer.step import binary_cross_entropy, make_optimizer, make_stepper
from trainer.tower import build_cached_model

TOKENS, WIDTH, SEQUENCE_LENGTH = 196, 768, 24
TEXT_CONFIG = {
    "class_name": "DistilBertBackbone",
    "config": {
        "vocabulary_size": 30522,
        "num_layers": 6,
        "num_heads": 12,
        "hidden_dim": WIDTH,
        "intermediate_dim": 4 * WIDTH,
        "dropout": 0.1,
        "max_sequence_length": 512,
    },
}


def random_batch(rows: int, length: int, seed: int = 0) -> Batch:
    """Return a batch of random features, its sentences up to four tokens shorter than `length`."""
    rng = np.random.default_rng(seed)
    valid = rng.integers(max(1, length - 4), length + 1, (rows, 1))
    return Batch(
        rng.normal(size=(rows, TOKENS, WIDTH)).astype(np.float16),
        rng.normal(size=(rows, length, WIDTH)).astype(np.float16),
        np.arange(length) < valid,
        rng.integers(0, 2, rows).astype(np.float32),
        np.ones(rows, np.float32),
        np.arange(rows),
    )


def cached_step(k_txt: int, rows: int, length: int) -> Callable[[], Any]:
    """Return a call that takes one step over cached features and waits for it."""
    train = TrainConfig(k_txt=k_txt)
    model = build_cached_model(TEXT_CONFIG, WIDTH, TOKENS, train)
    stepper = make_stepper([(model, make_optimizer(train))])
    batches = [random_batch(rows, length if k_txt else 1, seed) for seed in range(3)]
    taken = 0

    def step() -> Any:
        nonlocal taken
        taken += 1
        return float(np.asarray(stepper.train(batches[taken % 3])[0]))

    return step


def end_to_end_step(k_txt: int, rows: int, compiled: bool) -> Callable[[], Any]:
    """Return a call that takes one step from pixels and tokens.

    The frozen layers run forwards only on both sides; `compiled` is XLA.
    """
    import keras_hub
    import tensorflow as tf

    train = TrainConfig(k_txt=k_txt)
    vision = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=WIDTH,
        mlp_dim=4 * WIDTH,
    )
    text = keras_hub.models.DistilBertBackbone.from_config(TEXT_CONFIG["config"])
    model = build_end_to_end(vision, text, train)
    optimizer = make_optimizer(train)
    optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    valid = rng.integers(7, 13, (rows, 1))
    inputs = {
        "pixel_values": tf.constant(rng.normal(size=(rows, 224, 224, 3)), tf.float32),
        "input_ids": tf.constant(rng.integers(1, 30000, (rows, SEQUENCE_LENGTH)), tf.int32),
        "attention_mask": tf.constant(np.arange(SEQUENCE_LENGTH) < valid, tf.int32),
    }
    labels = tf.constant(rng.integers(0, 2, rows), tf.float32)
    weights = tf.ones(rows)

    @tf.function(jit_compile=compiled)
    def train_step() -> Any:
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)[:, 0]
            loss = binary_cross_entropy(labels, logits, weights)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    return lambda: float(train_step())


def measure(
    layers: list[int], rows: int = 32, length: int = 12, rounds: int = 3, steps: int = 10
) -> dict[str, Any]:
    """Time a step for each number of trained text layers, both ways.

    Args:
        layers: Values of k_txt.
        rows: Rows of a step.
        length: Tokens that the cached batch is padded to.
        rounds: In each, every side runs once, end to end one step.
        steps: Cached steps of a round.

    Returns:
        Median and spread in seconds of each side, and the median ratios of the
        rounds.
    """
    figures: dict[str, Any] = {"batch_size": rows, "tokens": length, "k_txt": {}}
    for k_txt in layers:
        sides = {
            "cached": cached_step(k_txt, rows, length),
            "end_to_end": end_to_end_step(k_txt, rows, compiled=False),
            "end_to_end_xla": end_to_end_step(k_txt, rows, compiled=True),
        }
        for step in sides.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, step in sides.items():
                taken = []
                for _ in range(steps if name == "cached" else 1):
                    started = time.perf_counter()
                    step()
                    taken.append(time.perf_counter() - started)
                seconds[name].append(statistics.median(taken))
        found: dict[str, Any] = {
            name: {
                "seconds": round(statistics.median(values), 5),
                "spread": [round(min(values), 5), round(max(values), 5)],
            }
            for name, values in seconds.items()
        }
        for name in ("end_to_end", "end_to_end_xla"):
            pairs = zip(seconds[name], seconds["cached"], strict=True)
            found[name]["ratio"] = round(statistics.median(a / b for a, b in pairs), 1)
        figures["k_txt"][str(k_txt)] = found
        del sides
        keras.backend.clear_session()
        gc.collect()
    return figures


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    rows = [
        [
            k_txt,
            f"{1e3 * found['cached']['seconds']:.1f} ms",
            f"{found['end_to_end']['seconds']:.2f} s",
            f"{found['end_to_end']['ratio']:.0f}×",
            f"{found['end_to_end_xla']['seconds']:.2f} s",
            f"{found['end_to_end_xla']['ratio']:.0f}×",
        ]
        for k_txt, found in figures["k_txt"].items()
    ]
    header = ["k_txt", "cached", "end to end", "ratio", "end to end, XLA", "ratio"]
    return table(header, rows)
