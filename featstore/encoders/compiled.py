"""The framework: import it, and compile what runs for every photo and sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.errors import UsageError

BACKENDS = ("tensorflow", "jax")
_CHOOSE = "set KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax"


def import_framework() -> str:
    """Import Keras and keras-hub on the backend that is configured.

    Returns:
        The backend: "tensorflow" or "jax".

    Raises:
        UsageError: Another backend is configured, or its package is missing.
    """
    chosen = os.environ.get("KERAS_BACKEND", "")
    # Asked before Keras is imported, which fails on a backend whose package is missing.
    if chosen and chosen not in BACKENDS:
        raise UsageError(f"KERAS_BACKEND={chosen}: not a backend that is supported; {_CHOOSE}")
    try:
        import keras
        import keras_hub  # noqa: F401
    except ImportError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(
            f"Keras cannot be imported on the backend {chosen or 'of keras.json'} ({reason});"
            f" install what is missing, or {_CHOOSE}"
        ) from error
    backend = str(keras.backend.backend())
    if backend not in BACKENDS:
        raise UsageError(f"keras.json: backend {backend} is not supported; {_CHOOSE}")
    return backend


def compile_forward(
    run: Callable[[Any], Any], variables: Sequence[Any], first_token: int = 0
) -> Callable[[Any], np.ndarray]:
    """Compile the inference of an encoder.

    Args:
        run: From inputs to hidden states of shape (batch, tokens, width).
        variables: The Keras variables that it reads.
        first_token: The tokens before it are left out of the result.

    Returns:
        From arrays, in the structure that `run` takes, to an array of shape
        (batch, tokens - first_token, width). One compilation a batch shape.
    """
    if import_framework() == "tensorflow":
        import keras
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def forward(inputs: Any) -> Any:
            return run(inputs)[:, first_token:]

        return lambda inputs: forward(
            keras.tree.map_structure(tf.convert_to_tensor, inputs)
        ).numpy()
    import jax
    import keras

    @jax.jit
    def apply(values: Any, inputs: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return run(inputs)[:, first_token:]

    values = [variable.value for variable in variables]
    return lambda inputs: np.asarray(apply(values, inputs))


def compile_converter(converter: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return an image converter as a function of one photo, with the bits of its eager call.

    Args:
        converter: A keras-hub `ImageConverter`.

    Returns:
        From uint8 of shape (height, width, 3), of any size, to float32 of shape
        (*converter.image_size, 3); may be called from several threads.
    """
    if import_framework() != "tensorflow":
        return lambda image: np.asarray(converter(image), np.float32)
    import tensorflow as tf

    convert = tf.function(
        converter_ops(converter), input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)]
    )
    concrete = convert.get_concrete_function()
    return lambda image: concrete(tf.constant(image)).numpy()


def converter_ops(converter: Any) -> Callable[[Any], Any]:
    """Return an image converter as TensorFlow operations, to be traced in a graph.

    Args:
        converter: A keras-hub `ImageConverter`.

    Returns:
        From a uint8 tensor of shape (height, width, 3) to a float32 one of shape
        (*converter.image_size, 3), with the bits of the converter's eager call.
    """
    import tensorflow as tf

    # Called eagerly, the converter rounds the resized image back to uint8; traced, it does not,
    # and the pixels differ by up to half a level. So resize, round, and normalise apart.
    normalise = type(converter).from_config({**converter.get_config(), "image_size": None})

    def convert(image: Any) -> Any:
        with tf.device("CPU:0"):
            resized = converter.resizing(tf.cast(image, tf.float32))
            levels = tf.clip_by_value(tf.round(resized), 0.0, 255.0)
            return tf.cast(normalise(levels), tf.float32)

    return convert
