"""The fusion head: the text asks an image's tokens, then a small MLP.

A fusion layer is cross-attention, its query added, and layer normalisation, as in the reference
study, whose head has one of them and no feed-forward part. Of several, each asks with what the
one before found.
"""

from __future__ import annotations

import re
from typing import Any

import keras
from keras import ops

from featstore.errors import ConfigError
from trainer.config import TrainConfig
from trainer.model.fastpath import (
    absorbed_attention,
    apply_dense,
    drop,
    given_rates,
    single_query_attention,
)

VISION_NAME, TEXT_NAME = "vit_backbone", "txt_backbone"
TAIL_NAME, VISION_TAIL_NAME = "text_tail", "vision_tail"
HEAD_LAYERS = ("xattn", "xattn_residual", "xattn_norm", "flatten_cls", "mlp_1", "drop_1", "logit")
"""The study's head."""
POOL_NAME = "mean_tokens"
_OF_FUSION = re.compile(r"xattn(_\d+)?(_residual|_norm)?")


def fusion_names(number: int) -> tuple[str, str, str]:
    """Return the names of a fusion layer's attention, sum and normalisation.

    Args:
        number: From 1; the first has the study's names.
    """
    name = "xattn" if number == 1 else f"xattn_{number}"
    return name, f"{name}_residual", f"{name}_norm"


def is_of_head(name: str) -> bool:
    """Tell whether a layer of this name belongs to the head."""
    return name in (*HEAD_LAYERS, POOL_NAME) or _OF_FUSION.fullmatch(name) is not None


def head_layers(model: keras.Model) -> list[Any]:
    """Return the layers of a model's head, in the order in which they run."""
    return [layer for layer in model.layers if is_of_head(layer.name)]


@keras.saving.register_keras_serializable(package="featstore")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` that is fast where queries are few.

    Constructor, variables and their names are the parent's, and so is the name
    of the class, by which Keras names a layer in a weights file: files go either
    way. A call that is not of unmasked queries over one set of features (other
    keys than values, masks, a gate, a window), or of more queries than a head is
    wide, from where on the short cut is none, runs the parent's code. Of queries
    whose number is left open there are taken to be few.
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
            and (query.shape[1] is None or query.shape[1] <= self.key_dim)
            and len(value.shape) == 3
            and (key is None or key is value)
            and all(mask is None for mask in masks)
            and not use_causal_mask
            # Options of newer Keras releases only.
            and not getattr(self, "_use_gate", False)
            and getattr(self, "_sliding_window", None) is None
        )
        if absorbs:
            if query.shape[1] == 1:
                found, weights = single_query_attention(self, query[:, 0], value, training=training)
                output = ops.expand_dims(found, 1)
            else:
                output, weights = absorbed_attention(self, query, value, training)
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


def fusion_layers(model: keras.Model) -> int:
    """Return how many fusion layers a model's head has."""
    return sum(isinstance(x, keras.layers.MultiHeadAttention) for x in head_layers(model))


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


def logit_count(classes: int) -> int:
    """Return how many logits tell so many classes apart: one of two, else one of each."""
    return 1 if classes == 2 else classes


def apply_head(
    text: Any,
    features: Any,
    train: TrainConfig,
    fast: bool = True,
    *,
    classes: int = 2,
    mask: Any = None,
) -> Any:
    """Add the fusion head to a functional model.

    The layers are named as in the reference study (`HEAD_LAYERS`) and belong
    to the model itself: `model.get_layer("mlp_1")`. Initial weights come from
    Python's random state, as everywhere in Keras.

    Args:
        text: Symbolic float of shape (batch, 1, text_width): the first token's state; with
            `queries = "all"` (batch, length, text_width): every token's.
        features: Symbolic float of shape (batch, tokens, vision_width).
        train: `queries`, `fusion_layers`, `num_heads`, `head_dim`, `mlp_dim`, `dropout`,
            `attention_dropout` and `dtype_policy` are used.
        fast: `MultiHeadAttention`, `Dense` and `Dropout` of this module rather than Keras's own.
        classes: 2 or 3.
        mask: Symbolic bool or int of shape (batch, length), true where a token is real:
            needed where every token asks, since what they find is averaged over these.

    Returns:
        Symbolic float32 of shape (batch, 1): the logit of entailment; of three classes
        (batch, 3): that of each.

    Raises:
        ConfigError: The heads do not fit the text width.
    """
    text_width, dtype = text.shape[-1], train.dtype_policy
    heads = head_heads(train, text_width)
    attention = MultiHeadAttention if fast else keras.layers.MultiHeadAttention
    dense = Dense if fast else keras.layers.Dense
    x = text
    for number in range(1, train.fusion_layers + 1):
        name, residual, norm = fusion_names(number)
        attended = attention(
            heads, train.head_dim, dropout=attention_dropout(train), dtype=dtype, name=name
        )(x, features)
        x = keras.layers.Add(dtype=dtype, name=residual)([x, attended])
        x = keras.layers.LayerNormalization(epsilon=1e-6, dtype=dtype, name=norm)(x)
    if train.queries == "all":
        x = keras.layers.GlobalAveragePooling1D(dtype=dtype, name=POOL_NAME)(x, mask=mask)
    else:
        x = keras.layers.Flatten(dtype=dtype, name="flatten_cls")(x)
    x = dense(train.mlp_dim, activation="gelu", dtype=dtype, name="mlp_1")(x)
    dropout = Dropout if fast else keras.layers.Dropout
    x = dropout(train.dropout, dtype=dtype, name="drop_1")(x)
    return keras.layers.Dense(logit_count(classes), dtype="float32", name="logit")(x)
