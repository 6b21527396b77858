"""One compiled training step, and one compiled prediction, of one Keras model or several.

The same two calls on either backend: TensorFlow (`tf.function` under XLA) and
JAX (`jax.jit` over the model's stateless form).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from featstore.store import ALIGNMENT_BYTES
from trainer.batches import Batch
from trainer.config import TrainConfig

Member = tuple[keras.Model, keras.optimizers.Optimizer]


class Stepper(Protocol):
    """What the training loop needs of a backend: steps of one or more models on one batch.

    The models share nothing but the batch: each result is what the model alone
    would give.
    """

    def train(self, batch: Batch) -> list[Any]:
        """Take one optimizer step of each model; return the mean losses, on the device."""
        ...

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """Return the logits of the batch's valid rows, float32 of shape (models, rows)."""
        ...

    def sync(self) -> None:
        """Write what the steps changed back to the models' and optimizers' variables."""
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


def make_stepper(members: Sequence[Member], xla: bool = True) -> Stepper:
    """Return the stepper of the backend that Keras runs on.

    Args:
        members: Models from `build_cached_model`, each with its optimizer,
            which is built here if it is not yet.
        xla: Compile; False traces a plain graph. JAX always compiles.
    """
    keep_freed_memory()
    for model, optimizer in members:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        return _JaxStepper(members)
    return _TensorFlowStepper(members, xla)


class _TensorFlowStepper:
    def __init__(self, members: Sequence[Member], xla: bool) -> None:
        import tensorflow as tf

        def gradients(inputs: Any, labels: Any, weights: Any) -> Any:
            losses, values = [], []
            for model, optimizer in members:
                with tf.GradientTape() as tape:
                    logits = model(inputs, training=True)[:, 0]
                    loss = binary_cross_entropy(labels, logits, weights)
                    scaled = optimizer.scale_loss(loss)
                losses.append(loss)
                values.append(tape.gradient(scaled, model.trainable_variables))
            return losses, values

        def update(values: Any) -> None:
            for (model, optimizer), part in zip(members, values, strict=True):
                optimizer.apply(part, model.trainable_variables)

        def predict(inputs: Any) -> Any:
            return tf.stack([model(inputs, training=False)[:, 0] for model, _ in members])

        # In two parts: the gradients are compiled once for each length of sentence, and the
        # optimizer, the larger half of the compilation, once in all.
        # Nothing in them branches on a tensor, so AutoGraph would only make tracing slower.
        function = functools.partial(tf.function, jit_compile=xla, autograph=False)
        self._gradients = function(gradients)
        self._update = function(update)
        self._predict = function(predict)
        self._from_dlpack = tf.experimental.dlpack.from_dlpack

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Hand the features over as they lie in memory; TensorFlow would copy an array."""
        inputs: dict[str, Any] = batch.inputs()
        # DLPack knows NumPy's own dtypes; TensorFlow takes aligned memory only.
        if batch.features.dtype.isbuiltin == 1 and not batch.features.ctypes.data % ALIGNMENT_BYTES:
            inputs["features"] = self._from_dlpack(batch.features.__dlpack__())
        return inputs

    def train(self, batch: Batch) -> list[Any]:
        losses, values = self._gradients(self._inputs(batch), batch.labels, batch.weights)
        self._update(values)
        return losses

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return self._predict(self._inputs(batch)).numpy()[:, : len(batch.rows)]

    def sync(self) -> None:
        """Nothing to do: the steps assign to the variables."""


class _JaxStepper:
    def __init__(self, members: Sequence[Member]) -> None:
        import jax

        self._members = members

        def train_one(member: Member, state: Any, batch: Any) -> Any:
            model, optimizer = member
            trainable, rest, moments = state
            inputs, labels, weights = batch

            def loss_of(trainable: Any) -> Any:
                logits, after = model.stateless_call(trainable, rest, inputs, training=True)
                loss = binary_cross_entropy(labels, logits[:, 0], weights)
                return optimizer.scale_loss(loss), (loss, after)

            (_, (loss, rest)), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable)
            trainable, moments = optimizer.stateless_apply(moments, gradients, trainable)
            return loss, (trainable, rest, moments)

        def train(states: Any, batch: Any) -> Any:
            pairs = [train_one(m, s, batch) for m, s in zip(members, states, strict=True)]
            return [loss for loss, _ in pairs], [state for _, state in pairs]

        def predict(states: Any, inputs: Any) -> Any:
            logits = [
                model.stateless_call(trainable, rest, inputs, training=False)[0][:, 0]
                for (model, _), (trainable, rest, _) in zip(members, states, strict=True)
            ]
            return jax.numpy.stack(logits)

        self._train = jax.jit(train, donate_argnums=0)
        self._predict = jax.jit(predict)
        self._states: Any = None

    def _load(self) -> Any:
        if self._states is None:
            self._states = [
                (
                    [variable.value for variable in model.trainable_variables],
                    [variable.value for variable in model.non_trainable_variables],
                    [variable.value for variable in optimizer.variables],
                )
                for model, optimizer in self._members
            ]
        return self._states

    def train(self, batch: Batch) -> list[Any]:
        inputs = (batch.inputs(), batch.labels, batch.weights)
        losses, self._states = self._train(self._load(), inputs)
        return losses

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return np.asarray(self._predict(self._load(), batch.inputs()))[:, : len(batch.rows)]

    def sync(self) -> None:
        if self._states is None:
            return
        for (model, optimizer), state in zip(self._members, self._states, strict=True):
            groups = (
                model.trainable_variables,
                model.non_trainable_variables,
                optimizer.variables,
            )
            for group, values in zip(groups, state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
        # The next step donates its inputs: it must not be given the variables' own arrays.
        self._states = None
