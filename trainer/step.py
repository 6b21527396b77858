"""One compiled training step, and one compiled prediction, of a Keras model.

The same two calls on either backend: TensorFlow (`tf.function` under XLA) and
JAX (`jax.jit` over the model's stateless form).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from trainer.batches import ALIGNMENT, Batch
from trainer.config import TrainConfig


class Stepper(Protocol):
    """What the training loop needs of a backend."""

    def train(self, batch: Batch) -> Any:
        """Take one optimizer step; return the batch's mean loss, on the device."""
        ...

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """Return the logits of the batch's valid rows, float32 of shape (rows,)."""
        ...

    def variables(self) -> list[Any]:
        """Return the optimizer's variables, up to date."""
        ...

    def sync(self) -> None:
        """Write what the steps changed back to the model's and optimizer's variables."""
        ...


def binary_cross_entropy(labels: Any, logits: Any, weights: Any) -> Any:
    """Return the weighted mean of the cross-entropy of logits.

    `softplus(z) - z·y`, which neither overflows nor loses digits for large
    |z|, and whose gradient is `sigmoid(z) - y` at every z, 0 included.

    Args:
        labels: float32 of shape (batch,), 1 for entailment.
        logits: float32 of shape (batch,).
        weights: float32 of shape (batch,), 0 for filling rows.
    """
    losses = ops.softplus(logits) - logits * labels
    return ops.sum(losses * weights) / ops.sum(weights)


def make_optimizer(train: TrainConfig) -> keras.optimizers.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as the settings say."""
    optimizer = keras.optimizers.AdamW(
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        clipnorm=train.clipnorm or None,
    )
    if train.dtype_policy == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


@functools.cache
def keep_freed_memory() -> None:
    """Make the C library keep what a step frees for the next step.

    A step's temporary arrays take tens of megabytes. glibc maps such anew each
    time, and touching fresh pages took a fifth of a step with k_txt 0. The
    process then holds the most that it ever used until it ends. Elsewhere than
    on glibc nothing is changed.
    """
    if not sys.platform.startswith("linux"):
        return
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def make_stepper(
    model: keras.Model, optimizer: keras.optimizers.Optimizer, compiled: bool = True
) -> Stepper:
    """Return the stepper of the backend that Keras runs on.

    Args:
        model: From `build_cached_model`.
        optimizer: Is built here if it is not yet.
        compiled: Use XLA; False traces a plain graph.
    """
    keep_freed_memory()
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        return _JaxStepper(model, optimizer)
    return _TensorFlowStepper(model, optimizer, compiled)


class _TensorFlowStepper:
    def __init__(
        self, model: keras.Model, optimizer: keras.optimizers.Optimizer, compiled: bool
    ) -> None:
        import tensorflow as tf

        def gradients(inputs: Any, labels: Any, weights: Any) -> Any:
            with tf.GradientTape() as tape:
                logits = model(inputs, training=True)[:, 0]
                loss = binary_cross_entropy(labels, logits, weights)
                scaled = optimizer.scale_loss(loss)
            return loss, tape.gradient(scaled, model.trainable_variables)

        def update(values: Any) -> None:
            optimizer.apply(values, model.trainable_variables)

        # In two parts: the gradients are compiled once for each length of sentence, and the
        # optimizer, the larger half of the compilation, once in all.
        self._gradients = tf.function(gradients, jit_compile=compiled)
        self._update = tf.function(update, jit_compile=compiled)
        self._predict = tf.function(
            lambda inputs: model(inputs, training=False)[:, 0], jit_compile=compiled
        )
        self._optimizer = optimizer
        self._from_dlpack = tf.experimental.dlpack.from_dlpack

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Hand the features over as they lie in memory; TensorFlow would copy an array."""
        inputs: dict[str, Any] = batch.inputs()
        if batch.features.dtype.isbuiltin and not batch.features.ctypes.data % ALIGNMENT:
            inputs["features"] = self._from_dlpack(batch.features.__dlpack__())
        return inputs

    def train(self, batch: Batch) -> Any:
        loss, values = self._gradients(self._inputs(batch), batch.labels, batch.weights)
        self._update(values)
        return loss

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return self._predict(self._inputs(batch)).numpy()[: len(batch.rows)]

    def variables(self) -> list[Any]:
        return self._optimizer.variables

    def sync(self) -> None:
        """Nothing to do: the steps assign to the variables."""


class _JaxStepper:
    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        import jax

        self._model, self._optimizer = model, optimizer

        def loss_of(trainable: Any, rest: Any, batch: Any) -> Any:
            inputs, labels, weights = batch
            logits, rest = model.stateless_call(trainable, rest, inputs, training=True)
            loss = binary_cross_entropy(labels, logits[:, 0], weights)
            return optimizer.scale_loss(loss), (loss, rest)

        gradient = jax.value_and_grad(loss_of, has_aux=True)

        def train(state: Any, batch: Any) -> Any:
            trainable, rest, moments = state
            (_, (loss, rest)), gradients = gradient(trainable, rest, batch)
            trainable, moments = optimizer.stateless_apply(moments, gradients, trainable)
            return loss, (trainable, rest, moments)

        self._train = jax.jit(train, donate_argnums=0)
        self._predict = jax.jit(
            lambda trainable, rest, inputs: model.stateless_call(
                trainable, rest, inputs, training=False
            )[0][:, 0]
        )
        self._state: Any = None

    def _load(self) -> Any:
        if self._state is None:
            self._state = (
                [variable.value for variable in self._model.trainable_variables],
                [variable.value for variable in self._model.non_trainable_variables],
                [variable.value for variable in self._optimizer.variables],
            )
        return self._state

    def train(self, batch: Batch) -> Any:
        inputs = (batch.inputs(), batch.labels, batch.weights)
        loss, self._state = self._train(self._load(), inputs)
        return loss

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        trainable, rest, _ = self._load()
        return np.asarray(self._predict(trainable, rest, batch.inputs()))[: len(batch.rows)]

    def variables(self) -> list[Any]:
        self.sync()
        return self._optimizer.variables

    def sync(self) -> None:
        if self._state is None:
            return
        variables = (
            self._model.trainable_variables,
            self._model.non_trainable_variables,
            self._optimizer.variables,
        )
        for group, values in zip(variables, self._state, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        # The next step donates its inputs: it must not be given the variables' own arrays.
        self._state = None
