"""The sections of `featstore.toml` that decide rows, photos and features; how the file is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from featstore.errors import ConfigError
from featstore.settings import (
    build_section,
    checked_values,
    complete,
    hints,
    read_toml,
    setting,
    suggest,
)

DEFAULT_FILE = "featstore.toml"
DEFAULT_K_TXT = 3
DEFAULT_VIEWS = 1
# Of the file, read by the trainer.
OTHER_SECTIONS = ("train", "track", "runs")
# What a run and a search write of themselves into their folder.
RECORDS = ("manifest.json", "search.json")
SPLITS = ("train", "val", "test")
STUDY_VIT = "vit_base_patch16_224_imagenet21k"
STUDY_TEXT = "distil_bert_base_en_uncased"


@dataclass(frozen=True)
class DataConfig:
    """The user's rows and photos, and how the rows are split."""

    rows: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] = setting(
        "",
        "row file (JSONL, CSV or Parquet; a pattern, or a data set's folder), a list of them (as a"
        " flag: repeated), or either per split: {train = ..., val = ..., test = ...}; empty: the"
        " built-in demo",
        path=True,
    )
    images: str = setting(
        "",
        "folder of photos, <Image_ID>.jpg or .png, .webp, .gif, .bmp, .tif, .avif; empty: those"
        " in the rows' Parquet or Arrow files",
        path=True,
    )
    fractions: tuple[float, ...] = setting(
        (0.8, 0.1, 0.1), "shares of the images in train, val, test", minimum=0, maximum=1
    )
    split_seed: int = setting(0, "seed of the split", minimum=0)
    split_file: str = setting(
        "", "your own split instead: JSON {train: [ids], ...} or CSV image_id,split", path=True
    )
    duplicates: str = setting(
        "drop", "what to do with a row that repeats another exactly", choices=("drop", "keep")
    )
    encoding: str = setting(
        "", "text encoding of the row files; empty: UTF-8, or told from the bytes and said"
    )
    classes: int = setting(
        2,
        "classes told apart: 2, neutral rows being left out, or 3 with neutral",
        minimum=2,
        maximum=3,
        before=2,
    )
    row_weights: tuple[float, ...] = setting(
        (),
        "weight in the loss of each file of rows (of train, where rows are per split), in their"
        " order; empty: 1",
        above=0,
        before=(),
    )
    label_names: tuple[str, ...] = setting(
        (),
        "what labels that are class ids mean, from 0 on, such as entailment, neutral,"
        " contradiction; files that name theirs need none",
        before=(),
    )


@dataclass(frozen=True)
class EncodersConfig:
    """The two frozen encoders."""

    vit: str = setting(
        STUDY_VIT, "vision encoder: keras-hub preset name, hf://… or preset folder", preset=True
    )
    text: str = setting(
        STUDY_TEXT, "text encoder: keras-hub preset name, hf://… or preset folder", preset=True
    )
    sequence_length: int = setting(
        24, "tokens of a sentence, [CLS] and [SEP] included; longer ones are cut", minimum=3
    )


def usable_cores() -> int:
    """Return how many cores this process may use; all of them where the system does not say."""
    # Linux alone has it.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class StoreConfig:
    """Where features are kept and what is kept of them."""

    root: str = setting("cache", "folder of the store, the splits and the reports", path=True)
    dtype: str = setting(
        "float16",
        "stored number format; int8 has one scale a token, and half the bytes of float16",
        choices=("float16", "float32", "bfloat16", "int8"),
    )
    shard_rows: int = setting(1024, "rows of one HDF5 shard", minimum=1)
    tokens: str = setting(
        "patches",
        'vision tokens kept: "patches", or "all" with the class token',
        choices=("patches", "all"),
    )
    precision: str = setting(
        "float32",
        "arithmetic of the frozen encoders while extracting",
        choices=("float32", "bfloat16", "float16"),
    )
    view_seed: int = setting(0, "seed of the photometric views of photos", minimum=0, before=0)
    encode_batch_size: int = setting(
        32, "rows in one forward pass; halved on its own when memory runs out", minimum=1
    )
    decode_threads: int = setting(
        0, "threads that read and decode photos; 0: as many as cores", minimum=0, free=True
    )

    @property
    def threads(self) -> int:
        """How many threads read and decode photos."""
        return self.decode_threads or usable_cores()


@dataclass(frozen=True)
class RunsConfig:
    """Where runs are kept. Of a project, not of a run: no part of `Config`."""

    folder: str = setting("runs", "folder of the runs", path=True)


@dataclass(frozen=True)
class FeatureConfig:
    """The sections that decide what is stored."""

    data: DataConfig = field(default_factory=DataConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    store: StoreConfig = field(default_factory=StoreConfig)

    @property
    def is_demo(self) -> bool:
        """True where no rows are named: everything runs on the built-in demo."""
        return not self.data.rows


Composite = TypeVar("Composite", bound=FeatureConfig)


def sections_of(kind: type[FeatureConfig]) -> dict[str, type]:
    """Return the sections of a composite by name."""
    return {field.name: hints(kind)[field.name] for field in dataclasses.fields(kind)}


def by_section(kind: type[FeatureConfig], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return settings, given by their keys alone, under their sections.

    Args:
        kind: The composite.
        settings: Key to value.

    Raises:
        ConfigError: No section has such a key; the message names the nearest.
    """
    owners = {
        field.name: name
        for name, section in sections_of(kind).items()
        for field in dataclasses.fields(section)
    }
    found: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        if key not in owners:
            raise ConfigError(f"unknown setting {key!r}{suggest(key, owners)}")
        found.setdefault(owners[key], {})[key] = value
    return found


def runs_of(run: Path) -> Path:
    """Return the folder of runs that a run, a search, or a search's trial is in."""
    parent = Path(os.path.abspath(run)).parent
    return parent.parent if (parent / "search.json").exists() else parent


def home_of(file: str | os.PathLike[str] | None) -> Path:
    """Return the folder that a configuration's relative paths are taken from.

    Args:
        file: A TOML file; None, or one that is not there: the working directory.
    """
    path = Path(os.path.abspath(file or DEFAULT_FILE))
    return path.parent if path.is_file() else Path.cwd()


def runs_folder(path: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the runs of a configuration: `[runs] folder`, or `runs` beside it.

    Args:
        path: Its file; that of a run or of a search stands for the folder which has
            that one. None: `featstore.toml` of the working directory, if it is there.

    Returns:
        Relative where `path` is.

    Raises:
        ConfigError: The file cannot be read.
    """
    file = Path(path or DEFAULT_FILE)
    if path is None and not file.exists():
        return Path(RunsConfig.folder)
    if any((file.parent / name).exists() for name in RECORDS):
        return Path(os.path.relpath(runs_of(file.parent)))
    values = read_toml(file).get("runs", {})
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: runs must be a section: [runs]")
    given = {"folder": RunsConfig.folder, **values}
    home = file.parent if file.is_file() else Path()
    return Path(build_section("runs", RunsConfig, given, str(file), home).folder)


def with_paths(config: Composite, change: Callable[[str], str]) -> Composite:
    """Return settings with every path among them changed; presets given by name are none."""

    def changed(value: Any, of_preset: bool) -> Any:
        if isinstance(value, dict):
            return {key: changed(inner, of_preset) for key, inner in value.items()}
        if isinstance(value, tuple):
            return tuple(changed(inner, of_preset) for inner in value)
        return change(value) if value and (not of_preset or "/" in value) else value

    sections = {}
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        sections[part.name] = dataclasses.replace(
            section,
            **{
                field.name: changed(getattr(section, field.name), field.metadata["preset"])
                for field in dataclasses.fields(section)
                if field.metadata["path"] or field.metadata["preset"]
            },
        )
    return dataclasses.replace(config, **sections)


def material(
    sections: Mapping[str, type], config: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return of settings those that two runs of the same must agree in.

    Whether they are of the same rows, photos and encoders, digests and fingerprints tell,
    wherever these are: paths are left out, and what changes no number.

    Args:
        sections: Section to the dataclass that declares it.
        config: Section to key to value, as `dataclasses.asdict` gives them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, values in config.items():
        declared = {field.name: field.metadata for field in dataclasses.fields(sections[name])}
        kept = {
            key: value
            for key, value in values.items()
            if not (
                declared[key]["path"]
                or declared[key]["free"]
                or (declared[key]["preset"] and os.path.isabs(value))
            )
        }
        if kept:
            found[name] = kept
    return found


def load_sections(
    kind: type[Composite],
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    others: Iterable[str] = (),
    where: str = "command line",
) -> Composite:
    """Read settings: defaults, then the file, then what overrides them.

    Without rows of the user's own, the built-in demo's encoders and training
    settings take the place of the defaults.

    Args:
        kind: The composite of sections.
        path: A TOML file; None takes `featstore.toml` of the working directory
            where there is one.
        overrides: Section to key to value. Relative paths among them are taken
            from the working directory; those of the file, and the default root, from
            the file's folder.
        others: Sections that the file may have and that are not read.
        where: What to call the overrides in an error.

    Raises:
        ConfigError: Unknown section or key (with the nearest known one), wrong
            type, value out of bounds, unreadable file.
    """
    sections = sections_of(kind)
    file = Path(path) if path is not None else Path(DEFAULT_FILE)
    given = read_toml(file) if path is not None or file.exists() else {}
    known = tuple(dict.fromkeys((*sections, *others)))
    for name, values in given.items():
        if name not in known:
            raise ConfigError(
                f"{file}: unknown section {name!r}{suggest(name, known)}; known: {', '.join(known)}"
            )
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: {name} must be a section: [{name}]")
    parts: dict[str, dict[str, Any]] = {}
    for name, section in sections.items():
        parts[name] = {}
        for values, source, folder in (
            (complete(section, given.get(name, {})), str(file), file.absolute().parent),
            ((overrides or {}).get(name, {}), where, Path.cwd()),
        ):
            parts[name] |= checked_values(name, section, values, source, folder)
    if not parts["data"].get("rows"):
        from featstore import demo

        for name in parts.keys() & demo.SETTINGS.keys():
            parts[name] = demo.SETTINGS[name] | parts[name]
    parts["store"].setdefault("root", StoreConfig.root)
    parts["store"]["root"] = os.path.abspath(home_of(file) / parts["store"]["root"])
    return kind(**{name: section(**parts[name]) for name, section in sections.items()})
