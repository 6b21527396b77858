"""One training step: cached against end to end, at the study's size.

ViT-B/16 at 224 and DistilBERT base with random weights, synthetic pixels, and
sentences as long as the hypotheses of SNLI-VE. Both sides run in one process, in
turns, so that a machine that slows down meanwhile slows both.

A cached batch is padded to the longest of sentences of like length, as an epoch
of the study's size has it: the steps of a round are such batches. End to end
pads all to 24 tokens, as the study did; a few of 24 beside 196 patches and
twelve blocks of the ViT do not matter there.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring import seconds_of
from benchmarks.sentences import padded_lengths
from benchmarks.sizes import STUDY, Size
from benchmarks.tables import table
from featstore.store.numbers import Numbers, aligned_empty
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.model.cached import build_cached_model
from trainer.model.end_to_end import build_end_to_end
from trainer.run.optimizer import make_optimizer
from trainer.run.step import Stepper, cross_entropy, make_stepper


def random_batch(rows: int, length: int, seed: int = 0, size: Size = STUDY) -> Batch:
    """Return a batch of random features, its sentences up to four tokens shorter than `length`."""
    rng = np.random.default_rng(seed)
    valid = rng.integers(max(1, length - 4), length + 1, (rows, 1))
    features = aligned_empty((rows, size.tokens, size.width), np.float16)
    features[...] = rng.standard_normal(features.shape, np.float32)
    return Batch(
        Numbers(features),
        Numbers(rng.standard_normal((rows, length, size.width), np.float32).astype(np.float16)),
        np.arange(length) < valid,
        rng.integers(0, 2, rows).astype(np.float32),
        np.ones(rows, np.float32),
        np.arange(rows),
    )


def cached_stepper(train: TrainConfig, size: Size = STUDY) -> tuple[keras.Model, Stepper]:
    """Return a cached model and what trains it."""
    model = build_cached_model(size.text_config, size.width, size.tokens, train)
    return model, make_stepper([(model, make_optimizer(train))])


def cached_step(
    k_txt: int, rows: int, lengths: Sequence[int], size: Size = STUDY
) -> Callable[[], Any]:
    """Return a call that takes one step over cached features and waits for it.

    Args:
        k_txt: Text layers that train; with none, one token of a sentence is read.
        rows: Rows of a batch.
        lengths: What the batches of consecutive calls are padded to, over and over.
        size: Of the features.
    """
    _, stepper = cached_stepper(size.train(k_txt), size)
    lengths = lengths if k_txt else [1]
    batches = {
        length: [random_batch(rows, length, seed, size) for seed in range(3)]
        for length in set(lengths)
    }
    for one in batches.values():  # traces, or compiles under JAX
        stepper.train(one[0])
    taken = 0

    def step() -> Any:
        nonlocal taken
        batch = batches[lengths[taken % len(lengths)]][taken % 3]
        taken += 1
        return float(np.asarray(stepper.train(batch)[0]))

    return step


@dataclass
class PixelBatch:
    """A batch of the end-to-end model, as a stepper reads it."""

    pixel_values: NDArray[np.float32]
    input_ids: NDArray[np.int32]
    attention_mask: NDArray[np.int32]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]

    def inputs(self) -> dict[str, Any]:
        """Return the model's inputs by name."""
        return {
            "pixel_values": self.pixel_values,
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
        }

    @property
    def rows(self) -> NDArray[np.int64]:
        """Positions of the valid rows: all."""
        return np.arange(len(self.labels))


def pixel_batch(rows: int, size: Size = STUDY) -> PixelBatch:
    """Return random pixels and sentences of 7 to 12 tokens."""
    rng = np.random.default_rng(0)
    valid = rng.integers(7, 13, (rows, 1))
    shape = (rows, size.sequence_length)
    return PixelBatch(
        rng.standard_normal((rows, size.image, size.image, 3), np.float32),
        rng.integers(1, size.vocabulary, shape).astype(np.int32),
        (np.arange(size.sequence_length) < valid).astype(np.int32),
        rng.integers(0, 2, rows).astype(np.float32),
        np.ones(rows, np.float32),
    )


@dataclass
class EndToEnd:
    """The end-to-end model's calls; each runs one batch and waits for it.

    Attributes:
        train: Takes an optimizer step. The frozen layers run forwards only.
        predict: Computes the logits.
    """

    train: Callable[[], Any]
    predict: Callable[[], Any]


def end_to_end(
    k_txt: int, rows: int, compiled: bool, size: Size = STUDY, dtype_policy: str = "float32"
) -> EndToEnd:
    """Return the steps from pixels and tokens.

    Args:
        k_txt: Text layers that train.
        rows: Rows of a batch.
        compiled: Use XLA; JAX always does.
        size: Of the encoders.
        dtype_policy: Of both encoders and of the head.
    """
    train = size.train(k_txt, dtype_policy=dtype_policy)
    vision = size.vision_backbone(dtype=dtype_policy)
    text = size.text_backbone(dtype=dtype_policy)
    model = build_end_to_end(vision, text, train)
    optimizer = make_optimizer(train)
    optimizer.build(model.trainable_variables)
    batch: Any = pixel_batch(rows, size)
    if keras.backend.backend() == "jax":
        import jax

        # Read by every step: on the device once.
        batch = PixelBatch(**jax.device_put(vars(batch)))
        stepper = make_stepper([(model, optimizer)])
        return EndToEnd(
            lambda: float(np.asarray(stepper.train(batch)[0])), lambda: stepper.predict(batch)
        )
    import tensorflow as tf

    inputs, labels, weights = tf.nest.map_structure(
        tf.constant, (batch.inputs(), batch.labels, batch.weights)
    )

    @tf.function(jit_compile=compiled)
    def train_step() -> Any:
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)[:, 0]
            loss = cross_entropy(labels, logits, weights)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    @tf.function(jit_compile=compiled)
    def predict() -> Any:
        return model(inputs, training=False)[:, 0]

    return EndToEnd(lambda: float(train_step()), lambda: predict().numpy())


def release() -> None:
    """Let go of the models that nobody holds any more."""
    keras.backend.clear_session()
    gc.collect()


def measure(
    layers: Sequence[int],
    rows: int = 32,
    lengths: Sequence[int] | None = None,
    rounds: int = 3,
    steps: int = 32,
    size: Size = STUDY,
) -> dict[str, Any]:
    """Time a step for each number of trained text layers, both ways.

    Args:
        layers: Values of k_txt.
        rows: Rows of a step.
        lengths: Tokens that cached batches are padded to; None: as many as those
            of `steps` batches of an epoch of the study.
        rounds: In each, every side runs once, end to end one step.
        steps: Cached steps of a round, of which the mean counts.
        size: Of the encoders.

    Returns:
        Median and spread in seconds of each side, and the median ratios of the
        rounds.
    """
    lengths = lengths or padded_lengths(size.sequence_length, rows, steps)
    figures: dict[str, Any] = {
        "size": size.name,
        "batch_size": rows,
        "tokens": round(statistics.fmean(lengths), 2),
        "rounds": rounds,
        "k_txt": {},
    }
    for k_txt in layers:
        sides = {
            "cached": cached_step(k_txt, rows, lengths, size),
            "end_to_end": end_to_end(k_txt, rows, False, size).train,
            "end_to_end_xla": end_to_end(k_txt, rows, True, size).train,
        }
        for step in sides.values():
            step()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, step in sides.items():
                times = steps if name == "cached" else 1
                seconds[name].append(statistics.fmean(seconds_of(step) for _ in range(times)))
        found: dict[str, Any] = {
            name: {
                "seconds": round(statistics.median(values), 5),
                "spread": [round(min(values), 5), round(max(values), 5)],
            }
            for name, values in seconds.items()
        }
        for name in ("end_to_end", "end_to_end_xla"):
            pairs = [a / b for a, b in zip(seconds[name], seconds["cached"], strict=True)]
            found[name]["ratio"] = round(statistics.median(pairs), 1)
            found[name]["ratio_spread"] = [round(min(pairs), 1), round(max(pairs), 1)]
        figures["k_txt"][str(k_txt)] = found
        del sides
        release()
    return figures


def report(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""

    def ratio(side: dict[str, Any]) -> str:
        low, high = side["ratio_spread"]
        return f"{side['ratio']:.0f}× ({low:.0f}–{high:.0f})"

    rows = []
    for k_txt, found in figures["k_txt"].items():
        low, high = found["cached"]["spread"]
        rows.append(
            [
                k_txt,
                f"{1e3 * found['cached']['seconds']:.1f} ms ({1e3 * low:.1f}–{1e3 * high:.1f})",
                f"{found['end_to_end']['seconds']:.2f} s",
                ratio(found["end_to_end"]),
                f"{found['end_to_end_xla']['seconds']:.2f} s",
                ratio(found["end_to_end_xla"]),
            ]
        )
    header = ["k_txt", "cached", "end to end", "ratio", "end to end, XLA", "ratio"]
    head = (
        f"One training step of {figures['batch_size']} rows, padded to {figures['tokens']} tokens"
        " on average where text layers train; median (least–greatest) of"
        f" {figures['rounds']} rounds."
    )
    return f"{head}\n\n{table(header, rows)}"
