"""The fast path: exact algebra over the weights of plain Keras and keras-hub layers.

Each function computes what a plain layer computes, from that layer's own
variables and dropout generators, in a form of few large matrix products:

- With one query, attention is `softmax(q·(W_k x_j)) · (W_v x_j)`. Both products
  can be regrouped so that no token is projected: `(W_kᵀ q)·x_j` for the scores,
  and `W_v (Σ a_j x_j) + b_v Σ a_j` for the result. `Σ a_j` stays because dropout
  on the scores moves it away from 1.
- The same regrouping holds for a few queries: it costs more with each, and less than
  projecting the tokens while they are fewer than a head is wide.
- Dense products are taken over (rows · tokens, width) matrices. Over
  (rows, tokens, width) the gradient of a kernel becomes one product a row,
  added up afterwards, which costs several times as much.

tests/test_fastpath.py holds each against its plain layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import keras
from keras import ops


class Rate(NamedTuple):
    """A dropout's rate as a graph takes it: float32 scalars, arguments of the graph.

    Attributes:
        rate: The share that is dropped.
        keep: `1 - rate`, computed in float64, as the backends compute it of a constant.
        scale: `1 / (1 - rate)`, computed likewise.
    """

    rate: Any
    keep: Any
    scale: Any


given_rates: ContextVar[Mapping[int, Rate]] = ContextVar(
    "given_rates", default=MappingProxyType({})
)
"""While a graph is traced: of dropout layers, by their `id`, the rates that are its arguments.

A rate that is no constant of the graph can change from run to run without another trace."""


def drop(layer: keras.layers.Dropout, x: Any) -> Any:
    """Apply a `Dropout` in training, at its own rate or at the one of `given_rates`.

    Args:
        layer: Its generator is used, its rate is above 0, and it has no `noise_shape`.
        x: Float of any shape.

    Returns:
        What the layer returns: the same draws, kept and scaled alike.
    """
    given = given_rates.get().get(id(layer))
    if given is None:
        return layer(x, training=True)
    jax = keras.backend.backend() == "jax"
    rate, keep, scale = (ops.cast(number, x.dtype) for number in given)
    # JAX draws in the dtype of the rate, TensorFlow in that of the numbers.
    dtype = "float32" if jax else x.dtype
    draws = keras.random.uniform(ops.shape(x), dtype=dtype, seed=layer.seed_generator)
    if jax:
        return ops.where(draws < given.keep, x / keep, ops.zeros_like(x))
    return ops.where(draws >= rate, x * scale, ops.zeros_like(x))


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
    (found,) = attentions_over_same_tokens([attention], [query], tokens, mask, training, queries)
    return found


def attentions_over_same_tokens(
    attentions: Sequence[keras.layers.MultiHeadAttention],
    queries_of: Sequence[Any],
    tokens: Any,
    mask: Any = None,
    training: bool | None = None,
    queries: Any = 1,
) -> list[tuple[Any, Any]]:
    """Apply `single_query_attention` of several layers to the same tokens.

    All that is large are the two products with the tokens: one of each is taken, over the heads
    of all layers side by side.

    Args:
        attentions: Built layers, of one compute dtype.
        queries_of: The query of each, float of shape (batch, query_width).
        tokens, mask, training, queries: As `single_query_attention` takes them.

    Returns:
        Of each layer what `single_query_attention` returns; of several, other than in the
        last digits.
    """
    dtype = attentions[0].compute_dtype
    tokens = ops.cast(tokens, dtype)
    absorbed = [_absorb(*pair) for pair in zip(attentions, queries_of, strict=True)]
    weights, kept = [], []
    for attention, scores in zip(
        attentions,
        _by_layer(attentions, _token_scores(_side_by_side(absorbed), tokens)),
        strict=True,
    ):
        if attention.use_bias:
            scores = _tie(scores, ops.cast(attention.key_dense.bias, dtype))
        if mask is not None:
            lowest = -3e4 if dtype == "float16" else -1e9
            scores = ops.where(ops.expand_dims(mask, 1), scores, ops.cast(lowest, dtype))
        weights.append(ops.softmax(scores, axis=-1))
        kept.append(weights[-1])
        if training and attention._dropout > 0:
            shape = (ops.shape(tokens)[0], attention.num_heads, queries, ops.shape(tokens)[1])
            noise = drop(attention._dropout_layer, ops.ones(shape, dtype))
            kept[-1] = weights[-1] * noise[:, :, 0]
    pooled = _by_layer(attentions, _token_sums(_side_by_side(kept), tokens))
    outputs = [_read_out(*each) for each in zip(attentions, pooled, kept, strict=True)]
    return [(output, ops.expand_dims(own, 2)) for output, own in zip(outputs, weights, strict=True)]


def _absorb(attention: keras.layers.MultiHeadAttention, query: Any) -> Any:
    """Return `W_kᵀ q` of each head, of shape (batch, heads, width)."""
    dtype = attention.compute_dtype
    q = ops.reshape(
        project(attention.query_dense, query), (-1, attention.num_heads, attention.key_dim)
    )
    q = q * ops.cast(attention._inverse_sqrt_key_dim, dtype)
    key_kernel = ops.transpose(ops.cast(attention.key_dense.kernel, dtype), (1, 2, 0))
    return _swap_heads(ops.matmul(_swap_heads(q), key_kernel))


def _read_out(attention: keras.layers.MultiHeadAttention, pooled: Any, kept: Any) -> Any:
    """Return the output for the tokens' weighted sums, of shape (batch, output_width).

    Args:
        attention: The layer.
        pooled: Shape (batch, heads, width).
        kept: The weights, after dropout, of shape (batch, heads, tokens).
    """
    dtype = attention.compute_dtype
    value_kernel = ops.transpose(ops.cast(attention.value_dense.kernel, dtype), (1, 0, 2))
    value = _swap_heads(ops.matmul(_swap_heads(pooled), value_kernel))
    if attention.use_bias:
        value_bias = ops.cast(attention.value_dense.bias, dtype)
        value = value + ops.sum(kept, axis=-1, keepdims=True) * value_bias
    rows = ops.reshape(value, (-1, attention.num_heads * value.shape[-1]))
    return project(attention.output_dense, rows)


def _side_by_side(parts: Sequence[Any]) -> Any:
    """Join the heads of several layers, axis 1."""
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=1)


def _by_layer(attentions: Sequence[keras.layers.MultiHeadAttention], joined: Any) -> list[Any]:
    """Take apart what `_side_by_side` joined."""
    if len(attentions) == 1:
        return [joined]
    ends = list(itertools.accumulate(attention.num_heads for attention in attentions))
    return list(ops.split(joined, ends[:-1], axis=1))


def absorbed_attention(
    attention: keras.layers.MultiHeadAttention,
    query: Any,
    tokens: Any,
    training: bool | None = None,
) -> tuple[Any, Any]:
    """Apply a built `MultiHeadAttention` to a few queries without projecting the tokens.

    Args:
        attention: A built layer; its own weights and dropout are used.
        query: Float of shape (batch, queries, query_width).
        tokens: Float of shape (batch, tokens, width): keys and values.
        training: Whether dropout applies to the attention weights.

    Returns:
        The output, of shape (batch, queries, output_width), and the attention weights
        before dropout, of shape (batch, heads, queries, tokens).
    """
    dtype = attention.compute_dtype
    tokens = ops.cast(tokens, dtype)
    heads, head_dim = attention.num_heads, attention.key_dim
    batch, queries, width = ops.shape(query)[0], ops.shape(query)[1], tokens.shape[-1]

    def turned(x: Any, first: Any, second: Any) -> Any:
        """Swap two leading axes of (first, second, queries, width), laid out as matrices."""
        return ops.transpose(ops.reshape(x, (first, second, queries, width)), (1, 0, 2, 3))

    q = project(attention.query_dense, ops.reshape(query, (-1, query.shape[-1])))
    q = ops.reshape(q, (-1, heads, head_dim)) * ops.cast(attention._inverse_sqrt_key_dim, dtype)
    key_kernel = ops.transpose(ops.cast(attention.key_dense.kernel, dtype), (1, 2, 0))
    absorbed = turned(ops.matmul(_swap_heads(q), key_kernel), heads, batch)
    scores = _token_scores(ops.reshape(absorbed, (batch, -1, width)), tokens)
    if attention.use_bias:
        scores = _tie(scores, ops.cast(attention.key_dense.bias, dtype))
    shape = (batch, heads, queries, ops.shape(tokens)[1])
    weights = ops.reshape(ops.softmax(scores, axis=-1), shape)
    kept = weights
    if training and attention._dropout > 0:
        kept = drop(attention._dropout_layer, weights)
    pooled = _token_sums(ops.reshape(kept, (batch, -1, shape[-1])), tokens)
    value_kernel = ops.transpose(ops.cast(attention.value_dense.kernel, dtype), (1, 0, 2))
    pooled = ops.reshape(turned(pooled, batch, heads), (heads, -1, width))
    value = _swap_heads(ops.matmul(pooled, value_kernel))
    if attention.use_bias:
        value_bias = ops.cast(attention.value_dense.bias, dtype)
        sums = ops.transpose(ops.sum(kept, axis=-1), (0, 2, 1))
        value = value + ops.reshape(sums, (-1, heads, 1)) * value_bias
    output = project(attention.output_dense, ops.reshape(value, (-1, heads * value.shape[-1])))
    return ops.reshape(output, (batch, queries, output.shape[-1])), weights


def _swap(x: Any) -> Any:
    return ops.transpose(x, (0, 2, 1))


def _swap_heads(x: Any) -> Any:
    return ops.transpose(x, (1, 0, 2))


def _custom_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`ops.custom_gradient`; backends hand the upstream over by position or by name.

    Args:
        function: Returns its value and a function from the upstream to the
            gradients of its arguments.
    """

    @ops.custom_gradient
    def call(*arguments: Any) -> tuple[Any, Any]:
        value, gradient = function(*arguments)

        def either(*upstreams: Any, upstream: Any = None) -> Any:
            return gradient(upstreams[0] if upstream is None else upstream)

        return value, either

    return functools.wraps(function)(call)


@_custom_gradient
def _token_scores(absorbed: Any, tokens: Any) -> Any:
    """Return `absorbed · tokensᵀ`, of shape (batch, heads, tokens).

    The tokens are by far the largest operand. Here and in `_token_sums` they
    stand on the left, or on the right untransposed, forwards and backwards:
    the other forms copy them first and take up to four times as long on a CPU.

    Args:
        absorbed: Shape (batch, heads, width).
        tokens: Shape (batch, tokens, width).
    """

    def gradient(upstream: Any) -> tuple[Any, Any]:
        return ops.matmul(upstream, tokens), ops.matmul(_swap(upstream), absorbed)

    return _swap(ops.matmul(tokens, _swap(absorbed))), gradient


@_custom_gradient
def _token_sums(weights: Any, tokens: Any) -> Any:
    """Return `weights · tokens`, of shape (batch, heads, width).

    Args:
        weights: Shape (batch, heads, tokens).
        tokens: Shape (batch, tokens, width).
    """

    def gradient(upstream: Any) -> tuple[Any, Any]:
        return _swap(ops.matmul(tokens, _swap(upstream))), ops.matmul(_swap(weights), upstream)

    return ops.matmul(weights, tokens), gradient


@_custom_gradient
def _tie(scores: Any, key_bias: Any) -> Any:
    """Return the scores, and give the key bias the gradient that it has: zero.

    It adds the same to all scores of a head, which softmax ignores. With a
    gradient, the optimizer treats it as it does in the plain layer.
    """

    def gradient(upstream: Any) -> tuple[Any, Any]:
        return upstream, ops.zeros_like(key_bias)

    return scores, gradient


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
    y = _product(x, ops.reshape(kernel, (x.shape[-1], -1)))
    return y if dense.bias is None else y + ops.reshape(ops.cast(dense.bias, x.dtype), (-1,))


def apply_dense(dense: keras.layers.Dense, x: Any) -> Any:
    """Apply a built `Dense` to a matrix, in the layer's own dtype.

    Args:
        dense: The layer.
        x: Float of shape (rows, inputs).

    Returns:
        Float of shape (rows, units).
    """
    x = ops.cast(x, dense.compute_dtype)
    y = _product(x, ops.cast(dense.kernel, x.dtype))
    y = y if dense.bias is None else y + ops.cast(dense.bias, x.dtype)
    return y if dense.activation is None else dense.activation(y)


@_custom_gradient
def _product(x: Any, kernel: Any) -> Any:
    """Return `x · kernel` of two matrices, `kernel` by far the larger.

    It stands on the left, untransposed, when the gradient of `x` is taken, for
    the reason given at `_token_scores`.
    """

    def gradient(upstream: Any) -> tuple[Any, Any]:
        of_x = ops.transpose(ops.matmul(kernel, ops.transpose(upstream)))
        return of_x, ops.matmul(ops.transpose(x), upstream)

    return ops.matmul(x, kernel), gradient
