"""The encoder families that can be used: one entry each, by the class of their backbone.

An entry says where a keras-hub backbone of that class keeps its transformer
blocks, so that `featstore.encoders.tower` can cut it before any of them. To
support another family, add its entry; tests/test_families.py holds every entry
against the backbone itself. Nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from featstore.errors import ConfigError, PresetError


@dataclass(frozen=True)
class Parts:
    """A backbone taken apart: what comes before the blocks, the blocks, what follows.

    Attributes:
        entering: The symbolic hidden states that enter the first block, of
            shape (batch, tokens, width).
        blocks: The transformer blocks, in the order in which they run.
            A layer that runs several times is there as often.
        norm: The layer that normalises what leaves the last block, or None
            where the blocks do so themselves.
        leaving: The symbolic hidden states at the end, where the backbone
            goes on and pools them; None where it returns them.
        arguments: What each block takes beside the hidden states.
        num_tokens: Tokens of an image, where keras-hub's symbolic shapes are
            wrong; None where they tell.
    """

    entering: Any
    blocks: list[Any]
    norm: Any = None
    leaving: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_tokens: int | None = None


@dataclass(frozen=True)
class Family:
    """What is known of the backbones of one keras-hub class.

    Attributes:
        title: What people call it.
        kind: "vision" or "text".
        parts: Takes a backbone apart.
        model_types: What transformers calls them; keras-hub converts these.
        leading_tokens: From the backbone's configuration: how many tokens
            (class, distillation, registers) stand before the patches of an
            image.
        final_norm: A norm follows the last block.
        query: Of text, the token that the head reads: "first" ([CLS] or <s>),
            or "last", the end token, of a causal encoder: each token sees
            those before it alone, so its blocks need no padding mask.
        shared: From the backbone's configuration: how many blocks in a row
            are one layer, with one set of weights. It can be cut before them
            alone: what trains above a cut must not be what runs below it.
        trains: Of vision, whether its last blocks can train; of text all can.
        pieces: Of text, how a piece of its tokenizer shows where a word starts or ends; see
            `featstore.encoders.words`.
    """

    title: str
    kind: str
    parts: Callable[[Any], Parts]
    model_types: tuple[str, ...] = ()
    leading_tokens: Callable[[Mapping[str, Any]], int] = lambda config: 0
    final_norm: bool = False
    query: str = "first"
    shared: Callable[[Mapping[str, Any]], int] = lambda config: 1
    trains: bool = False
    pieces: str = "##"


# Of a backbone of two towers: the attribute, and the field of its configuration, that holds each.
TWO_TOWERS = ("CLIPBackbone", "SigLIPBackbone")
TOWERS = {"vision": "vision_encoder", "text": "text_encoder"}


def _of_encoder(encoder: Any) -> Parts:
    """Return the parts of a backbone whose blocks and final norm are inside one layer."""
    return Parts(encoder.input, encoder.encoder_layers, encoder.layer_norm)


def _of_transformer_layers(backbone: Any) -> Parts:
    """Return the parts of a text backbone, whose blocks follow each other in its own graph."""
    entering = backbone.transformer_layers[0].input
    # Beside the mask, where Keras counts that as an input.
    entering = entering[0] if isinstance(entering, list | tuple) else entering
    return Parts(entering, backbone.transformer_layers)


def _of_clip(backbone: Any) -> Parts:
    """Return the parts of one of CLIP's towers."""
    blocks = backbone.encoder_layers
    return Parts(blocks[0].input, blocks, backbone.layer_norm)


def _of_siglip(backbone: Any) -> Parts:
    """Return the parts of SigLIP's vision tower, which ends in a pooling."""
    blocks, norm = backbone.encoder_layers, backbone.post_layer_norm
    # The symbolic shape has a class token more.
    count = backbone.embedding.num_positions
    return Parts(blocks[0].input, blocks, norm, leaving=norm.output, num_tokens=count)


def _of_dinov3(backbone: Any) -> Parts:
    """Return the parts of a DINOv3, whose blocks are told where each patch is."""
    from keras import ops

    # They follow from the image's size alone.
    where = backbone.rope_embedding(ops.zeros((1, *backbone.image_shape)))
    leading = 1 + backbone.num_register_tokens
    return Parts(
        backbone.embeddings.output,
        backbone.encoder.layers,
        backbone.layernorm,
        arguments={"position_embeddings": where, "num_prefix_tokens": leading},
    )


def _of_albert(backbone: Any) -> Parts:
    """Return the parts of an ALBERT: each group is one layer that runs several times."""
    if backbone.num_inner_repetitions != 1:
        raise PresetError(
            f"{backbone.name}: an ALBERT with {backbone.num_inner_repetitions} layers in a group"
            " cannot be cut; expected 1 (num_inner_repetitions); choose another preset"
        )
    layers = [layer for (layer,) in backbone.transformer_layers]
    runs = backbone.num_layers // backbone.num_groups
    return Parts(
        backbone.embeddings_projection.output, [one for one in layers for _ in range(runs)]
    )


FAMILIES = {
    "ViTBackbone": Family(
        "ViT",
        "vision",
        lambda backbone: _of_encoder(backbone.get_layer("vit_encoder")),
        ("vit",),
        leading_tokens=lambda config: int(config.get("use_class_token", True)),
        final_norm=True,
        trains=True,
    ),
    "DeiTBackbone": Family(
        "DeiT",
        "vision",
        lambda backbone: _of_encoder(backbone.get_layer("deit_encoder")),
        ("deit",),
        leading_tokens=lambda config: 2,
        final_norm=True,
        trains=True,
    ),
    "DINOV2Backbone": Family(
        "DINOv2",
        "vision",
        lambda backbone: Parts(backbone.encoder.input, backbone.encoder.layers, backbone.layernorm),
        ("dinov2", "dinov2_with_registers"),
        leading_tokens=lambda config: 1 + int(config.get("num_register_tokens", 0)),
        final_norm=True,
        trains=True,
    ),
    "DINOV3Backbone": Family(
        "DINOv3",
        "vision",
        _of_dinov3,
        ("dinov3_vit",),
        leading_tokens=lambda config: 1 + int(config.get("num_register_tokens", 4)),
        final_norm=True,
    ),
    "CLIPVisionEncoder": Family(
        "CLIP", "vision", _of_clip, leading_tokens=lambda config: 1, final_norm=True
    ),
    "SigLIPVisionEncoder": Family("SigLIP", "vision", _of_siglip, final_norm=True),
    "DistilBertBackbone": Family("DistilBERT", "text", _of_transformer_layers, ("distilbert",)),
    "BertBackbone": Family("BERT", "text", _of_transformer_layers, ("bert",)),
    "RobertaBackbone": Family("RoBERTa", "text", _of_transformer_layers, ("roberta",), pieces="Ġ"),
    "XLMRobertaBackbone": Family(
        "XLM-RoBERTa", "text", _of_transformer_layers, ("xlm-roberta",), pieces="▁"
    ),
    "AlbertBackbone": Family(
        "ALBERT",
        "text",
        _of_albert,
        ("albert",),
        shared=lambda config: int(config["num_layers"]) // int(config.get("num_groups", 1)),
        pieces="▁",
    ),
    "CLIPTextEncoder": Family(
        "CLIP", "text", _of_clip, final_norm=True, query="last", pieces="</w>"
    ),
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


def check_k(k: int, num_blocks: int, kind: str, shared: int = 1) -> None:
    """Check how many of an encoder's last blocks are left to training.

    Args:
        k: How many.
        num_blocks: How many there are.
        kind: "vision" or "text".
        shared: Blocks in a row that are one layer.

    Raises:
        ConfigError: It is outside 0..num_blocks, or would part one layer.
    """
    if 0 <= k <= num_blocks and k % shared == 0:
        return
    setting = {"vision": "k_vit", "text": "k_txt"}[kind]
    weights, choose = "", f"0 to {num_blocks}"
    if shared > 1:
        weights = f", {shared} in a row with the same weights, which train together or not at all"
        *others, last = [str(cut) for cut in range(0, num_blocks + 1, shared)]
        choose = f"{', '.join(others)} or {last}"
    raise ConfigError(
        f"[train] {setting} = {k}: the {kind} encoder has {num_blocks} transformer blocks{weights};"
        f" choose {choose}"
    )


def num_patches(config: Mapping[str, Any]) -> int:
    """Return how many patches one image has, from a vision backbone's configuration."""
    patch = config["patch_size"]
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    height, width = config["image_shape"][:2]
    return (height // patch_height) * (width // patch_width)
