"""Compile what runs for every photo and sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.encoders.framework import import_framework, pinned_framework


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

        @pinned_framework()
        def run_forward(inputs: Any) -> np.ndarray:
            return forward(keras.tree.map_structure(tf.convert_to_tensor, inputs)).numpy()

        return run_forward
    import jax
    import keras

    @jax.jit
    def apply(values: Any, inputs: Any) -> Any:
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return run(inputs)[:, first_token:]

    values = [variable.value for variable in variables]

    @pinned_framework()
    def run_apply(inputs: Any) -> np.ndarray:
        return np.asarray(apply(values, inputs))

    return run_apply


def compile_converter(converter: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Return an image converter as a function of one photo, with the bits of its eager call.

    Args:
        converter: A keras-hub `ImageConverter`.

    Returns:
        From uint8 of shape (height, width, 3), of any size, to float32 of shape
        (*converter.image_size, 3); may be called from several threads.
    """
    try:
        import tensorflow as tf
    except ImportError:
        # On JAX alone: its resize, with other last bits (see docs/FORMAT.md).
        import_framework()
        return lambda image: np.asarray(converter(image), np.float32)

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

    # By TensorFlow on either backend, as in a `tf.data` pipeline: JAX resizes to other last bits,
    # and a pixel that they round to another level moves a feature a hundred times as far.
    # Called eagerly, the converter rounds the resized image back to uint8; traced, it does not,
    # and the pixels differ by up to half a level. So resize, round, and normalise apart.
    normalise = type(converter).from_config({**converter.get_config(), "image_size": None})

    def convert(image: Any) -> Any:
        with tf.device("CPU:0"):
            resized = converter.resizing(tf.cast(image, tf.float32))
            levels = tf.clip_by_value(tf.round(resized), 0.0, 255.0)
            return tf.cast(normalise(levels), tf.float32)

    return convert
