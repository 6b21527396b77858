"""Preset folders of tiny encoders with random weights, written by keras-hub itself."""

from __future__ import annotations

import io
import string
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import sentencepiece

WORDS = (
    "a the dog cat man woman runs sits on in red two park ball is not sleeping un ##able ##s . ,"
)


def randomise(model: keras.Model, seed: int, scale: float = 0.2) -> None:
    """Give every weight noise, so that no bias is zero and no norm is the identity."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.path.endswith("position_ids"):
            weight.assign(np.arange(weight.shape[1])[None])
            continue
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


# Settings of a tiny backbone of every family, by class; DINOv2 with registers and without, ALBERT
# of one layer that runs three times and of three.
_SIZES = {"num_layers": 3, "num_heads": 2, "hidden_dim": 8}
_VISION = {**_SIZES, "dropout_rate": 0.1}
_IMAGE = {"image_shape": (32, 32, 3), "patch_size": 8}
_INNER = {**_SIZES, **_IMAGE, "intermediate_dim": 12}
_PLAIN_TEXT = {
    **_SIZES,
    "vocabulary_size": 320,
    "intermediate_dim": 12,
    "max_sequence_length": 24,
}
_TEXT = {**_PLAIN_TEXT, "dropout": 0.1}
_ALBERT = {**_TEXT, "embedding_dim": 6}
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
    "dinov3": (
        "DINOV3Backbone",
        {**_INNER, "attention_dropout": 0.1, "num_register_tokens": 2, "use_gated_mlp": True},
    ),
    "clip_vision": ("CLIPVisionEncoder", _INNER),
    "siglip_vision": ("SigLIPVisionEncoder", _INNER),
    "distil_bert": ("DistilBertBackbone", _TEXT),
    "bert": ("BertBackbone", _TEXT),
    "roberta": ("RobertaBackbone", _TEXT),
    "xlm_roberta": ("XLMRobertaBackbone", _TEXT),
    "albert": ("AlbertBackbone", _ALBERT),
    "albert_groups": ("AlbertBackbone", {**_ALBERT, "num_groups": 3}),
    "clip_text": ("CLIPTextEncoder", {**_PLAIN_TEXT, "embedding_dim": 8}),
}
# Their tokenizers and image converters; of others ViT's.
_TOKENIZERS = {
    "distil_bert": "DistilBertTokenizer",
    "bert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm_roberta": "XLMRobertaTokenizer",
    "albert": "AlbertTokenizer",
    "albert_groups": "AlbertTokenizer",
    "clip_text": "CLIPTokenizer",
    "clip": "CLIPTokenizer",
}
_CONVERTERS = {
    "deit": "DeiTImageConverter",
    "dinov2": "DINOV2ImageConverter",
    "dinov2_registers": "DINOV2ImageConverter",
    "dinov3": "DINOV3ImageConverter",
    "clip_vision": "CLIPImageConverter",
    "clip": "CLIPImageConverter",
    "siglip_vision": "SigLIPImageConverter",
    "siglip": "SigLIPImageConverter",
}


def tiny_backbone(name: str) -> Any:
    """Return one of `TINY_FAMILIES`, or "clip" or "siglip", of two towers; random weights."""
    if name in ("clip", "siglip"):
        return _two_towers(name)
    class_name, settings = TINY_FAMILIES[name]
    backbone = getattr(keras_hub.models, class_name)(**settings)
    randomise(backbone, seed=3)
    return backbone


def _two_towers(name: str) -> Any:
    vision = tiny_backbone(f"{name}_vision")
    if name == "clip":
        text = tiny_backbone("clip_text")
        backbone = keras_hub.models.CLIPBackbone(vision, text, projection_dim=6)
    else:
        sizes = {**_PLAIN_TEXT, "embedding_dim": 8, "projection_dim": 8}
        backbone = keras_hub.models.SigLIPBackbone(
            vision, keras_hub.models.SigLIPTextEncoder(**sizes)
        )
    randomise(backbone, seed=3)
    return backbone


def write_tiny_family(name: str, folder: Path) -> Path:
    """Write the preset of a `tiny_backbone`, with its tokenizer and its image converter."""
    tiny_backbone(name).save_to_preset(str(folder))
    if name in _TOKENIZERS:
        kind = getattr(keras_hub.tokenizers, _TOKENIZERS[name])
        kind(**_vocabulary(_TOKENIZERS[name])).save_to_preset(str(folder))
    if name not in _TOKENIZERS or name == "clip":
        kind = getattr(keras_hub.layers, _CONVERTERS.get(name, "ViTImageConverter"))
        kind(image_size=(32, 32), scale=1 / 255, interpolation="bicubic").save_to_preset(
            str(folder)
        )
    return folder


def _vocabulary(tokenizer: str) -> dict[str, Any]:
    """Return a small vocabulary of `WORDS` as a tokenizer's class wants it."""
    if tokenizer in ("DistilBertTokenizer", "BertTokenizer"):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
        return {"vocabulary": words, "lowercase": True}
    if tokenizer in ("RobertaTokenizer", "CLIPTokenizer"):
        return _byte_pairs(clip=tokenizer == "CLIPTokenizer")
    pieces = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    if tokenizer == "AlbertTokenizer":
        pieces = {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "pad_piece": "<pad>"}
        pieces |= {"unk_piece": "<unk>", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
        pieces["user_defined_symbols"] = "[MASK]"
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.split() * 4),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **pieces,
    )
    return {"proto": model.getvalue()}


def _byte_pairs(clip: bool) -> dict[str, Any]:
    """Return a vocabulary of bytes, of bytes that end a word (CLIP), and of merged ones."""
    letters = [*string.ascii_lowercase, ".", ",", "Ġ"]
    if clip:
        ends = [f"{letter}</w>" for letter in letters]
        merges = [("d", "o"), ("do", "g</w>"), ("m", "a"), ("ma", "n</w>"), ("i", "n</w>")]
        special = ["<|startoftext|>", "<|endoftext|>"]
        tokens = ["!", *letters, *ends, *("".join(pair) for pair in merges), *special]
    else:
        merges = [("d", "o"), ("do", "g"), ("m", "a"), ("ma", "n"), ("Ġ", "r"), ("Ġr", "u")]
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        tokens = [*special, *letters, *("".join(pair) for pair in merges), "<mask>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return {"vocabulary": vocabulary, "merges": [" ".join(pair) for pair in merges]}


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
