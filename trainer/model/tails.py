"""What a cached model begins with: the text layers that train, and int8 features widened."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from trainer.model.fastpath import encoder_layer, first_token_layer


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
