"""One training step, and the predictions, of one Keras model or several.

The same two calls on either backend: TensorFlow (a `tf.function`) and JAX
(`jax.jit` over the model's stateless form). On a CPU, TensorFlow's own kernels
are as fast as what XLA makes of the step, which takes seconds to compile for
each length of sentence (docs/BENCHMARKS.md).
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

from featstore.encoders.framework import pinned_framework
from featstore.progress import Progress
from featstore.store.numbers import ALIGNMENT_BYTES
from trainer.batches import Batch, CachedRows
from trainer.model.together import logits_together
from trainer.prefetch import Prefetcher
from trainer.run.adjustable import Numbers

LENGTH_STEP = 4
SENTENCE_INPUTS = ("hidden", "padding_mask", "hidden_scales")

Member = tuple[keras.Model, keras.optimizers.Optimizer]


class Predictor(Protocol):
    """What scoring needs of a backend: the logits of one or more models on one batch."""

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        """Return the logits of the batch's valid rows.

        Returns:
            float32 of shape (models, rows); of three classes (models, rows, 3).
        """
        ...


class Stepper(Predictor, Protocol):
    """What the training loop needs of a backend: steps of one or more models on one batch.

    The models share the batch and the products with its tokens; each result is what the model
    alone would give, but for the last digits of those products.
    """

    def train(self, batch: Batch) -> list[Any]:
        """Take one optimizer step of each model; return the mean losses, on the device."""
        ...

    def sync(self) -> None:
        """Write what the steps changed back to the models' and optimizers' variables."""
        ...

    def forget(self) -> None:
        """Give up steps that were not written back: what the variables hold counts."""
        ...


def flat(logits: Any) -> Any:
    """Return a model's output: (batch,) where it has one logit a row, else as it is."""
    return logits[:, 0] if logits.shape[-1] == 1 else logits


def cross_entropy(labels: Any, logits: Any, weights: Any) -> Any:
    """Return the weighted mean of the cross-entropy of logits.

    `softplus(z) - z·y`, which neither overflows nor loses digits for large
    |z|, and whose gradient is `sigmoid(z) - y` at every z, 0 included; of three
    classes `logsumexp(z) - Σ z·y`.

    Args:
        labels: float32 of shape (batch,), 1 for entailment; or (batch, classes), whose rows add
            up to 1.
        logits: float32 of the same shape.
        weights: float32 of shape (batch,), 0 for filling rows.
    """
    if len(logits.shape) == 1:
        losses = ops.softplus(logits) - logits * labels
    else:
        losses = ops.logsumexp(logits, axis=-1) - ops.sum(logits * labels, axis=-1)
    return ops.sum(losses * weights) / ops.sum(weights)


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


def padded(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Pad sentences to a multiple of `LENGTH_STEP` tokens, so that few lengths occur.

    Args:
        inputs: As `Batch.inputs` returns them. Single tokens stay what they are.
    """
    length = inputs["padding_mask"].shape[1] if "padding_mask" in inputs else 1
    missing = -length % LENGTH_STEP if length > 1 else 0
    if not missing:
        return inputs

    def pad(array: NDArray[Any]) -> NDArray[Any]:
        return np.pad(array, [(0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)])

    return {name: pad(x) if name in SENTENCE_INPUTS else x for name, x in inputs.items()}


def make_predictor(models: Sequence[keras.Model]) -> Predictor:
    """Return the predictor of the backend that Keras runs on; it allocates no optimizer.

    Args:
        models: Models from `build_cached_model`; their weights at the time of a
            prediction are used.
    """
    keep_freed_memory()
    if keras.backend.backend() == "jax":
        return _JaxPredictor(models)
    return _TensorFlowPredictor(models)


def make_stepper(members: Sequence[Member]) -> Stepper:
    """Return the stepper of the backend that Keras runs on.

    Args:
        members: Models from `build_cached_model`, each with its optimizer,
            which is built here if it is not yet.
    """
    keep_freed_memory()
    for model, optimizer in members:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        return _JaxStepper(members)
    return _TensorFlowStepper(members)


@pinned_framework()
def predict_logits(
    predictor: Predictor,
    rows: CachedRows,
    batch_size: int,
    progress: Progress = lambda rows: None,
) -> NDArray[np.float32]:
    """Return the logits of every row, in the order of the rows; `progress` is told of each batch.

    Returns:
        float32 of shape (models, len(rows)), of three classes (models, len(rows), 3). Every row
        is computed exactly once.
    """
    parts: list[NDArray[np.float32]] = []
    order: list[NDArray[np.int64]] = []
    with Prefetcher(rows, rows.in_order(batch_size), batch_size) as batches:
        for batch in batches:
            parts.append(predictor.predict(batch))
            order.append(batch.rows)
            progress(len(batch.rows))
    logits = np.concatenate(parts, axis=1)
    return logits[:, np.argsort(np.concatenate(order))]


class _TensorFlowPredictor:
    def __init__(self, models: Sequence[keras.Model]) -> None:
        import tensorflow as tf

        def predict(inputs: Any) -> Any:
            logits = logits_together(models, inputs, training=False)
            return tf.stack([flat(own) for own in logits])

        # Traced once, for sentences of any length. Nothing branches on a tensor, so AutoGraph would
        # only make tracing slower.
        self._signature = {x.name: tf.TensorSpec(x.shape, x.dtype) for x in models[0].inputs}
        self._predict = tf.function(predict, input_signature=[self._signature], autograph=False)
        self._from_dlpack = tf.experimental.dlpack.from_dlpack
        self._tensor = tf.convert_to_tensor

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the inputs as tensors, the features as they lie in memory: others are copied."""
        inputs: dict[str, Any] = batch.inputs()
        # DLPack knows NumPy's own dtypes; TensorFlow takes aligned memory only.
        values = batch.features.values
        on_host = isinstance(values, np.ndarray)
        if on_host and values.dtype.isbuiltin == 1 and not values.ctypes.data % ALIGNMENT_BYTES:
            inputs["features"] = self._from_dlpack(values.__dlpack__())
        # A function makes tensors of arrays too, but takes longer.
        return {name: self._tensor(value) for name, value in inputs.items()}

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        return self._predict(self._inputs(batch)).numpy()[:, : len(batch.rows)]


class _TensorFlowStepper(_TensorFlowPredictor):
    def __init__(self, members: Sequence[Member]) -> None:
        import tensorflow as tf

        models, optimizers = ([*each] for each in zip(*members, strict=True))
        super().__init__(models)
        self._numbers = numbers = Numbers(members)

        def train(inputs: Any, labels: Any, weights: Any, given: Any) -> Any:
            with numbers.given(given):
                with tf.GradientTape() as tape:
                    logits = logits_together(models, inputs, training=True)
                    losses = [cross_entropy(labels, flat(own), weights) for own in logits]
                    scaled = [
                        optimizer.scale_loss(loss)
                        for loss, optimizer in zip(losses, optimizers, strict=True)
                    ]
                # Each loss depends on its own model's variables alone.
                variables = [model.trainable_variables for model in models]
                gradients = tape.gradient(scaled, variables)
                for optimizer, own, of in zip(optimizers, gradients, variables, strict=True):
                    optimizer.apply(own, of)
            return losses

        outputs = models[0].output.shape[-1]
        of_rows = tf.TensorSpec([None] if outputs == 1 else [None, outputs], tf.float32)
        column, numbers_spec = (tf.TensorSpec([None] * n, tf.float32) for n in (1, 2))
        signature = [self._signature, of_rows, column, numbers_spec]
        self._train = tf.function(train, input_signature=signature, autograph=False)

    def train(self, batch: Batch) -> list[Any]:
        labels, weights = self._tensor(batch.labels), self._tensor(batch.weights)
        given = self._tensor(self._numbers.array())
        losses: list[Any] = self._train(self._inputs(batch), labels, weights, given)
        return losses

    def sync(self) -> None:
        """Nothing to do: the steps assign to the variables."""

    def forget(self) -> None:
        """Nothing to do, for the same reason."""


def _variables_as(variables: Any, states: Any) -> keras.StatelessScope:
    """Return a scope in which variables have the values of a state, group by group."""
    pairs: list[Any] = []
    for groups, state in zip(variables, states, strict=True):
        for group, values in zip(groups, state, strict=False):
            pairs += zip(group, values, strict=True)
    return keras.StatelessScope(state_mapping=pairs)


class _JaxPredictor:
    """Predictions under `jax.jit`, which compiles them anew for each length of sentence."""

    def __init__(self, models: Sequence[keras.Model]) -> None:
        import jax

        def predict(states: Any, inputs: Any) -> Any:
            with _variables_as(self._variables, states):
                logits = logits_together(models, inputs, training=False)
            return jax.numpy.stack([flat(own) for own in logits])

        self._variables: list[tuple[Any, ...]] = [
            (model.trainable_variables, model.non_trainable_variables) for model in models
        ]
        self._predict = jax.jit(predict)

    def _states(self) -> list[tuple[Any, ...]]:
        """Return the arrays of each model's variables, by group."""
        return [
            tuple([variable.value for variable in group] for group in groups)
            for groups in self._variables
        ]

    def predict(self, batch: Batch) -> NDArray[np.float32]:
        states = [state[:2] for state in self._states()]
        return np.asarray(self._predict(states, padded(batch.inputs())))[:, : len(batch.rows)]


class _JaxStepper(_JaxPredictor):
    """Steps under `jax.jit`; their state is kept out of the variables until `sync`."""

    def __init__(self, members: Sequence[Member]) -> None:
        import jax

        models, optimizers = ([*each] for each in zip(*members, strict=True))
        super().__init__(models)
        self._variables = [
            (*groups, optimizer.variables)
            for groups, (_, optimizer) in zip(self._variables, members, strict=True)
        ]

        self._numbers = numbers = Numbers(members)

        def loss_of(trainable: Any, rest: Any, moments: Any, batch: Any) -> Any:
            inputs, labels, weights = batch
            state = [*zip(trainable, rest, moments, strict=True)]
            with _variables_as(self._variables, state) as scope:
                logits = logits_together(models, inputs, training=True)
                losses = [cross_entropy(labels, flat(own), weights) for own in logits]
                pairs = zip(losses, optimizers, strict=True)
                scaled = sum(optimizer.scale_loss(loss) for loss, optimizer in pairs)
            rest = [[scope.get_current_value(v) for v in groups[1]] for groups in self._variables]
            return scaled, (losses, rest)

        def train(states: Any, batch: Any, given: Any) -> Any:
            trainable, rest, moments = zip(*states, strict=True)
            with numbers.given(given):
                # Each loss depends on its own model's variables alone.
                gradient = jax.value_and_grad(loss_of, has_aux=True)
                (_, (losses, rest)), gradients = gradient(trainable, rest, moments, batch)
                after = []
                for i, optimizer in enumerate(optimizers):
                    own, moved = optimizer.stateless_apply(moments[i], gradients[i], trainable[i])
                    after.append((own, rest[i], moved))
            return losses, after

        self._train = jax.jit(train, donate_argnums=0)
        self._ahead: Any = None

    def _states(self) -> list[tuple[Any, ...]]:
        if self._ahead is None:
            self._ahead = super()._states()
        return list(self._ahead)

    def train(self, batch: Batch) -> list[Any]:
        inputs = (padded(batch.inputs()), batch.labels, batch.weights)
        losses, self._ahead = self._train(self._states(), inputs, self._numbers.array())
        return losses

    def forget(self) -> None:
        self._ahead = None

    def sync(self) -> None:
        if self._ahead is None:
            return
        for groups, state in zip(self._variables, self._ahead, strict=True):
            for group, values in zip(groups, state, strict=True):
                for variable, value in zip(group, values, strict=True):
                    variable.assign(value)
        # The next step donates its inputs: it must not be given the variables' own arrays.
        self._ahead = None
