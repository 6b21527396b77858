"""One forward pass of several models over the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from featstore.encoders.spec import QUANTISED
from trainer.batches import SCALES_OF
from trainer.model.fastpath import attentions_over_same_tokens
from trainer.model.head import HEAD_LAYERS, TAIL_NAME, VISION_TAIL_NAME, MultiHeadAttention


def logits_together(models: Sequence[keras.Model], inputs: Any, training: bool) -> list[Any]:
    """Return the logits of several models on one batch.

    Models of the fast path in which no layer of an encoder trains share their products with the
    image's tokens (`attentions_over_same_tokens`). Others are called one after the other.

    Args:
        models: From `build_cached_model`, over the same features.
        inputs: A batch of their inputs.
        training: Whether dropout applies.

    Returns:
        Of each model float32 of shape (batch, 1).
    """
    if len(models) == 1 or not _can_join(models):
        return [model(inputs, training=training) for model in models]
    attentions = [model.get_layer("xattn") for model in models]
    hidden, features = (_widened(models[0], inputs, name) for name in ("hidden", "features"))
    queries = [model.get_layer(TAIL_NAME)(hidden) for model in models]
    attended = attentions_over_same_tokens(
        attentions, [query[:, 0] for query in queries], features, training=training
    )
    logits = []
    for model, query, (output, _) in zip(models, queries, attended, strict=True):
        x = model.get_layer("xattn_residual")([query, ops.expand_dims(output, 1)])
        for name in HEAD_LAYERS[2:]:
            layer = model.get_layer(name)
            x = layer(x, training=training) if name == "drop_1" else layer(x)
        logits.append(x)
    return logits


def _can_join(models: Sequence[keras.Model]) -> bool:
    attentions = [model.get_layer("xattn") for model in models]
    return (
        all(isinstance(attention, MultiHeadAttention) for attention in attentions)
        and len({attention.compute_dtype for attention in attentions}) == 1
        and not any(model.get_layer(TAIL_NAME).transformer_layers for model in models)
        and not any(layer.name == VISION_TAIL_NAME for model in models for layer in model.layers)
    )


def _widened(model: keras.Model, inputs: Any, name: str) -> Any:
    """Return some features as the model's layers take them."""
    if keras.backend.standardize_dtype(inputs[name].dtype) != QUANTISED:
        return inputs[name]
    return model.get_layer(f"dequantize_{name}")(inputs[name], inputs[SCALES_OF[name]])
