"""What a run is: every setting of the data, the encoders, the store and the training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featstore.config import (
    DEFAULT_K_TXT,
    DEFAULT_VIEWS,
    OTHER_SECTIONS,
    FeatureConfig,
    RunsConfig,
    load_sections,
    runs_of,
    sections_of,
    with_paths,
)
from featstore.settings import build_section, render_toml, setting

if TYPE_CHECKING:
    from featstore.project import Project

CONTROLS = ("none", "hypothesis-only", "shuffled-images")
# What validation gives of each epoch, see `trainer.metrics.validation_figures`.
MONITORS = (
    *("val_loss", "val_macro_f1", "val_accuracy", "val_auc", "val_macro_f1_at_half"),
    *("val_accuracy_at_half", "val_f1", "val_precision", "val_recall", "val_average_precision"),
    *("val_brier", "val_calibration_error"),
)
LOWER_IS_BETTER = ("val_loss", "val_brier", "val_calibration_error")
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
SCHEDULES = ("plateau", "constant", "linear", "cosine")
DECAYS = ("linear", "cosine")
# What a step with k_txt 0 reads.
DECIDE_BATCHES = (
    *("queries", "seed", "batch_size", "control", "oversample", "buckets", "class_weights"),
    *("label_smoothing", "views"),
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run over cached features."""

    k_txt: int = setting(DEFAULT_K_TXT, "last text layers that train, 0 to all of them", minimum=0)
    k_vit: int = setting(
        0, "last vision blocks that train, with the final norm; 0: none", minimum=0, before=0
    )
    views: int = setting(
        DEFAULT_VIEWS,
        "photometric views of a photo, one of which a training row is shown each epoch, view 0"
        " being the plain photo; 1: that alone",
        minimum=1,
        before=1,
    )
    lr: float = setting(1e-4, "AdamW learning rate", above=0)
    weight_decay: float = setting(1e-5, "AdamW decoupled weight decay", minimum=0)
    clipnorm: float = setting(
        1.0, "largest norm of one variable's gradient; 0: no limit", minimum=0
    )
    dropout: float = setting(0.15, "dropout before the logit", minimum=0, maximum=0.95)
    attention_dropout: float = setting(
        -1.0,
        "dropout of the cross-attention's weights; negative: the same as dropout",
        minimum=-1,
        maximum=0.95,
        before=0.0,
    )
    batch_size: int = setting(32, "rows of one step", minimum=1)
    epochs: int = setting(8, "most passes over the training rows", minimum=1)
    num_heads: int = setting(0, "heads of the cross-attention; 0: text width / head_dim", minimum=0)
    head_dim: int = setting(64, "width of one head", minimum=1)
    mlp_dim: int = setting(512, "width of the hidden layer before the logit", minimum=1)
    queries: str = setting(
        "cls",
        'what asks the image: the first text token ("cls"), or every one, then averaged ("all")',
        choices=("cls", "all"),
        before="cls",
    )
    fusion_layers: int = setting(
        1, "cross-attention layers, each asking with what the one before found", minimum=1, before=1
    )
    monitor: str = setting(
        "val_loss",
        "what chooses the best epoch, the learning rate's cuts and the early stop",
        choices=MONITORS,
    )
    lr_schedule: str = setting(
        "plateau",
        "learning rate after the warm-up: cut when the monitor stops gaining, held, or falling to"
        " min_lr by the last epoch",
        choices=SCHEDULES,
        before="plateau",
    )
    warmup_epochs: float = setting(
        0.0, "epochs over which the learning rate rises from 0 to lr", minimum=0, before=0.0
    )
    min_lr: float = setting(
        0.0, "lowest learning rate of a plateau's cuts and of a decay", minimum=0, before=0.0
    )
    reduce_lr_factor: float = setting(
        0.5, "what the learning rate is multiplied by on a plateau", above=0, maximum=1
    )
    reduce_lr_patience: int = setting(
        2, "epochs without gain before the learning rate is cut", minimum=1
    )
    early_stop_patience: int = setting(3, "epochs without gain before training ends", minimum=1)
    layer_decay: float = setting(
        1.0,
        "learning rate of each layer of an encoder over that of the layer above it, the head's"
        " being lr",
        above=0,
        maximum=1,
        before=1.0,
    )
    accumulate_steps: int = setting(
        1, "steps whose mean gradient makes one update of the weights", minimum=1, before=1
    )
    ema_momentum: float = setting(
        0.0,
        "share that the weights' moving average keeps at each step; it is what is judged and kept;"
        " 0: none",
        minimum=0,
        maximum=0.9999,
        before=0.0,
    )
    label_smoothing: float = setting(
        0.0,
        "share of a label that is spread over all classes, in the training loss alone",
        minimum=0,
        maximum=0.9,
        before=0.0,
    )
    class_weights: dict[str, float] | str = setting(
        "",
        "weight of each label's rows in the training loss: balanced, or"
        " {contradiction = 1, entailment = 2}; empty: all alike",
        above=0,
        words=("balanced",),
        before="",
    )
    oversample: dict[str, float] | str = setting(
        "",
        "expected draws an epoch of the rows of a bucket, such as {gender = 1.2, counting = 1.3};"
        " empty: each row once",
        minimum=1,
        words=(),
        before="",
    )
    buckets: str = setting(
        "", "bucket file of oversample; empty: the ten that ship", path=True, before=""
    )
    seed: int = setting(0, "seed of weights, order and dropout", minimum=0)
    control: str = setting(
        "none",
        "train without the picture: zeroed features, or another image's",
        choices=CONTROLS,
    )
    dtype_policy: str = setting(
        "float32",
        "Keras dtype policy of a step",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
    )
    keep_state: bool = setting(
        False,
        "keep a finished run's optimizer state, with which it can be trained for longer",
        free=True,
        before=False,
    )
    features_on: str = setting(
        "auto",
        "where a step finds image features: host, device (in the memory of the device that"
        " computes, put there once), or auto: on an accelerator where they take at most half of"
        " its free memory (JAX tells how much that is), else on the host",
        choices=("auto", "host", "device"),
        free=True,
        before="auto",
    )
    fast_path: bool = setting(
        True,
        "take the step's exact shortcuts; otherwise the plain Keras layers, many times slower",
    )

    @property
    def reads_sentences(self) -> bool:
        """Whether a step reads all tokens of a sentence, rather than the first one's state."""
        return self.k_txt > 0 or self.queries == "all"


@dataclass(frozen=True)
class TrackConfig:
    """Who else is told what a run does; its own folder always has everything."""

    to: tuple[str, ...] = setting(
        ("tensorboard",),
        "what a run's settings and figures are also sent to: tensorboard (files in the run's"
        " folder), mlflow, wandb, trackio",
        choices=TRACKERS,
        free=True,
        before=("tensorboard",),
        flag="--track",
    )
    project: str = setting(
        "featstore",
        "name under which they keep the runs: an experiment of MLflow, a project of the others",
        free=True,
        before="featstore",
        flag="--track-project",
    )


@dataclass(frozen=True)
class Config(FeatureConfig):
    """All sections of `featstore.toml`."""

    train: TrainConfig = field(default_factory=TrainConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    @classmethod
    def of(cls, features: FeatureConfig, train: TrainConfig) -> Config:
        """Return the settings of a run over the features of a configuration."""
        track = features.track if isinstance(features, Config) else TrackConfig()
        return cls(features.data, features.encoders, features.store, train, track)


@dataclass(frozen=True)
class ProjectFile(Config):
    """All sections that `featstore.toml` may have."""

    runs: RunsConfig = field(default_factory=RunsConfig)


SECTIONS = sections_of(Config)


def load_config(
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read all settings; see `featstore.config.load_sections`."""
    return load_sections(Config, path, overrides, OTHER_SECTIONS)


def render_config(config: Config, comments: bool = False, defaults: bool = True) -> str:
    """Return the settings as TOML that `load_config` reads back; see `render_toml`."""
    return render_toml(config, comments, defaults)


def with_sections(config: Config, sections: Mapping[str, Mapping[str, Any]]) -> Config:
    """Return settings under others.

    Args:
        config: The settings.
        sections: Section to key to value; these win.
    """
    parts = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in sections.items()
    }
    return dataclasses.replace(config, **parts)


def beside_run(config: Config, folder: Path) -> Config:
    """Return a run's settings with the paths below its project's folder relative to the run's.

    So a project that is moved as a whole finds its store and data. Others stay absolute.

    Args:
        config: The settings; their paths are absolute.
        folder: The run's, or the search's.
    """
    folder = Path(os.path.abspath(folder))
    home = runs_of(folder).parent

    def relative(value: str) -> str:
        below = Path(value).is_absolute() and Path(value).is_relative_to(home)
        return os.path.relpath(value, folder) if below and home != home.parent else value

    return with_paths(config, relative)


def config_of(project: Project, **settings: Any) -> Config:
    """Return the settings of a run on a project.

    Args:
        project: Its rows and features, and the `[train]` section of its file.
        settings: `[train]` settings by their names; they win.

    Raises:
        ConfigError: Unknown setting, wrong type, or a value out of bounds.
    """
    known = project.config
    if not isinstance(known, Config):
        # Its rows decide whether the demo's settings are the defaults.
        rows = {"data": {"rows": project.config.data.rows}}
        known = load_config(project.file or os.devnull, rows)
    values = {**vars(known.train), **settings}
    train = build_section("train", TrainConfig, values, "settings", Path.cwd())
    own = project.config
    return Config(own.data, own.encoders, own.store, train, known.track)
