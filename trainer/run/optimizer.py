"""AdamW, in one pass over the weights where the backend has a kernel for it, and its rates."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from featstore.encoders.framework import pinned_framework
from featstore.errors import ConfigError
from trainer.config import DECAYS, TrainConfig


class _Rates:
    """Learning rates that a schedule scales, and that differ by layer: for an optimizer of Keras.

    Attributes:
        rate_scale: What the learning rate is multiplied by at the next step; None: no schedule.
        layer_decay: Rate of a layer over that of the layer above it; None: all alike.
        factors: While a graph is traced that takes them as arguments: of each variable, what
            its rate is multiplied by; None: 1.
    """

    rate_scale: Any = None
    layer_decay: float | None = None
    factors: Sequence[Any] | None = None

    def _get_current_learning_rate(self) -> Any:
        rate = super()._get_current_learning_rate()  # type: ignore[misc]
        return rate if self.rate_scale is None else rate * self.rate_scale

    def own_rate(self, variable: Any, learning_rate: Any) -> Any:
        """Return a variable's learning rate."""
        if self.factors is None:
            return learning_rate
        factor = self.factors[self._get_variable_index(variable)]  # type: ignore[attr-defined]
        return learning_rate if factor is None else learning_rate * factor


class AdamW(_Rates, keras.optimizers.AdamW):
    """AdamW of Keras, with the rates of `_Rates`."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Update one variable and its moments at its own rate; as the parent."""
        super().update_step(gradient, variable, self.own_rate(variable, learning_rate))

    def _apply_weight_decay(self, variables: Any) -> None:
        if self.factors is None:
            super()._apply_weight_decay(variables)
            return
        scale = self.rate_scale
        for variable in variables:
            # The parent asks for the rate of all.
            self.rate_scale = self.own_rate(variable, 1.0 if scale is None else scale)
            super()._apply_weight_decay([variable])
        self.rate_scale = scale


class InPlaceAdamW(_Rates, keras.optimizers.Adam):
    """AdamW of Keras on TensorFlow: its arithmetic and variables, with less memory traffic.

    Keras writes each step of Adam's formula to memory before the next reads it;
    compiled, all weights and moments are written to new arrays. TensorFlow's
    kernel reads and writes each once, in place. What is left is rounding: the
    kernel computes `1 - beta` in float32.

    Args:
        learning_rate: Step size.
        weight_decay: Share of a weight, times `learning_rate`, that a step
            takes away from it before Adam's update.
        options: Of the parent.
    """

    def __init__(self, learning_rate: float, weight_decay: float, **options: Any) -> None:
        # Not given to the parent, which would take the decay in a pass of its own.
        super().__init__(learning_rate, name="adamw", **options)
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
        rate = tf.cast(self.own_rate(variable, learning_rate), dtype)
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
        train: `lr`, `weight_decay`, `clipnorm`, `dtype_policy`, `fast_path`, `lr_schedule`,
            `warmup_epochs`, `layer_decay`, `accumulate_steps` and `ema_momentum` are used.
    """
    in_place = train.fast_path and keras.backend.backend() == "tensorflow"
    optimizer = (InPlaceAdamW if in_place else AdamW)(
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        clipnorm=train.clipnorm or None,
        gradient_accumulation_steps=train.accumulate_steps if train.accumulate_steps > 1 else None,
        use_ema=train.ema_momentum > 0,
        ema_momentum=train.ema_momentum,
    )
    if is_scheduled(train):
        optimizer.rate_scale = 1.0
    if train.layer_decay < 1:
        optimizer.layer_decay = train.layer_decay
    if train.dtype_policy == "mixed_float16":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> Any:
    """Return the optimizer itself, from under loss scaling too."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def learning_rate(optimizer: keras.optimizers.Optimizer) -> float:
    """Return the current learning rate, its schedule included, also under loss scaling."""
    own = inner_optimizer(optimizer)
    return _unscaled_rate(own) * (1.0 if own.rate_scale is None else own.rate_scale)


def _unscaled_rate(optimizer: Any) -> float:
    # Seven digits: the variable is float32, and 5e-05 should read so.
    return float(f"{float(np.asarray(optimizer._learning_rate)):.7g}")


def cut_learning_rate(
    optimizer: keras.optimizers.Optimizer, factor: float, lowest: float = 0.0
) -> None:
    """Multiply the learning rate, but not below the lowest; a traced step takes the new one."""
    own = inner_optimizer(optimizer)
    rate = _unscaled_rate(own)
    own.learning_rate = max(rate * factor, min(rate, lowest))


def is_scheduled(train: TrainConfig) -> bool:
    """Return whether the learning rate changes from step to step."""
    return train.lr_schedule in DECAYS or train.warmup_epochs > 0


def rate_scale(train: TrainConfig, epochs: float) -> float:
    """Return what a step's learning rate is, over `lr`.

    The numbers of Keras's `CosineDecay` (with its warm-up) and `PolynomialDecay` of power 1,
    which would be constants of a graph. The rises and falls are those of Goyal et al. 2017
    (arXiv:1706.02677) and Loshchilov & Hutter 2017 (arXiv:1608.03983).

    Args:
        train: `lr`, `epochs`, `lr_schedule`, `warmup_epochs` and `min_lr` are used.
        epochs: What was trained before the step, in epochs, with fractions.
    """
    if epochs < train.warmup_epochs:
        return epochs / train.warmup_epochs
    if train.lr_schedule not in DECAYS:
        return 1.0
    left = 1 - (epochs - train.warmup_epochs) / (train.epochs - train.warmup_epochs)
    if train.lr_schedule == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    lowest = min(train.min_lr / train.lr, 1.0)
    return lowest + (1 - lowest) * left


def check_length(train: TrainConfig, steps: int) -> None:
    """Refuse a warm-up that never ends, and gradients that are never applied.

    Args:
        train: The run's settings.
        steps: Of its first epoch.

    Raises:
        ConfigError: The run is too short for one of them.
    """
    if train.accumulate_steps > steps * train.epochs:
        raise ConfigError(
            f"[train] accumulate_steps must be at most the steps of the run, which has"
            f" {train.epochs} epochs of {steps}; found {train.accumulate_steps}"
        )
    if train.warmup_epochs >= train.epochs:
        raise ConfigError(
            f"[train] warmup_epochs must be below epochs, which is {train.epochs}; found"
            f" {train.warmup_epochs:g}"
        )


@contextlib.contextmanager
def averaged(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Iterator[None]:
    """Have a model hold the moving averages of its weights meanwhile, where there are any.

    Polyak & Juditsky 1992; as Keras's `use_ema`.
    """
    own = inner_optimizer(optimizer)
    if not own.use_ema:
        yield
        return
    variables = model.trainable_variables
    kept = [keras.ops.copy(variable) for variable in variables]
    own.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
