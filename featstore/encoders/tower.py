"""The frozen keras-hub encoders: load their weights, run them, cut them at a boundary."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from featstore.encoders.presets import (
    IMAGE_CONVERTER_FILE,
    Preset,
    image_converter_fields,
    one_line,
    resolve_preset,
)
from featstore.errors import ConfigError, PresetError

TEXT_INPUTS = ("token_ids", "padding_mask", "segment_ids")
TOKENIZE_ROWS = 4096


class VisionEncoder:
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
            its backbone does not turn one image into (tokens, width).
    """

    def __init__(
        self, preset: Preset | str, tokens: str = "patches", precision: str = "float32"
    ) -> None:
        import keras_hub

        if tokens not in ("patches", "all"):
            raise ConfigError(f'[store] tokens must be "patches" or "all", found {tokens!r}')
        self.preset = preset if isinstance(preset, Preset) else resolve_preset(preset)
        self.tokens = tokens
        self.precision = precision
        image_converter_fields(self.preset)
        self.backbone = load_backbone(self.preset, precision)
        self.leading_tokens = leading_tokens(self.backbone, self.preset.name)
        try:
            # float32 whatever Keras's global policy is: pixels are part of the fingerprint.
            self.converter = keras_hub.layers.ImageConverter.from_preset(
                self.preset.location, dtype="float32"
            )
        except Exception as error:
            raise _load_failure(self.preset, "image converter", error) from error
        height, width = self.backbone.inputs[0].shape[1:3]
        if tuple(self.converter.image_size) != (height, width):
            raise PresetError(
                f"preset {self.preset.name}: the image converter gives"
                f" {self.converter.image_size}, the backbone takes {(height, width)}; set"
                f" image_size in {IMAGE_CONVERTER_FILE}"
            )
        self._skipped = self.leading_tokens if tokens == "patches" else 0
        self._forward = _compile(self.backbone, self._skipped)
        self._to_pixels = _compile_converter(self.converter)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels that the backbone takes."""
        height, width = self.backbone.inputs[0].shape[1:3]
        return int(height), int(width)

    @property
    def num_tokens(self) -> int:
        """Tokens of one image, after `tokens` was applied."""
        return int(self.backbone.output.shape[1]) - self._skipped

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return int(self.backbone.output.shape[2])

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

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Run the backbone.

        Args:
            pixels: float32 of shape (batch, *image_size, 3). One compilation a
                batch size: pad the last batch instead of making it shorter.

        Returns:
            Shape (batch, num_tokens, width), in the precision's dtype.
        """
        return self._forward(pixels)


class TextEncoder:
    """A frozen text backbone, cut before its last layers, and its tokenizer.

    Args:
        preset: A resolved preset, or a name for `resolve_preset`.
        sequence_length: Tokens of a sentence with its start and end tokens;
            longer sentences are cut, shorter ones are padded.
        precision: Arithmetic of the backbone, as in `VisionEncoder`.

    Raises:
        PresetError: The preset cannot be loaded, or its backbone is not a
            chain of keras-hub `TransformerEncoder` layers.
        ConfigError: `sequence_length` is more than the backbone has positions.
    """

    def __init__(
        self, preset: Preset | str, sequence_length: int, precision: str = "float32"
    ) -> None:
        import keras_hub

        self.preset = preset if isinstance(preset, Preset) else resolve_preset(preset)
        self.sequence_length = sequence_length
        self.precision = precision
        limit = self.preset.config["config"].get("max_sequence_length")
        if limit is not None and sequence_length > limit:
            raise ConfigError(
                f"[encoders] sequence_length must be at most {limit}, the positions of preset"
                f" {self.preset.name}; found {sequence_length}"
            )
        self.backbone = load_backbone(self.preset, precision)
        self.layers = transformer_layers(self.backbone, self.preset.name)
        try:
            self._preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(
                self.preset.location, sequence_length=sequence_length
            )
        except Exception as error:
            raise _load_failure(self.preset, "tokenizer", error) from error
        self._forward: dict[int, Callable[..., np.ndarray]] = {}

    @property
    def num_layers(self) -> int:
        """Transformer layers of the backbone."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """Numbers of one token."""
        return int(self.layers[-1].output.shape[-1])

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
            packed = self._preprocessor(list(sentences[rows]))
            token_ids[rows] = np.asarray(packed["token_ids"])
            padding_mask[rows] = np.asarray(packed["padding_mask"])
        return token_ids, padding_mask

    def encode(self, token_ids: np.ndarray, padding_mask: np.ndarray, k_txt: int) -> np.ndarray:
        """Run the layers below the last `k_txt`.

        Args:
            token_ids: int32 of shape (batch, length). One compilation a shape
                and `k_txt`: pad the last batch.
            padding_mask: bool of the same shape.
            k_txt: Last layers left out; 0 runs them all.

        Returns:
            Shape (batch, length, width), in the precision's dtype: what enters
            layer `num_layers - k_txt`, or the backbone's output for 0.

        Raises:
            ConfigError: `k_txt` is outside 0..num_layers.
        """
        if k_txt not in self._forward:
            self._forward[k_txt] = _compile(frozen_part(self.backbone, k_txt, self.preset.name), 0)
        return self._forward[k_txt](text_inputs(self.backbone, token_ids, padding_mask))


def leading_tokens(backbone: Any, name: str) -> int:
    """Return how many tokens stand before the patches (ViT 1, DeiT 2, DINOv2 1 + registers).

    Args:
        backbone: A keras-hub vision backbone.
        name: What to call it in an error.

    Raises:
        PresetError: The backbone does not turn one RGB image of a fixed size
            into (batch, tokens, width) with one token a patch.
    """
    wanted = "expected (batch, height, width, 3) in and (batch, tokens, width) out, as ViT has"
    inputs, output = backbone.inputs, backbone.output
    shape = getattr(output, "shape", None)
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[3] != 3:
        found = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in inputs)
        raise PresetError(f"vision preset {name}: {wanted}; found inputs {found}; choose another")
    if shape is None or len(shape) != 3 or None in shape[1:]:
        found = str(tuple(shape)) if shape is not None else f"a {type(output).__name__}"
        raise PresetError(f"vision preset {name}: {wanted}; found output {found}; choose another")
    patch = getattr(backbone, "patch_size", None)
    if patch is None:
        raise PresetError(
            f"vision preset {name}: {type(backbone).__name__} has no patch_size, so its class"
            " tokens cannot be told from its patches; choose a ViT, DeiT or DINOv2 preset"
        )
    rows, columns = (patch, patch) if isinstance(patch, int) else tuple(patch)
    height, width = inputs[0].shape[1:3]
    leading = int(shape[1]) - (height // rows) * (width // columns)
    if leading < 0:
        raise PresetError(
            f"vision preset {name}: {shape[1]} tokens for {height // rows}×{width // columns}"
            " patches; expected at least one a patch; choose a ViT, DeiT or DINOv2 preset"
        )
    return leading


def transformer_layers(backbone: Any, name: str) -> list[Any]:
    """Return a text backbone's transformer layers, in the order in which they run.

    Args:
        backbone: A keras-hub text backbone.
        name: What to call it in an error.

    Raises:
        PresetError: The layers are not keras-hub `TransformerEncoder` layers
            that run one after the other and end in the backbone's output.
    """
    import keras_hub

    supported = "choose a DistilBERT, BERT, RoBERTa or XLM-RoBERTa preset"
    layers = list(getattr(backbone, "transformer_layers", []))
    encoder = keras_hub.layers.TransformerEncoder
    if not layers or not all(isinstance(layer, encoder) for layer in layers):
        raise PresetError(
            f"text preset {name}: {type(backbone).__name__} is not made of keras-hub"
            f" TransformerEncoder layers and cannot be cut; {supported}"
        )
    output = backbone.output
    if isinstance(output, dict):
        output = output.get("sequence_output")
    chained = all(
        layer_input(after) is before.output for before, after in itertools.pairwise(layers)
    )
    if not chained or layers[-1].output is not output:
        raise PresetError(
            f"text preset {name}: the layers of {type(backbone).__name__} do not run once each, one"
            f" after the other, up to its output, so it cannot be cut; {supported}"
        )
    unknown = [tensor.name for tensor in backbone.inputs if tensor.name not in TEXT_INPUTS]
    if unknown:
        raise PresetError(
            f"text preset {name}: {type(backbone).__name__} wants the inputs {', '.join(unknown)},"
            f" which a sentence does not give; {supported}"
        )
    return layers


def layer_input(layer: Any) -> Any:
    """Return the symbolic hidden states that enter a layer of a functional backbone."""
    tensors = layer.input
    return tensors[0] if isinstance(tensors, list | tuple) else tensors


def frozen_part(backbone: Any, k_txt: int, name: str) -> Any:
    """Return the backbone without its last `k_txt` layers, as a model on the same weights.

    Args:
        backbone: A keras-hub text backbone.
        k_txt: Layers left out; 0 leaves none out.
        name: What to call it in an error.

    Returns:
        keras.Model with the backbone's inputs; its output has shape
        (batch, length, width).

    Raises:
        ConfigError: `k_txt` is outside 0..number of layers.
        PresetError: The backbone cannot be cut.
    """
    import keras

    layers = transformer_layers(backbone, name)
    check_k_txt(k_txt, len(layers))
    output = layer_input(layers[-k_txt]) if k_txt else layers[-1].output
    return keras.Model(backbone.input, output)


def check_k_txt(k_txt: int, num_layers: int) -> None:
    """Check the number of last text layers to train.

    Raises:
        ConfigError: It is outside 0..num_layers.
    """
    if not 0 <= k_txt <= num_layers:
        raise ConfigError(
            f"[train] k_txt must be from 0 to {num_layers}, the layers of the text encoder;"
            f" found {k_txt}"
        )


def text_inputs(backbone: Any, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
    """Return the inputs a text backbone wants; a lone sentence is all segment 0."""
    wanted = {tensor.name for tensor in backbone.inputs}
    # A zero that keeps the type and shape of arrays and of symbolic tensors alike.
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask, "segment_ids": token_ids * 0}
    return {key: value for key, value in inputs.items() if key in wanted}


def _compile(model: Any, first_token: int) -> Callable[[Any], np.ndarray]:
    """Return the compiled inference of `model`, its tokens from `first_token` on."""
    import keras

    single = len(model.inputs) == 1 and not isinstance(model.input, dict)
    key = None if single or len(model.inputs) > 1 else model.inputs[0].name

    def wrap(inputs: Any) -> Any:
        return inputs if key is None or isinstance(inputs, Mapping) else {key: inputs}

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def forward(inputs: Any) -> Any:
            return model(wrap(inputs), training=False)[:, first_token:]

        return lambda inputs: forward(
            keras.tree.map_structure(tf.convert_to_tensor, inputs)
        ).numpy()
    if keras.backend.backend() == "jax":
        import jax

        @jax.jit
        def apply(trainable: Any, fixed: Any, inputs: Any) -> Any:
            outputs, _ = model.stateless_call(trainable, fixed, wrap(inputs), training=False)
            return outputs[:, first_token:]

        trainable = [variable.value for variable in model.trainable_variables]
        fixed = [variable.value for variable in model.non_trainable_variables]
        return lambda inputs: np.asarray(apply(trainable, fixed, inputs))
    raise PresetError(
        f"the Keras backend {keras.backend.backend()} is not supported; set"
        " KERAS_BACKEND=tensorflow or jax"
    )


def _compile_converter(converter: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return the converter as a function of one uint8 image, with the bits of its eager call."""
    import keras

    if keras.backend.backend() != "tensorflow":
        return lambda image: np.asarray(converter(image), np.float32)
    import tensorflow as tf

    # Called eagerly, the converter rounds the resized image back to uint8; traced, it does not,
    # and the pixels differ by up to half a level. So resize, round, and normalise apart.
    normalise = type(converter).from_config({**converter.get_config(), "image_size": None})

    @tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
    def convert(image: Any) -> Any:
        with tf.device("CPU:0"):
            resized = converter.resizing(tf.cast(image, tf.float32))
            levels = tf.clip_by_value(tf.round(resized), 0.0, 255.0)
            return tf.cast(normalise(levels), tf.float32)

    concrete = convert.get_concrete_function()
    return lambda image: concrete(tf.constant(image)).numpy()


def load_backbone(preset: Preset, precision: str) -> Any:
    """Load a preset's backbone with its weights.

    Args:
        preset: The preset.
        precision: The Keras dtype policy of its layers.

    Raises:
        PresetError: keras-hub cannot load it.
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
