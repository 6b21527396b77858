"""How large a cached model is, told from its settings, without Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featstore.config import usable_cores
from featstore.encoders.families import FAMILIES
from featstore.encoders.presets import resolve_preset
from featstore.errors import FeatstoreError
from trainer.config import Config, TrainConfig

SMALL_STEP, SMALL_STEP_OF_MANY = 12_288, 4096
"""Rows of a step times the width of a token, up to which an operation has one thread.

The first on two cores: up to there a step is 1.08 to 1.8 times as fast (`python -m benchmarks
threads`), with the bits that two threads give by oneDNN's products. The second on more, where it
was not measured and large products have more to lose; beyond it the bits may be others.
"""


def block_parameters(width: int, inner: int) -> int:
    """Return the parameters of a transformer block of width d and inner width m.

    Four projections, two normalisations and two dense layers: 4(d² + d) + 4d + 2dm + m + d.
    """
    return 4 * (width**2 + width) + 4 * width + 2 * width * inner + inner + width


def vision_parameters(vision: Mapping[str, Any], k_vit: int) -> int:
    """Return the parameters of the last vision blocks and of the final norm; 0 for none.

    Args:
        vision: The settings of the backbone, `config` of its preset's `config.json`.
        k_vit: Blocks.
    """
    if not k_vit:
        return 0
    width, inner = int(vision["hidden_dim"]), int(vision.get("mlp_dim", 0))
    inner = inner or int(vision["intermediate_dim"])
    block = block_parameters(width, inner)
    if "layer_scale_init_value" in vision:
        block += 2 * width  # DINOv2 scales what attention and feed-forward add.
    if vision.get("use_swiglu_ffn"):
        gated = (int(inner * 2 / 3) + 7) // 8 * 8
        block += 3 * width * gated + 2 * gated - 2 * width * inner - inner
    return k_vit * block + 2 * width


def count_parameters(
    text_config: Mapping[str, Any],
    vision: Mapping[str, Any],
    train: TrainConfig,
    classes: int = 2,
) -> int:
    """Return the parameters of a cached model, all of which train.

    A text layer that runs several times counts once.

    Args:
        text_config: The text preset's parsed `config.json`.
        vision: The settings of the vision backbone; of them `hidden_dim`, where no block trains.
        train: `k_txt`, `k_vit` and the head's sizes are used.
        classes: 2 or 3.
    """
    settings = text_config["config"]
    family = FAMILIES.get(text_config.get("class_name", ""))
    shared = family.shared(settings) if family else 1
    norm = 2 if train.k_txt and family and family.final_norm else 0
    width, inner = int(settings["hidden_dim"]), int(settings["intermediate_dim"])
    vision_width = int(vision["hidden_dim"])
    across = (train.num_heads or width // train.head_dim) * train.head_dim
    attention = (width + 1) * across + 2 * (vision_width + 1) * across + (across + 1) * width
    mlp = (width + 1) * train.mlp_dim + (train.mlp_dim + 1) * (1 if classes == 2 else classes)
    text = train.k_txt // shared * block_parameters(width, inner) + norm * width
    trained = text + vision_parameters(vision, train.k_vit)
    return trained + train.fusion_layers * (attention + 2 * width) + mlp


def step_threads(config: Config, batch_size: int = 0) -> int:
    """Return how many threads share an operation of a step: 1 where it is small, 0 for all.

    To hand a part of a small product to another thread takes longer than the part.

    Args:
        config: A run's settings.
        batch_size: Rows of its largest step; 0: as `config` says.
    """
    train = config.train
    try:
        text = resolve_preset(config.encoders.text).tower("text").config["config"]
        vision = resolve_preset(config.encoders.vit).tower("vision").config["config"]
    except FeatstoreError:
        # What needs them will say so.
        return 0
    width = max(int(text["hidden_dim"]), int(vision["hidden_dim"]))
    return int(is_small(batch_size or train.batch_size, width) and not train.k_vit)


def is_small(rows: int, width: int) -> bool:
    """Return whether a step of so many rows, on tokens so wide, is small on this machine."""
    return rows * width <= (SMALL_STEP if usable_cores() <= 2 else SMALL_STEP_OF_MANY)
