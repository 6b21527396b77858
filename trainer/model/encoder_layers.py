"""Layers of the encoders on the fast path: whole, or for the one token that leaves.

Only one token leaves the text tower (the first, of CLIP the last), so its last layer needs the
query, output projection and feed-forward of that token.

tests/test_fastpath.py holds each against its plain layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from trainer.model.fastpath import apply_dense, project, single_query_attention


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

    x = ops.reshape(hidden, (-1, width))
    y = layer._self_attention_layer_norm(x) if layer.normalize_first else x
    y = _self_attention(layer._self_attention_layer, y, shape, padding_mask, training)
    return ops.reshape(_after_attention(layer, x, y, drop), shape)


def _after_attention(layer: Any, x: Any, y: Any, drop: Callable[[Any, Any], Any]) -> Any:
    """Return what a `TransformerEncoder` makes of its input and of its attention's output.

    Args:
        layer: The layer.
        x: Its input, of shape (rows, width).
        y: What its attention made of it, of the same shape.
        drop: Applies one of the layer's dropouts to such a matrix.
    """
    pre_norm = layer.normalize_first
    x = drop(layer._self_attention_dropout, y) + x
    if not pre_norm:
        x = layer._self_attention_layer_norm(x)
    y = layer._feedforward_layer_norm(x) if pre_norm else x
    y = apply_dense(layer._feedforward_intermediate_dense, y)
    y = apply_dense(layer._feedforward_output_dense, y)
    x = drop(layer._feedforward_dropout, y) + x
    return x if pre_norm else layer._feedforward_layer_norm(x)


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

    x, tokens = hidden[:, 0], hidden
    if layer.normalize_first:
        flat = layer._self_attention_layer_norm(ops.reshape(hidden, (-1, width)))
        tokens = ops.reshape(flat, ops.shape(hidden))
    mask = None if padding_mask is None else ops.cast(padding_mask, "bool")
    y, _ = single_query_attention(
        layer._self_attention_layer, tokens[:, 0], tokens, mask, training, queries=length
    )
    return ops.expand_dims(_after_attention(layer, x, y, drop), 1)


def last_token(states: Any, padding_mask: Any) -> Any:
    """Return the state of each row's last real token, of shape (batch, 1, width).

    As a sum in which one term is not zero: exact, and any other program has its operations.

    Args:
        states: Float of shape (batch, length, width).
        padding_mask: Bool or int32 of shape (batch, length); padding is at the end.
    """
    mask = ops.cast(padding_mask, "int32")
    reached = ops.equal(ops.cumsum(mask, axis=1), ops.sum(mask, axis=1, keepdims=True))
    picked = ops.cast(reached, states.dtype) * ops.cast(mask, states.dtype)
    return ops.sum(states * ops.expand_dims(picked, -1), axis=1, keepdims=True)


def last_token_layer(layer: Any, hidden: Any, padding_mask: Any) -> Any:
    """Run a built, causal keras-hub `CLIPEncoderLayer` for each row's last real token only.

    That token sees the real tokens and nothing else, so that the padding mask is its mask. The
    layer has no dropout.

    Args:
        layer: The layer.
        hidden: Float of shape (batch, length, width).
        padding_mask: Bool of shape (batch, length); padding is at the end.

    Returns:
        Shape (batch, 1, width).
    """
    tokens = layer.layer_norm_1(hidden)
    query = last_token(tokens, padding_mask)[:, 0]
    y, _ = single_query_attention(layer.attention, query, tokens, ops.cast(padding_mask, "bool"))
    x = last_token(ops.cast(hidden, y.dtype), padding_mask)[:, 0] + y
    y = layer.activation(apply_dense(layer.dense_1, layer.layer_norm_2(x)))
    return ops.expand_dims(x + apply_dense(layer.dense_2, y), 1)
