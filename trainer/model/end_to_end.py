"""The same model from pixels and tokens: parity oracle, export format, baseline."""

from __future__ import annotations

import functools
from typing import Any

import keras

from featstore.encoders.tower import frozen_part, leading_tokens, text_inputs, transformer_layers
from featstore.errors import PresetError
from trainer.config import TrainConfig
from trainer.model.head import TEXT_NAME, VISION_NAME, apply_head
from trainer.model.weights import seeded, trained_weights


@keras.saving.register_keras_serializable(package="featstore")
class FrozenVision(keras.layers.Layer):
    """A vision backbone that never trains and never runs its dropout.

    Args:
        backbone: A keras-hub vision backbone, taken over: it is frozen.
        tokens: `"patches"` drops the leading class and register tokens;
            `"all"` keeps them.
    """

    def __init__(self, backbone: Any, tokens: str = "patches", **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": backbone.dtype_policy})
        self.backbone = backbone
        self.tokens = tokens
        set_trainable(backbone, False)
        self._skipped = leading_tokens(backbone, backbone.name) if tokens == "patches" else 0
        self.built = True

    @property
    def trainable(self) -> bool:
        """Always False: a model that is reloaded sets this flag on all its layers."""
        return False

    @trainable.setter
    def trainable(self, value: bool) -> None:
        set_trainable(self.backbone, False)

    def call(self, pixels: Any) -> Any:
        """Return the tokens, of shape (batch, tokens, width), of float pixels."""
        inputs = pixels
        if isinstance(self.backbone.input, dict):
            inputs = {self.backbone.inputs[0].name: pixels}
        return self.backbone(inputs, training=False)[:, self._skipped :]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return (batch, tokens, width)."""
        _, tokens, width = self.backbone.output.shape
        return (input_shape[0], tokens - self._skipped, width)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {**super().get_config(), "backbone": backbone, "tokens": self.tokens}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FrozenVision:
        """Rebuild the layer with a backbone of random weights."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


@keras.saving.register_keras_serializable(package="featstore")
class TextTower(keras.layers.Layer):
    """A text backbone of which only the last layers train.

    The layers below run in inference mode even while the model trains: a
    frozen layer whose dropout runs is not the one whose output was cached.

    Args:
        backbone: A keras-hub text backbone, taken over: its layers' `trainable`
            flags are set here.
        k_txt: The last layers that train.

    Raises:
        ConfigError: `k_txt` is outside 0..number of layers.
        PresetError: The backbone cannot be cut.
    """

    def __init__(self, backbone: Any, k_txt: int, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": backbone.dtype_policy})
        self.backbone = backbone
        self.k_txt = k_txt
        frozen = frozen_part(backbone, k_txt, backbone.name)
        layers = transformer_layers(backbone, backbone.name)
        # A function, so that Keras does not track (and save) the shared layers a second time.
        self._run_frozen = functools.partial(frozen, training=False)
        self._first_trained = len(layers) - k_txt
        self._freeze(True)
        self.built = True

    @property
    def trainable(self) -> bool:
        """Whether the last layers train; the others never do, whatever is set."""
        return bool(self._trainable)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._freeze(value)

    def _freeze(self, trains: bool) -> None:
        self._trainable = trains
        # The backbone must be trainable for a layer inside it to be.
        set_trainable(self.backbone, trains)
        trained = {id(layer) for layer in self.trained_layers}
        for layer in self.backbone.layers:
            if id(layer) not in trained:
                set_trainable(layer, False)

    @property
    def trained_layers(self) -> list[Any]:
        """The last `k_txt` layers, in the order in which they run."""
        return transformer_layers(self.backbone, self.backbone.name)[self._first_trained :]

    def call(self, token_ids: Any, attention_mask: Any, training: bool | None = None) -> Any:
        """Run the backbone.

        Args:
            token_ids: int32 of shape (batch, length).
            attention_mask: int32 of the same shape, 1 where a token is real.
            training: Whether the dropout of the trained layers applies.

        Returns:
            Shape (batch, 1, width): the state of the first token.
        """
        x = self._run_frozen(text_inputs(self.backbone, token_ids, attention_mask))
        for layer in self.trained_layers:
            x = layer(x, padding_mask=attention_mask, training=training)
        return x[:, :1]

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], **_: Any
    ) -> tuple[int | None, ...]:
        """Return (batch, 1, width)."""
        layers = transformer_layers(self.backbone, self.backbone.name)
        return (input_shape[0], 1, layers[-1].output.shape[-1])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {**super().get_config(), "backbone": backbone, "k_txt": self.k_txt}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TextTower:
        """Rebuild the layer with a backbone of random weights."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


def build_end_to_end(
    vision_backbone: Any, text_backbone: Any, train: TrainConfig, tokens: str = "patches"
) -> keras.Model:
    """Build the model from pixels and tokens, with plain Keras layers.

    Args:
        vision_backbone: keras-hub backbone with its weights, such as
            `VisionEncoder.backbone`. It is taken over and frozen.
        text_backbone: keras-hub backbone with its weights, such as
            `TextEncoder.backbone`. It is taken over: all but its last
            `train.k_txt` layers are frozen, and training changes those.
        train: `k_txt`, the head's sizes, `seed` and `dtype_policy` are used. The
            head starts as the cached model's does.
        tokens: As the store's: `"patches"` or `"all"`.

    Returns:
        keras.Model from `pixel_values` (float32, batch, height, width, 3; see
        `VisionEncoder.to_pixels`), `input_ids` and `attention_mask` (int32,
        batch, length) to the logit (float32, batch, 1).

    Raises:
        ConfigError: `k_txt` or the heads do not fit the text backbone.
        PresetError: A backbone has the wrong shape, or its freezing failed.
    """
    pixels = keras.Input(vision_backbone.inputs[0].shape[1:], name="pixel_values")
    input_ids = keras.Input((None,), dtype="int32", name="input_ids")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    features = FrozenVision(vision_backbone, tokens, name=VISION_NAME)(pixels)
    cls = TextTower(text_backbone, train.k_txt, name=TEXT_NAME)(input_ids, attention_mask)
    with seeded(f"head {train.seed}"):
        logit = apply_head(cls, features, train, fast=False)
    inputs = {
        "pixel_values": pixels,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
    }
    model = keras.Model(inputs, logit, name="end_to_end")
    check_frozen(model)
    return model


def set_trainable(layer: Any, value: bool) -> None:
    """Set `trainable` on a built layer and on all inside it, whatever it was before.

    Keras alone skips the inside of a layer whose own flag already has the
    value, as that of a reloaded frozen backbone does.
    """
    for inner in layer._flatten_layers():
        inner.trainable = value
    for weight in layer.weights:
        weight.trainable = value


def check_frozen(model: keras.Model) -> None:
    """Check that exactly the head and the last text layers train.

    Raises:
        PresetError: Another variable trains, or one of theirs does not.
    """
    expected = {id(weight): weight.path for weight in trained_weights(model).values()}
    found = {id(weight): weight.path for weight in model.trainable_variables}
    extra = [found[key] for key in found.keys() - expected.keys()]
    missing = [expected[key] for key in expected.keys() - found.keys()]
    if extra or missing:
        raise PresetError(
            "end-to-end model: expected the head and the last text layers to train and nothing"
            f" else; found {len(extra)} more ({', '.join(sorted(extra)[:3])}) and"
            f" {len(missing)} fewer ({', '.join(sorted(missing)[:3])}); leave `trainable` alone"
        )
