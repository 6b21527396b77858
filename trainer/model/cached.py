"""The model that trains over cached features."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
from keras.src.saving import saving_lib
from keras.src.utils.naming import to_snake_case

from featstore.encoders.families import FAMILIES, check_k, family_of
from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import WEIGHTS_FILE, Preset
from featstore.encoders.spec import QUANTISED
from featstore.encoders.tower import Tower, load_backbone
from featstore.store.shard import HDF5_ERRORS
from trainer.batches import SCALES_OF
from trainer.config import TrainConfig
from trainer.model.head import TAIL_NAME, VISION_TAIL_NAME, apply_head
from trainer.model.tails import Dequantize, TextTail, VisionTail, short_backbone
from trainer.model.weights import copy_weights, layer_weights, seeded


def _features_input(
    name: str, shape: tuple[int | None, int], dtype: str, inputs: dict[str, Any]
) -> Any:
    """Add the input of some features, and of their scales if they are int8; return the features."""
    inputs[name] = keras.Input(shape, dtype=dtype, name=name)
    if dtype != QUANTISED:
        return inputs[name]
    scales = SCALES_OF[name]
    inputs[scales] = keras.Input(shape[:1], dtype="float32", name=scales)
    return Dequantize(name=f"dequantize_{name}")(inputs[name], inputs[scales])


def text_layer_configs(text_config: Mapping[str, Any], k_txt: int) -> list[dict[str, Any]]:
    """Return the configs of a text backbone's last `k_txt` layers, without its weights.

    Args:
        text_config: The text preset's parsed `config.json`.
        k_txt: How many layers.

    Returns:
        `layer_configs` of a `TextTail`; one that runs several times is there once.

    Raises:
        ConfigError: `k_txt` is outside 0..number of layers.
        PresetError: The backbone is of no text family.
    """
    name = str(text_config["class_name"])
    family = family_of(name, "text", name)
    settings = text_config["config"]
    num_layers, shared = int(settings["num_layers"]), family.shared(settings)
    check_k(k_txt, num_layers, "text", shared)
    # Small where size does not matter.
    small = {"vocabulary_size": 8, "max_sequence_length": 8}
    small |= {"num_groups": 1} if "num_groups" in settings else {}
    template = short_backbone(text_config, 1, "float32", **small)
    block, *norm = Tower(template, "text").upper_layers(1)
    layers = range((num_layers - k_txt) // shared, num_layers // shared)
    configs = [_layer_config(block, _NUMBER.sub(rf"{i}\g<1>", block.name)) for i in layers]
    return configs + [_layer_config(layer, layer.name) for layer in norm if k_txt]


# The number of the first layer in its name: `transformer_layer_0`, of ALBERT
# `group_0_inner_layer_0`.
_NUMBER = re.compile(r"0(_inner_layer_0)?$")


def _layer_config(layer: Any, name: str) -> dict[str, Any]:
    """Return what `TextTail` makes a layer of, without its dtype, under another name."""
    import keras_hub

    config = {key: value for key, value in layer.get_config().items() if key != "dtype"}
    config["name"] = name
    if type(layer) is keras_hub.layers.TransformerEncoder:
        return config
    saved = keras.saving.serialize_keras_object(layer)
    names = ("module", "class_name", "registered_name")
    return {**{name: saved[name] for name in names}, "config": config}


@pinned_framework()
def build_cached_model(
    text_config: Mapping[str, Any],
    vision_width: int,
    num_tokens: int,
    train: TrainConfig,
    *,
    feature_dtype: str = "float16",
    classes: int = 2,
    vision_config: Mapping[str, Any] | None = None,
    tokens: str = "patches",
) -> keras.Model:
    """Build the model that trains over cached features, with random weights.

    Its variables are those of the head, of the last `train.k_txt` text layers,
    and of the last `train.k_vit` vision blocks and their final norm, nothing
    else; `load_pretrained` gives the layers the presets' weights. Initial
    weights and dropout follow from `train.seed` alone, and the head's do not
    depend on `k_txt` and `k_vit`.

    Args:
        text_config: The text preset's parsed `config.json` (`Preset.config`).
        vision_width: Numbers of one vision token.
        num_tokens: Vision tokens of an image, as they are stored.
        train: `k_txt`, `k_vit`, the head's sizes, `seed`, `dtype_policy` and
            `fast_path` are used.
        feature_dtype: The store's dtype. Features enter the graph in it and
            are cast inside, so that fewer bytes are moved.
        classes: 2 or 3.
        vision_config: The vision preset's parsed `config.json`, where `k_vit` is not 0.
        tokens: Where `k_vit` is not 0: "patches" keeps the leading tokens from the head.

    Returns:
        keras.Model from `features` (batch, num_tokens, vision_width), `hidden`
        (batch, length, width) and `padding_mask` (bool, batch, length) to the
        logits (float32, batch, 1 or 3), see `apply_head`. Where `feature_dtype` is
        "int8", also from `feature_scales` (float32, batch, num_tokens) and
        `hidden_scales` (float32, batch, length).

    Raises:
        ConfigError: `k_txt`, `k_vit` or the heads do not fit the encoders.
        PresetError: An encoder is of no family.
    """
    width = int(text_config["config"]["hidden_dim"])
    inputs: dict[str, Any] = {}
    features = _features_input("features", (num_tokens, vision_width), feature_dtype, inputs)
    hidden = _features_input("hidden", (None, width), feature_dtype, inputs)
    padding_mask = keras.Input((None,), dtype="bool", name="padding_mask")
    inputs["padding_mask"] = padding_mask
    configs = text_layer_configs(text_config, train.k_txt)
    family = FAMILIES[text_config["class_name"]]
    runs = family.shared(text_config["config"])
    if train.k_vit:
        assert vision_config is not None
        with seeded(f"vision {train.seed}"):
            features = vision_tail(vision_config, train, tokens)(features)
    with seeded(f"text {train.seed}"):
        whole = train.queries == "all"
        tail = TextTail(
            configs,
            fast=train.fast_path,
            runs=runs,
            query=family.query,
            whole=whole,
            dtype=train.dtype_policy,
            name=TAIL_NAME,
        )
        states = tail(hidden, padding_mask=padding_mask)
    with seeded(f"head {train.seed}"):
        logits = apply_head(
            states, features, train, train.fast_path, classes=classes, mask=padding_mask
        )
    return keras.Model(inputs, logits, name="cached")


def vision_tail(vision_config: Mapping[str, Any], train: TrainConfig, tokens: str) -> VisionTail:
    """Return the layer of the last vision blocks, with random weights.

    Args:
        vision_config: The vision preset's parsed `config.json`.
        train: `k_vit` and `dtype_policy` are used.
        tokens: "patches" leaves the leading tokens out of its output.

    Raises:
        ConfigError: `k_vit` is outside 0..number of blocks.
        PresetError: The backbone is of no vision family.
    """
    name, config = str(vision_config["class_name"]), vision_config["config"]
    family = family_of(name, "vision", name)
    check_k(train.k_vit, int(config["num_layers"]), "vision")
    skipped = family.leading_tokens(config) if tokens == "patches" else 0
    return VisionTail(
        vision_config, train.k_vit, skipped, dtype=train.dtype_policy, name=VISION_TAIL_NAME
    )


@pinned_framework()
def load_pretrained(model: keras.Model, text: Preset, vision: Preset | None = None) -> None:
    """Give a cached model's text and vision layers the presets' weights.

    They are read alone, where a preset's file is one of Keras's own; else the whole
    backbone is loaded.

    Args:
        model: From `build_cached_model`, with these presets' `config`.
        text: The text preset.
        vision: The vision preset; None where no vision block trains.

    Raises:
        PresetError: One cannot be loaded.
        RunError: A weight's shape differs.
    """
    tail = model.get_layer(TAIL_NAME).transformer_layers
    if tail and not _read_layers(tail, text):
        load_text_layers(model, load_backbone(text, "float32"))
    if vision is not None:
        backbone = _read_last_blocks(vision, model.get_layer(VISION_TAIL_NAME).k_vit)
        load_vision_layers(model, backbone or load_backbone(vision, "float32"))


def load_vision_layers(model: keras.Model, vision_backbone: Any) -> None:
    """Copy the last layers of a vision backbone into a cached model; see `load_text_layers`."""
    tail = model.get_layer(VISION_TAIL_NAME)
    source = Tower(vision_backbone, "vision").upper_layers(tail.k_vit)
    for layer, pretrained in zip(tail.trained_layers.values(), source, strict=True):
        copy_weights(layer_weights(pretrained), layer_weights(layer))


class _LastBlocks(saving_lib.H5IOStore):
    """A weights file of a whole backbone, read as that of a backbone of its last blocks alone.

    Args:
        path: The file.
        block: How its groups of blocks are called: `block`, `block_1` and so on.
        below: Blocks that are left out.
    """

    def __init__(self, path: Any, block: str, below: int) -> None:
        super().__init__(path, mode="r")
        self.block, self.below = re.compile(rf"{block}(?:_(\d+))?"), below

    def get(self, path: str) -> Any:
        """Return the entry of a path of the short backbone."""
        parts = path.split("/")
        for i, part in enumerate(parts):
            if found := self.block.fullmatch(part):
                number = int(found[1] or 0) + self.below
                parts[i] = f"{part.removesuffix(f'_{found[1]}')}_{number}" if number else part
        return super().get("/".join(parts))


def _read_last_blocks(preset: Preset, k: int) -> Any:
    """Return a vision backbone of the last blocks alone, with the preset's weights.

    None where its weights file has another form.
    """
    count = int(preset.config["config"]["num_layers"])
    if not _has_own_file(preset):
        return None
    with keras.name_scope(VISION_TAIL_NAME):
        backbone = short_backbone(preset.config, k, "float32")
    block = to_snake_case(type(Tower(backbone, "vision").blocks[0]).__name__)
    names = {block, *(f"{block}_{i}" for i in range(1, count))}

    def is_known(file: h5py.File) -> bool:
        groups: list[str] = []
        file.visit(groups.append)
        found = [name for group in groups if (name := group.rpartition("/")[2]) in names]
        return sorted(found) == sorted(names)

    def store(path: Path) -> saving_lib.H5IOStore:
        return _LastBlocks(path, block, count - k)

    return backbone if _read(preset, is_known, store, {"": backbone}) else None


def _read_layers(layers: list[Any], preset: Preset) -> bool:
    """Read a backbone's last layers from its weights file; False where it has another form."""
    count = int(preset.config["config"]["num_layers"])
    names = ["transformer_encoder", *(f"transformer_encoder_{i}" for i in range(1, count))]

    def is_known(file: h5py.File) -> bool:
        return {name for name in file["layers"] if name.startswith(names[0])} == {*names}

    def store(path: Path) -> saving_lib.H5IOStore:
        return saving_lib.H5IOStore(path, mode="r")

    if len(layers) > count or not _has_own_file(preset):
        return False
    own = (f"layers/{name}" for name in names[count - len(layers) :])
    return _read(preset, is_known, store, dict(zip(own, layers, strict=True)))


def _has_own_file(preset: Preset) -> bool:
    """Tell whether a preset's weights are in one file of Keras's own."""
    return [path.name for path in preset.weights_files] == [WEIGHTS_FILE]


def _read(
    preset: Preset,
    is_known: Callable[[h5py.File], bool],
    store: Callable[[Path], saving_lib.H5IOStore],
    parts: Mapping[str, Any],
) -> bool:
    """Read some of a preset's weights from its file; False where it has another form.

    Args:
        preset: Its weights are in one file of Keras's own.
        is_known: Tells of the file whether it has the form.
        store: Opens it for Keras.
        parts: Path in it to what is read from there.
    """
    (path,) = preset.weights_files
    try:
        with h5py.File(path, "r", locking=False) as file:
            if not is_known(file):
                return False
        with contextlib.closing(store(path)) as opened:
            for inner_path, part in parts.items():
                saving_lib._load_state(part, opened, None, inner_path, visited_saveables=set())
    except (*HDF5_ERRORS, IndexError):
        # What the file is, keras-hub's own loader will say.
        return False
    return True


def load_text_layers(model: keras.Model, text_backbone: Any) -> None:
    """Copy the last layers of a text backbone into a cached model.

    Args:
        model: From `build_cached_model`.
        text_backbone: The keras-hub backbone with its weights; it must have
            been built from the same `config.json`.

    Raises:
        RunError: A weight's shape differs.
    """
    tail = model.get_layer(TAIL_NAME).transformer_layers
    tower = Tower(text_backbone, "text")
    source = tower.upper_layers(tower.num_blocks)
    for layer, pretrained in zip(tail, source[len(source) - len(tail) :], strict=True):
        copy_weights(layer_weights(pretrained), layer_weights(layer))
