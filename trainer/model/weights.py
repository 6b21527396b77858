"""Weights of a model: name, copy, transfer; the state of its random generators."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from featstore.errors import RunError
from trainer.model.head import TAIL_NAME, TEXT_NAME, VISION_NAME, VISION_TAIL_NAME, head_layers


def layer_weights(layer: Any) -> dict[str, Any]:
    """Return a built layer's weights by their path below it, such as `query/kernel`."""
    named = {weight.path.rpartition(f"{layer.name}/")[2]: weight for weight in layer.weights}
    if len(named) != len(layer.weights):
        raise RunError(f"layer {layer.name}: two weights have one path; expected unique paths")
    return named


def copy_weights(source: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    """Copy weights by name.

    Raises:
        RunError: A name is on one side only, or a shape differs. Nothing is
            copied then.
    """
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target:
            side = "source" if name in source else "target"
            raise RunError(
                f"weights cannot be copied: {name} is in the {side} only; build both models with"
                " the same presets and the same [train] k_txt and k_vit"
            )
        if tuple(source[name].shape) != tuple(target[name].shape):
            raise RunError(
                f"weights cannot be copied: {name} has shape {tuple(source[name].shape)}, expected"
                f" {tuple(target[name].shape)}; build both models with the same presets and [train]"
                " settings"
            )
    for name, weight in target.items():
        weight.assign(source[name])


def random_state(model: keras.Model) -> dict[str, np.ndarray]:
    """Return the state of every dropout's random generator.

    Keras keeps it in the layers' `SeedGenerator`s: in `model.variables`, but
    in no `model.weights` and in no weights file. A resumed run that is to draw
    what the first would have drawn must restore it.
    """
    return {name: np.asarray(variable) for name, variable in _seed_variables(model).items()}


def set_random_state(model: keras.Model, state: Mapping[str, np.ndarray]) -> None:
    """Restore what `random_state` returned.

    Raises:
        RunError: The state is of another model.
    """
    variables = _seed_variables(model)
    if variables.keys() != state.keys():
        raise RunError(
            f"random state: expected {len(variables)} random generators, found {len(state)}; resume"
            " with the settings that the run was started with"
        )
    for name, variable in variables.items():
        variable.assign(state[name])


def _seed_variables(model: keras.Model) -> dict[str, Any]:
    """Return the generators' variables, numbered: their layers' names differ by process."""
    layers = model._flatten_layers(include_self=False)
    states = [generator.state for layer in layers for generator in layer._seed_generators]
    return {f"seed_generator_{i}": state for i, state in enumerate(states)}


@contextlib.contextmanager
def seeded(seed: str) -> Iterator[None]:
    """Make what Keras draws at construction follow from `seed`, and nothing else change.

    An initializer or a dropout without a seed of its own takes one from
    Python's global random state when it is made.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def trained_weights(model: keras.Model) -> dict[str, Any]:
    """Return the weights that train, by `layer/path`, of a cached or an end-to-end model.

    Both kinds of model give the same names, so this is also how weights go
    from one to the other.
    """
    return named_weights(trained_layers(model))


def trained_layers(model: keras.Model) -> dict[str, Any]:
    """Return the layers that train, by name, of a cached or an end-to-end model.

    Names of vision layers begin with `vit_backbone/`: those of both encoders may be alike.
    """
    layers = {layer.name: layer for layer in model.layers}
    if TAIL_NAME in layers:
        text = layers[TAIL_NAME].transformer_layers
        vision = layers[VISION_TAIL_NAME].trained_layers if VISION_TAIL_NAME in layers else {}
    else:
        text = layers[TEXT_NAME].trained_layers
        vision = {layer.name: layer for layer in layers[VISION_NAME].trained_layers}
    return name_layers(vision, text, model)


def name_layers(
    vision: Mapping[str, Any], text: Iterable[Any], model: keras.Model
) -> dict[str, Any]:
    """Return the layers that train by their names; see `trained_layers`.

    Args:
        vision: Those of the vision encoder, by their names in it.
        text: Those of the text encoder.
        model: Has the head.
    """
    found = {f"{VISION_NAME}/{name}": layer for name, layer in vision.items()}
    found |= {layer.name: layer for layer in text}
    return found | {layer.name: layer for layer in head_layers(model)}


def named_weights(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of layers by `layer/path`, as `layer_weights` has the path."""
    return {
        f"{name}/{path}": weight
        for name, layer in layers.items()
        for path, weight in layer_weights(layer).items()
    }


def train_only(backbone: Any, layers: Iterable[Any]) -> None:
    """Freeze all of a backbone but some of its layers, at whatever depth they are.

    A layer hands its flag down to those inside it, but not if it had the value already. So each
    layer and weight is set, from the outside in.
    """
    trained = {id(weight) for layer in layers for weight in layer.weights}
    for layer in backbone._flatten_layers():
        layer.trainable = any(id(weight) in trained for weight in layer.weights)
    for weight in backbone.weights:
        weight.trainable = id(weight) in trained


def transfer_weights(source: keras.Model, target: keras.Model) -> None:
    """Copy the trained weights from one model to the other, cached or end to end.

    Raises:
        RunError: The models do not have the same trained layers, or a shape
            differs. Nothing is copied then.
    """
    copy_weights(trained_weights(source), trained_weights(target))
