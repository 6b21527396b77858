"""A run's model on the disk: build it, start it from elsewhere, save where it stands."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np

from featstore.encoders.presets import resolve_preset
from featstore.errors import Advice, RunError
from featstore.publish import check_space, publish, write_bytes
from featstore.store.shard import HDF5_ERRORS
from trainer.config import Config, TrainConfig
from trainer.model.cached import build_cached_model
from trainer.model.head import head_layers, is_of_head
from trainer.model.weights import (
    copy_weights,
    layer_weights,
    random_state,
    seeded,
    set_random_state,
    trained_layers,
)
from trainer.model.weights_file import check_self_contained
from trainer.run.folder import SEARCH_FILE, Run


def build_model(config: Config, row_shape: tuple[int, int]) -> keras.Model:
    """Build the cached model of a configuration, with random weights.

    Args:
        config: The settings.
        row_shape: Tokens and width of the image features.
    """
    tokens, width = row_shape
    text, train = resolve_preset(config.encoders.text).tower("text"), config.train
    vision = resolve_preset(config.encoders.vit).tower("vision") if train.k_vit else None
    return build_cached_model(
        text.config,
        width,
        tokens,
        train,
        feature_dtype=config.store.dtype,
        vision_config=None if vision is None else vision.config,
        tokens=config.store.tokens,
        classes=config.data.classes,
    )


def load_best(run: Run) -> keras.Model:
    """Return a run's model with the weights of its best epoch.

    Raises:
        RunError: The run has no weights yet, or they do not fit its settings.
    """
    shape = run.manifest["features"]["vision"]["row_shape"]
    if len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise RunError(f"{run.manifest_path}: row_shape is {shape}, expected two positive integers")
    model = build_model(run.config, (shape[0], shape[1]))
    if not run.weights_path.is_file():
        raise _without_weights(run)
    try:
        check_self_contained(run.weights_path)
        model.load_weights(run.weights_path)
    except (*HDF5_ERRORS, IndexError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        what = "cannot be read" if isinstance(error, OSError) else "does not fit the run's settings"
        raise run.damaged(run.weights_path, f"{what} ({reason})") from error
    return model


def _without_weights(run: Run) -> RunError:
    """Say why a run has no weights, and how they can be had."""
    if not (run.folder.parent / SEARCH_FILE).exists() or run.manifest["status"] == "running":
        return RunError(f"{run.weights_path}: not there; the run has not finished an epoch")
    again = run.again
    return RunError(
        f"{run.folder}: its search kept the weights of its best trials only ([search] keep)",
        Advice(
            "the same settings and seed give the same weights: run ",
            again,
            f", then use {again.options['name']}",
        ),
    )


LayerWeights = dict[str, dict[str, np.ndarray[Any, Any]]]


def starting_weights(source: Run) -> LayerWeights:
    """Return what other runs can take from a run: layer to path to weight.

    Raises:
        RunError: The run has no weights yet, or they do not fit its settings.
    """
    # Layers that Keras makes draw seeds from Python's random state, used or not.
    with seeded("spared"):
        model = load_best(source)
    numpy = keras.ops.convert_to_numpy
    return {
        name: {path: numpy(weight) for path, weight in layer_weights(layer).items()}
        for name, layer in trained_layers(model).items()
        if layer.weights
    }


def start_from(model: keras.Model, source: Run, weights: LayerWeights) -> list[str]:
    """Copy another run's head, and the layers of the encoders that both train.

    The last layer of the head is left as it is where the other run tells apart another number
    of classes.

    Args:
        model: A cached model, its other layers already pretrained.
        source: The run to start from.
        weights: Its `starting_weights`.

    Returns:
        Names of the layers copied.

    Raises:
        RunError: The heads do not have the same layers, or one that both have differs in
            shape.
    """
    trained = trained_layers(model)
    layers = {layer.name: layer for layer in head_layers(model) if layer.weights}
    theirs = {name for name in weights if is_of_head(name)}
    if differing := sorted(layers.keys() ^ theirs):
        raise RunError(
            f"--init-from {source.name}: {', '.join(differing)} only in one of both heads; expected"
            f" --fusion-layers {source.config.train.fusion_layers}, as that run has"
        )
    if weights["logit"]["bias"].shape != tuple(layers["logit"].bias.shape):
        del layers["logit"]
    layers |= {
        name: layer for name, layer in trained.items() if name in weights and not is_of_head(name)
    }
    for name, layer in layers.items():
        try:
            copy_weights(weights[name], layer_weights(layer))
        except RunError as error:
            raise RunError(f"--init-from {source.name}: layer {name}: {error}") from error
    return list(layers)


def save_weights(run: Run, model: keras.Model) -> None:
    """Publish the model's weights as the run's best, as `model.save_weights` writes them.

    Raises:
        WriteError: The disk is full, or refuses.
    """
    # Keras's own way for a file of this kind within an archive. By path, HDF5 itself would
    # write it, and an HDF5 file that a full disk cut short ends the process later.
    from keras.src.saving import saving_lib

    memory = io.BytesIO()
    store = saving_lib.H5IOStore(memory, mode="w")
    saving_lib._save_state(
        model, weights_store=store, assets_store=None, inner_path="", visited_saveables=set()
    )
    store.close()
    data = memory.getbuffer()
    check_space(run.folder, data.nbytes)
    write_bytes(run.weights_path, data)


@dataclass
class Progress:
    """Where a training stands, between two steps.

    Attributes:
        epoch: Epoch being run, from 0.
        step: Steps of it that are done.
        loss_sum: Sum over those steps of loss times rows.
        rows: Rows of those steps.
        seconds: Training time of this epoch so far.
        total_seconds: Wall time of all sessions.
        history: One record for each finished epoch.
        best: Best value of the monitored metric, higher is better.
        best_epoch: Its epoch, from 0.
        waited: Epochs since the best.
        waited_lr: Epochs since the best or the last cut of the rate.
        best_metrics: Validation metrics of the best epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    total_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    best_epoch: int = -1
    waited: int = 0
    waited_lr: int = 0
    best_metrics: dict[str, Any] = field(default_factory=dict)

    def improves(self, value: float) -> bool:
        """Return whether a monitored value, higher is better, is the best so far."""
        return self.best is None or value > self.best

    def ended(self, train: TrainConfig) -> str:
        """Return why no epoch is left to run, "early stop" or "all epochs"; "" where one is."""
        if self.waited >= train.early_stop_patience:
            return "early stop"
        return "all epochs" if self.epoch >= train.epochs else ""

    def check(self) -> None:
        """Refuse values that no training leaves.

        Raises:
            ValueError: A field has another type, or a count is negative.
        """
        for name, default in vars(Progress()).items():
            value = getattr(self, name)
            if name == "best":
                fits = value is None or isinstance(value, float)
            elif isinstance(default, int):
                fits = type(value) is int and value >= default
            elif isinstance(default, float):
                fits = type(value) in (int, float)
            else:
                fits = isinstance(value, type(default))
            if not fits:
                raise ValueError(f"{name} is {value!r:.80}")
        if not all(isinstance(record, dict) for record in self.history):
            raise ValueError("history is not a list of records")


def save_state(
    path: Path, model: keras.Model, optimizer_variables: list[Any], progress: Progress
) -> None:
    """Publish everything that the rest of a training depends on, as one .npz.

    Raises:
        WriteError: The disk is full, or refuses.
    """
    numpy = keras.ops.convert_to_numpy
    arrays = {f"model/{i}": numpy(v) for i, v in enumerate(model.trainable_variables)}
    arrays |= {f"optimizer/{i}": numpy(v) for i, v in enumerate(optimizer_variables)}
    arrays |= {f"random/{name}": value for name, value in random_state(model).items()}
    arrays["progress"] = np.array(json.dumps(vars(progress), allow_nan=False))
    check_space(path.parent, sum(array.nbytes for array in arrays.values()))
    with publish(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def read_progress(path: Path) -> Progress:
    """Return where the training stands whose state `save_state` wrote; no array is read.

    Raises:
        RunError: The file is damaged.
    """
    return _read_state(path, ["progress"])[1]


def _read_state(
    path: Path, names: list[str] | None = None
) -> tuple[dict[str, np.ndarray[Any, Any]], Progress]:
    """Read the arrays of a state, or some of them, and where the training stands."""
    try:
        if not path.is_file():
            raise ValueError("not a file")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in names or file.files}
        progress = Progress(**json.loads(str(arrays.pop("progress"))))
        progress.check()
    # What zipfile, NumPy and json raise on bytes that they did not write.
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        NotImplementedError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise RunError(
            f"{path}: not a readable checkpoint ({error}); delete it to start again"
        ) from error
    return arrays, progress


def load_state(path: Path, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Progress:
    """Restore what `save_state` wrote.

    Raises:
        RunError: The file is damaged, or is of a model of other shapes.
    """
    arrays, progress = _read_state(path)
    groups = {"model": model.trainable_variables, "optimizer": optimizer.variables}
    for group, variables in groups.items():
        for i, variable in enumerate(variables):
            value = arrays.get(f"{group}/{i}")
            if value is None or value.shape != tuple(variable.shape):
                raise RunError(
                    f"{path}: {group} variable {variable.path} has shape"
                    f" {None if value is None else value.shape}, expected {tuple(variable.shape)}"
                )
            if str(value.dtype) != keras.backend.standardize_dtype(variable.dtype):
                raise RunError(
                    f"{path}: {group} variable {variable.path} is {value.dtype}, expected"
                    f" {variable.dtype}"
                )
            variable.assign(value)
    prefix = "random/"
    states = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    try:
        set_random_state(model, states)
    except (RunError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: {reason}") from error
    return progress
