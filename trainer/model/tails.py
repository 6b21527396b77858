"""What a cached model begins with: the layers that train of both encoders, and int8 widened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from featstore.encoders.tower import Tower, run_blocks
from featstore.errors import PresetError
from trainer.model.encoder_layers import (
    encoder_layer,
    first_token_layer,
    last_token,
    last_token_layer,
)


def query_token(states: Any, padding_mask: Any, query: str) -> Any:
    """Return the state of the token that the head reads, of shape (batch, 1, width).

    Args:
        states: Float of shape (batch, length, width).
        padding_mask: Bool or int32 of shape (batch, length); padding is at the end.
        query: "first" or "last"; see `featstore.encoders.families.Family`.
    """
    return states[:, :1] if query == "first" else last_token(states, padding_mask)


@keras.saving.register_keras_serializable(package="featstore")
class TextTail(keras.layers.Layer):
    """The last layers of a text backbone, and which of its tokens' states leave.

    Args:
        layer_configs: Of each layer, in the order in which they run: of a
            keras-hub `TransformerEncoder` its `get_config()`, of others (such
            as a final norm) what `keras.saving.serialize_keras_object` makes.
            None at all: the layer only picks the token.
        fast: Run the layers by `trainer.model.fastpath`, the last for the one
            token alone where only that leaves. Weights, draws and result are
            the plain layers'.
        runs: How often each layer runs before the next does.
        query: The token that leaves: "first" or "last".
        whole: Every token leaves instead.
    """

    def __init__(
        self,
        layer_configs: list[dict[str, Any]],
        fast: bool = True,
        runs: int = 1,
        query: str = "first",
        whole: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layer_configs = layer_configs
        self.fast, self.runs, self.query, self.whole = fast, runs, query, whole
        self.transformer_layers = [_layer_of(config, self.dtype_policy) for config in layer_configs]

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
            Shape (batch, 1, width): the state of the one token; or that of each,
            (batch, length, width).
        """
        steps = [layer for layer in self.transformer_layers for _ in range(self.runs)]
        norms = [step for step in steps if isinstance(step, keras.layers.LayerNormalization)]
        blocks = steps[: len(steps) - len(norms)]
        x = hidden
        if self.fast and blocks and not self.whole:
            for block in blocks[:-1]:
                x = self._run(block, x, padding_mask, training)
            if self.query == "first":
                x = first_token_layer(blocks[-1], x, padding_mask, training)
            else:
                x = last_token_layer(blocks[-1], x, padding_mask)
        else:
            for block in blocks:
                x = self._run(block, x, padding_mask, training)
            x = x if self.whole else query_token(x, padding_mask, self.query)
        for norm in norms:
            x = norm(x)
        return x

    def _run(self, block: Any, x: Any, padding_mask: Any, training: bool | None) -> Any:
        if self.query == "last":
            # Causal: no real token sees the padding behind it.
            return block(x, training=training)
        if self.fast:
            return encoder_layer(block, x, padding_mask, training)
        return block(x, padding_mask=padding_mask, training=training)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], **_: Any
    ) -> tuple[int | None, ...]:
        """Return (batch, 1, width), or the shape of the states."""
        return (input_shape[0], input_shape[1] if self.whole else 1, input_shape[2])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("layer_configs", "fast", "runs", "query", "whole")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _layer_of(config: dict[str, Any], policy: Any) -> Any:
    """Make a layer of `TextTail.layer_configs`."""
    import keras_hub

    if "class_name" not in config:
        return keras_hub.layers.TransformerEncoder.from_config({**config, "dtype": policy})
    inner = {**config["config"], "dtype": policy.name}
    return keras.saving.deserialize_keras_object({**config, "config": inner})


def short_backbone(encoder: Mapping[str, Any], num_layers: int, dtype: str, **sizes: int) -> Any:
    """Return a backbone like a preset's, of fewer blocks and with random weights.

    keras-hub alone knows how its classes set up a block; so a backbone is asked for them.

    Args:
        encoder: The preset's parsed `config.json`.
        num_layers: Its blocks.
        dtype: Dtype policy of its layers.
        sizes: What else of its config is another.

    Raises:
        PresetError: Its blocks drop whole paths, with draws that no seed decides.
    """
    import keras_hub

    name, config = str(encoder["class_name"]), encoder["config"]
    if config.get("drop_path_rate"):
        raise PresetError(
            f"vision preset of a {name}: drop_path_rate is {config['drop_path_rate']}, which"
            " keras-hub draws from no seed of its own; expected 0 where vision blocks train: set it"
            " to 0 in the preset's config.json, or train with --k-vit 0"
        )
    settings = {**config, "num_layers": num_layers, "dtype": dtype, **sizes}
    return getattr(keras_hub.models, name).from_config(settings)


@keras.saving.register_keras_serializable(package="featstore")
class VisionTail(keras.layers.Layer):
    """The last blocks of a vision backbone and its final norm, as keras-hub runs them.

    The head reads every patch, so the last block has no token whose query, feed-forward or
    norm could be left out but the leading ones, one of 197 in the reference study.

    Args:
        encoder: `class_name` and `config` of the backbone, from its preset's `config.json`.
        k_vit: How many blocks, 1 at least.
        skipped: Leading tokens (class, registers) that the blocks see and the head does not.

    Raises:
        PresetError: The backbone is of no vision family, or see `short_backbone`.
    """

    def __init__(
        self, encoder: Mapping[str, Any], k_vit: int, skipped: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.encoder = {key: encoder[key] for key in ("class_name", "config")}
        self.k_vit, self.skipped = k_vit, skipped
        with keras.name_scope(self.name):
            tower = Tower(short_backbone(encoder, k_vit, self.dtype_policy.name), "vision")
        # These alone are kept of it: what embeds the pixels goes.
        self.blocks, self.norm = list(tower.blocks), tower.norm
        self.built = True

    @property
    def trained_layers(self) -> dict[str, Any]:
        """The layers by the names that they have in the whole backbone, in their order."""
        below = int(self.encoder["config"]["num_layers"]) - self.k_vit

        def name(block: Any) -> str:
            return re.sub(r"\d+$", lambda number: str(int(number[0]) + below), block.name)

        norm = {} if self.norm is None else {self.norm.name: self.norm}
        return {name(block): block for block in self.blocks} | norm

    def call(self, hidden: Any, training: bool | None = None) -> Any:
        """Run the layers.

        Args:
            hidden: Float of shape (batch, tokens, width): what enters the first of the blocks,
                the leading tokens included.
            training: Whether the blocks' own dropout applies.

        Returns:
            Shape (batch, tokens - skipped, width).
        """
        x = run_blocks(self.blocks, hidden, None, training)
        x = x if self.norm is None else self.norm(x)
        return x[:, self.skipped :]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return (batch, tokens - skipped, width)."""
        batch, tokens, width = input_shape
        return (batch, None if tokens is None else tokens - self.skipped, width)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"encoder": self.encoder, "k_vit": self.k_vit, "skipped": self.skipped}
        return {**super().get_config(), **own}


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
