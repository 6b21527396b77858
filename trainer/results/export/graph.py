"""The model in TensorFlow's own terms: SavedModel, and ONNX."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from featstore.encoders.pixels import converter_ops
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import RunError, UsageError

ONNX_OPSET = 18
# A protocol buffer holds 2 GiB; the graph takes some of it.
ONNX_LIMIT_BYTES = 2_000_000_000
# Of both byte orders: the mark of Exif; the entry of its first directory that says how a photo is
# turned (tag 0x0112, type 3 (short), one value); which byte of the value after it is the low one.
_ORIENTATION = (
    (b"Exif\x00\x00II", bytes([0x12, 0x01, 0x03, 0x00, 0x01, 0x00, 0x00, 0x00]), 0),
    (b"Exif\x00\x00MM", bytes([0x01, 0x12, 0x00, 0x03, 0x00, 0x00, 0x00, 0x01]), 1),
)
_EXIF_BYTES = 1 << 16


def _input_signature(model: keras.Model) -> dict[str, Any]:
    import tensorflow as tf

    return {
        tensor.name: tf.TensorSpec(tensor.shape, tensor.dtype, tensor.name)
        for tensor in model.inputs
    }


def save_saved_model(
    model: keras.Model,
    path: Path,
    vision: VisionEncoder,
    text: TextEncoder,
    threshold: float | None,
) -> None:
    """Write a SavedModel with two endpoints.

    Both return `logit` and `probability` (float32) and `label` (int32: 1 entailment, 0
    contradiction), each of shape (batch,); of three classes the first two are of shape
    (batch, 3), and label 2 is neutral. `serving_default` takes `pixel_values`, `input_ids`
    and `attention_mask`; `serve_bytes` takes `images`, the bytes of JPEG or PNG files, and
    `sentences`, UTF-8, both strings of shape (batch,).

    Args:
        model: From `build_plain`, with its weights.
        path: The folder.
        vision: Its image converter is part of `serve_bytes`.
        text: Its tokenizer is part of `serve_bytes`; it needs the operations of tensorflow-text.
        threshold: Probability from which a row is called entailment; None of three classes.
    """
    import tensorflow as tf

    signature = _input_signature(model)
    to_pixels = converter_ops(vision.converter)
    pixel_spec = tf.TensorSpec((*vision.image_size, 3), tf.float32)
    batch_of_strings = tf.TensorSpec((None,), tf.string)

    def answer(inputs: Mapping[str, Any]) -> dict[str, Any]:
        logit = model(inputs, training=False)
        if threshold is None:
            probability = tf.nn.softmax(logit)
            label = tf.argmax(logit, -1, output_type=tf.int32)
        else:
            logit = tf.squeeze(logit, -1)
            probability = tf.sigmoid(logit)
            label = tf.cast(probability >= threshold, tf.int32)
        return {"logit": logit, "probability": probability, "label": label}

    @tf.function(input_signature=list(signature.values()), autograph=False)
    def serve(*arrays: Any) -> dict[str, Any]:
        return answer(dict(zip(signature, arrays, strict=True)))

    @tf.function(input_signature=[batch_of_strings, batch_of_strings], autograph=False)
    def serve_bytes(images: Any, sentences: Any) -> dict[str, Any]:
        pixels = tf.map_fn(
            lambda data: tf.ensure_shape(to_pixels(_decode(data)), pixel_spec.shape),
            images,
            fn_output_signature=pixel_spec,
        )
        packed = text.preprocessor(sentences)
        return answer(
            {
                "pixel_values": pixels,
                "input_ids": tf.cast(packed["token_ids"], tf.int32),
                "attention_mask": tf.cast(packed["padding_mask"], tf.int32),
            }
        )

    module = tf.Module()
    # The variables, not the Keras layers: those would be written as an object graph of theirs.
    module.state = [variable.value for variable in model.variables]
    # Tables and buffers of the tokenizer, where it has some.
    module.tokenizer = text.preprocessor.tokenizer
    signatures = {
        "serving_default": serve.get_concrete_function(),
        "serve_bytes": serve_bytes.get_concrete_function(),
    }
    tf.saved_model.save(module, str(path), signatures=signatures)


def _decode(data: Any) -> Any:
    """Decode one photo by the rules of `decode_image`, as TensorFlow's operations.

    Bit for bit the same pixels, but for PNG files of one bit, and of 16 bits of grey (one level).

    Args:
        data: A string tensor of shape (): the bytes of a JPEG, PNG or WebP file.

    Returns:
        uint8 of shape (height, width, 3).
    """
    import tensorflow as tf

    def jpeg() -> Any:
        # Pillow's inverse transform; TensorFlow's default is another.
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
        return _turn(image, _orientation(data))

    def other() -> Any:
        # PNG of any kind becomes four channels; of WebP, which has three or four, only as it is.
        is_png = tf.strings.substr(data, 0, 4) == b"\x89PNG"
        image = tf.cond(
            is_png,
            lambda: tf.io.decode_png(data, channels=4),
            lambda: tf.io.decode_image(data, expand_animations=False),
        )
        image = tf.cast(image, tf.int32)
        opaque = tf.fill([*tf.unstack(tf.shape(image)[:2]), 1], 255)
        alpha = tf.concat([image, opaque], -1)[..., 3:4]
        # On white, rounded to the nearest.
        blended = (2 * (image[..., :3] * alpha + 255 * (255 - alpha)) + 255) // 510
        return tf.ensure_shape(tf.cast(blended, tf.uint8), (None, None, 3))

    return tf.cond(tf.strings.substr(data, 0, 2) == b"\xff\xd8", jpeg, other)


def _orientation(data: Any) -> Any:
    """Return a JPEG's Exif orientation, an int32 tensor; 1 where it has none.

    Found by its bytes after the mark of Exif, not by following Exif's directories.
    """
    import tensorflow as tf

    head = tf.strings.substr(data, 0, _EXIF_BYTES)
    values = tf.pad(tf.cast(tf.io.decode_raw(head, tf.uint8), tf.int32), [[0, 16]])
    found = tf.constant(1, tf.int32)
    for mark, entry, low_byte in _ORIENTATION:
        places = _find(values, entry)
        # Of no mark at all, the least is the largest integer.
        places = tf.boolean_mask(places, places > tf.reduce_min(_find(values, mark)))
        value = tf.gather(values, places[:1] + len(entry) + low_byte)
        found = tf.concat([value, [found]], 0)[0]
    return found


def _find(values: Any, wanted: bytes) -> Any:
    """Return the places of some bytes in int32 `values`, in their order."""
    import tensorflow as tf

    count = tf.maximum(tf.size(values) - len(wanted) + 1, 0)
    equal = [values[i : i + count] == byte for i, byte in enumerate(wanted)]
    return tf.cast(tf.where(tf.reduce_all(tf.stack(equal), axis=0))[:, 0], tf.int32)


def _turn(image: Any, orientation: Any) -> Any:
    """Turn an image (height, width, 3) upright from one of the eight Exif orientations."""
    import tensorflow as tf

    def where(condition: Any, change: Any, image: Any) -> Any:
        return tf.cond(condition, lambda: change(image), lambda: image)

    def among(*values: int) -> Any:
        return tf.reduce_any(tf.equal(orientation, values))

    image = where(among(5, 6, 7, 8), lambda x: tf.transpose(x, (1, 0, 2)), image)
    image = where(among(2, 3, 6, 7), lambda x: x[:, ::-1], image)
    return where(among(3, 4, 7, 8), lambda x: x[::-1], image)


def check_onnx_packages() -> None:
    """Refuse where the packages for ONNX are missing.

    Raises:
        UsageError: Names them, and what to install.
    """
    needed = ("tf2onnx", "onnx", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format onnx: {', '.join(missing)} cannot be imported; install the extra:"
            " pip install 'featstore[onnx]'"
        )


def save_onnx(model: keras.Model, path: Path, card: Mapping[str, Any]) -> None:
    """Write an ONNX file with a dynamic batch and length; its output is `logit`, (batch, 1 or 3).

    Args:
        model: From `build_plain`, with its weights.
        path: The file.
        card: Put into the file's metadata, each value as JSON.

    Raises:
        RunError: The model is larger than an ONNX file may be, or tf2onnx failed.
    """
    if model.count_params() * 4 > ONNX_LIMIT_BYTES:
        raise RunError(
            f"{path.name}: {model.count_params():,} numbers are more than the 2 GB of one ONNX"
            " file; export with --format saved_model or keras"
        )
    import tensorflow as tf

    with warnings.catch_warnings():
        # Of old NumPy names, in its own modules.
        warnings.simplefilter("ignore")
        import onnx
        import tf2onnx
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)
    signature = _input_signature(model)

    @tf.function(input_signature=list(signature.values()), autograph=False)
    def predict(*arrays: Any) -> dict[str, Any]:
        return {"logit": model(dict(zip(signature, arrays, strict=True)), training=False)}

    captured = _captured_arrays(predict.get_concrete_function())
    converted, _ = tf2onnx.convert.from_function(
        predict,
        input_signature=list(signature.values()),
        opset=ONNX_OPSET,
        # ONNX has no Erfc, by which TensorFlow computes GELU.
        custom_op_handlers={"Erfc": (_erfc_as_erf, [])},
    )
    graph = converted.graph
    used = {name for node in graph.node for name in node.input}
    # What was captured without being a variable comes out as one more input.
    for stray in [given for given in graph.input if given.name not in signature]:
        if stray.name in used and stray.name not in captured:
            raise RunError(f"{path.name}: tf2onnx made an input {stray.name!r} of unknown value")
        if stray.name in used:
            value = onnx.numpy_helper.from_array(captured[stray.name], stray.name)
            graph.initializer.append(value)
        graph.input.remove(stray)
    for given in [*graph.input, *graph.output]:
        _name_axes(given)
    for key, value in card.items():
        entry = converted.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    onnx.checker.check_model(converted)
    path.write_bytes(converted.SerializeToString())


def _captured_arrays(concrete: Any) -> dict[str, np.ndarray]:
    """Return the constants that a function took from outside, by their names in its graph."""
    return {
        inner.name: outer.numpy()
        for outer, inner in concrete.graph.captures
        if outer.dtype.name != "resource"
    }


def _name_axes(given: Any) -> None:
    """Call an input's or output's axes of unknown length `batch` and `length`."""
    for axis, dimension in zip(("batch", "length"), given.type.tensor_type.shape.dim, strict=False):
        if not dimension.dim_value:
            dimension.dim_param = axis


def _erfc_as_erf(context: Any, node: Any, name: str, arguments: Any) -> None:
    """Write a node `Erfc(x)` as `1 − Erf(x)`."""
    output = node.output[0]
    shape, dtype = context.get_shape(output), context.get_dtype(output)
    one = context.make_const(f"{node.name}_one", np.array(1, np.float32)).output[0]
    context.remove_node(node.name)
    erf = context.make_node("Erf", [node.input[0]])
    context.make_node(
        "Sub",
        [one, erf.output[0]],
        outputs=[output],
        shapes=[shape],
        dtypes=[dtype],
        name=node.name,
    )
