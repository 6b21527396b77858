"""A configuration opened: rows, presets, specs and encoders, each made once and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from featstore.config import (
    DEFAULT_FILE,
    DEFAULT_K_TXT,
    DEFAULT_VIEWS,
    OTHER_SECTIONS,
    FeatureConfig,
    by_section,
    load_sections,
)
from featstore.data.dataset import Dataset, load_dataset
from featstore.encoders.presets import Digests
from featstore.encoders.spec import FeatureSpec, TextSpec, VisionSpec, text_spec, vision_spec
from featstore.errors import FeatstoreError, UsageError
from featstore.extract.encode import Encoder, load_encoder
from featstore.extract.plan import KINDS
from featstore.progress import says
from featstore.settings import read_toml
from featstore.store.users import User, user_of

Made = TypeVar("Made")


class Configured:
    """What a configuration means: its rows, the specs of its features, its encoders.

    Nothing is read or made before it is asked for, and nothing twice. `Project` says what it
    is made of, and adds the stores.
    """

    def __init__(
        self,
        config: FeatureConfig | None = None,
        *,
        dry_run: bool = False,
        file: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and settings:
            raise TypeError("give a configuration or settings, not both")
        self.file = None if file is None else Path(file)
        self.dry_run = dry_run
        if config is None:
            given = by_section(FeatureConfig, settings)
            config = load_sections(FeatureConfig, os.devnull, given, where="Project")
        self.config = config
        self.root = Path(config.store.root)
        self._digests = Digests(self.root, write=not dry_run)
        self._made: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str] = DEFAULT_FILE, **settings: Any) -> Self:
        """Open the configuration of a file.

        Args:
            path: The TOML file; its relative paths are taken from its folder.
            settings: Settings by their names; they win.

        Raises:
            ConfigError: As in `Project`, or the file cannot be read.
        """
        overrides = by_section(FeatureConfig, settings)
        config = load_sections(FeatureConfig, Path(path), overrides, OTHER_SECTIONS, "Project.load")
        return cls(config, file=path)

    def __repr__(self) -> str:
        data, encoders, store = self.config.data, self.config.encoders, self.config.store
        rows = "built-in demo" if self.config.is_demo else data.rows
        return (
            f"<{type(self).__name__} rows={rows!r} images={data.images!r} vit={encoders.vit!r}"
            f" text={encoders.text!r} dtype={store.dtype!r} root={store.root!r}>"
        )

    def with_config(self, config: FeatureConfig) -> Self:
        """Return a project of other settings that keeps what it has in common with this one."""
        other = type(self)(config, file=self.file, dry_run=self.dry_run)
        other._made = self._made
        other._digests = self._digests
        return other

    def once(self, key: str, make: Callable[[], Made]) -> Made:
        """Return what was made under a key, by this project or one `with_config`; else make it."""
        if key not in self._made:
            self._made[key] = make()
        return cast(Made, self._made[key])

    @functools.cached_property
    def user(self) -> User:
        """Who uses the store: the configuration, or the runs that the settings are of."""
        return user_of(self.file)

    @property
    def dataset(self) -> Dataset:
        """The rows, photos and split; `dataset.save()` writes split and report.

        Raises:
            ConfigError, RowError, DataError, SplitError: See `load_dataset`.
        """
        report = self._digests.write
        return self.once(
            self._rows_key, lambda: load_dataset(self.config.data, self._data_root(), report)
        )

    def _data_root(self) -> Path:
        """Return where the demo's scenes are; of a dry run that would make them, apart."""
        if not self.dry_run or self.has_dataset:
            return self.root
        return Path(self.once("scenes", tempfile.TemporaryDirectory).name)

    def save_dataset(self, elsewhere: Path | None = None) -> bool:
        """Write the split and the report of the rows: below the root, where that allows it.

        Args:
            elsewhere: Where to write them if the root may not be written; None: nowhere.

        Returns:
            Whether they are below the root; `dataset` knows where else.
        """
        with contextlib.suppress(FeatstoreError):
            self.dataset.save()
            return self.dataset.root == self.root
        if elsewhere is not None:
            moved = dataclasses.replace(self.dataset, root=elsewhere)
            moved.save()
            self._made[self._rows_key] = moved
        return False

    def with_dataset(self, dataset: Dataset) -> Self:
        """Return a project of the same encoders and store over other rows."""
        other = self.with_config(self.config)
        other._made = {key: made for key, made in self._made.items() if key != self._rows_key}
        other._made[self._rows_key] = dataset
        return other

    @property
    def _rows_key(self) -> str:
        return f"dataset {self.config.data!r} {self.root}"

    @property
    def has_dataset(self) -> bool:
        """Whether rows are named, or the demo's are there already."""
        return not self.config.is_demo or (self.root / "demo").is_dir()

    @functools.cached_property
    def k_txt(self) -> int:
        """The text layers that the configuration trains: `[train] k_txt`."""
        return self._trained("k_txt", DEFAULT_K_TXT)

    @functools.cached_property
    def k_vit(self) -> int:
        """The vision blocks that the configuration trains: `[train] k_vit`."""
        return self._trained("k_vit", 0)

    @functools.cached_property
    def views(self) -> int:
        """The photometric views that the configuration trains on: `[train] views`."""
        return self._trained("views", DEFAULT_VIEWS)

    def _trained(self, setting: str, default: int) -> int:
        train = getattr(self.config, "train", None)
        if train is not None:
            return int(getattr(train, setting))
        given = read_toml(self.file).get("train", {}) if self.file else {}
        return int(given.get(setting, default))

    def at_k_vit(self, k_vit: int) -> Self:
        """Return a project whose image features are those that enter the last `k_vit` blocks."""
        other = self.with_config(self.config)
        other.__dict__["k_vit"] = k_vit
        return other

    @property
    def vision_spec(self) -> VisionSpec:
        """The spec of plain photos' hidden states that enter the last `k_vit` vision blocks.

        Raises:
            PresetError: The preset cannot be found or is not a vision encoder.
            ConfigError: The encoder has fewer blocks.
        """
        return self.view_spec(0)

    def view_spec(self, view: int) -> VisionSpec:
        """Return the spec of one photometric view of the photos; see `vision_spec`.

        Args:
            view: Its number; 0: the plain photo.
        """
        encoders, store, blocks = self.config.encoders, self.config.store, self.k_vit
        key = f"spec {encoders!r} {dataclasses.replace(store, root='')!r} vit {blocks} {view}"
        return self.once(key, lambda: vision_spec(encoders, store, blocks, self._digests, view))

    def text_spec(self, k_txt: int | None = None) -> TextSpec:
        """Return the spec of the hidden states that enter the last `k_txt` text layers.

        Args:
            k_txt: None: as the configuration says.

        Raises:
            PresetError: The preset cannot be found or is not a text encoder.
            ConfigError: The encoder has fewer layers.
        """
        encoders, store = self.config.encoders, self.config.store
        layers = self.k_txt if k_txt is None else k_txt
        key = f"spec {encoders!r} {dataclasses.replace(store, root='')!r} {layers}"
        return self.once(key, lambda: text_spec(encoders, store, layers, self._digests))

    def spec(self, kind: str, k_txt: int | None = None, view: int = 0) -> VisionSpec | TextSpec:
        """Return the spec of one kind of features, "vit" or "text".

        See `view_spec` and `text_spec`.

        Raises:
            UsageError: Another kind.
        """
        if kind not in KINDS:
            raise UsageError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
        return self.view_spec(view) if kind == "vit" else self.text_spec(k_txt)

    @property
    def asked(self) -> dict[str, VisionSpec | TextSpec]:
        """Kind to the spec that the configuration asks for; of photos that of view 0."""
        return {kind: self.spec(kind) for kind in KINDS}

    @property
    def asked_views(self) -> list[VisionSpec]:
        """The specs of the photometric views that the configuration asks for beside view 0."""
        return [self.view_spec(view) for view in range(1, self.views)]

    @property
    def fingerprints(self) -> set[str]:
        """The fingerprints of all features that the configuration asks for."""
        return {spec.fingerprint for spec in (*self.asked.values(), *self.asked_views)}

    def preset_name(self, kind: str) -> str:
        """Return the name of the encoder of one kind, as the user wrote it."""
        encoders = self.config.encoders
        return encoders.vit if kind == "vit" else encoders.text

    @says("loading an encoder")
    def encoder(self, spec: FeatureSpec) -> Encoder:
        """Return the encoder of a spec with its weights; see `forget_encoders`.

        Raises:
            PresetError: It cannot be loaded.
        """
        fixed = dataclasses.replace(spec.plain, dtype="", boundary=0, weights="", architecture={})
        key = f"encoder {self.preset_name(spec.kind)} {fixed!r}"
        return self.once(key, lambda: load_encoder(spec, self.preset_name(spec.kind)))

    def forget_encoders(self) -> None:
        """Let go of the encoders' memory; they are loaded again when they are needed."""
        for key in [key for key in self._made if key.startswith("encoder ")]:
            del self._made[key]
