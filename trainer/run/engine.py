"""Models that are built and traced once, and serve one run after another.

A run's numbers must not depend on who was served before: `Engine.reset` gives the model, the
optimizer and every random generator what new ones would have. Keras draws a seed for each random
object when it is made, and here all of them come from one sequence (`weights.seeded`): the same
places of another run's sequence are what its own model would have drawn.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import inspect
import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras.src.backend.common.name_scope import current_path

from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import resolve_preset
from trainer.config import Config, TrainConfig
from trainer.model.cached import load_pretrained
from trainer.model.head import TAIL_NAME, VISION_TAIL_NAME, attention_dropout
from trainer.model.weights import seeded
from trainer.run.adjustable import Adjustable
from trainer.run.checkpoint import LayerWeights, build_model, starting_weights
from trainer.run.folder import Run
from trainer.run.optimizer import inner_optimizer, is_scheduled, make_optimizer
from trainer.run.step import Stepper, make_stepper

KEPT_MODELS, KEPT_BYTES = 8, 1 << 31
"""Most models, and bytes of them, that are kept for later runs; those idle longest go first."""
DRAWS = 4096
# As Keras draws the seed of what is given none.
LOWEST_SEED, HIGHEST_SEED = 1, int(1e9)


def architecture(
    config: Config, row_shape: tuple[int, int], text: str, vision: str = ""
) -> Hashable:
    """Return what decides a step's graph: runs that agree in it can share a model.

    Args:
        config: The run's settings.
        row_shape: Tokens and width of the image features.
        text: Fingerprint of the text features, which is also that of the layers above them.
        vision: The image features', which counts where layers above them train.
    """
    train = config.train
    blocks = (vision, train.k_vit, config.store.tokens) if train.k_vit else ()
    numbers = [train.dropout, attention_dropout(train), train.weight_decay, train.clipnorm]
    if train.fast_path:
        # Arguments of the graph, but for whether there are any.
        numbers = [float(number > 0) for number in numbers]
        if keras.backend.backend() != "tensorflow":
            numbers[-1] = train.clipnorm
    # Of these the numbers themselves are arguments in any graph.
    options = (is_scheduled(train), train.layer_decay < 1, train.ema_momentum > 0)
    return (
        (text, row_shape, config.store.dtype, train.k_txt, train.num_heads, train.head_dim),
        (config.data.classes, train.queries, train.fusion_layers),
        (train.mlp_dim, train.dtype_policy, train.fast_path, *numbers),
        (train.accumulate_steps, *options),
        blocks,
    )


def _draws(seed: str) -> list[int]:
    """Return the seeds that Keras draws one after the other under `seeded(seed)`."""
    generator = random.Random(seed)
    return [generator.randint(LOWEST_SEED, HIGHEST_SEED) for _ in range(DRAWS)]


@contextlib.contextmanager
def _watched_weights() -> Iterator[dict[int, Any]]:
    """Note the initializer of each weight that is made meanwhile, by the weight's `id`.

    Weights of the encoders' layers are zero: the presets' will take their place, and random
    numbers for them take longer than the rest of the model.
    """
    found: dict[int, Any] = {}
    add_weight = keras.layers.Layer.add_weight
    signature = inspect.signature(add_weight)

    @functools.wraps(add_weight)
    def noting(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        initializer = keras.initializers.get(given.arguments.get("initializer"))
        if {TAIL_NAME, VISION_TAIL_NAME} & {*current_path().split("/")}:
            given.arguments["initializer"] = "zeros"
        weight = add_weight(*given.args, **given.kwargs)
        found[id(weight)] = initializer
        return weight

    keras.layers.Layer.add_weight = noting
    try:
        yield found
    finally:
        keras.layers.Layer.add_weight = add_weight


def variable_bytes(variable: Any) -> int:
    """Return the bytes of a Keras variable."""
    return math.prod(variable.shape) * int(np.dtype(variable.dtype).itemsize)


class Engine:
    """One model with its optimizer, for any run of its architecture.

    Args:
        config: The settings of its first run.
        row_shape: Tokens and width of the image features.
        again: It will be `reset` for further runs.

    Attributes:
        model: The cached model.
        optimizer: Its optimizer, built.
    """

    @pinned_framework()
    def __init__(self, config: Config, row_shape: tuple[int, int], again: bool = True) -> None:
        train = config.train
        # Every layer that Keras makes draws a seed from Python's random state, used or not.
        with seeded("spared"), _watched_weights() as initializers:
            self.model = build_model(config, row_shape)
            vision = resolve_preset(config.encoders.vit).tower("vision") if train.k_vit else None
            load_pretrained(self.model, resolve_preset(config.encoders.text).tower("text"), vision)
        self.optimizer = make_optimizer(train)
        self.optimizer.build(self.model.trainable_variables)
        if not again:
            return
        self._adjustable = Adjustable(self.model, self.optimizer)
        self._generators: list[tuple[Any, str, int]] = []
        self._initialised: list[tuple[Any, Any, int]] = []
        self._find_draws(train.seed, initializers)
        numpy = keras.ops.convert_to_numpy
        self._pretrained = [
            (variable, numpy(variable))
            for tail in self._tails.values()
            for variable in tail.trainable_variables
        ]
        self._at_start = [
            (variable, value if (value := numpy(variable)).any() else None)
            for variable in self.optimizer.variables
        ]

    @property
    def _tails(self) -> dict[str, Any]:
        """The layers that have the presets' weights, by the sequence that their draws are of."""
        layers = {layer.name: layer for layer in self.model.layers}
        names = {"vision": VISION_TAIL_NAME, "text": TAIL_NAME}
        return {stream: layers[name] for stream, name in names.items() if name in layers}

    def _find_draws(self, seed: int, initializers: Mapping[int, Any]) -> None:
        """Find out which draw of which sequence each random object of the new model has.

        Args:
            seed: The model was built with it.
            initializers: Of each variable, by its `id`.
        """
        stream_of = {
            id(layer): stream
            for stream, tail in self._tails.items()
            for layer in tail._flatten_layers()
        }
        places = {
            stream: {drawn: place for place, drawn in enumerate(_draws(f"{stream} {seed}"))}
            for stream in (*self._tails, "head")
        }
        for layer in self.model._flatten_layers(include_self=False):
            stream = stream_of.get(id(layer), "head")
            for generator in layer._seed_generators:
                drawn = int(keras.ops.convert_to_numpy(generator.state)[0])
                self._generators.append((generator.state, stream, places[stream][drawn]))
        pretrained = {
            id(variable) for tail in self._tails.values() for variable in tail.trainable_variables
        }
        for variable in self.model.trainable_variables:
            if id(variable) not in pretrained:
                initializer = initializers[id(variable)]
                seed_drawn = getattr(initializer, "seed", None)
                place = -1 if seed_drawn is None else places["head"][seed_drawn]
                self._initialised.append((variable, initializer, place))

    @property
    def bytes(self) -> int:
        """What its weights and its optimizer's numbers take, and the preset's once more."""
        variables = (*self.model.variables, *self.optimizer.variables)
        kept = (variable for variable, _ in self._pretrained)
        return sum(variable_bytes(variable) for variable in (*variables, *kept))

    @pinned_framework()
    def reset(self, train: TrainConfig) -> None:
        """Make everything what it is before a run's first step.

        Args:
            train: The run's settings; they are of this engine's architecture.
        """
        draws = {stream: _draws(f"{stream} {train.seed}") for stream in (*self._tails, "head")}
        for state, stream, place in self._generators:
            state.assign([draws[stream][place], 0])
        for variable, initializer, place in self._initialised:
            if place >= 0:
                initializer = copy.copy(initializer)
                initializer.seed = draws["head"][place]
            variable.assign(initializer(variable.shape, dtype=variable.dtype))
        for variable, value in self._pretrained:
            variable.assign(value)
        for variable, value in self._at_start:
            # JAX may have taken the variable's own array for its steps: it is not read.
            zeros = value is None
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype) if zeros else value)
        self._adjustable.set(train)
        inner_optimizer(self.optimizer).learning_rate = train.lr


class Engines:
    """The models of a process, each kept for later runs of its architecture.

    Args:
        kept: Models that are kept while they serve no run.
    """

    def __init__(self, kept: int = KEPT_MODELS) -> None:
        self._kept = kept
        self._idle: list[tuple[Hashable, Engine]] = []
        self._busy: dict[int, Hashable] = {}
        self._steppers: list[tuple[list[Engine], Stepper]] = []
        self._starting: tuple[Hashable, LayerWeights] = ((), {})

    def take(
        self, config: Config, row_shape: tuple[int, int], text: str, vision: str = ""
    ) -> Engine:
        """Return an engine in the state in which a run begins, nobody else's until given back.

        Args:
            config: The run's settings.
            row_shape: Tokens and width of the image features.
            text: Fingerprint of the text features.
            vision: Fingerprint of the image features.
        """
        key = architecture(config, row_shape, text, vision)
        at = next((i for i, (known, _) in enumerate(self._idle) if known == key), None)
        if at is None:
            engine = Engine(config, row_shape, again=self._kept > 0)
        else:
            engine = self._idle.pop(at)[1]
            engine.reset(config.train)
        self._busy[id(engine)] = key
        return engine

    def give_back(self, engine: Engine) -> None:
        """Let later runs have an engine; those that were idle longest make room for it."""
        key = self._busy.pop(id(engine), None)
        if key is None:
            return
        self._idle.append((key, engine))
        while len(self._idle) > self._kept or (len(self._idle) > 1 and self.bytes > KEPT_BYTES):
            _, oldest = self._idle.pop(0)
            self._steppers = [one for one in self._steppers if oldest not in one[0]]
            del oldest
            # A model refers to itself; its arrays would otherwise wait for a later collection.
            gc.collect()

    @property
    def bytes(self) -> int:
        """What the idle models take."""
        return sum(engine.bytes for _, engine in self._idle)

    def starting_weights(self, source: Run) -> LayerWeights:
        """Return what runs can take from a run; those of the last one asked for are kept.

        Raises:
            RunError: The run has no weights yet, or they do not fit its settings.
        """
        path = source.weights_path
        status = path.stat() if path.is_file() else None
        key = (path.resolve(), status and (status.st_ino, status.st_size, status.st_mtime_ns))
        if self._starting[0] != key:
            self._starting = (key, starting_weights(source))
        return self._starting[1]

    def stepper(self, engines: Sequence[Engine]) -> Stepper:
        """Return what takes steps of these engines' models, traced once."""
        members = list(engines)
        for known, stepper in self._steppers:
            if known == members:
                stepper.forget()
                return stepper
        stepper = make_stepper([(engine.model, engine.optimizer) for engine in members])
        self._steppers = [*self._steppers[1 - 2 * self._kept :], (members, stepper)]
        return stepper
