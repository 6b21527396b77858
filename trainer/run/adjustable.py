"""What of a step may change from run to run without another trace.

The rates of the head's dropouts, the decay and the longest gradient are Python numbers of Keras's
layers and optimizers, which a trace makes constants of its graph. Here they are arguments of the
graph, read from the layers at each step: a search over them traces one graph. The learning rate is
a variable already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from trainer.config import TrainConfig
from trainer.model import head
from trainer.model.fastpath import Rate, given_rates
from trainer.run.optimizer import InPlaceAdamW, inner_optimizer


class Adjustable:
    """The numbers of one model and its optimizer that their graph takes as arguments.

    Of the plain layers (`fast_path = false`) none: they are constants there.

    Args:
        model: A cached model.
        optimizer: Its optimizer.
    """

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = inner_optimizer(optimizer)
        self._in_place = isinstance(self._optimizer, InPlaceAdamW)
        layers = {layer.name: layer for layer in model.layers}
        attention, after = layers.get("xattn"), layers.get("drop_1")
        self._attention = self._after = None
        if isinstance(attention, head.MultiHeadAttention):
            self._attention = attention._dropout_layer
        if isinstance(after, head.Dropout):
            self._after = after
        self._dropouts = [
            layer for layer in (self._attention, self._after) if layer is not None and layer.rate
        ]

    def set(self, train: TrainConfig) -> None:
        """Take over a run's numbers; those that are 0 in the graph stay so.

        Args:
            train: `dropout`, `attention_dropout`, `weight_decay` and `clipnorm` are used.
        """
        for layer in self._dropouts:
            attends = layer is self._attention
            layer.rate = head.attention_dropout(train) if attends else train.dropout
        if self._in_place:
            self._optimizer.decoupled_decay = train.weight_decay
            self._optimizer.clipnorm = train.clipnorm or None
        else:
            self._optimizer.weight_decay = train.weight_decay

    def values(self) -> tuple[float, ...]:
        """Return the numbers as they are now."""
        found: list[float] = []
        for layer in self._dropouts:
            found += [layer.rate, 1.0 - layer.rate, 1.0 / (1.0 - layer.rate)]
        if self._in_place:
            found += [self._optimizer.decoupled_decay, self._optimizer.clipnorm or 0.0]
        else:
            found.append(self._optimizer.weight_decay or 0.0)
        return tuple(found)

    @contextlib.contextmanager
    def given(self, numbers: Any) -> Iterator[None]:
        """Have what is traced meanwhile read the numbers from an argument.

        Args:
            numbers: float32 of shape (numbers,): `values`, while a graph is traced.
        """
        rates = {
            id(layer): Rate(*(numbers[3 * i + j] for j in range(3)))
            for i, layer in enumerate(self._dropouts)
        }
        rest, optimizer = 3 * len(self._dropouts), self._optimizer
        name = "given" if self._in_place else "weight_decay"
        before = getattr(optimizer, name)
        token = given_rates.set({**given_rates.get(), **rates})
        try:
            if self._in_place:
                optimizer.given = (numbers[rest], numbers[rest + 1])
            elif before is not None:
                optimizer.weight_decay = numbers[rest]
            yield
        finally:
            given_rates.reset(token)
            setattr(optimizer, name, before)


class Numbers:
    """The numbers of several models, as an array that is made anew only when one changed.

    Args:
        members: Models, each with its optimizer.
    """

    def __init__(self, members: Any) -> None:
        self.of = [Adjustable(model, optimizer) for model, optimizer in members]
        self._known: tuple[tuple[float, ...], ...] = ()
        self._array: NDArray[np.float32] = np.empty(0, np.float32)

    @contextlib.contextmanager
    def given(self, numbers: Any) -> Iterator[None]:
        """Have what is traced meanwhile read each model's numbers from an argument.

        Args:
            numbers: float32 of shape (models, numbers): `array`, while a graph is traced.
        """
        with contextlib.ExitStack() as stack:
            for i, adjustable in enumerate(self.of):
                stack.enter_context(adjustable.given(numbers[i]))
            yield

    def array(self) -> NDArray[np.float32]:
        """Return float32 of shape (models, most numbers of a model); the rest of a row is 0."""
        now = tuple(adjustable.values() for adjustable in self.of)
        if now != self._known:
            longest = max(map(len, now))
            padded = [[*numbers, *[0.0] * (longest - len(numbers))] for numbers in now]
            self._known, self._array = now, np.array(padded, np.float32)
        return self._array
