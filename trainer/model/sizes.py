"""How large a cached model is, told from its settings, without Keras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featstore.encoders.families import FAMILIES
from trainer.config import TrainConfig


def count_parameters(
    text_config: Mapping[str, Any], vision_width: int, train: TrainConfig, classes: int = 2
) -> int:
    """Return the parameters of a cached model, all of which train.

    A text layer of width d and inner width m has four projections, two normalisations and
    two dense layers: 4(d² + d) + 4d + 2dm + m + d. One that runs several times counts once.

    Args:
        text_config: The text preset's parsed `config.json`.
        vision_width: Numbers of one vision token.
        train: `k_txt` and the head's sizes are used.
        classes: 2 or 3.
    """
    settings = text_config["config"]
    family = FAMILIES.get(text_config.get("class_name", ""))
    shared = family.shared(settings) if family else 1
    norm = 2 if train.k_txt and family and family.final_norm else 0
    width, inner = int(settings["hidden_dim"]), int(settings["intermediate_dim"])
    layer = 4 * (width**2 + width) + 4 * width + 2 * width * inner + inner + width
    across = (train.num_heads or width // train.head_dim) * train.head_dim
    attention = (width + 1) * across + 2 * (vision_width + 1) * across + (across + 1) * width
    mlp = (width + 1) * train.mlp_dim + (train.mlp_dim + 1) * (1 if classes == 2 else classes)
    text = train.k_txt // shared * layer + norm * width
    return text + train.fusion_layers * (attention + 2 * width) + mlp
