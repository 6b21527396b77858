"""What of a step may change from run to run without another trace.

The rates of the head's dropouts, the decay and the longest gradient are Python numbers of Keras's
layers and optimizers, which a trace makes constants of its graph. Here they are arguments of the
graph, read from the layers at each step: a search over them traces one graph. The learning rate is
a variable already; what a schedule and a layer multiply it by is an argument too.
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

    Of the plain layers (`fast_path = false`) only those of the rates and of the moving average:
    the others are constants there.

    Args:
        model: A cached model.
        optimizer: Its optimizer.
    """

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self._optimizer = inner_optimizer(optimizer)
        self._in_place = isinstance(self._optimizer, InPlaceAdamW)
        fusion = [layer for layer in model.layers if isinstance(layer, head.MultiHeadAttention)]
        after = [layer for layer in model.layers if isinstance(layer, head.Dropout)]
        self._of_attention = [layer._dropout_layer for layer in fusion]
        self._dropouts = [layer for layer in (*self._of_attention, *after) if layer.rate]
        self._depths = depths(model)

    def set(self, train: TrainConfig) -> None:
        """Take over a run's numbers; those that are 0 in the graph stay so.

        Args:
            train: `dropout`, `attention_dropout`, `weight_decay`, `clipnorm`, `layer_decay` and
                `ema_momentum` are used.
        """
        for layer in self._dropouts:
            attends = any(layer is one for one in self._of_attention)
            layer.rate = head.attention_dropout(train) if attends else train.dropout
        if self._in_place:
            self._optimizer.decoupled_decay = train.weight_decay
            self._optimizer.clipnorm = train.clipnorm or None
        else:
            self._optimizer.weight_decay = train.weight_decay
        self._optimizer.ema_momentum = train.ema_momentum
        if self._optimizer.layer_decay is not None:
            self._optimizer.layer_decay = train.layer_decay

    def values(self) -> tuple[float, ...]:
        """Return the numbers as they are now."""
        found: list[float] = []
        for layer in self._dropouts:
            found += [layer.rate, 1.0 - layer.rate, 1.0 / (1.0 - layer.rate)]
        if self._in_place:
            found += [self._optimizer.decoupled_decay, self._optimizer.clipnorm or 0.0]
        else:
            found.append(self._optimizer.weight_decay or 0.0)
        found += [self._optimizer.rate_scale or 0.0, self._optimizer.ema_momentum]
        decay = self._optimizer.layer_decay
        if decay is not None:
            found += [decay**depth for depth in range(1, max(self._depths, default=0) + 1)]
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
        changed: dict[str, Any] = {}
        if self._in_place:
            changed["given"] = (numbers[rest], numbers[rest + 1])
        elif optimizer.weight_decay is not None:
            changed["weight_decay"] = numbers[rest]
        rest += 2 if self._in_place else 1
        if optimizer.rate_scale is not None:
            changed["rate_scale"] = numbers[rest]
        if optimizer.use_ema:
            changed["ema_momentum"] = numbers[rest + 1]
        if optimizer.layer_decay is not None:
            changed["factors"] = tuple(
                numbers[rest + 1 + depth] if depth else None for depth in self._depths
            )
        before = {name: getattr(optimizer, name) for name in changed}
        token = given_rates.set({**given_rates.get(), **rates})
        try:
            for name, value in changed.items():
                setattr(optimizer, name, value)
            yield
        finally:
            given_rates.reset(token)
            for name, value in before.items():
                setattr(optimizer, name, value)


def depths(model: keras.Model) -> list[int]:
    """Return for each trainable variable how far below the head its layer is: 0 in the head."""
    found: dict[int, int] = {}
    layers = {layer.name: layer for layer in model.layers}
    towers: list[list[Any]] = []
    if head.TAIL_NAME in layers:
        towers.append([[layer] for layer in layers[head.TAIL_NAME].transformer_layers])
    if head.VISION_TAIL_NAME in layers:
        tail = layers[head.VISION_TAIL_NAME]
        norm = [] if tail.norm is None else [tail.norm]
        *below, last = tail.blocks
        # The final norm trains with the last block.
        towers.append([*([block] for block in below), [last, *norm]])
    for tower in towers:
        for depth, together in enumerate(reversed(tower), 1):
            for layer in together:
                found |= {id(variable): depth for variable in layer.trainable_variables}
    return [found.get(id(variable), 0) for variable in model.trainable_variables]


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
