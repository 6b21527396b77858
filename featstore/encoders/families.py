"""The encoder families that can be used: one entry each, by the class of their backbone.

An entry says where a keras-hub backbone of that class keeps its transformer
blocks, so that `featstore.encoders.tower` can cut it before any of them. To
support another family, add its entry; tests/test_families.py holds every entry
against the backbone itself. Nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from featstore.errors import ConfigError, PresetError


@dataclass(frozen=True)
class Parts:
    """A backbone taken apart: what comes before the blocks, the blocks, what follows.

    Attributes:
        entering: The symbolic hidden states that enter the first block, of
            shape (batch, tokens, width).
        blocks: The transformer blocks, in the order in which they run.
        norm: The layer that normalises what leaves the last block, or None
            where the blocks do so themselves.
    """

    entering: Any
    blocks: list[Any]
    norm: Any = None


@dataclass(frozen=True)
class Family:
    """What is known of the backbones of one keras-hub class.

    Attributes:
        title: What people call it.
        kind: "vision" or "text". Of text, the head reads the first token,
            [CLS] or <s>.
        parts: Takes a backbone apart.
        model_types: What transformers calls them; keras-hub converts these.
        leading_tokens: From the backbone's configuration: how many tokens
            (class, distillation, registers) stand before the patches of an
            image.
    """

    title: str
    kind: str
    parts: Callable[[Any], Parts]
    model_types: tuple[str, ...] = ()
    leading_tokens: Callable[[Mapping[str, Any]], int] = lambda config: 0


def _of_encoder(encoder: Any) -> Parts:
    """Return the parts of a backbone whose blocks and final norm are inside one layer."""
    return Parts(encoder.input, encoder.encoder_layers, encoder.layer_norm)


def _of_transformer_layers(backbone: Any) -> Parts:
    """Return the parts of a text backbone, whose blocks follow each other in its own graph."""
    entering = backbone.transformer_layers[0].input
    # Beside the mask, where Keras counts that as an input.
    entering = entering[0] if isinstance(entering, list | tuple) else entering
    return Parts(entering, backbone.transformer_layers)


FAMILIES = {
    "ViTBackbone": Family(
        "ViT",
        "vision",
        lambda backbone: _of_encoder(backbone.get_layer("vit_encoder")),
        ("vit",),
        leading_tokens=lambda config: int(config.get("use_class_token", True)),
    ),
    "DeiTBackbone": Family(
        "DeiT",
        "vision",
        lambda backbone: _of_encoder(backbone.get_layer("deit_encoder")),
        ("deit",),
        leading_tokens=lambda config: 2,
    ),
    "DINOV2Backbone": Family(
        "DINOv2",
        "vision",
        lambda backbone: Parts(backbone.encoder.input, backbone.encoder.layers, backbone.layernorm),
        ("dinov2", "dinov2_with_registers"),
        leading_tokens=lambda config: 1 + int(config.get("num_register_tokens", 0)),
    ),
    "DistilBertBackbone": Family("DistilBERT", "text", _of_transformer_layers, ("distilbert",)),
    "BertBackbone": Family("BERT", "text", _of_transformer_layers, ("bert",)),
    "RobertaBackbone": Family("RoBERTa", "text", _of_transformer_layers, ("roberta",)),
    "XLMRobertaBackbone": Family("XLM-RoBERTa", "text", _of_transformer_layers, ("xlm-roberta",)),
}


def family_of(class_name: str, kind: str, preset: str) -> Family:
    """Return the entry of a backbone's class.

    Args:
        class_name: Such as `ViTBackbone`.
        kind: What it is to be: "vision" or "text".
        preset: What to call the preset in an error.

    Raises:
        PresetError: No entry of that kind has this class.
    """
    family = FAMILIES.get(class_name)
    if family is None or family.kind != kind:
        raise PresetError(
            f"{kind} preset {preset}: a {class_name} cannot be cut into blocks as a {kind} encoder;"
            f" choose a {titles(kind)} preset"
        )
    return family


def titles(kind: str) -> str:
    """Return what people call the families of one kind, "vision" or "text"."""
    *others, last = [entry.title for entry in FAMILIES.values() if entry.kind == kind]
    return f"{', '.join(others)} or {last}"


def check_k(k: int, num_blocks: int, kind: str) -> None:
    """Check how many of an encoder's last blocks are left to training.

    Raises:
        ConfigError: It is outside 0..num_blocks.
    """
    if not 0 <= k <= num_blocks:
        setting = {"vision": "k_vit", "text": "k_txt"}[kind]
        raise ConfigError(
            f"[train] {setting} = {k}: the {kind} encoder has {num_blocks} transformer blocks;"
            f" choose 0 to {num_blocks}"
        )


def num_patches(config: Mapping[str, Any]) -> int:
    """Return how many patches one image has, from a vision backbone's configuration."""
    patch = config["patch_size"]
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    height, width = config["image_shape"][:2]
    return (height // patch_height) * (width // patch_width)
