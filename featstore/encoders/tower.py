"""The frozen keras-hub encoders: load their weights, cut them before their last blocks, run them.

Vision and text follow one rule. An encoder is an embedding, a chain of blocks,
and perhaps a final norm; cut before its last k blocks, what lies below the cut
is run once for each input and kept, what lies above is left to training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.encoders.compiled import compile_converter, compile_forward
from featstore.encoders.families import Family, check_k, family_of, num_patches
from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import (
    IMAGE_CONVERTER_FILE,
    Preset,
    image_converter_fields,
    one_line,
    resolve_preset,
)
from featstore.errors import ConfigError, PresetError

TOKENIZE_ROWS = 4096
# Tokens of a whole sentence are counted up to here, so many sentences at a time.
MOST_COUNTED, COUNTED_ROWS = 4096, 256


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
        if kind == "vision":
            self._check_image(config, name)
        self._embed = keras.Model(backbone.input, parts.entering)

    def _check_image(self, config: dict[str, Any], name: str) -> None:
        shape = tuple(self.backbone.inputs[0].shape)
        if shape[3] != 3:
            raise PresetError(
                f"vision preset {name}: expected images of shape (height, width, 3), found"
                f" {shape[1:]}; choose another"
            )
        found, expected = self.backbone.output.shape[1], self.leading_tokens + num_patches(config)
        if found != expected:
            raise PresetError(
                f"vision preset {name}: expected {expected} tokens of an image, of which"
                f" {self.leading_tokens} before the patches, found {found}; choose another"
            )

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the backbone."""
        return len(self.blocks)

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
        given = {"images": first, "token_ids": first, "padding_mask": padding_mask}
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
        check_k(k, self.num_blocks, self.family.kind)
        blocks = self.blocks[: self.num_blocks - k]

        def run(inputs: Any) -> Any:
            if k == 0:
                output = self.backbone(inputs, training=False)
                return output["sequence_output"] if isinstance(output, dict) else output
            x = self._embed(inputs, training=False)
            mask = inputs["padding_mask"] if self.family.kind == "text" else None
            return run_blocks(blocks, x, mask, training=False)

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
        check_k(k, self.num_blocks, self.family.kind)
        blocks = self.blocks[self.num_blocks - k :]

        def run(hidden: Any, padding_mask: Any = None, training: bool | None = False) -> Any:
            x = run_blocks(blocks, hidden, padding_mask, training)
            return self.norm(x) if k and self.norm is not None else x

        return run

    def upper_layers(self, k: int) -> list[Any]:
        """Return the layers that `upper(k)` runs, in their order.

        Raises:
            ConfigError: `k` is outside 0..num_blocks.
        """
        check_k(k, self.num_blocks, self.family.kind)
        norm = [self.norm] if k and self.norm is not None else []
        return [*self.blocks[self.num_blocks - k :], *norm]


def run_blocks(blocks: Sequence[Any], x: Any, mask: Any, training: bool | None) -> Any:
    """Run blocks one after the other; see `Tower.upper`."""
    masked = {} if mask is None else {"padding_mask": mask}
    for block in blocks:
        x = block(x, training=training, **masked)
        # DeiT's blocks return their attention scores too.
        x = x[0] if isinstance(x, tuple) else x
    return x


class _Encoder:
    """A preset's frozen backbone, compiled once for each place where it is cut."""

    def __init__(self, kind: str, preset: Preset | str, precision: str) -> None:
        self.preset = preset if isinstance(preset, Preset) else resolve_preset(preset)
        self.precision = precision
        family_of(self.preset.class_name, kind, self.preset.name)
        self.backbone = load_backbone(self.preset, precision)
        self.tower = Tower(self.backbone, kind, self.preset.name)
        self.first_token = 0
        self._forward: dict[int, Callable[[Any], np.ndarray]] = {}

    @property
    def num_layers(self) -> int:
        """Transformer blocks of the backbone."""
        return self.tower.num_blocks

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return self.tower.width

    def _encode(self, inputs: Any, k: int) -> np.ndarray:
        if k not in self._forward:
            run, variables = self.tower.lower(k), self.backbone.variables
            self._forward[k] = compile_forward(run, variables, self.first_token)
        return self._forward[k](inputs)


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
        import keras_hub

        image_converter_fields(self.preset)
        self.first_token = self.tower.leading_tokens if tokens == "patches" else 0
        try:
            # float32 whatever Keras's global policy is: pixels are part of the fingerprint.
            self.converter = keras_hub.layers.ImageConverter.from_preset(
                self.preset.location, dtype="float32"
            )
        except Exception as error:
            raise _load_failure(self.preset, "image converter", error) from error
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
        return int(self.backbone.output.shape[1]) - self.first_token

    def to_pixels(self, image: np.ndarray) -> np.ndarray:
        """Convert one photo as the preset asks; may be called from several threads.

        The result has the same bits as the preset's converter called on the
        uint8 array: resized, rounded to whole levels, then scaled and offset.

        Args:
            image: uint8 of shape (height, width, 3), of any size.

        Returns:
            float32 of shape (*image_size, 3).
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected uint8 (height, width, 3), got {image.dtype} {image.shape}")
        return self._to_pixels(image)

    def encode(self, pixels: np.ndarray, k_vit: int = 0) -> np.ndarray:
        """Run the blocks below the last `k_vit`.

        Args:
            pixels: float32 of shape (batch, *image_size, 3). One compilation a
                batch size and `k_vit`: pad the last batch instead of making it
                shorter.
            k_vit: Last blocks left out; 0 runs them all, and the final norm.

        Returns:
            Shape (batch, num_tokens, width), in the precision's dtype: what
            enters block `num_layers - k_vit`, or the backbone's output for 0.

        Raises:
            ConfigError: `k_vit` is outside 0..num_layers.
        """
        return self._encode(self.tower.inputs(pixels), k_vit)


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
        self.preprocessor = _load_preprocessor(self.preset, sequence_length)

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
            block `num_layers - k_txt`, or the backbone's output for 0.

        Raises:
            ConfigError: `k_txt` is outside 0..num_layers.
        """
        return self._encode(self.tower.inputs(token_ids, padding_mask), k_txt)


def _load_preprocessor(preset: Preset, sequence_length: int) -> Any:
    """Load what turns sentences of a preset into token ids, without its backbone."""
    import keras_hub

    try:
        return keras_hub.models.TextClassifierPreprocessor.from_preset(
            preset.location, sequence_length=sequence_length
        )
    except Exception as error:
        raise _load_failure(preset, "tokenizer", error) from error


@pinned_framework()
def token_counts(preset: Preset, sentences: Sequence[str]) -> list[int]:
    """Return the tokens of whole sentences, start and end included; `MOST_COUNTED` at most.

    Raises:
        PresetError: The tokenizer cannot be loaded.
    """
    preprocessor = _load_preprocessor(preset, MOST_COUNTED)
    counts: list[int] = []
    for start in range(0, len(sentences), COUNTED_ROWS):
        packed = preprocessor(list(sentences[start : start + COUNTED_ROWS]))
        counts += np.asarray(packed["padding_mask"]).sum(axis=1).tolist()
    return counts


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
        return keras_hub.models.Backbone.from_preset(preset.location, dtype=precision)
    except Exception as error:
        raise _load_failure(preset, "backbone", error) from error


def _load_failure(preset: Preset, part: str, error: Exception) -> PresetError:
    return PresetError(
        f"preset {preset.name}: its {part} cannot be loaded ({one_line(error)}); fetch or save the"
        " preset again, with the installed keras-hub"
    )
