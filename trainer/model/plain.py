"""The end-to-end model of plain Keras and keras-hub layers alone: what other programs read."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from featstore.encoders.framework import pinned_framework
from featstore.encoders.tower import Tower
from trainer.config import TrainConfig
from trainer.model.encoder_layers import last_token
from trainer.model.head import TEXT_NAME, VISION_NAME, apply_head
from trainer.model.weights import (
    copy_weights,
    name_layers,
    named_weights,
    seeded,
    train_only,
    trained_weights,
)


@pinned_framework()
def build_plain(
    vision_backbone: Any,
    text_backbone: Any,
    train: TrainConfig,
    tokens: str = "patches",
    classes: int = 2,
) -> keras.Model:
    """Build the model from pixels and token ids, as the reference study built it.

    `build_end_to_end` is the same function of its inputs. This one has no class of this
    project, so that `keras.models.load_model` reads it where only Keras and keras-hub are
    installed, and its weights file has the layout of the study's: `vit_backbone` and
    `txt_backbone` are the backbones themselves, the head's layers are named as by
    `trainer.model.head.apply_head`.

    It is meant to predict: trained further, the dropout of the layers that stay frozen
    would run too, and a file of it, loaded again, has the vision blocks all trainable or none.

    Args:
        vision_backbone: keras-hub backbone with its weights. It is taken over: named
            `vit_backbone`, all but its last `train.k_vit` blocks and final norm frozen. Of one
            that pools its tokens, the part before that is.
        text_backbone: keras-hub backbone with its weights. It is taken over: named
            `txt_backbone`, all but its last `train.k_txt` layers frozen.
        train: `k_txt`, `k_vit`, the head's sizes, `seed` and `dtype_policy` are used. The head
            has random weights; see `transfer_to_plain`.
        tokens: `"all"`: the head attends over every token of the image, class token
            included, as the study's does. `"patches"`: the leading tokens are left out.
        classes: 2 or 3.

    Returns:
        keras.Model from `pixel_values` (float32, batch, height, width, 3), `input_ids` and
        `attention_mask` (int32, batch, length) to the logit of entailment (float32, batch, 1);
        of three classes to that of each (batch, 3).

    Raises:
        ConfigError: `k_txt`, `k_vit` or the heads do not fit the backbones.
        PresetError: A backbone is of no family, or has the wrong shape.
    """
    vision, text = Tower(vision_backbone, "vision"), Tower(text_backbone, "text")
    text.check_k(train.k_txt)
    vision_layers, text_layers = vision.upper_layers(train.k_vit), text.upper_layers(train.k_txt)
    vision.whole.name, text_backbone.name = VISION_NAME, TEXT_NAME
    train_only(vision_backbone, vision_layers)
    train_only(vision.whole, vision_layers)
    train_only(text_backbone, text_layers)
    pixels = keras.Input(vision_backbone.inputs[0].shape[1:], name="pixel_values")
    input_ids = keras.Input((None,), dtype="int32", name="input_ids")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    features = vision.whole(vision.inputs(pixels), training=None if train.k_vit else False)
    if tokens == "patches" and vision.leading_tokens:
        features = features[:, vision.leading_tokens :]
    states = text_backbone(text.inputs(input_ids, attention_mask))
    # BERT's output has more than the hidden states.
    states = states["sequence_output"] if isinstance(states, dict) else states
    if train.queries == "cls":
        first = text.family.query == "first"
        states = ops.expand_dims(states[:, 0], 1) if first else last_token(states, attention_mask)
    with seeded(f"head {train.seed}"):
        logits = apply_head(states, features, train, False, classes=classes, mask=attention_mask)
    inputs = {
        "pixel_values": pixels,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
    }
    return keras.Model(inputs, logits, name="visual_entailment")


def plain_weights(model: keras.Model, k_txt: int, k_vit: int = 0) -> dict[str, Any]:
    """Return the weights of a plain model that train, named as by `trained_weights`."""
    # A tower whose backbone pools is a model of its own in here, of no family; none of its blocks
    # trains.
    tower = model.get_layer(VISION_NAME)
    vision = Tower(tower, "vision").upper_layers(k_vit) if k_vit else []
    text = Tower(model.get_layer(TEXT_NAME), "text").upper_layers(k_txt)
    return named_weights(name_layers({layer.name: layer for layer in vision}, text, model))


def transfer_to_plain(source: keras.Model, plain: keras.Model, train: TrainConfig) -> None:
    """Copy the trained weights of a cached or an end-to-end model into a plain one.

    Raises:
        RunError: The models do not have the same trained layers, or a shape differs. Nothing
            is copied then.
    """
    copy_weights(trained_weights(source), plain_weights(plain, train.k_txt, train.k_vit))
