"""The fast MultiHeadAttention against Keras's own: outputs, gradients, weights, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import ConfigError
from trainer.config import TrainConfig
from trainer.model.head import HEAD_LAYERS, MultiHeadAttention, apply_head
from trainer.model.weights import seeded


def pair(query_width: int, width: int, heads: int, **kwargs: Any) -> tuple[Any, Any]:
    """Return the plain and the fast layer with the same random weights."""
    layers = [
        cls(heads, 4, name="xattn", **kwargs)
        for cls in (keras.layers.MultiHeadAttention, MultiHeadAttention)
    ]
    rng = np.random.default_rng(0)
    for layer in layers:
        layer.build((None, 1, query_width), (None, None, width))
    for plain, fast in zip(layers[0].weights, layers[1].weights, strict=True):
        assert (plain.path, plain.shape) == (fast.path, fast.shape)
        plain.assign(rng.normal(scale=0.5, size=plain.shape))
        fast.assign(plain)
    return layers[0], layers[1]


def arrays(
    batch: int, queries: int, query_width: int, tokens: int, width: int, seed: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(batch, queries, query_width)).astype(np.float32)
    return query, rng.normal(size=(batch, tokens, width)).astype(np.float16)


def output_and_gradients(layer: Any, query: Any, features: Any, **kwargs: Any) -> list[np.ndarray]:
    query, features = tf.constant(query), tf.constant(features)
    with tf.GradientTape() as tape:
        tape.watch([query, features])
        output = layer(query, features, **kwargs)
        loss = tf.reduce_sum(
            output * tf.sin(tf.range(tf.size(output), dtype="float32") + 1)[: output.shape[-1]]
        )
    gradients = tape.gradient(loss, [*layer.trainable_variables, query, features])
    assert None not in gradients
    return [output.numpy(), *(gradient.numpy() for gradient in gradients)]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    query_width=st.integers(1, 9),
    width=st.integers(1, 9),
    tokens=st.integers(1, 7),
    use_bias=st.booleans(),
    half=st.booleans(),
)
def test_equals_keras(
    batch: int, heads: int, query_width: int, width: int, tokens: int, use_bias: bool, half: bool
) -> None:
    plain, fast = pair(query_width, width, heads, use_bias=use_bias)
    query, features = arrays(batch, 1, query_width, tokens, width)
    if not half:
        features = features.astype(np.float32)
    # The gradient that reaches float16 features is rounded to float16.
    tolerance = 2e-3 if half else 1e-5
    expected = output_and_gradients(plain, query, features)
    found = output_and_gradients(fast, query, features)
    assert_close(found[:-1], expected[:-1], 1e-5)
    assert_close(found[-1:], expected[-1:], tolerance)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_input_dtype_is_cast_in_the_graph(dtype: str) -> None:
    _, fast = pair(6, 5, 2)
    query, features = arrays(2, 1, 6, 4, 5)
    stored = keras.ops.cast(features, dtype)
    widened = keras.ops.cast(stored, "float32")
    output = fast(query, stored)
    assert output.dtype == "float32"
    np.testing.assert_array_equal(np.asarray(output), np.asarray(fast(query, widened)))


def test_fast_path_projects_no_token() -> None:
    """The property that makes it fast: no product of the size of the projected tokens."""
    _, fast = pair(8, 8, 2)
    query, features = arrays(1, 1, 8, 997, 8)
    graph = tf.function(fast).get_concrete_function(query, features.astype(np.float32)).graph
    projected = {(1, 997, 2, 4), (997, 8)}
    shapes = {
        tuple(out.shape)
        for op in graph.get_operations()
        for out in op.outputs
        if op.type in ("Einsum", "MatMul", "BatchMatMulV2")
    }
    assert shapes
    assert not shapes & projected


@pytest.mark.parametrize(
    ("queries", "kwargs"),
    [
        (5, {}),
        (1, {"attention_mask": np.array([[[True, False, True, True]]] * 2)}),
        (1, {"key": np.ones((2, 4, 5), np.float32)}),
    ],
)
def test_other_calls_are_the_parents(queries: int, kwargs: dict[str, Any]) -> None:
    plain, fast = pair(6, 5, 2)
    query, features = arrays(2, queries, 6, 4, 5)
    features = features.astype(np.float32)
    expected = np.asarray(plain(query, features, **kwargs))
    np.testing.assert_array_equal(np.asarray(fast(query, features, **kwargs)), expected)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("queries", [2, 4])
def test_few_queries_are_kerass(queries: int, use_bias: bool) -> None:
    """Values, gradients and dropout, of as many queries as a head is wide."""
    plain, fast = pair(6, 5, 3, use_bias=use_bias, dropout=0.4, seed=7)
    query, features = arrays(3, queries, 6, 7, 5)
    features = features.astype(np.float32)
    for training in (False, True, True):
        expected = output_and_gradients(plain, query, features, training=training)
        found = output_and_gradients(fast, query, features, training=training)
        assert_close(found, expected, 1e-5)
    _, weights = fast(query, features, return_attention_scores=True)
    assert weights.shape == (3, 3, queries, 7)
    graph = tf.function(fast).get_concrete_function(query, features).graph
    shapes = {tuple(out.shape) for op in graph.get_operations() for out in op.outputs}
    # No token was projected.
    assert not shapes & {(3, 7, 3, 4), (21, 12)}


def test_gate_is_the_parents() -> None:
    plain, fast = pair(6, 5, 2, use_gate=True)
    query, features = arrays(2, 1, 6, 4, 5)
    expected = np.asarray(plain(query, features.astype(np.float32)))
    np.testing.assert_array_equal(np.asarray(fast(query, features.astype(np.float32))), expected)


def test_attention_weights() -> None:
    plain, fast = pair(6, 5, 2)
    query, features = arrays(3, 1, 6, 4, 5)
    _, expected = plain(query, features, return_attention_scores=True)
    output, weights = fast(query, features, return_attention_scores=True)
    assert weights.shape == (3, 2, 1, 4)
    np.testing.assert_allclose(np.asarray(weights), np.asarray(expected), atol=1e-6)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(output), np.asarray(fast(query, features)))
    symbolic = fast(keras.Input((1, 6)), keras.Input((4, 5)), return_attention_scores=True)
    assert [tensor.shape for tensor in symbolic] == [(None, 1, 6), (None, 2, 1, 4)]


def test_dropout_is_the_same_draw() -> None:
    """One seed, one shape of scores: both layers drop the same ones, so Σ a is not 1 in either."""
    plain, fast = pair(6, 5, 2, dropout=0.5, seed=7)
    query, features = arrays(8, 1, 6, 6, 5)
    features = features.astype(np.float32)
    still = np.asarray(fast(query, features, training=False))
    for _ in range(2):
        expected = output_and_gradients(plain, query, features, training=True)
        found = output_and_gradients(fast, query, features, training=True)
        assert_close(found, expected, 1e-5)
        assert np.abs(found[0] - still).max() > 1e-2


@pytest.mark.parametrize("direction", ["to fast", "to plain"])
def test_weights_file_goes_either_way(tmp_path: Path, direction: str) -> None:
    class Holder(keras.Model):
        def __init__(self, attention: Any) -> None:
            super().__init__()
            self.attention = attention

        def call(self, inputs: Any) -> Any:
            return self.attention(inputs["query"], inputs["features"])

    query, features = arrays(2, 1, 6, 4, 5)
    inputs = {"query": query, "features": features.astype(np.float32)}
    plain, _ = pair(6, 5, 2)
    _, fast = pair(6, 5, 2)
    source, target = (plain, fast) if direction == "to fast" else (fast, plain)
    for weight in target.weights:
        weight.assign(np.zeros(weight.shape))
    source, target = Holder(source), Holder(target)
    expected = source(inputs)
    target(inputs)
    source.save_weights(tmp_path / "x.weights.h5")
    target.load_weights(tmp_path / "x.weights.h5")
    np.testing.assert_allclose(np.asarray(target(inputs)), np.asarray(expected), atol=1e-6)


def head(train: TrainConfig, text_width: int, width: int, tokens: int, fast: bool) -> Any:
    cls, features = keras.Input((1, text_width)), keras.Input((tokens, width))
    return keras.Model([cls, features], apply_head(cls, features, train, fast=fast))


@pytest.mark.parametrize("fast", [True, False])
def test_several_layers_ask_with_what_the_one_before_found(fast: bool) -> None:
    train = TrainConfig(num_heads=2, head_dim=4, mlp_dim=3, fusion_layers=3)
    model = head(train, 6, 5, 4, fast)
    names = [layer.name for layer in model.layers]
    assert [name for name in names if name.startswith("xattn")] == [
        f"{stem}{part}"
        for stem in ("xattn", "xattn_2", "xattn_3")
        for part in ("", "_residual", "_norm")
    ]
    query, features = arrays(2, 1, 6, 4, 5)
    inner = {name: model.get_layer(name).output for name in names[2:]}
    found = keras.Model(model.inputs, inner)([query, features.astype(np.float32)])
    for before, number in (("xattn_norm", 2), ("xattn_2_norm", 3)):
        attended = model.get_layer(f"xattn_{number}")(found[before], features.astype(np.float32))
        expected = model.get_layer(f"xattn_{number}_norm")(attended + found[before])
        np.testing.assert_allclose(found[f"xattn_{number}_norm"], expected, atol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_every_token_asks_and_padding_counts_nothing(fast: bool) -> None:
    train = TrainConfig(num_heads=2, head_dim=4, mlp_dim=3, queries="all")
    inputs = keras.Input((None, 6)), keras.Input((4, 5)), keras.Input((None,), dtype="bool")
    output = apply_head(*inputs[:2], train, fast, mask=inputs[2])
    model = keras.Model(inputs, output)
    query, features = arrays(2, 7, 6, 4, 5)
    features = features.astype(np.float32)
    mask = np.arange(7) < np.array([[3], [7]])
    logits = np.asarray(model([query, features, mask]))
    other = np.where(mask[..., None], query, 9.0)
    np.testing.assert_allclose(np.asarray(model([other, features, mask])), logits, atol=1e-6)
    cut = np.asarray(model([query[:1, :3], features[:1], mask[:1, :3]]))
    np.testing.assert_allclose(cut, logits[:1], atol=1e-6)
    pooled = keras.Model(inputs, model.get_layer("mean_tokens").output)([query, features, mask])
    normed = keras.Model(inputs, model.get_layer("xattn_norm").output)([query, features, mask])
    np.testing.assert_allclose(pooled[0], np.asarray(normed)[0, :3].mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_head_of_the_study(fast: bool) -> None:
    model = head(TrainConfig(num_heads=12, head_dim=64, mlp_dim=512), 768, 768, 196, fast)
    assert model.count_params() == 2_758_145
    assert [layer.name for layer in model.layers if layer.name in HEAD_LAYERS] == list(HEAD_LAYERS)
    assert model.get_layer("xattn_norm").epsilon == 1e-6
    assert model.output.dtype == "float32"


def test_head_by_hand() -> None:
    """The head against the study's formula, written in NumPy."""
    model = head(TrainConfig(head_dim=4, mlp_dim=3, num_heads=2), 6, 5, 4, True)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape))
    query, features = arrays(2, 1, 6, 4, 5)
    w = {weight.path: np.asarray(weight) for weight in model.weights}
    q = np.einsum("bqd,dhk->bqhk", query, w["xattn/query/kernel"]) + w["xattn/query/bias"]
    k = np.einsum("bsd,dhk->bshk", features, w["xattn/key/kernel"]) + w["xattn/key/bias"]
    v = np.einsum("bsd,dhk->bshk", features, w["xattn/value/kernel"]) + w["xattn/value/bias"]
    scores = np.exp(np.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(4))
    scores /= scores.sum(-1, keepdims=True)
    x = np.einsum("bhqs,bshk->bqhk", scores, v)
    x = np.einsum("bqhk,hkd->bqd", x, w["xattn/attention_output/kernel"])
    x = x + w["xattn/attention_output/bias"] + query
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = (x * w["xattn_norm/gamma"] + w["xattn_norm/beta"])[:, 0]
    x = x @ w["mlp_1/kernel"] + w["mlp_1/bias"]
    x = np.asarray(keras.ops.gelu(x, approximate=False))
    expected = x @ w["logit/kernel"] + w["logit/bias"]
    np.testing.assert_allclose(np.asarray(model([query, features])), expected, atol=1e-4)


def test_logit_stays_float32_in_mixed_precision() -> None:
    train = TrainConfig(num_heads=2, head_dim=4, mlp_dim=3, dtype_policy="mixed_bfloat16")
    model = head(train, 6, 5, 4, True)
    assert model.get_layer("mlp_1").compute_dtype == "bfloat16"
    assert model.get_layer("mlp_1").variable_dtype == "float32"
    assert model.output.dtype == "float32"


def test_heads_must_fit() -> None:
    with pytest.raises(ConfigError, match="head_dim must divide the text width 6"):
        head(TrainConfig(), 6, 5, 4, True)


@pytest.mark.parametrize(
    ("settings_of", "rates"),
    [
        ({}, (0.4, 0.4)),
        ({"attention_dropout": 0.0}, (0.0, 0.4)),
        ({"attention_dropout": 0.7}, (0.7, 0.4)),
    ],
)
def test_dropout_acts_on_the_attention_weights_and_before_the_logit(
    settings_of: dict[str, float], rates: tuple[float, float]
) -> None:
    """As in the study, at one rate; and the fast head draws what the plain one draws."""
    train = TrainConfig(num_heads=2, head_dim=4, mlp_dim=8, dropout=0.4, **settings_of)
    query, features = arrays(16, 1, 6, 9, 5)
    found = []
    for fast in (False, True):
        with seeded("head"):
            model = head(train, 6, 5, 9, fast)
        assert (model.get_layer("xattn").dropout, model.get_layer("drop_1").rate) == rates
        with tf.GradientTape() as tape:
            outputs = [model([query, features], training=True) for _ in range(2)]
            loss = tf.reduce_sum(outputs[0] * tf.sin(tf.range(16.0)[:, None]))
        gradients = tape.gradient(loss, model.trainable_variables)
        found.append([np.asarray(value) for value in (*outputs, *gradients)])
    assert_close(found[1], found[0], 1e-5)
    assert np.abs(found[0][0] - found[0][1]).max() > 1e-3
