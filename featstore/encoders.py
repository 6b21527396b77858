"""The frozen keras-hub encoders: find a preset, know its identity, run it.

`resolve_preset`, `image_converter_fields` and `tokenizer_digest` read a local
folder with json and xxhash alone, so that a fingerprint costs no import of
TensorFlow. `VisionEncoder` and `TextEncoder` load the weights.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from featstore.config import suggest
from featstore.errors import ConfigError, PresetError

WEIGHTS_FILE = "model.weights.h5"
SHARDED_WEIGHTS_FILE = "model.weights.json"
IMAGE_CONVERTER_FILE = "image_converter.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_ASSETS = ("merges.txt", "vocabulary.json", "vocabulary.spm", "vocabulary.txt")
TEXT_INPUTS = ("token_ids", "padding_mask", "segment_ids")
TOKENIZE_ROWS = 4096

_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Preset:
    """One keras-hub preset: where it is and what it holds.

    Attributes:
        name: As the user wrote it.
        location: What keras-hub loads from: an absolute folder, or the handle.
        config: The parsed `config.json`; `config["config"]` holds the
            constructor's arguments.
        class_name: The backbone's class, such as `ViTBackbone`.
        weights_files: The local files that hold the weights.
        weights_digest: xxh3_128 of the weights' bytes, in hexadecimal.
    """

    name: str
    location: str
    config: dict[str, Any] = field(repr=False)
    class_name: str
    weights_files: tuple[Path, ...] = field(repr=False)
    weights_digest: str

    def local_file(self, file: str) -> Path | None:
        """Return the local path of one of the preset's files, or None where it has none.

        Raises:
            PresetError: The preset's hub cannot be reached.
        """
        return _local_file(self.name, self.location, file)

    def read_json(self, file: str) -> dict[str, Any] | None:
        """Return one of the preset's JSON files, or None where it has none.

        Raises:
            PresetError: The file is not JSON, or the hub cannot be reached.
        """
        path = self.local_file(file)
        return None if path is None else _read_json(self.name, path)


def resolve_preset(name: str | Path) -> Preset:
    """Find a preset and compute the digest of its weights.

    A folder is read without TensorFlow or Keras. Anything else is fetched by
    keras-hub's own resolver, which keeps what it fetched.

    Args:
        name: A preset folder, a keras-hub preset name, or a handle such as
            `kaggle://...` or `hf://...`.

    Raises:
        PresetError: No such folder or name, a file is missing or damaged, or
            the hub cannot be reached.
    """
    name = str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        location = str(folder.resolve())
    elif "://" in name:
        location = name
    else:
        location = _builtin_name(name)
    config_path = _local_file(name, location, "config.json")
    if config_path is None:
        raise PresetError(
            f"preset {name}: no config.json; expected a keras-hub preset, as written by"
            " backbone.save_to_preset(folder)"
        )
    config = _read_json(name, config_path)
    if "class_name" not in config or not isinstance(config.get("config"), dict):
        raise PresetError(
            f"preset {name}: config.json is not keras-hub's; convert it with"
            f" keras_hub.models.Backbone.from_preset({name!r}).save_to_preset(folder), save the"
            " image converter or tokenizer there too, and give that folder"
        )
    files = _weights_files(name, location)
    return Preset(
        name=name,
        location=location,
        config=config,
        class_name=str(config["class_name"]),
        weights_files=files,
        weights_digest=_digest_files(files),
    )


def image_converter_fields(preset: Preset) -> dict[str, Any]:
    """Return what decides the pixels that the vision encoder sees.

    Returns:
        `class_name`, `image_size` ([height, width]), `scale`, `offset` (None,
        a number, or one number a channel), `interpolation`, `antialias`,
        `crop_to_aspect_ratio`, `pad_to_aspect_ratio`. JSON values only.

    Raises:
        PresetError: The preset ships no image converter, or one that leaves
            the image's size open.
    """
    saved = preset.read_json(IMAGE_CONVERTER_FILE)
    if saved is None:
        raise PresetError(
            f"preset {preset.name}: no {IMAGE_CONVERTER_FILE}, so its pixel scaling is unknown;"
            " save it with keras_hub.layers.ImageConverter(...).save_to_preset(folder), or choose a"
            " vision preset that has one"
        )
    given = dict(saved.get("config", {}))
    # Older presets hold the names that keras-hub's ImageConverter still accepts.
    if "height" in given and "width" in given:
        given["image_size"] = [given["height"], given["width"]]
    if "variance" in given and "mean" in given:
        deviation = [math.sqrt(value) for value in given["variance"]]
        given["offset"] = [
            -mean / value for mean, value in zip(given["mean"], deviation, strict=True)
        ]
        given["scale"] = [given["scale"] / value for value in deviation]
    size = given.get("image_size")
    if not size or None in size:
        raise PresetError(
            f"preset {preset.name}: {IMAGE_CONVERTER_FILE} has no image_size; set it to the"
            " backbone's [height, width] there"
        )
    return {
        "class_name": saved.get("class_name"),
        "image_size": [int(length) for length in size],
        "scale": given.get("scale"),
        "offset": given.get("offset"),
        "interpolation": given.get("interpolation", "bilinear"),
        "antialias": bool(given.get("antialias", False)),
        "crop_to_aspect_ratio": bool(given.get("crop_to_aspect_ratio", True)),
        "pad_to_aspect_ratio": bool(given.get("pad_to_aspect_ratio", False)),
    }


def tokenizer_digest(preset: Preset) -> str:
    """Return the xxh3_128 of the tokenizer's settings and vocabulary, in hexadecimal.

    Raises:
        PresetError: The preset has no tokenizer or no vocabulary.
    """
    saved = preset.read_json(TOKENIZER_FILE)
    if saved is None:
        raise PresetError(
            f"preset {preset.name}: no {TOKENIZER_FILE}; save the tokenizer beside the backbone"
            " with tokenizer.save_to_preset(folder), or choose a text preset"
        )
    # The layer's own name and dtype do not decide a token.
    settings = {
        key: value
        for key, value in saved.get("config", {}).items()
        if key not in ("name", "dtype", "trainable")
    }
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([saved.get("class_name"), settings], sort_keys=True).encode())
    assets = [(asset, preset.local_file(f"assets/tokenizer/{asset}")) for asset in TOKENIZER_ASSETS]
    found = [(asset, path) for asset, path in assets if path is not None]
    if not found:
        raise PresetError(
            f"preset {preset.name}: no vocabulary in assets/tokenizer; expected one of"
            f" {', '.join(TOKENIZER_ASSETS)}; save it again with tokenizer.save_to_preset(folder)"
        )
    for asset, path in found:
        _update_with_file(digest, path, asset)
    return digest.hexdigest()


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
    import keras_hub

    try:
        return keras_hub.models.Backbone.from_preset(preset.location, dtype=precision)
    except Exception as error:
        raise _load_failure(preset, "backbone", error) from error


def _load_failure(preset: Preset, part: str, error: Exception) -> PresetError:
    return PresetError(
        f"preset {preset.name}: its {part} cannot be loaded ({_one_line(error)}); fetch or save the"
        " preset again, with the installed keras-hub"
    )


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _builtin_name(name: str) -> str:
    """Return `name` where keras-hub knows it."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise PresetError(
            f"preset {name}: no such folder; give a preset folder, a keras-hub preset name, or"
            " hf://owner/name"
        )
    from keras_hub.src.utils.preset_utils import BUILTIN_PRESETS

    if name not in BUILTIN_PRESETS:
        raise PresetError(
            f"preset {name}: neither a folder nor a keras-hub preset name"
            f"{suggest(name, BUILTIN_PRESETS)}; give a preset folder, a name from"
            " https://keras.io/keras_hub/presets, or hf://owner/name"
        )
    return name


def _local_file(name: str, location: str, file: str) -> Path | None:
    """Return the local path of a preset's file, fetched if need be; None where it has none."""
    folder = Path(location)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    from keras_hub.src.utils.preset_utils import get_file

    try:
        return Path(get_file(location, file))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise PresetError(
            f"preset {name}: {file} cannot be fetched ({_one_line(error)}); check the name and the"
            " network, or fetch the preset on another machine and give its folder"
        ) from error


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PresetError(
            f"preset {name}: {path.name} cannot be read ({_one_line(error)}); fetch or save the"
            " preset again"
        ) from error
    if not isinstance(content, dict):
        raise PresetError(
            f"preset {name}: {path.name} must hold an object, found {type(content).__name__}; fetch"
            " or save the preset again"
        )
    return content


def _weights_files(name: str, location: str) -> tuple[Path, ...]:
    """Return the file of the weights, or the index and its shards in order."""
    single = _local_file(name, location, WEIGHTS_FILE)
    if single is not None:
        return (single,)
    index = _local_file(name, location, SHARDED_WEIGHTS_FILE)
    if index is None:
        raise PresetError(
            f"preset {name}: neither {WEIGHTS_FILE} nor {SHARDED_WEIGHTS_FILE}; save it again with"
            " backbone.save_to_preset(folder)"
        )
    shards: set[str] = set()
    for entry in _read_json(name, index).get("weight_map", {}).values():
        shards.update(entry if isinstance(entry, list) else [entry])
    paths = [(shard, _local_file(name, location, shard)) for shard in sorted(shards)]
    missing = [shard for shard, path in paths if path is None]
    if missing or not shards:
        raise PresetError(
            f"preset {name}: {SHARDED_WEIGHTS_FILE} names {', '.join(missing) or 'no shard'}, which"
            " is missing; fetch or save the preset again"
        )
    return (index, *(path for _, path in paths if path is not None))


def _digest_files(files: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        # One file: the digest is the file's own, which any xxhsum can check.
        _update_with_file(digest, path, path.name if len(files) > 1 else "")
    return digest.hexdigest()


def _update_with_file(digest: Any, path: Path, label: str) -> None:
    try:
        with path.open("rb") as stream:
            if label:
                digest.update(f"{label}\0{path.stat().st_size}\0".encode())
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise PresetError(
            f"preset file {path}: cannot be read ({error.strerror}); fetch or save the preset again"
        ) from error
