"""AdamW, in one pass over the weights where the backend has a kernel for it."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from featstore.encoders.framework import pinned_framework
from trainer.config import TrainConfig


class InPlaceAdamW(keras.optimizers.Adam):
    """AdamW of Keras on TensorFlow: its arithmetic and variables, with less memory traffic.

    Keras writes each step of Adam's formula to memory before the next reads it;
    compiled, all weights and moments are written to new arrays. TensorFlow's
    kernel reads and writes each once, in place. What is left is rounding: the
    kernel computes `1 - beta` in float32.

    Args:
        learning_rate: Step size.
        weight_decay: Share of a weight, times `learning_rate`, that a step
            takes away from it before Adam's update.
        clipnorm: Longest gradient of a variable (2-norm), or None.
    """

    def __init__(self, learning_rate: float, weight_decay: float, clipnorm: float | None) -> None:
        # Not given to the parent, which would take the decay in a pass of its own.
        super().__init__(learning_rate, clipnorm=clipnorm, name="adamw")
        self.decoupled_decay = weight_decay
        # While a graph is traced that takes them as arguments: decay and longest gradient.
        self.given: tuple[Any, Any] | None = None

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its moments.

        Args:
            gradient: Shape of `variable`.
            variable: A TensorFlow variable that the optimizer was built with.
            learning_rate: Scalar.
        """
        import tensorflow as tf

        index = self._get_variable_index(variable)
        variable = variable.value if isinstance(variable, keras.Variable) else variable
        dtype = variable.dtype
        rate = tf.cast(learning_rate, dtype)
        step = tf.cast(self.iterations + 1, dtype)
        if self.decoupled_decay:
            decay = self.decoupled_decay if self.given is None else self.given[0]
            # Only after the gradient is there, whose other operations may still read the variable:
            # it would be copied.
            with tf.control_dependencies([gradient]):
                variable.assign_sub(variable * (rate * decay))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.cast(self.beta_1, dtype) ** step,
            beta2_power=tf.cast(self.beta_2, dtype) ** step,
            lr=rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=tf.cast(gradient, dtype),
        )

    def _clip_by_norm(self, values: Any, axes: Any = None) -> Any:
        """Return a gradient no longer than `clipnorm`; the parent's takes three passes more."""
        import tensorflow as tf

        if axes is not None:
            return super()._clip_by_norm(values, axes)
        longest = self.clipnorm if self.given is None else self.given[1]
        norm = tf.sqrt(2 * tf.nn.l2_loss(values))
        return values * (longest / tf.maximum(norm, longest))


@pinned_framework()
def make_optimizer(train: TrainConfig) -> keras.optimizers.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) as the settings say.

    Args:
        train: `lr`, `weight_decay`, `clipnorm`, `dtype_policy` and `fast_path`
            are used.
    """
    if train.fast_path and keras.backend.backend() == "tensorflow":
        optimizer = InPlaceAdamW(train.lr, train.weight_decay, train.clipnorm or None)
    else:
        optimizer = keras.optimizers.AdamW(
            learning_rate=train.lr,
            weight_decay=train.weight_decay,
            clipnorm=train.clipnorm or None,
        )
    if train.dtype_policy == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> Any:
    """Return the optimizer itself, from under loss scaling too."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Return the current learning rate, also under loss scaling."""
    rate = inner_optimizer(optimizer).learning_rate
    # Seven digits: the variable is float32, and 5e-05 should read so.
    return float(f"{float(np.asarray(rate)):.7g}")


def cut_learning_rate(optimizer: keras.optimizers.Optimizer, factor: float) -> None:
    """Multiply the learning rate; a traced step takes the new one."""
    inner_optimizer(optimizer).learning_rate = learning_rate(optimizer) * factor
