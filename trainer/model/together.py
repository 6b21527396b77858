"""One forward pass of several models over the same batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from featstore.encoders.spec import QUANTISED
from trainer.batches import SCALES_OF
from trainer.model.fastpath import attentions_over_same_tokens
from trainer.model.head import (
    HEAD_LAYERS,
    TAIL_NAME,
    VISION_TAIL_NAME,
    MultiHeadAttention,
    fusion_layers,
    fusion_names,
)

AFTER_FUSION = HEAD_LAYERS[3:]


def logits_together(models: Sequence[keras.Model], inputs: Any, training: bool) -> list[Any]:
    """Return the logits of several models on one batch.

    Models of the fast path in which no layer of an encoder trains and the first token asks
    share their products with the image's tokens (`attentions_over_same_tokens`), fusion layer by
    fusion layer. Others are called one after the other.

    Args:
        models: From `build_cached_model`, over the same features.
        inputs: A batch of their inputs.
        training: Whether dropout applies.

    Returns:
        Of each model float32 of shape (batch, 1), of three classes (batch, 3).
    """
    if len(models) == 1 or not _can_join(models):
        return [model(inputs, training=training) for model in models]
    hidden, features = (_widened(models[0], inputs, name) for name in ("hidden", "features"))
    found = [model.get_layer(TAIL_NAME)(hidden) for model in models]
    for number in range(1, max(map(fusion_layers, models)) + 1):
        attention, residual, norm = fusion_names(number)
        at = [i for i, model in enumerate(models) if fusion_layers(model) >= number]
        attended = attentions_over_same_tokens(
            [models[i].get_layer(attention) for i in at],
            [found[i][:, 0] for i in at],
            features,
            training=training,
        )
        for i, (output, _) in zip(at, attended, strict=True):
            x = models[i].get_layer(residual)([found[i], ops.expand_dims(output, 1)])
            found[i] = models[i].get_layer(norm)(x)
    logits = []
    for model, x in zip(models, found, strict=True):
        for name in AFTER_FUSION:
            layer = model.get_layer(name)
            x = layer(x, training=training) if name == "drop_1" else layer(x)
        logits.append(x)
    return logits


def _can_join(models: Sequence[keras.Model]) -> bool:
    tails = [model.get_layer(TAIL_NAME) for model in models]
    attentions = [model.get_layer("xattn") for model in models]
    return (
        all(isinstance(attention, MultiHeadAttention) for attention in attentions)
        and len({attention.compute_dtype for attention in attentions}) == 1
        and not any(tail.transformer_layers or tail.whole for tail in tails)
        and not any(layer.name == VISION_TAIL_NAME for model in models for layer in model.layers)
    )


def _widened(model: keras.Model, inputs: Any, name: str) -> Any:
    """Return some features as the model's layers take them."""
    if keras.backend.standardize_dtype(inputs[name].dtype) != QUANTISED:
        return inputs[name]
    return model.get_layer(f"dequantize_{name}")(inputs[name], inputs[SCALES_OF[name]])
