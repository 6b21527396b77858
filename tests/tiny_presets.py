"""Preset folders of tiny encoders with random weights, written by keras-hub itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

WORDS = (
    "a the dog cat man woman runs sits on in red two park ball is not sleeping un ##able ##s . ,"
)


def randomise(model: keras.Model, seed: int, scale: float = 0.2) -> None:
    """Give every weight noise, so that no bias is zero and no norm is the identity."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        noise = rng.normal(scale=scale, size=weight.shape)
        centre = 1.0 if weight.path.endswith("gamma") else 0.0
        weight.assign((centre + noise).astype(np.float32))


def tiny_vision_backbone(seed: int = 0) -> Any:
    """Return a ViT of 32×32 pixels: a class token and 16 patches, 16 wide."""
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        dropout_rate=0.1,
        attention_dropout=0.1,
    )
    randomise(backbone, seed)
    return backbone


def tiny_text_backbone(seed: int = 1, num_layers: int = 4) -> Any:
    """Return a DistilBERT of 16 numbers a token, with the usual dropout."""
    backbone = keras_hub.models.DistilBertBackbone(
        vocabulary_size=5 + len(WORDS.split()),
        num_layers=num_layers,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        dropout=0.1,
        max_sequence_length=32,
    )
    randomise(backbone, seed)
    return backbone


# Settings of a tiny backbone of every family, by class; DINOv2 with registers and without.
_VISION = {"num_layers": 3, "num_heads": 2, "hidden_dim": 8, "dropout_rate": 0.1}
_IMAGE = {"image_shape": (32, 32, 3), "patch_size": 8}
_TEXT = {
    "vocabulary_size": 40,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 12,
    "dropout": 0.1,
    "max_sequence_length": 16,
}
TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTBackbone", {**_VISION, **_IMAGE, "mlp_dim": 12}),
    "vit_without_class_token": (
        "ViTBackbone",
        {**_VISION, **_IMAGE, "mlp_dim": 12, "use_class_token": False},
    ),
    "deit": ("DeiTBackbone", {**_VISION, **_IMAGE, "intermediate_dim": 12}),
    "dinov2": ("DINOV2Backbone", {**_VISION, **_IMAGE, "intermediate_dim": 12}),
    "dinov2_registers": (
        "DINOV2Backbone",
        {**_VISION, **_IMAGE, "intermediate_dim": 12, "num_register_tokens": 4},
    ),
    "distil_bert": ("DistilBertBackbone", _TEXT),
    "bert": ("BertBackbone", _TEXT),
    "roberta": ("RobertaBackbone", _TEXT),
    "xlm_roberta": ("XLMRobertaBackbone", _TEXT),
}


def write_tiny_family(name: str, folder: Path) -> Path:
    """Write the preset of one of `TINY_FAMILIES`: a backbone alone, with random weights."""
    class_name, settings = TINY_FAMILIES[name]
    backbone = getattr(keras_hub.models, class_name)(**settings)
    randomise(backbone, seed=3)
    backbone.save_to_preset(str(folder))
    return folder


def write_tiny_vision(folder: Path) -> Path:
    """Write the vision preset; every option of its converter differs from the default."""
    tiny_vision_backbone().save_to_preset(str(folder))
    keras_hub.layers.ViTImageConverter(
        image_size=(32, 32),
        scale=[0.017, 0.019, 0.013],
        offset=[-2.1, -1.9, 0.3],
        interpolation="bicubic",
        antialias=True,
        crop_to_aspect_ratio=True,
    ).save_to_preset(str(folder))
    return folder


def write_tiny_text(folder: Path) -> Path:
    """Write the text preset with its tokenizer."""
    tiny_text_backbone().save_to_preset(str(folder))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    keras_hub.models.DistilBertTokenizer(vocabulary, lowercase=True).save_to_preset(str(folder))
    return folder
