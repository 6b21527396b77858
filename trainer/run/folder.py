"""A run's folder: what is in it, and how it is read again.

runs/<name>/
    config.toml        every setting, resolved
    manifest.json      command, versions, fingerprints, counts, times, status
    history.csv        one line an epoch
    metrics.json       validation metrics of the best epoch, at τ and at 0.5
    best.weights.h5    weights of the best epoch
    last.npz           what is needed to go on: weights, optimizer, random state
    curves.png         learning curves
    tensorboard/       the same, for TensorBoard
    evaluate-*.json    what `evaluate` found on a split
    predictions-*.csv  the rows it measured, each with its logit
    summary*.md        the same to read
    parity-*.json      what `parity` found on a split
    report*.html       all of it on a page, of `report`
    explain.html       what `explain` showed of some rows
    tracking.json      under which names others know the run, see `trainer.run.tracking`

Of a run that was imported the manifest says `imported`: from what file, with which labels and
layers. It has no epoch, no state to go on from, and no curves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import xxhash

from featstore.config import RECORDS, material, runs_of, with_paths
from featstore.encoders.spec import differing_fields
from featstore.errors import Advice, Command, RunError, UsageError
from featstore.publish import read_json, write_json, write_text
from featstore.store.users import record_use, user_of
from trainer.config import SECTIONS, Config, beside_run, load_config, render_config

if TYPE_CHECKING:
    import pandas as pd

# Where a field of a JSON file is, and what it may be.
Fields = Sequence[tuple[tuple[str, ...], tuple[type, ...]]]
# What the readers of a run's manifest rely on.
MANIFEST_FIELDS: Fields = (
    (("status",), (str,)),
    (("backend",), (str,)),
    (("init_from",), (str, type(None))),
    (("data", "rows_digest"), (str,)),
    (("data", "splits_digest"), (str,)),
    (("features", "vision", "fingerprint"), (str,)),
    (("features", "vision", "row_shape"), (list,)),
    (("features", "text", "fingerprint"), (str,)),
)
# And of its metrics, beside what `decided` gives.
METRICS_FIELDS: Fields = (
    (("epoch",), (int,)),
    (("loss",), (int, float)),
    (("threshold",), (int, float, type(None))),
)
# Of `history.csv`, one line an epoch.
HISTORY_COLUMNS = (
    *("epoch", "steps", "lr", "loss", "val_loss", "val_accuracy", "val_macro_f1"),
    *("val_accuracy_at_half", "val_macro_f1_at_half", "val_auc", "val_average_precision"),
    *("val_f1", "val_precision", "val_recall", "val_brier", "val_calibration_error", "threshold"),
    *("seconds", "wait_share", "val_seconds"),
)
SEARCH_FILE = "search.json"
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Run:
    """Paths and files of one run.

    Args:
        folder: The run's folder.
        elsewhere: Section to key to value of the settings that say where its rows, photos,
            encoders and store are now; see `places`.
    """

    def __init__(
        self, folder: Path, elsewhere: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.folder, self.elsewhere = folder, elsewhere or {}
        self.name = folder.name
        self.config_path = folder / "config.toml"
        self.manifest_path = folder / "manifest.json"
        self.history_path = folder / "history.csv"
        self.metrics_path = folder / "metrics.json"
        self.weights_path = folder / "best.weights.h5"
        self.checkpoint_path = folder / "last.npz"
        self.curves_path = folder / "curves.png"
        self.tensorboard_path = folder / "tensorboard"

    @property
    def exists(self) -> bool:
        """Whether a run was started under this name."""
        return self.manifest_path.exists()

    @property
    def config(self) -> Config:
        """The run's resolved settings, its paths as they are now.

        A path that is relative in the file is looked for from the folder where the file is,
        and, if nothing is there, from the folder that the run was trained in.

        Raises:
            RunError: There are none.
            ConfigError: They cannot be read.
        """
        if not self.config_path.is_file():
            raise RunError(f"{self.config_path}: not there, or not a file; the run is damaged")
        # All defaults would be another run's.
        if not self.config_path.stat().st_size:
            raise RunError(f"{self.config_path}: empty; the run is damaged", Advice("restore it"))
        config = load_config(self.config_path, self.elsewhere)
        trained_in, here = self._trained_in, os.path.abspath(self.folder)
        if not trained_in or trained_in == here:
            return config

        def found(value: str) -> str:
            if os.path.exists(value) or "://" in value:
                return value
            seen = os.path.relpath(value, here) if os.path.isabs(value) else value
            earlier = os.path.normpath(os.path.join(trained_in, seen))
            return earlier if os.path.exists(earlier) else value

        return with_paths(config, found)

    @property
    def _trained_in(self) -> str:
        """Where the folder was when its settings were written; empty of older versions."""
        for name in RECORDS:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return str(read_json(self.folder / name)["folder"])
        return ""

    @property
    def source(self) -> str | None:
        """The folder of the run that this one started from, also where both were moved."""
        recorded = self.manifest["init_from"]
        return None if recorded is None else moved_run(recorded, self.folder, self._trained_in)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run was made by and of.

        Raises:
            RunError: There is none, it cannot be read, or a field is missing.
        """
        return self._json(self.manifest_path, MANIFEST_FIELDS)

    @property
    def metrics(self) -> dict[str, Any]:
        """The validation metrics of the best epoch.

        Raises:
            RunError: The run has not finished an epoch, or the file is damaged.
        """
        metrics = self._json(self.metrics_path, METRICS_FIELDS)
        called = "at_argmax" if metrics["threshold"] is None else "at_threshold"
        figures = [((called, name), (int, float)) for name in ("accuracy", "macro_f1")]
        self._check_fields(self.metrics_path, metrics, figures)
        return metrics

    @property
    def weights_digest(self) -> str | None:
        """The XXH3-128 of the best weights' file, by which figures know whose they are.

        None where it is not there.
        """
        try:
            with self.weights_path.open("rb") as file:
                return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        except OSError:
            return None

    @property
    def history(self) -> pd.DataFrame:
        """One line for each finished epoch: losses, figures on val, rates, times in seconds.

        Raises:
            RunError: The run has not finished an epoch, or the file is damaged.
        """
        import pandas as pd

        try:
            text = self.history_path.read_text(encoding="utf-8")
            history = pd.read_csv(io.StringIO(text))
            # The parser of pandas 2 is off by a last digit in every third number.
            exact = pd.read_csv(io.StringIO(text), dtype=str)
            for name in history.select_dtypes("float"):
                history[name] = exact[name].astype(float)
            # A number that was cut off would be read as another.
            if not text.endswith("\n"):
                raise ValueError("its last line is cut off")
            # An older version's are fewer.
            known = [name for name in HISTORY_COLUMNS if name in history]
            history[known].astype(float)
            if list(history["epoch"]) != list(range(1, len(history) + 1)):
                raise ValueError("its epochs are not 1, 2, 3 and so on")
        except KeyError as error:
            raise self.damaged(self.history_path, f"no column {error}") from error
        except (OSError, ValueError) as error:
            raise self.damaged(self.history_path, f"cannot be read ({error})") from error
        return history

    @property
    def again(self) -> Command:
        """The command that trains the same run under another name, to the same weights."""
        start: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            recorded = read_json(self.manifest_path)["init_from"]
            if recorded is not None:
                start = {"init_from": moved_run(recorded, self.folder, self._trained_in)}
        parent = Path(os.path.abspath(self.folder)).parent
        in_search = (parent / SEARCH_FILE).exists()
        name = f"{parent.name}-{self.name}" if in_search else f"{self.name}-again"
        return Command("train", config=self.config_path, name=name, **start, bare=True)

    def damaged(self, path: Path, what: str) -> RunError:
        """Return the error of a file of this run that is not as it was written.

        Args:
            path: The file.
            what: What is wrong with it.
        """
        with contextlib.suppress(OSError, ValueError, TypeError):
            if "imported" in read_json(self.manifest_path):
                return RunError(f"{path}: {what}", Advice("restore it, or import the run again"))
        return RunError(
            f"{path}: {what}",
            Advice("restore it; or the same settings and seed give the same run: ", self.again),
        )

    def _check_fields(self, path: Path, content: dict[str, Any], fields: Fields) -> None:
        for keys, kinds in fields:
            value: Any = content
            for key in keys:
                value = value.get(key, ...) if isinstance(value, dict) else ...
            if not isinstance(value, kinds):
                raise self.damaged(path, f"no {'.'.join(keys)}; the file was changed")

    def _json(self, path: Path, fields: Fields) -> dict[str, Any]:
        try:
            value = read_json(path)
        except FileNotFoundError as error:
            raise RunError(
                f"{path}: not there; is {self.folder} a finished run?",
                Advice("train one with ", Command("train")),
            ) from error
        except (OSError, ValueError) as error:
            raise self.damaged(path, f"cannot be read ({error})") from error
        if not isinstance(value, dict):
            raise self.damaged(path, f"expected a JSON object, found {type(value).__name__}")
        self._check_fields(path, value, fields)
        return value

    def write_config(self, config: Config) -> None:
        """Publish the resolved settings."""
        write_text(self.config_path, render_config(beside_run(config, self.folder)))

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Publish the manifest."""
        write_json(self.manifest_path, {"folder": os.path.abspath(self.folder), **manifest})

    def record_use(self, root: Path) -> None:
        """Have a store know that this run needs what it was trained on."""
        data, features = self.manifest["data"], self.manifest["features"]
        needed = [features[kind]["fingerprint"] for kind in ("vision", "text")]
        needed += [data["rows_digest"], data["splits_digest"]]
        record_use(root, user_of(self.config_path), needed)

    def check_new(self) -> None:
        """Allow a run that is made at once, with no epoch to go on from.

        Raises:
            UsageError: The name is taken.
        """
        if self.exists or (self.folder / SEARCH_FILE).exists():
            what = "a run" if self.exists else "a search"
            raise UsageError(f"{self.folder}: {what} is there already; choose another name")

    def check_free_or_same(self, config: Config, longer: bool = False) -> None:
        """Allow a new run, or one that was stopped and has the same settings.

        Args:
            config: The settings.
            longer: Allow a finished run too, see `trainer.run.resume`.

        Raises:
            UsageError: The name is taken by a search, by a finished run, or by
                one with other settings.
        """
        if (self.folder / SEARCH_FILE).exists():
            raise UsageError(f"{self.folder}: a search, not a run; choose another --name")
        if not self.exists:
            return
        if self.manifest["status"] == "finished" and not longer:
            raise UsageError(
                f"{self.folder}: a finished run; choose another --name, or more --epochs than its"
                f" {self.config.train.epochs}"
            )
        ours, theirs = (
            material(SECTIONS, dataclasses.asdict(one)) for one in (config, self.config)
        )
        changed = differing_fields(ours, theirs)
        if changed:
            raise UsageError(
                f"{self.folder}: a run with other settings ({'; '.join(changed)});"
                " choose another --name, or the settings it was started with"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the run against a second training of the same name.

        Raises:
            RunError: Another process is training it, or the folder cannot be
                made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"{self.folder}: another process is training this run; choose another --name"
            ) from error
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()


def run_folder(runs: Path, name: str) -> Path:
    """Return the folder of a run by name.

    Raises:
        UsageError: The name has characters that a folder's name should not.
    """
    if not NAME_PATTERN.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: expected letters, digits, '.', '_' and '-', not starting with"
            " a sign, at most 100"
        )
    return runs / name


def moved_run(recorded: str, folder: Path, before: str) -> str:
    """Return the folder of a run that was recorded by its folder, also where it was moved since.

    Args:
        recorded: Its folder then.
        folder: Of the run or search that has the record.
        before: Where that was then, "" where it is not known. Of runs that lay beside each
            other, a copy of both has its own.
    """
    runs, here = runs_of(folder), os.path.abspath(folder)
    places = [Path(recorded), runs / Path(recorded).name]
    runs_then = os.path.normpath(os.path.join(before, os.path.relpath(runs, here)))
    if before not in ("", here) and Path(recorded).parent == Path(os.path.realpath(runs_then)):
        places.reverse()
    found = next((path for path in places if path.is_dir()), None)
    return recorded if found is None else str(found.resolve())


def places(
    config: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] | None = None,
    rows: str | os.PathLike[str] | Sequence[str] | None = None,
    split_file: str | os.PathLike[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the settings that say where a run's data and store are now.

    Args:
        config: A configuration of the same data: its rows, photos, split, encoders and store.
        root: Folder of the store; this and the following win.
        images: Folder of the photos.
        rows: Row file, or several.
        split_file: The user's own split.

    Raises:
        ConfigError: The configuration cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    if config is not None:
        known = load_config(config)
        found = {
            "data": {key: getattr(known.data, key) for key in ("rows", "images", "split_file")},
            "encoders": {"vit": known.encoders.vit, "text": known.encoders.text},
            "store": {"root": known.store.root},
        }
    for section, key, value in (
        ("store", "root", root),
        ("data", "images", images),
        ("data", "rows", rows),
        ("data", "split_file", split_file),
    ):
        if value is not None:
            of_section = found.setdefault(section, {})
            of_section[key] = (
                os.fspath(value) if isinstance(value, str | os.PathLike) else tuple(value)
            )
    return found


def free_name(runs: Path, stem: str) -> str:
    """Return a name of the stem and the time that no run has."""
    stem = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    name, number = stem, 1
    while (runs / name).exists():
        number += 1
        name = f"{stem}-{number}"
    return name


def find_run(runs: Path, name: str) -> Run:
    """Return a run by its name or by its folder.

    Raises:
        RunError: There is none; the message lists the nearest names.
    """
    for folder in (Path(name), runs / name):
        if (folder / "manifest.json").exists():
            return Run(folder)
    known = sorted(path.parent.name for path in runs.glob("*/manifest.json"))
    shown = f"; runs there: {', '.join(known[-5:])}" if known else "; no runs yet"
    raise RunError(
        f"{name}: no such run in {runs}{shown}", Advice("train one with ", Command("train"))
    )
