"""The fusion head: one text query attends over an image's tokens, then a small MLP."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from featstore.errors import ConfigError
from trainer.config import TrainConfig
from trainer.model.fastpath import apply_dense, drop, given_rates, single_query_attention

VISION_NAME, TEXT_NAME = "vit_backbone", "txt_backbone"
TAIL_NAME, VISION_TAIL_NAME = "text_tail", "vision_tail"
HEAD_LAYERS = ("xattn", "xattn_residual", "xattn_norm", "flatten_cls", "mlp_1", "drop_1", "logit")


@keras.saving.register_keras_serializable(package="featstore")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` that is fast where the query is one token.

    Constructor, variables and their names are the parent's, and so is the name
    of the class, by which Keras names a layer in a weights file: files go either
    way. A call that is not one unmasked query over one set of features
    (self-attention, other keys than values, masks, a gate, a window) runs the
    parent's code.
    """

    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Attend from `query` over `value`.

        Args:
            query: Float of shape (batch, queries, query_width).
            value: Float of shape (batch, tokens, width), float16 and bfloat16
                included; cast to the layer's compute dtype in the graph.
            key: As `value`, or None to use `value`.
            query_mask, value_mask, key_mask, attention_mask, use_causal_mask:
                As in the parent, and left to it.
            return_attention_scores: Return the attention weights too.
            training: Whether dropout applies.

        Returns:
            Shape (batch, queries, output_width); with the weights, of shape
            (batch, heads, queries, tokens), where asked for.
        """
        masks = (query_mask, value_mask, key_mask, attention_mask)
        absorbs = (
            len(query.shape) == 3
            and query.shape[1] == 1
            and len(value.shape) == 3
            and (key is None or key is value)
            and all(mask is None for mask in masks)
            and not use_causal_mask
            # Options of newer Keras releases only.
            and not getattr(self, "_use_gate", False)
            and getattr(self, "_sliding_window", None) is None
        )
        if absorbs:
            output, weights = single_query_attention(self, query[:, 0], value, training=training)
            output = ops.expand_dims(output, 1)
            return (output, weights) if return_attention_scores else output
        return super().call(
            query,
            value,
            key=key,
            query_mask=query_mask,
            value_mask=value_mask,
            key_mask=key_mask,
            attention_mask=attention_mask,
            return_attention_scores=return_attention_scores,
            training=training,
            use_causal_mask=use_causal_mask,
        )

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        return_attention_scores: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Return the symbolic output; the parent's shape of the weights is for self-attention."""
        output = super().compute_output_spec(query, value, key, **kwargs)
        if not return_attention_scores:
            return output
        shape = (query.shape[0], self.num_heads, query.shape[1], value.shape[1])
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)


@keras.saving.register_keras_serializable(package="featstore")
class Dense(keras.layers.Dense):
    """`keras.layers.Dense` over a matrix, with the products of `trainer.model.fastpath`."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Apply the layer.

        Args:
            inputs: Float of shape (batch, inputs).
            training: Changes nothing.

        Returns:
            Shape (batch, units).
        """
        return apply_dense(self, inputs)


@keras.saving.register_keras_serializable(package="featstore")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` whose rate may be an argument of the graph."""

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Apply the layer.

        Args:
            inputs: Float of any shape.
            training: Whether it drops.

        Returns:
            The shape of `inputs`.
        """
        if not training or id(self) not in given_rates.get():
            return super().call(inputs, training=training)
        return drop(self, inputs)


def head_heads(train: TrainConfig, text_width: int) -> int:
    """Return the number of attention heads that the settings mean.

    Raises:
        ConfigError: It is left open (0) and `head_dim` does not divide the
            text width.
    """
    if train.num_heads:
        return train.num_heads
    if text_width % train.head_dim:
        raise ConfigError(
            f"[train] head_dim must divide the text width {text_width} where num_heads is 0; found"
            f" {train.head_dim}; set num_heads, or another head_dim"
        )
    return text_width // train.head_dim


def attention_dropout(train: TrainConfig) -> float:
    """Return the dropout of the attention weights that the settings mean."""
    return train.dropout if train.attention_dropout < 0 else train.attention_dropout


def apply_head(cls: Any, features: Any, train: TrainConfig, fast: bool = True) -> Any:
    """Add the fusion head to a functional model.

    The layers are named as in the reference study (`HEAD_LAYERS`) and belong
    to the model itself: `model.get_layer("mlp_1")`. Initial weights come from
    Python's random state, as everywhere in Keras.

    Args:
        cls: Symbolic float of shape (batch, 1, text_width).
        features: Symbolic float of shape (batch, tokens, vision_width).
        train: `num_heads`, `head_dim`, `mlp_dim`, `dropout`, `attention_dropout` and
            `dtype_policy` are used.
        fast: `MultiHeadAttention`, `Dense` and `Dropout` of this module rather than Keras's own.

    Returns:
        Symbolic float32 of shape (batch, 1): the logit of entailment.

    Raises:
        ConfigError: The heads do not fit the text width.
    """
    text_width, dtype = cls.shape[-1], train.dtype_policy
    heads = head_heads(train, text_width)
    attention = MultiHeadAttention if fast else keras.layers.MultiHeadAttention
    dense = Dense if fast else keras.layers.Dense
    attended = attention(
        heads, train.head_dim, dropout=attention_dropout(train), dtype=dtype, name="xattn"
    )(cls, features)
    x = keras.layers.Add(dtype=dtype, name="xattn_residual")([cls, attended])
    x = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name="xattn_norm")(x)
    x = keras.layers.Flatten(dtype=dtype, name="flatten_cls")(x)
    x = dense(train.mlp_dim, activation="gelu", dtype=dtype, name="mlp_1")(x)
    dropout = Dropout if fast else keras.layers.Dropout
    x = dropout(train.dropout, dtype=dtype, name="drop_1")(x)
    return keras.layers.Dense(1, dtype="float32", name="logit")(x)
