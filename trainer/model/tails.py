"""The text layers that train, and the model that trains over cached features."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from featstore.encoders.tower import check_k_txt, transformer_layers
from featstore.errors import PresetError, RunError
from featstore.store.numbers import QUANTISED
from trainer.config import TrainConfig
from trainer.model.fastpath import encoder_layer, first_token_layer
from trainer.model.head import apply_head

TAIL_NAME = "text_tail"
SCALES_OF = {"features": "feature_scales", "hidden": "hidden_scales"}


@keras.saving.register_keras_serializable(package="featstore")
class TextTail(keras.layers.Layer):
    """The last layers of a text backbone, of which only the first token's state leaves.

    Args:
        layer_configs: `get_config()` of each keras-hub `TransformerEncoder`,
            in the order in which they run. None at all: the layer only picks
            the first token.
        fast: Run the layers by `trainer.model.fastpath`, the last for the first
            token alone. Weights, draws and result are the plain layers'.
    """

    def __init__(
        self, layer_configs: list[dict[str, Any]], fast: bool = True, **kwargs: Any
    ) -> None:
        import keras_hub

        super().__init__(**kwargs)
        self.layer_configs = layer_configs
        self.fast = fast
        self.transformer_layers = [
            keras_hub.layers.TransformerEncoder.from_config({**config, "dtype": self.dtype_policy})
            for config in layer_configs
        ]

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the layers' variables for hidden states of `input_shape`."""
        for layer in self.transformer_layers:
            layer.build(input_shape)
        self.built = True

    def call(self, hidden: Any, padding_mask: Any = None, training: bool | None = None) -> Any:
        """Run the layers.

        Args:
            hidden: Float of shape (batch, length, width): what enters the
                first of the layers.
            padding_mask: Bool of shape (batch, length), True where a token is
                real, or None.
            training: Whether the layers' own dropout applies.

        Returns:
            Shape (batch, 1, width): the state of the first token.
        """
        x = hidden
        if not self.fast or not self.transformer_layers:
            for layer in self.transformer_layers:
                x = layer(x, padding_mask=padding_mask, training=training)
            return ops.expand_dims(x[:, 0], 1)
        for layer in self.transformer_layers[:-1]:
            x = encoder_layer(layer, x, padding_mask, training)
        return first_token_layer(self.transformer_layers[-1], x, padding_mask, training)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], **_: Any
    ) -> tuple[int | None, ...]:
        """Return (batch, 1, width)."""
        return (input_shape[0], 1, input_shape[2])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        config = super().get_config()
        return {**config, "layer_configs": self.layer_configs, "fast": self.fast}


@keras.saving.register_keras_serializable(package="featstore")
class Dequantize(keras.layers.Layer):
    """int8 levels times the scale of their token.

    In float32 whatever the other layers compute in: a scale rounded to
    bfloat16 would move all numbers of its token.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": "float32"})

    def call(self, levels: Any, scales: Any) -> Any:
        """Widen features.

        Args:
            levels: int8 of shape (batch, tokens, width).
            scales: float32 of shape (batch, tokens).

        Returns:
            float32 of shape (batch, tokens, width).
        """
        return ops.cast(levels, "float32") * ops.expand_dims(scales, -1)

    def compute_output_spec(self, levels: Any, scales: Any) -> Any:
        """Return float32 of the shape of `levels`."""
        return keras.KerasTensor(levels.shape, dtype="float32")


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
        `get_config()` of each layer, in the order in which they run.

    Raises:
        ConfigError: `k_txt` is outside 0..number of layers.
        PresetError: The backbone cannot be cut.
    """
    import keras_hub

    name = str(text_config["class_name"])
    backbone_class = getattr(keras_hub.models, name, None)
    if backbone_class is None or "num_layers" not in text_config["config"]:
        raise PresetError(
            f"text preset: unknown class {name} or no num_layers in its config.json; choose a"
            " DistilBERT, BERT, RoBERTa or XLM-RoBERTa preset"
        )
    num_layers = int(text_config["config"]["num_layers"])
    check_k_txt(k_txt, num_layers)
    # keras-hub alone knows how its class sets up a layer: ask a backbone of that class, made small
    # where size does not matter.
    arguments = {**text_config["config"], "dtype": "float32", "num_layers": 1}
    template_arguments = {**arguments, "vocabulary_size": 8, "max_sequence_length": 8}
    layer = transformer_layers(backbone_class.from_config(template_arguments), name)[0]
    config = {key: value for key, value in layer.get_config().items() if key != "dtype"}
    stem = config["name"].removesuffix("0")
    return [{**config, "name": f"{stem}{i}"} for i in range(num_layers - k_txt, num_layers)]


def build_cached_model(
    text_config: Mapping[str, Any],
    vision_width: int,
    num_tokens: int,
    train: TrainConfig,
    *,
    feature_dtype: str = "float16",
) -> keras.Model:
    """Build the model that trains over cached features, with random weights.

    Its variables are those of the head and of the last `train.k_txt` text
    layers, nothing else; `load_text_layers` gives the latter the preset's
    weights. Initial weights and dropout follow from `train.seed` alone, and
    the head's do not depend on `k_txt`.

    Args:
        text_config: The text preset's parsed `config.json` (`Preset.config`).
        vision_width: Numbers of one vision token.
        num_tokens: Vision tokens of an image.
        train: `k_txt`, the head's sizes, `seed`, `dtype_policy` and `fast_path`
            are used.
        feature_dtype: The store's dtype. Features enter the graph in it and
            are cast inside, so that fewer bytes are moved.

    Returns:
        keras.Model from `features` (batch, num_tokens, vision_width), `hidden`
        (batch, length, width) and `padding_mask` (bool, batch, length) to the
        logit (float32, batch, 1). Where `feature_dtype` is "int8", also from
        `feature_scales` (float32, batch, num_tokens) and `hidden_scales`
        (float32, batch, length).

    Raises:
        ConfigError: `k_txt` or the heads do not fit the text encoder.
        PresetError: The text encoder cannot be cut.
    """
    width = int(text_config["config"]["hidden_dim"])
    inputs: dict[str, Any] = {}
    features = _features_input("features", (num_tokens, vision_width), feature_dtype, inputs)
    hidden = _features_input("hidden", (None, width), feature_dtype, inputs)
    padding_mask = keras.Input((None,), dtype="bool", name="padding_mask")
    inputs["padding_mask"] = padding_mask
    configs = text_layer_configs(text_config, train.k_txt)
    with seeded(f"text {train.seed}"):
        tail = TextTail(configs, fast=train.fast_path, dtype=train.dtype_policy, name=TAIL_NAME)
        cls = tail(hidden, padding_mask=padding_mask)
    with seeded(f"head {train.seed}"):
        logit = apply_head(cls, features, train, fast=train.fast_path)
    return keras.Model(inputs, logit, name="cached")


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
    source = transformer_layers(text_backbone, text_backbone.name)
    for layer, pretrained in zip(tail, source[len(source) - len(tail) :], strict=True):
        copy_weights(layer_weights(pretrained), layer_weights(layer))


def layer_weights(layer: Any) -> dict[str, Any]:
    """Return a built layer's weights by their path below it, such as `query/kernel`."""
    named = {weight.path.rpartition(f"{layer.name}/")[2]: weight for weight in layer.weights}
    if len(named) != len(layer.weights):
        raise RunError(f"layer {layer.name}: two weights have one path; expected unique paths")
    return named


def copy_weights(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Copy weights by name.

    Raises:
        RunError: A name is on one side only, or a shape differs. Nothing is
            copied then.
    """
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target:
            side = "source" if name in source else "target"
            raise RunError(
                f"weights cannot be copied: {name} is in the {side} only; build both models with"
                " the same text preset and the same [train] k_txt"
            )
        if tuple(source[name].shape) != tuple(target[name].shape):
            raise RunError(
                f"weights cannot be copied: {name} has shape {tuple(source[name].shape)}, expected"
                f" {tuple(target[name].shape)}; build both models with the same presets and [train]"
                " settings"
            )
    for name, weight in target.items():
        weight.assign(source[name])


def random_state(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the state of every dropout's random generator.

    Keras keeps it in the layers' `SeedGenerator`s: in `model.variables`, but
    in no `model.weights` and in no weights file. A resumed run that is to draw
    what the first would have drawn must restore it.
    """
    return {name: np.asarray(variable) for name, variable in _seed_variables(model).items()}


def set_random_state(model: keras.Model, state: Mapping[str, np.ndarray]) -> None:
    """Restore what `random_state` returned.

    Raises:
        RunError: The state is of another model.
    """
    variables = _seed_variables(model)
    if variables.keys() != state.keys():
        raise RunError(
            f"random state: expected {len(variables)} random generators, found {len(state)}; resume"
            " with the settings that the run was started with"
        )
    for name, variable in variables.items():
        variable.assign(state[name])


def _seed_variables(model: keras.Model) -> dict[str, Any]:
    """Return the generators' variables, numbered: their layers' names differ by process."""
    layers = model._flatten_layers(include_self=False)
    states = [generator.state for layer in layers for generator in layer._seed_generators]
    return {f"seed_generator_{i}": state for i, state in enumerate(states)}


@contextlib.contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Make what Keras draws at construction follow from `seed`, and nothing else change.

    An initializer or a dropout without a seed of its own takes one from
    Python's global random state when it is made.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
