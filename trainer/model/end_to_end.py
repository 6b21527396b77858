"""The same model from pixels and tokens: parity oracle, export format, baseline."""

from __future__ import annotations

from typing import Any, ClassVar

import keras

from featstore.encoders.framework import pinned_framework
from featstore.encoders.tower import Tower
from featstore.errors import PresetError
from trainer.config import TrainConfig
from trainer.model.head import TEXT_NAME, VISION_NAME, apply_head
from trainer.model.tails import query_token
from trainer.model.weights import seeded, train_only, trained_weights


class _TowerLayer(keras.layers.Layer):
    """A backbone of which only the last blocks train, if any do.

    The blocks below run in inference mode even while the model trains: a
    frozen layer whose dropout runs is not the one whose output was cached.
    """

    kind: ClassVar[str]

    def __init__(self, backbone: Any, k: int, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "dtype": backbone.dtype_policy})
        self.backbone = backbone
        # Not a layer: Keras tracks (and saves) what is inside once, through the backbone.
        self.tower = Tower(backbone, self.kind)
        self.k = k
        self._freeze(True)
        self.built = True

    @property
    def trained_layers(self) -> list[Any]:
        """The layers that train, in the order in which they run."""
        return self.tower.upper_layers(self.k)

    @property
    def trainable(self) -> bool:
        """Whether the last blocks train; the others never do, whatever is set."""
        return bool(self._trainable) and self.k > 0

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._freeze(value)

    def _freeze(self, value: bool) -> None:
        self._trainable = value
        train_only(self.backbone, self.trained_layers if value else [])

    def run(self, inputs: Any, mask: Any = None, training: bool | None = None) -> Any:
        """Return the backbone's hidden states, of shape (batch, tokens, width)."""
        hidden = self.tower.lower(self.k)(self.tower.inputs(inputs, mask))
        return self.tower.upper(self.k)(hidden, mask, training)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        backbone = keras.saving.serialize_keras_object(self.backbone)
        return {**super().get_config(), "backbone": backbone}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """Rebuild the layer with a backbone of random weights."""
        backbone = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**{**config, "backbone": backbone})


@keras.saving.register_keras_serializable(package="featstore")
class VisionTower(_TowerLayer):
    """A vision backbone of which only the last blocks and the final norm train, if any do.

    Args:
        backbone: A keras-hub vision backbone, taken over: its layers' `trainable`
            flags are set here.
        tokens: `"patches"` drops the leading class and register tokens;
            `"all"` keeps them.
        k_vit: The last blocks that train.

    Raises:
        ConfigError: `k_vit` is outside 0..number of blocks.
        PresetError: The backbone is not of a vision family.
    """

    kind = "vision"

    def __init__(
        self, backbone: Any, tokens: str = "patches", k_vit: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(backbone, k_vit, **kwargs)
        self.tokens = tokens
        self._skipped = self.tower.leading_tokens if tokens == "patches" else 0

    def call(self, pixels: Any, training: bool | None = None) -> Any:
        """Run the backbone.

        Args:
            pixels: Float of shape (batch, height, width, 3).
            training: Whether the dropout of the trained blocks applies.

        Returns:
            Shape (batch, tokens, width).
        """
        return self.run(pixels, training=training)[:, self._skipped :]

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return (batch, tokens, width)."""
        return (input_shape[0], self.tower.num_tokens - self._skipped, self.tower.width)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "tokens": self.tokens, "k_vit": self.k}


@keras.saving.register_keras_serializable(package="featstore")
class TextTower(_TowerLayer):
    """A text backbone of which only the last blocks train.

    Args:
        backbone: A keras-hub text backbone, taken over: its layers' `trainable`
            flags are set here.
        k_txt: The last blocks that train.
        whole: Every token's state leaves, rather than the first's.

    Raises:
        ConfigError: `k_txt` is outside 0..number of blocks.
        PresetError: The backbone is not of a text family.
    """

    kind = "text"

    def __init__(self, backbone: Any, k_txt: int, whole: bool = False, **kwargs: Any) -> None:
        super().__init__(backbone, k_txt, **kwargs)
        self.whole = whole

    def call(self, token_ids: Any, attention_mask: Any, training: bool | None = None) -> Any:
        """Run the backbone.

        Args:
            token_ids: int32 of shape (batch, length).
            attention_mask: int32 of the same shape, 1 where a token is real.
            training: Whether the dropout of the trained blocks applies.

        Returns:
            Shape (batch, 1, width): the state of the token that the head reads; or that of
            each, (batch, length, width).
        """
        states = self.run(token_ids, attention_mask, training)
        if self.whole:
            return states
        return query_token(states, attention_mask, self.tower.family.query)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], **_: Any
    ) -> tuple[int | None, ...]:
        """Return (batch, 1, width), or (batch, length, width)."""
        return (input_shape[0], input_shape[1] if self.whole else 1, self.tower.width)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "k_txt": self.k, "whole": self.whole}


@pinned_framework()
def build_end_to_end(
    vision_backbone: Any,
    text_backbone: Any,
    train: TrainConfig,
    tokens: str = "patches",
    classes: int = 2,
) -> keras.Model:
    """Build the model from pixels and tokens, with plain Keras layers.

    Args:
        vision_backbone: keras-hub backbone with its weights, such as
            `VisionEncoder.backbone`. It is taken over: all but its last
            `train.k_vit` blocks and final norm are frozen, and training changes those.
        text_backbone: keras-hub backbone with its weights, such as
            `TextEncoder.backbone`. It is taken over: all but its last
            `train.k_txt` layers are frozen, and training changes those.
        train: `k_txt`, `k_vit`, the head's sizes, `seed` and `dtype_policy` are used.
            The head starts as the cached model's does.
        tokens: As the store's: `"patches"` or `"all"`.
        classes: 2 or 3.

    Returns:
        keras.Model from `pixel_values` (float32, batch, height, width, 3; see
        `VisionEncoder.to_pixels`), `input_ids` and `attention_mask` (int32,
        batch, length) to the logits (float32, batch, 1 or 3), see `apply_head`.

    Raises:
        ConfigError: `k_txt`, `k_vit` or the heads do not fit the backbones.
        PresetError: A backbone has the wrong shape, or its freezing failed.
    """
    pixels = keras.Input(vision_backbone.inputs[0].shape[1:], name="pixel_values")
    input_ids = keras.Input((None,), dtype="int32", name="input_ids")
    attention_mask = keras.Input((None,), dtype="int32", name="attention_mask")
    features = VisionTower(vision_backbone, tokens, train.k_vit, name=VISION_NAME)(pixels)
    tower = TextTower(text_backbone, train.k_txt, train.queries == "all", name=TEXT_NAME)
    states = tower(input_ids, attention_mask)
    with seeded(f"head {train.seed}"):
        logits = apply_head(states, features, train, False, classes=classes, mask=attention_mask)
    inputs = {
        "pixel_values": pixels,
        "input_ids": input_ids,
        "attention_mask": attention_mask,
    }
    model = keras.Model(inputs, logits, name="end_to_end")
    check_frozen(model)
    return model


def check_frozen(model: keras.Model) -> None:
    """Check that exactly the head and the last layers of both encoders train.

    Raises:
        PresetError: Another variable trains, or one of theirs does not.
    """
    expected = {id(weight): weight.path for weight in trained_weights(model).values()}
    found = {id(weight): weight.path for weight in model.trainable_variables}
    extra = [found[key] for key in found.keys() - expected.keys()]
    missing = [expected[key] for key in expected.keys() - found.keys()]
    if extra or missing:
        raise PresetError(
            "end-to-end model: expected the head and the last layers of the encoders to train and"
            f" nothing else; found {len(extra)} more ({', '.join(sorted(extra)[:3])}) and"
            f" {len(missing)} fewer ({', '.join(sorted(missing)[:3])}); leave `trainable` alone"
        )
