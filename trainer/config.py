"""What a run is: every setting of the data, the encoders, the store and the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featstore.config import DataConfig, EncodersConfig, StoreConfig
from featstore.errors import ConfigError
from featstore.settings import build_section, read_toml, render_toml, setting, suggest

DEFAULT_FILE = "featstore.toml"
CONTROLS = ("none", "hypothesis-only", "shuffled-images")


@dataclass(frozen=True)
class TrainConfig:
    """One training run over cached features."""

    k_txt: int = setting(3, "last text layers that train, 0 to all of them", minimum=0)
    lr: float = setting(1e-4, "AdamW learning rate", above=0)
    weight_decay: float = setting(1e-5, "AdamW decoupled weight decay", minimum=0)
    clipnorm: float = setting(
        1.0, "largest norm of one variable's gradient; 0: no limit", minimum=0
    )
    dropout: float = setting(0.15, "dropout before the logit", minimum=0, maximum=0.95)
    batch_size: int = setting(32, "rows of one step", minimum=1)
    epochs: int = setting(8, "most passes over the training rows", minimum=1)
    num_heads: int = setting(0, "heads of the cross-attention; 0: text width / head_dim", minimum=0)
    head_dim: int = setting(64, "width of one head", minimum=1)
    mlp_dim: int = setting(512, "width of the hidden layer before the logit", minimum=1)
    monitor: str = setting(
        "val_loss",
        "what chooses the best epoch, the learning rate's cuts and the early stop",
        choices=("val_loss", "val_macro_f1", "val_accuracy", "val_auc"),
    )
    reduce_lr_factor: float = setting(
        0.5, "learning rate is multiplied by this on a plateau", above=0, maximum=1
    )
    reduce_lr_patience: int = setting(2, "epochs without gain before that", minimum=1)
    early_stop_patience: int = setting(3, "epochs without gain before the end", minimum=1)
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
    fast_path: bool = setting(
        True, "the step's exact shortcuts; false: the plain Keras layers, many times slower"
    )


@dataclass(frozen=True)
class Config:
    """All sections of `featstore.toml`."""

    data: DataConfig = field(default_factory=DataConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def is_demo(self) -> bool:
        """True where no rows are named: the commands run on the built-in demo."""
        return not self.data.rows


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "encoders": EncodersConfig,
    "store": StoreConfig,
    "train": TrainConfig,
}


def load_config(
    path: str | Path | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Config:
    """Read the settings: defaults, then the file, then the flags.

    Without rows of the user's own, the built-in demo's encoders and training
    settings take the place of the defaults.

    Args:
        path: A TOML file; None takes `featstore.toml` of the working directory
            where there is one.
        overrides: Section to key to value, from flags. Relative paths among
            them are taken from the working directory.

    Raises:
        ConfigError: Unknown section or key (with the nearest known one), wrong
            type, value out of bounds, unreadable file.
    """
    file = Path(path) if path is not None else Path(DEFAULT_FILE)
    given = read_toml(file) if path is not None or file.exists() else {}
    for name, values in given.items():
        if name not in SECTIONS:
            raise ConfigError(
                f"{file}: unknown section {name!r}{suggest(name, SECTIONS)};"
                f" known: {', '.join(SECTIONS)}"
            )
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name} must be a section: [{name}]")
    flags = overrides or {}
    parts: dict[str, dict[str, Any]] = {}
    for name, section in SECTIONS.items():
        parts[name] = {}
        for values, where, folder in (
            (given.get(name, {}), str(file), file.absolute().parent),
            (flags.get(name, {}), "command line", Path.cwd()),
        ):
            built: Any = build_section(name, section, values, where, folder)
            parts[name] |= {key: getattr(built, key) for key in values}
    if not parts["data"].get("rows"):
        # Here, since the generator of the demo needs NumPy and `--help` does not.
        from featstore import demo

        parts["encoders"] = {"vit": demo.VIT_PRESET, "text": demo.TEXT_PRESET} | parts["encoders"]
        parts["train"] = demo.DEMO_TRAIN | parts["train"]
    sections = {name: section(**parts[name]) for name, section in SECTIONS.items()}
    root = Path(sections["store"].root).absolute()
    return Config(**{**sections, "store": dataclasses.replace(sections["store"], root=str(root))})


def render_config(config: Config, comments: bool = False, defaults: bool = True) -> str:
    """Return the settings as TOML that `load_config` reads back; see `render_toml`."""
    return render_toml(config, comments, defaults)
