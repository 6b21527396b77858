"""The fast path against the plain Keras and keras-hub layers: outputs, gradients, draws."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_presets import randomise

from featstore.encoders.presets import resolve_preset
from trainer.config import TrainConfig
from trainer.model.cached import build_cached_model
from trainer.model.encoder_layers import encoder_layer, first_token_layer
from trainer.run.optimizer import make_optimizer
from trainer.run.step import cross_entropy, make_stepper

WIDTH = 8


def text_layer(dropout: float, pre_norm: bool, activation: str = "gelu") -> Any:
    layer = keras_hub.layers.TransformerEncoder(
        intermediate_dim=12,
        num_heads=2,
        dropout=dropout,
        activation=activation,
        normalize_first=pre_norm,
    )
    layer.build((None, None, WIDTH))
    randomise(layer, 5)
    return layer


def seeds(layer: Any) -> list[Any]:
    return [g.state for part in layer._flatten_layers() for g in part._seed_generators]


def output_and_gradients(call: Any, layer: Any, hidden: Any) -> list[Any]:
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        output = call(hidden)
        loss = tf.reduce_sum(tf.sin(output))
    gradients = tape.gradient(loss, [hidden, *layer.trainable_variables])
    assert None not in gradients
    return [output, *gradients]


@pytest.mark.parametrize("length", range(1, 25))
def test_every_length(length: int) -> None:
    layer = text_layer(0.1, pre_norm=False)
    hidden = tf.constant(np.random.default_rng(length).normal(size=(3, length, WIDTH)), tf.float32)
    mask = np.arange(length) < np.array([[1], [length], [length // 2 + 1]])
    for fast, take in ((encoder_layer, slice(None)), (first_token_layer, slice(0, 1))):
        expected = output_and_gradients(
            lambda x, take=take: layer(x, padding_mask=mask, training=False)[:, take], layer, hidden
        )
        found = output_and_gradients(
            lambda x, fast=fast: fast(layer, x, mask, training=False), layer, hidden
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 24),
    valid=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    masked=st.booleans(),
    pre_norm=st.booleans(),
    training=st.booleans(),
    half=st.booleans(),
    first=st.booleans(),
)
def test_text_layer_equals_keras_hub(
    length: int,
    valid: list[int],
    masked: bool,
    pre_norm: bool,
    training: bool,
    half: bool,
    first: bool,
) -> None:
    """Every length and padding, dropout on with the same draws or off, either input dtype."""
    layer = text_layer(0.3, pre_norm)
    values = np.random.default_rng(length).normal(size=(len(valid), length, WIDTH))
    hidden = tf.constant(values.astype(np.float16 if half else np.float32))
    hidden = tf.cast(hidden, tf.float32)
    mask = np.arange(length) < np.minimum(valid, length)[:, None] if masked else None
    states = [state.numpy() for state in seeds(layer)]

    def plain(x: Any) -> Any:
        output = layer(x, padding_mask=mask, training=training)
        return output[:, :1] if first else output

    def fast(x: Any) -> Any:
        return (first_token_layer if first else encoder_layer)(layer, x, mask, training=training)

    expected = output_and_gradients(plain, layer, hidden)
    for state, value in zip(seeds(layer), states, strict=True):
        state.assign(value)
    found = output_and_gradients(fast, layer, hidden)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("first", [True, False])
def test_text_layer_computes_in_its_own_precision(first: bool) -> None:
    layer = keras_hub.layers.TransformerEncoder(12, 2, dtype="mixed_bfloat16", name="mixed")
    layer.build((None, None, WIDTH))
    randomise(layer, 5)
    hidden = tf.cast(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), tf.bfloat16)
    mask = np.array([[True] * 5, [True] * 3 + [False] * 2])
    fast = (first_token_layer if first else encoder_layer)(layer, hidden, mask, training=False)
    plain = layer(hidden, padding_mask=mask, training=False)
    assert fast.dtype == plain.dtype == tf.bfloat16
    plain = plain[:, :1] if first else plain
    np.testing.assert_allclose(tf.cast(fast, "float32"), tf.cast(plain, "float32"), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("k_txt", [0, 1, 3])
def test_plain_and_fast_models_train_alike(tiny_text: Path, tmp_path: Path, k_txt: int) -> None:
    """Six steps of AdamW with dropout on: the same losses, and files that fit either model."""
    from featstore.store.numbers import Numbers
    from trainer.batches import Batch

    train = TrainConfig(k_txt=k_txt, num_heads=2, head_dim=4, mlp_dim=6, lr=1e-3, dropout=0.3)
    plain = dataclasses.replace(train, fast_path=False)
    config = resolve_preset(tiny_text).config
    rng = np.random.default_rng(0)
    batches = []
    for length in (5, 9) * 3:
        mask = np.arange(length) < rng.integers(1, length + 1, size=(6, 1))
        batches.append(
            Batch(
                Numbers(rng.normal(size=(6, 7, 9)).astype(np.float16)),
                Numbers(rng.normal(size=(6, length, 16)).astype(np.float16)),
                mask,
                rng.integers(0, 2, 6).astype(np.float32),
                np.array([1, 1, 1, 1, 1, 0], np.float32),
                np.arange(5),
            )
        )
    losses, models = [], []
    for own in (train, plain):
        model = build_cached_model(config, 9, 7, own)
        stepper = make_stepper([(model, make_optimizer(own))])
        losses.append([float(stepper.train(batch)[0]) for batch in batches])
        models.append(model)
    np.testing.assert_allclose(losses[0], losses[1], atol=2e-5)
    assert len(set(np.round(losses[0], 6))) == len(batches)
    inputs = batches[1].inputs()
    assert type(models[1].get_layer("xattn")) is keras.layers.MultiHeadAttention
    for written, reading in ((models[0], plain), (models[1], train)):
        file = tmp_path / f"{reading.fast_path}.weights.h5"
        written.save_weights(file)
        other = build_cached_model(config, 9, 7, reading)
        other.load_weights(file)
        expected = written(inputs, training=False)
        np.testing.assert_allclose(other(inputs, training=False), expected, atol=1e-5)


def test_loss_has_a_gradient_at_zero() -> None:
    logits = tf.Variable([0.0, 0.0])
    with tf.GradientTape() as tape:
        loss = cross_entropy(tf.constant([1.0, 0.0]), logits, tf.ones(2))
    np.testing.assert_allclose(tape.gradient(loss, logits), [-0.25, 0.25])
