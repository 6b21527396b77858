"""The fast path: exact algebra over the weights of plain Keras and keras-hub layers.

Each function computes what a plain layer computes, from that layer's own
variables and dropout generators, in a form that a compiler turns into few large
matrix products:

- With one query, attention is `softmax(q·(W_k x_j)) · (W_v x_j)`. Both products
  can be regrouped so that no token is projected: `(W_kᵀ q)·x_j` for the scores,
  and `W_v (Σ a_j x_j) + b_v Σ a_j` for the result. `Σ a_j` stays because dropout
  on the scores moves it away from 1.
- Only the first token leaves the text tower, so its last layer needs the query,
  output projection and feed-forward of one token.
- Dense products are taken over (rows · tokens, width) matrices. Over
  (rows, tokens, width) the gradient of a kernel becomes one product a row,
  added up afterwards, which costs several times as much.
- Dropout draws Threefry bits (Salmon et al. 2011, "Parallel random numbers: as
  easy as 1, 2, 3"), which vectorise; TensorFlow's default, Philox, does not.

tests/test_fastpath.py holds each against its plain layer.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="featstore")
class ThreefryDropout(keras.layers.Dropout):
    """`keras.layers.Dropout` that draws Threefry bits on TensorFlow.

    Rate, seed and generator state are the parent's. On other backends the
    draws are the parent's too: JAX uses Threefry already.
    """

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Drop values while training.

        Args:
            inputs: Float of any shape.
            training: Whether to drop.

        Returns:
            Shape and dtype of `inputs`.
        """
        plain = keras.backend.backend() != "tensorflow" or self.noise_shape is not None
        if plain or not training or not 0 < self.rate < 1:
            return super().call(inputs, training=training)
        return inputs * _kept_share()(inputs, self.seed_generator.next(), self.rate)


@functools.cache
def _kept_share() -> Any:
    """Return the compiled draw of a dropout's factors; TensorFlow has Threefry under XLA only."""
    import tensorflow as tf

    @tf.function(jit_compile=True, autograph=False)
    def draw(like: Any, seed: Any, rate: float) -> Any:
        # Whole bits are compared: the same share is kept in every dtype.
        bits = tf.random.stateless_uniform(
            tf.shape(like),
            tf.cast(seed, tf.int32),
            minval=None,
            maxval=None,
            dtype=tf.uint32,
            alg="threefry",
        )
        kept = bits >= tf.constant(round(rate * 2**32), tf.uint32)
        return tf.cast(kept, like.dtype) * tf.cast(1 / (1 - rate), like.dtype)

    return draw


def use_threefry(layer: keras.layers.Layer) -> None:
    """Make every dropout inside a layer or model draw Threefry bits; nothing else changes."""
    for part in layer._flatten_layers():
        if type(part) is keras.layers.Dropout:
            # In place: keras-hub makes its dropouts in `build`, and a built layer takes no others.
            part.__class__ = ThreefryDropout


def single_query_attention(
    attention: keras.layers.MultiHeadAttention,
    query: Any,
    tokens: Any,
    mask: Any = None,
    training: bool | None = None,
    queries: Any = 1,
) -> tuple[Any, Any]:
    """Apply a built `MultiHeadAttention` to one query without projecting the tokens.

    Args:
        attention: A built layer; its own weights and dropout are used.
        query: Float of shape (batch, query_width).
        tokens: Float of shape (batch, tokens, width): keys and values.
        mask: Bool of shape (batch, tokens), True where the query may look, or
            None.
        training: Whether dropout applies to the attention weights.
        queries: Queries that the plain layer would be given, of which this is
            the first: dropout is drawn for all of them, so that both draw the
            same.

    Returns:
        The output, of shape (batch, output_width), and the attention weights
        before dropout, of shape (batch, heads, 1, tokens).
    """
    dtype = attention.compute_dtype
    tokens = ops.cast(tokens, dtype)
    heads, head_dim = attention.num_heads, attention.key_dim
    q = ops.reshape(project(attention.query_dense, query), (-1, heads, head_dim))
    q = q * ops.cast(attention._inverse_sqrt_key_dim, dtype)
    key_kernel = ops.transpose(ops.cast(attention.key_dense.kernel, dtype), (1, 2, 0))
    absorbed = ops.transpose(ops.matmul(ops.transpose(q, (1, 0, 2)), key_kernel), (1, 0, 2))
    scores = _token_scores(absorbed, tokens)
    if attention.use_bias:
        # One constant a head, which softmax ignores. Kept so that the key bias still has a
        # gradient (of zero), and the optimizer treats it as it does end to end.
        key_bias = ops.cast(attention.key_dense.bias, dtype)
        scores = scores + ops.expand_dims(ops.sum(q * key_bias, axis=-1), 1)
    if mask is not None:
        lowest = -3e4 if dtype == "float16" else -1e9
        scores = ops.where(ops.expand_dims(mask, -1), scores, ops.cast(lowest, dtype))
    weights = ops.softmax(scores, axis=1)
    kept = weights
    if training and attention._dropout > 0:
        shape = (ops.shape(tokens)[0], heads, queries, ops.shape(tokens)[1])
        noise = attention._dropout_layer(ops.ones(shape, dtype), training=True)[:, :, 0]
        kept = weights * _swap(noise)
    pooled = _token_means(kept, tokens)
    value_kernel = ops.transpose(ops.cast(attention.value_dense.kernel, dtype), (1, 0, 2))
    value = ops.transpose(ops.matmul(ops.transpose(pooled, (1, 0, 2)), value_kernel), (1, 0, 2))
    if attention.use_bias:
        value_bias = ops.cast(attention.value_dense.bias, dtype)
        value = value + ops.expand_dims(ops.sum(kept, axis=1), -1) * value_bias
    output = project(attention.output_dense, ops.reshape(value, (-1, heads * value.shape[-1])))
    return output, ops.expand_dims(_swap(weights), 2)


def _swap(x: Any) -> Any:
    return ops.transpose(x, (0, 2, 1))


@ops.custom_gradient
def _token_scores(absorbed: Any, tokens: Any) -> Any:
    """Return `tokens · absorbedᵀ`, of shape (batch, tokens, heads).

    The tokens are by far the largest operand. Here and in `_token_means` they
    stand on the left, or on the right untransposed, forwards and backwards:
    the other forms copy them first and take two to four times as long on a CPU.

    Args:
        absorbed: Shape (batch, heads, width).
        tokens: Shape (batch, tokens, width).
    """

    def gradient(*upstreams: Any, upstream: Any = None) -> tuple[Any, Any]:
        upstream = upstreams[0] if upstream is None else upstream
        return ops.matmul(_swap(upstream), tokens), ops.matmul(upstream, absorbed)

    return ops.matmul(tokens, _swap(absorbed)), gradient


@ops.custom_gradient
def _token_means(weights: Any, tokens: Any) -> Any:
    """Return `weightsᵀ · tokens`, of shape (batch, heads, width).

    Args:
        weights: Shape (batch, tokens, heads).
        tokens: Shape (batch, tokens, width).
    """

    def gradient(*upstreams: Any, upstream: Any = None) -> tuple[Any, Any]:
        upstream = upstreams[0] if upstream is None else upstream
        return ops.matmul(tokens, _swap(upstream)), ops.matmul(weights, upstream)

    return ops.matmul(_swap(weights), tokens), gradient


def project(dense: keras.layers.EinsumDense, x: Any) -> Any:
    """Apply a built projection of `MultiHeadAttention` to a matrix.

    Args:
        dense: Its kernel is (width, heads, head_dim), or (heads, head_dim,
            width) for the output.
        x: Float of shape (rows, inputs).

    Returns:
        Float of shape (rows, outputs), heads side by side.
    """
    kernel = ops.cast(dense.kernel, x.dtype)
    y = ops.matmul(x, ops.reshape(kernel, (x.shape[-1], -1)))
    return y if dense.bias is None else y + ops.reshape(ops.cast(dense.bias, x.dtype), (-1,))


def encoder_layer(
    layer: Any, hidden: Any, padding_mask: Any = None, training: bool | None = None
) -> Any:
    """Run a built keras-hub `TransformerEncoder`.

    Args:
        layer: The layer, post-norm or pre-norm.
        hidden: Float of shape (batch, length, width).
        padding_mask: Bool of shape (batch, length), or None.
        training: Whether the layer's dropout applies.

    Returns:
        Shape (batch, length, width).
    """
    shape = ops.shape(hidden)
    width = hidden.shape[-1]

    def drop(dropout: Any, x: Any) -> Any:
        # In the plain layer's shape, which the draws depend on.
        return ops.reshape(dropout(ops.reshape(x, shape), training=training), (-1, width))

    pre_norm = layer.normalize_first
    x = ops.reshape(hidden, (-1, width))
    y = layer._self_attention_layer_norm(x) if pre_norm else x
    y = _self_attention(layer._self_attention_layer, y, shape, padding_mask, training)
    x = drop(layer._self_attention_dropout, y) + x
    if not pre_norm:
        x = layer._self_attention_layer_norm(x)
    y = layer._feedforward_layer_norm(x) if pre_norm else x
    y = layer._feedforward_output_dense(layer._feedforward_intermediate_dense(y))
    x = drop(layer._feedforward_dropout, y) + x
    x = x if pre_norm else layer._feedforward_layer_norm(x)
    return ops.reshape(x, shape)


def _self_attention(
    attention: keras.layers.MultiHeadAttention,
    x: Any,
    shape: tuple[Any, ...],
    padding_mask: Any,
    training: bool | None,
) -> Any:
    """Apply `MultiHeadAttention` to (batch · length, width), tokens to tokens."""
    heads, head_dim = attention.num_heads, attention.key_dim

    def split(dense: keras.layers.EinsumDense) -> Any:
        projected = ops.reshape(project(dense, x), (*shape[:2], heads, head_dim))
        return ops.transpose(projected, (0, 2, 1, 3))

    q = split(attention.query_dense) * ops.cast(attention._inverse_sqrt_key_dim, x.dtype)
    k, v = split(attention.key_dense), split(attention.value_dense)
    mask = None if padding_mask is None else ops.expand_dims(ops.cast(padding_mask, "bool"), 1)
    weights = attention._masked_softmax(ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))), mask)
    if attention._dropout > 0:
        weights = attention._dropout_layer(weights, training=training)
    mixed = ops.transpose(ops.matmul(weights, v), (0, 2, 1, 3))
    return project(attention.output_dense, ops.reshape(mixed, (-1, heads * head_dim)))


def first_token_layer(
    layer: Any, hidden: Any, padding_mask: Any = None, training: bool | None = None
) -> Any:
    """Run a built keras-hub `TransformerEncoder` for its first token only.

    Args:
        layer: The layer, post-norm or pre-norm.
        hidden: Float of shape (batch, length, width).
        padding_mask: Bool of shape (batch, length), or None.
        training: Whether the layer's dropout applies. It is drawn for every
            token, as the plain layer draws it.

    Returns:
        Shape (batch, 1, width): token 0 of the layer's output.
    """
    length = ops.shape(hidden)[1]
    width = hidden.shape[-1]

    def drop(dropout: Any, x: Any) -> Any:
        if not training or not dropout.rate:
            return x
        return x * dropout(ops.ones_like(hidden), training=True)[:, 0]

    pre_norm = layer.normalize_first
    x, tokens = hidden[:, 0], hidden
    if pre_norm:
        flat = layer._self_attention_layer_norm(ops.reshape(hidden, (-1, width)))
        tokens = ops.reshape(flat, ops.shape(hidden))
    mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
    y, _ = single_query_attention(
        layer._self_attention_layer, tokens[:, 0], tokens, mask, training, queries=length
    )
    x = drop(layer._self_attention_dropout, y) + x
    if not pre_norm:
        x = layer._self_attention_layer_norm(x)
    y = layer._feedforward_layer_norm(x) if pre_norm else x
    y = layer._feedforward_output_dense(layer._feedforward_intermediate_dense(y))
    x = drop(layer._feedforward_dropout, y) + x
    return ops.expand_dims(x if pre_norm else layer._feedforward_layer_norm(x), 1)
