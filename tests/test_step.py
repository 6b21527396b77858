"""A step is Keras's own: loss, gradients, clipping, decay, scaling, learning rate."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from on_jax import run_on_jax

from featstore.store.numbers import Numbers
from trainer.batches import Batch
from trainer.config import TrainConfig
from trainer.run.optimizer import (
    InPlaceAdamW,
    cut_learning_rate,
    learning_rate,
    make_optimizer,
)
from trainer.run.step import cross_entropy, make_stepper, padded

ROWS, TOKENS, WIDTH, LENGTH = 8, 3, 6, 4
PLAIN = TrainConfig(lr=1e-2, weight_decay=0.1, clipnorm=0.5)


def tiny_model(dtype: str = "float32", dropout: float = 0.0) -> keras.Model:
    """Return a model with the inputs of the cached model, the same at each call."""
    features = keras.Input((TOKENS, WIDTH), dtype="float16", name="features")
    hidden = keras.Input((None, WIDTH), dtype="float16", name="hidden")
    mask = keras.Input((None,), dtype="bool", name="padding_mask")
    weight = keras.layers.Lambda(
        lambda pair: ops.sum(
            ops.cast(pair[0], dtype.removeprefix("mixed_"))
            * ops.cast(pair[1], dtype.removeprefix("mixed_"))[..., None],
            axis=1,
        ),
        output_shape=(WIDTH,),
        dtype=dtype,
    )([hidden, mask])
    x = keras.layers.Concatenate(dtype=dtype)([keras.layers.Flatten(dtype=dtype)(features), weight])
    x = keras.layers.Dense(5, activation="gelu", dtype=dtype)(x)
    x = keras.layers.Dropout(dropout, dtype=dtype)(x)
    logit = keras.layers.Dense(1, dtype="float32", name="logit")(x)
    inputs = {"features": features, "hidden": hidden, "padding_mask": mask}
    model = keras.Model(inputs, logit)
    # From NumPy, so that they are the same on either backend.
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.4, size=variable.shape))
    return model


def random_batch(seed: int, valid: int = ROWS, scale: float = 1.0, length: int = LENGTH) -> Batch:
    rng = np.random.default_rng(seed)
    features = (scale * rng.normal(size=(ROWS, TOKENS, WIDTH))).astype(np.float16)
    hidden = rng.normal(size=(ROWS, length, WIDTH)).astype(np.float16)
    mask = np.arange(length) < rng.integers(1, length + 1, (ROWS, 1))
    labels = rng.integers(0, 2, ROWS).astype(np.float32)
    weights = (np.arange(ROWS) < valid).astype(np.float32)
    return Batch(Numbers(features), Numbers(hidden), mask, labels, weights, np.arange(valid))


def weights_of(model: keras.Model) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in model.trainable_variables]


def train(
    settings: TrainConfig = PLAIN, steps: int = 4, **batch: Any
) -> tuple[list[float], keras.Model]:
    model = tiny_model(settings.dtype_policy)
    stepper = make_stepper([(model, make_optimizer(settings))])
    losses = [float(stepper.train(random_batch(seed, **batch))[0]) for seed in range(steps)]
    stepper.sync()
    return losses, model


def largest_difference(a: keras.Model, b: keras.Model) -> float:
    pairs = zip(weights_of(a), weights_of(b), strict=True)
    return max(float(np.abs(x - y).max()) for x, y in pairs)


def test_the_loss_is_the_mean_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=4, size=50).astype(np.float32)
    labels = rng.integers(0, 2, 50).astype(np.float32)
    weights = rng.integers(0, 2, 50).astype(np.float32)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    terms = -(labels * np.log(p) + (1 - labels) * np.log1p(-p))
    expected = (terms * weights).sum() / weights.sum()
    found = float(cross_entropy(labels, logits, weights))
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_huge_logits_is_finite_and_right() -> None:
    logits = np.array([1e4, -1e4, 1e4, -1e4], np.float32)
    labels = np.array([1, 0, 0, 1], np.float32)
    assert float(cross_entropy(labels, logits, np.ones(4, np.float32))) == 5e3


def test_the_loss_has_the_right_gradient_at_0() -> None:
    logits = tf.Variable([0.0, 0.0])
    with tf.GradientTape() as tape:
        loss = cross_entropy(tf.constant([1.0, 0.0]), logits, tf.ones(2))
    np.testing.assert_allclose(tape.gradient(loss, logits), [-0.25, 0.25])


def test_steps_equal_keras_own() -> None:
    losses, model = train(steps=5)
    oracle = tiny_model()
    oracle.compile(
        optimizer=keras.optimizers.AdamW(1e-2, weight_decay=0.1, clipnorm=0.5),
        loss=keras.losses.BinaryCrossentropy(from_logits=True),
        jit_compile=False,
    )
    start = weights_of(oracle)
    expected = []
    for seed in range(5):
        batch = random_batch(seed)
        # The loss is a running mean since the last reset of the metrics.
        oracle.reset_metrics()
        expected.append(float(oracle.train_on_batch(batch.inputs(), batch.labels[:, None])))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert largest_difference(model, oracle) < 2e-6
    moved = zip(start, weights_of(oracle), strict=True)
    assert min(float(np.abs(a - b).max()) for a, b in moved) > 1e-3


def test_filling_rows_change_nothing() -> None:
    settings = TrainConfig(lr=1e-2)
    results = []
    for filling in (0.0, 50.0):
        model = tiny_model()
        stepper = make_stepper([(model, make_optimizer(settings))])
        losses = []
        for seed in range(3):
            batch = random_batch(seed, valid=5)
            batch.features.values[5:] += np.float16(filling)
            batch.labels[5:] = 1 - batch.labels[5:] if filling else batch.labels[5:]
            losses.append(float(stepper.train(batch)[0]))
        results.append((losses, model))
    assert results[0][0] == results[1][0]
    assert largest_difference(results[0][1], results[1][1]) == 0


def test_the_loss_of_a_filled_batch_is_that_of_its_rows() -> None:
    batch = random_batch(0, valid=5)
    model = tiny_model()
    logits = np.asarray(model(batch.inputs()))[:5, 0].astype(np.float64)
    p = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.where(batch.labels[:5] == 1, np.log(p), np.log(1 - p)))
    stepper = make_stepper([(model, make_optimizer(PLAIN))])
    assert float(stepper.train(batch)[0]) == pytest.approx(expected, rel=1e-5)


def test_predictions_are_the_models_on_valid_rows() -> None:
    model = tiny_model(dropout=0.5)
    batch = random_batch(1, valid=6)
    stepper = make_stepper([(model, make_optimizer(PLAIN))])
    (found,) = stepper.predict(batch)
    assert found.shape == (6,)
    expected = np.asarray(model(batch.inputs(), training=False))[:6, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"clipnorm": 1e-3}, {"clipnorm": 0.0}, {"weight_decay": 0.0}, {"lr": 2e-2}]
)
def test_each_setting_of_the_optimizer_is_used(change: dict[str, float]) -> None:
    # Adam forgets the scale of gradients that is the same at each step: scale them unlike.
    def run(settings: TrainConfig) -> keras.Model:
        model = tiny_model()
        stepper = make_stepper([(model, make_optimizer(settings))])
        for seed in range(4):
            stepper.train(random_batch(seed, scale=(1 + seed) ** 2))
        return model

    changed = dataclasses.replace(PLAIN, **change)
    assert largest_difference(run(PLAIN), run(changed)) > 1e-5


def test_weight_decay_shrinks_weights_that_have_no_gradient() -> None:
    model = tiny_model()
    # Behind zero output weights the hidden layer has no gradient.
    model.get_layer("logit").kernel.assign(np.zeros((5, 1)))
    before = np.asarray(model.trainable_variables[0])
    settings = TrainConfig(lr=1e-2, weight_decay=0.5)
    make_stepper([(model, make_optimizer(settings))]).train(random_batch(0))
    after = np.asarray(model.trainable_variables[0])
    np.testing.assert_allclose(after, before * (1 - 1e-2 * 0.5), rtol=1e-5)


@pytest.mark.parametrize("clipnorm", [0.0, 1e-2, 1e3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_optimizer_is_adamw_of_keras(clipnorm: float, weight_decay: float) -> None:
    settings = TrainConfig(lr=1e-2, weight_decay=weight_decay, clipnorm=clipnorm)
    own = make_optimizer(settings)
    plain = make_optimizer(dataclasses.replace(settings, fast_path=False))
    assert type(own) is InPlaceAdamW
    assert isinstance(plain, keras.optimizers.AdamW)
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape).astype(np.float32) for shape in ((40, 30), (7,), (3, 4, 5))]
    sides = []
    for optimizer in (own, plain):
        variables = [keras.Variable(values) for values in start]
        optimizer.build(variables)
        sides.append(variables)
    for step in range(6):
        gradients = [tf.constant(rng.normal(size=x.shape), tf.float32) * 10**-step for x in start]
        for optimizer, variables in zip((own, plain), sides, strict=True):
            optimizer.apply(gradients, variables)
        # A checkpoint keeps the optimizer's variables by their order.
        for one, other in zip(
            [*sides[0], *own.variables], [*sides[1], *plain.variables], strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=3e-5, atol=1e-6)
    assert int(own.iterations) == 6
    moved = [np.abs(np.asarray(x) - y).max() for x, y in zip(sides[0], start, strict=True)]
    assert min(moved) > 1e-2


def test_the_step_is_traced_once_for_all_lengths() -> None:
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            traces.append(1)
            return x

    base = tiny_model()
    model = keras.Model({t.name: t for t in base.inputs}, Counted()(base.output))
    stepper = make_stepper([(model, make_optimizer(PLAIN))])
    stepper.train(random_batch(0))
    traced = len(traces)
    for length in (1, 2, 9):
        stepper.train(random_batch(1, length=length))
    assert len(traces) == traced


def test_jax_sees_few_lengths() -> None:
    for length, expected in ((1, 1), (2, 4), (4, 4), (5, 8), (23, 24)):
        inputs = random_batch(0, length=length).inputs()
        found = padded(inputs)
        assert found["hidden"].shape == (ROWS, expected, WIDTH)
        assert found["padding_mask"].shape == (ROWS, expected)
        np.testing.assert_array_equal(found["hidden"][:, :length], inputs["hidden"])
        np.testing.assert_array_equal(found["padding_mask"][:, :length], inputs["padding_mask"])
        assert not found["padding_mask"][:, length:].any()
        assert found["features"] is inputs["features"]


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_stays_close_and_finite(policy: str) -> None:
    exact, _ = train()
    mixed, model = train(dataclasses.replace(PLAIN, dtype_policy=policy))
    np.testing.assert_allclose(mixed, exact, rtol=0.1)
    assert mixed != exact
    assert all(np.isfinite(weight).all() for weight in weights_of(model))
    assert {weight.dtype.name for weight in weights_of(model)} == {"float32"}


def test_float16_scales_the_loss_and_skips_a_step_that_overflows() -> None:
    settings = dataclasses.replace(PLAIN, dtype_policy="mixed_float16")
    model = tiny_model("mixed_float16")
    optimizer = make_optimizer(settings)
    stepper = make_stepper([(model, optimizer)])
    scale = float(optimizer.dynamic_scale)
    assert scale > 1
    before = weights_of(model)
    batch = random_batch(0)
    batch.features.values[:] = 6e4
    stepper.train(batch)
    assert all((a == b).all() for a, b in zip(before, weights_of(model), strict=True))
    assert float(optimizer.dynamic_scale) < scale
    stepper.train(random_batch(1))
    assert any((a != b).any() for a, b in zip(before, weights_of(model), strict=True))


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_acut_learning_rate_takes_effect_without_tracing_again(policy: str) -> None:
    settings = dataclasses.replace(PLAIN, weight_decay=0.0, dtype_policy=policy)
    traces = []

    class Counted(keras.layers.Layer):
        def call(self, x: Any) -> Any:
            traces.append(1)
            return x

    base = tiny_model(policy)
    model = keras.Model(base.inputs, Counted(dtype="float32")(base.output))
    model = keras.Model({t.name: t for t in base.inputs}, model.output)
    optimizer = make_optimizer(settings)
    stepper = make_stepper([(model, optimizer)])
    stepper.train(random_batch(0))
    traced = len(traces)
    cut_learning_rate(optimizer, 1e-6)
    assert learning_rate(optimizer) == pytest.approx(1e-8)
    before = weights_of(model)
    stepper.train(random_batch(0))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(before, weights_of(model), strict=True))
    assert moved < 1e-6
    cut_learning_rate(optimizer, 1e6)
    stepper.train(random_batch(0))
    moved = max(float(np.abs(a - b).max()) for a, b in zip(before, weights_of(model), strict=True))
    assert moved > 1e-4
    assert len(traces) == traced


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_jax_gives_the_same_losses() -> None:
    program = "import json, test_step; print(json.dumps(test_step.train()[0]))"
    losses = json.loads(run_on_jax("-c", program, timeout=300).splitlines()[-1])
    np.testing.assert_allclose(losses, train()[0], rtol=1e-4)
