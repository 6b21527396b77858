"""Compile an encoder's forward pass, which runs for every photo and sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from featstore.encoders.framework import import_framework, pinned_framework

XLA, TENSORFLOW = "xla", "tensorflow"
KERNELS = (XLA, TENSORFLOW)
"""What computes a forward pass on TensorFlow: the first where both are as fast."""


def compile_forward(
    run: Callable[[Any], Any],
    variables: Sequence[Any],
    first_token: int = 0,
    kernels: str = XLA,
) -> Callable[[Any], Any]:
    """Compile the inference of an encoder.

    Args:
        run: From inputs to hidden states of shape (batch, tokens, width).
        variables: The Keras variables that it reads.
        first_token: The tokens before it are left out of the result.
        kernels: One of `KERNELS`. JAX has XLA's alone.

    Returns:
        From arrays, in the structure that `run` takes, to an array of shape
        (batch, tokens - first_token, width). One compilation a batch shape. JAX's may still
        be computed: `np.asarray` waits for it.
    """
    if import_framework() == "tensorflow":
        import keras
        import tensorflow as tf

        # Autograph would leave its Python files in the temporary folder after a kill.
        @tf.function(jit_compile=kernels == XLA, autograph=False)
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
    def run_apply(inputs: Any) -> Any:
        features = apply(values, inputs)
        # As soon as it is there, so that nobody waits for the copying alone.
        features.copy_to_host_async()
        return features

    return run_apply


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an accelerator ran out of memory, for TensorFlow and JAX alike."""
    text = f"{type(error).__name__} {error}".lower()
    marks = ("resourceexhausted", "resource_exhausted", "out of memory")
    return any(mark in text for mark in marks)
