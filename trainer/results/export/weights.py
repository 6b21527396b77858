"""A run's weights as files: all of them in Keras's layout, the trained ones as safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from featstore.errors import RunError


def save_weights(
    model: keras.Model,
    trained: Mapping[str, Any],
    folder: Path,
    names: tuple[str, str],
    card: Mapping[str, Any],
) -> None:
    """Write both files.

    Args:
        model: From `build_plain`, with its weights.
        trained: The weights that the run trained, by name; see `trained_weights`.
        folder: Where to.
        names: Of the safetensors file (float32, the trained weights) and of the Keras file (all
            weights).
        card: Put into the metadata of the safetensors file, each value as JSON.
    """
    from safetensors.numpy import save_file

    metadata = {key: json.dumps(value, ensure_ascii=False) for key, value in card.items()}
    tensors = {name: np.asarray(weight, np.float32) for name, weight in trained.items()}
    save_file(tensors, folder / names[0], metadata)
    model.save_weights(folder / names[1])
    # safetensors lets its writer alone read a file; this one is to be given away like the other.
    shutil.copymode(folder / names[1], folder / names[0])


def read_weights_back(
    model: keras.Model, trained: Mapping[str, Any], folder: Path, names: tuple[str, str]
) -> None:
    """Empty a model and load its weights from the file; compare the tensors of the other.

    Raises:
        RunError: A tensor of the safetensors file is not the run's.
    """
    from safetensors.numpy import load_file

    tensors = load_file(folder / names[0])
    for name in sorted(tensors.keys() | trained.keys()):
        if name not in tensors or not np.array_equal(tensors[name], np.asarray(trained[name])):
            raise RunError(f"{names[0]}: tensor {name} reads back as another than was written")
    for weight in model.weights:
        weight.assign(np.zeros(weight.shape))
    model.load_weights(folder / names[1])
