"""The frozen keras-hub encoders: load their weights, cut them before their last blocks, run them.

Vision and text follow one rule. An encoder is an embedding, a chain of blocks,
and perhaps a final norm; cut before its last k blocks, what lies below the cut
is run once for each input and kept, what lies above is left to training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from featstore.encoders.compiled import XLA, compile_forward
from featstore.encoders.families import Family, check_k, family_of, num_patches
from featstore.encoders.framework import no_device, pinned_framework
from featstore.encoders.pixels import Change, compile_converter
from featstore.encoders.presets import (
    IMAGE_CONVERTER_FILE,
    Preset,
    image_converter_fields,
    load_failure,
    resolve_preset,
)
from featstore.encoders.tokens import load_preprocessor
from featstore.errors import ConfigError, PresetError

TOKENIZE_ROWS = 4096


class Tower:
    """A backbone that can be cut before any of its blocks.

    `upper(k)` of `lower(k)` is the backbone, for every k from 0 to
    `num_blocks`; tests/test_families.py holds each family to it. The backbone
    is neither copied nor changed.

    Args:
        backbone: A keras-hub backbone.
        kind: "vision" or "text".
        name: What to call it in an error; by default its own name.

    Raises:
        PresetError: No family has such backbones, or it does not take one
            RGB image of a fixed size.
    """

    def __init__(self, backbone: Any, kind: str, name: str = "") -> None:
        import keras

        name = name or backbone.name
        self.backbone = backbone
        self.family: Family = family_of(type(backbone).__name__, kind, name)
        config = backbone.get_config()
        parts = self.family.parts(backbone)
        self.blocks, self.norm = parts.blocks, parts.norm
        self.width = int(config["hidden_dim"])
        self.leading_tokens = self.family.leading_tokens(config)
        self.shared = self.family.shared(config)
        self.arguments = parts.arguments
        pools = parts.leaving is not None
        # Up to the hidden states that leave the norm.
        self.whole = keras.Model(backbone.input, parts.leaving) if pools else backbone
        # Of an image; a sentence has as many as it has.
        self.num_tokens = 0
        if kind == "vision":
            self.num_tokens = int(parts.num_tokens or self.whole.output.shape[1])
            self._check_image(config, name)
        self._embed = keras.Model(backbone.input, parts.entering)

    def _check_image(self, config: dict[str, Any], name: str) -> None:
        shape = tuple(self.backbone.inputs[0].shape)
        if shape[3] != 3:
            raise PresetError(
                f"vision preset {name}: expected images of shape (height, width, 3), found"
                f" {shape[1:]}; choose another"
            )
        found, expected = self.num_tokens, self.leading_tokens + num_patches(config)
        if found != expected:
            raise PresetError(
                f"vision preset {name}: expected {expected} tokens of an image, of which"
                f" {self.leading_tokens} before the patches, found {found}; choose another"
            )

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the backbone."""
        return len(self.blocks)

    def check_k(self, k: int) -> None:
        """Check how many last blocks are left to training.

        Raises:
            ConfigError: `k` is outside 0..num_blocks, or would part blocks of one layer.
        """
        check_k(k, self.num_blocks, self.family.kind, self.shared)

    def inputs(self, first: Any, padding_mask: Any = None) -> Any:
        """Return what the backbone wants, in the structure that it wants.

        Args:
            first: Pixels of shape (batch, height, width, 3), or token ids of
                shape (batch, length). Arrays or tensors, symbolic ones too.
            padding_mask: Of text: shape (batch, length), true where a token is
                real.
        """
        if not isinstance(self.backbone.input, dict):
            return first
        names = ("images", "pixel_values", "token_ids")
        given = {**dict.fromkeys(names, first), "padding_mask": padding_mask}
        if "segment_ids" in self.backbone.input:
            # A lone sentence is all segment 0; the zeros keep the type of arrays and tensors alike.
            given["segment_ids"] = first * 0
        return {key: given[key] for key in self.backbone.input}

    def lower(self, k: int) -> Callable[[Any], Any]:
        """Return the part below the last `k` blocks.

        Args:
            k: 0 leaves nothing out: the whole backbone with its final norm.

        Returns:
            From `inputs` to hidden states of shape (batch, tokens, width): what
            enters block `num_blocks - k`, or what leaves the backbone. It runs
            in inference mode: no dropout whatever is being trained above.

        Raises:
            ConfigError: `k` is outside 0..num_blocks.
        """
        self.check_k(k)
        blocks = self.blocks[: self.num_blocks - k]

        def run(inputs: Any) -> Any:
            if k == 0:
                output = self.whole(inputs, training=False)
                return output["sequence_output"] if isinstance(output, dict) else output
            x = self._embed(inputs, training=False)
            mask = inputs.get("padding_mask") if self.family.kind == "text" else None
            return run_blocks(blocks, x, self._mask(mask), False, self.arguments)

        return run

    def upper(self, k: int) -> Callable[..., Any]:
        """Return the last `k` blocks and the final norm.

        Args:
            k: 0 returns the hidden states as they are: `lower(0)` ends after
                the norm.

        Returns:
            From hidden states (batch, tokens, width), of text with
            `padding_mask` (batch, length), to the backbone's output, of the
            same shape; `training` says whether its dropout applies.

        Raises:
            ConfigError: `k` is outside 0..num_blocks.
        """
        self.check_k(k)
        blocks = self.blocks[self.num_blocks - k :]

        def run(hidden: Any, padding_mask: Any = None, training: bool | None = False) -> Any:
            x = run_blocks(blocks, hidden, self._mask(padding_mask), training, self.arguments)
            return self.norm(x) if k and self.norm is not None else x

        return run

    def upper_layers(self, k: int) -> list[Any]:
        """Return the layers that `upper(k)` runs, in their order.

        Raises:
            ConfigError: `k` is outside 0..num_blocks.
        """
        self.check_k(k)
        norm = [self.norm] if k and self.norm is not None else []
        # One that runs several times is there once.
        return [*dict.fromkeys(self.blocks[self.num_blocks - k :]), *norm]

    def _mask(self, padding_mask: Any) -> Any:
        """Return the mask that the blocks take: a causal encoder's take none."""
        return padding_mask if self.family.query == "first" else None


def run_blocks(
    blocks: Sequence[Any],
    x: Any,
    mask: Any,
    training: bool | None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Run blocks one after the other; see `Tower.upper`.

    Args:
        blocks: The blocks.
        x: Hidden states that enter the first.
        mask: The padding mask, for blocks that take one; else None.
        training: Whether their dropout applies.
        arguments: What else they take; see `Parts`.
    """
    given = {**arguments, **({} if mask is None else {"padding_mask": mask})}
    for block in blocks:
        x = block(x, training=training, **given)
        # DeiT's blocks return their attention scores too.
        x = x[0] if isinstance(x, tuple) else x
    return x


class _Encoder:
    """A preset's frozen backbone, compiled once for each place where it is cut."""

    def __init__(self, kind: str, preset: Preset | str, precision: str) -> None:
        found = preset if isinstance(preset, Preset) else resolve_preset(preset)
        self.preset = found.tower(kind)
        self.precision = precision
        family_of(self.preset.class_name, kind, self.preset.name)
        self.backbone = load_backbone(self.preset, precision)
        self.tower = Tower(self.backbone, kind, self.preset.name)
        self.first_token = 0
        self._forward: dict[tuple[int, str], Callable[[Any], np.ndarray]] = {}

    @property
    def num_layers(self) -> int:
        """Transformer blocks of the backbone."""
        return self.tower.num_blocks

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return self.tower.width

    def _encode(self, inputs: Any, k: int, kernels: str = XLA) -> np.ndarray:
        if (k, kernels) not in self._forward:
            run, variables = self.tower.lower(k), self.backbone.variables
            self._forward[k, kernels] = compile_forward(run, variables, self.first_token, kernels)
        return self._forward[k, kernels](inputs)


class VisionEncoder(_Encoder):
    """A frozen vision backbone and its image converter.

    Args:
        preset: A resolved preset, or a name for `resolve_preset`.
        tokens: `"patches"` drops the leading class and register tokens;
            `"all"` keeps them.
        precision: Arithmetic of the backbone. The plain policy is used, not
            the mixed one: Keras casts every variable to the compute dtype
            before it is used, so both give the same features, and the plain
            one holds half the memory and casts once, at loading.

    Raises:
        PresetError: The preset cannot be loaded, has no image converter, or
            is not of a vision family.
    """

    @pinned_framework()
    def __init__(
        self, preset: Preset | str, tokens: str = "patches", precision: str = "float32"
    ) -> None:
        if tokens not in ("patches", "all"):
            raise ConfigError(f'[store] tokens must be "patches" or "all", found {tokens!r}')
        super().__init__("vision", preset, precision)
        import keras

        image_converter_fields(self.preset)
        self.first_token = self.tower.leading_tokens if tokens == "patches" else 0
        saved = self.preset.read_json(IMAGE_CONVERTER_FILE) or {}
        try:
            # float32 whatever Keras's global policy is: pixels are part of the fingerprint. By its
            # own class: keras-hub knows of a lone tower's no converter.
            self.converter = keras.saving.deserialize_keras_object(
                {**saved, "config": {**saved["config"], "dtype": "float32"}}
            )
        except Exception as error:
            raise load_failure(self.preset, "image converter", error) from error
        if tuple(self.converter.image_size) != self.image_size:
            raise PresetError(
                f"preset {self.preset.name}: the image converter gives"
                f" {self.converter.image_size}, the backbone takes {self.image_size}; set"
                f" image_size in {IMAGE_CONVERTER_FILE}"
            )
        self._to_pixels = compile_converter(self.converter)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels that the backbone takes."""
        height, width = self.backbone.inputs[0].shape[1:3]
        return int(height), int(width)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, after `tokens` was applied."""
        return self.tower.num_tokens - self.first_token

    def to_pixels(self, image: np.ndarray, change: Change | None = None) -> np.ndarray:
        """Convert one photo as the preset asks; may be called from several threads.

        The result has the same bits as the preset's converter called on the
        uint8 array: resized, rounded to whole levels, then scaled and offset.

        Args:
            image: uint8 of shape (height, width, 3), of any size.
            change: Changes the levels, float32 of shape (*image_size, 3) from 0 to 255, after
                they were rounded; as a photometric view does.

        Returns:
            float32 of shape (*image_size, 3).
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 (height, width, 3), got {image.dtype} {image.shape}")
        return self._to_pixels(image) if change is None else self._to_pixels(image, change)

    def encode(self, pixels: np.ndarray, k_vit: int = 0, kernels: str = XLA) -> np.ndarray:
        """Run the blocks below the last `k_vit`.

        Args:
            pixels: float32 of shape (batch, *image_size, 3). One compilation a
                batch size and `k_vit`: pad the last batch instead of making it
                shorter.
            k_vit: Last blocks left out; 0 runs them all, and the final norm.
            kernels: Of `featstore.encoders.compiled.KERNELS`, on TensorFlow.

        Returns:
            Shape (batch, num_tokens, width), in the precision's dtype: what
            enters block `num_layers - k_vit`, or the backbone's output for 0. JAX's array may
            still be computed: `np.asarray` waits for it.

        Raises:
            ConfigError: `k_vit` is outside 0..num_layers.
        """
        return self._encode(self.tower.inputs(pixels), k_vit, kernels)


class TextEncoder(_Encoder):
    """A frozen text backbone and its tokenizer.

    Args:
        preset: A resolved preset, or a name for `resolve_preset`.
        sequence_length: Tokens of a sentence with its start and end tokens;
            longer sentences are cut, shorter ones are padded.
        precision: Arithmetic of the backbone, as in `VisionEncoder`.

    Raises:
        PresetError: The preset cannot be loaded, or is not of a text family.
        ConfigError: `sequence_length` is more than the backbone has positions.
    """

    @pinned_framework()
    def __init__(
        self, preset: Preset | str, sequence_length: int, precision: str = "float32"
    ) -> None:
        super().__init__("text", preset, precision)
        self.sequence_length = sequence_length
        limit = self.preset.config["config"].get("max_sequence_length")
        if limit is not None and sequence_length > limit:
            raise ConfigError(
                f"[encoders] sequence_length must be at most {limit}, the positions of preset"
                f" {self.preset.name}; found {sequence_length}"
            )
        self.preprocessor = load_preprocessor(self.preset, sequence_length)

    @pinned_framework()
    def tokenize(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Turn sentences into token ids, a few thousand at a time.

        Returns:
            token_ids: int32 of shape (len(sentences), sequence_length).
            padding_mask: bool of the same shape; True where a token is real.
        """
        token_ids = np.zeros((len(sentences), self.sequence_length), np.int32)
        padding_mask = np.zeros(token_ids.shape, bool)
        for start in range(0, len(sentences), TOKENIZE_ROWS):
            rows = slice(start, start + TOKENIZE_ROWS)
            packed = self.preprocessor(list(sentences[rows]))
            token_ids[rows] = np.asarray(packed["token_ids"])
            padding_mask[rows] = np.asarray(packed["padding_mask"])
        return token_ids, padding_mask

    def encode(self, token_ids: np.ndarray, padding_mask: np.ndarray, k_txt: int = 0) -> np.ndarray:
        """Run the blocks below the last `k_txt`.

        Args:
            token_ids: int32 of shape (batch, length). One compilation a shape
                and `k_txt`: pad the last batch.
            padding_mask: bool of the same shape.
            k_txt: Last blocks left out; 0 runs them all.

        Returns:
            Shape (batch, length, width), in the precision's dtype: what enters
            block `num_layers - k_txt`, or the backbone's output for 0. JAX's array may still be
            computed: `np.asarray` waits for it.

        Raises:
            ConfigError: `k_txt` is outside 0..num_layers.
        """
        return self._encode(self.tower.inputs(token_ids, padding_mask), k_txt)


@pinned_framework()
def load_backbone(preset: Preset, precision: str) -> Any:
    """Load a preset's backbone with its weights.

    Args:
        preset: The preset.
        precision: The Keras dtype policy of its layers.

    Raises:
        PresetError: keras-hub cannot load it.
        UsageError: The Keras backend is not supported.
    """
    import keras_hub

    try:
        backbone = keras_hub.models.Backbone.from_preset(preset.location, dtype=precision)
        return _tower_of(backbone, preset.part, precision) if preset.part else backbone
    except Exception as error:
        raise no_device(error) or load_failure(preset, "backbone", error) from error


def _tower_of(backbone: Any, part: str, precision: str) -> Any:
    """Return one tower of two, in a precision that keras-hub gives to what is around them."""
    tower = getattr(backbone, part)
    if tower.dtype_policy.name == precision:
        return tower
    cast = type(tower).from_config({**tower.get_config(), "dtype": precision})
    cast.set_weights(tower.get_weights())
    return cast
