"""Preset folders: where an encoder's files are, and what decides its numbers.

For a folder nothing heavy is imported: `train` asks for fingerprints often.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from featstore.encoders.families import FAMILIES, TOWERS, TWO_TOWERS, titles
from featstore.encoders.framework import import_framework
from featstore.errors import FeatstoreError, PresetError
from featstore.progress import working
from featstore.publish import read_checked, write_checked
from featstore.settings import suggest

WEIGHTS_FILE = "model.weights.h5"
SHARDED_WEIGHTS_FILE = "model.weights.json"
IMAGE_CONVERTER_FILE = "image_converter.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_ASSETS = ("merges.txt", "vocabulary.json", "vocabulary.spm", "vocabulary.txt")
DIGESTS_FILE = "digests.json"

_READ_BYTES = 1 << 22
# A file that changed less than this before it was read may change again within one tick of the
# file system's clock, and keep its size and times.
_RACY_SECONDS = 2.0


class Digests:
    """Digests of weights files, kept so that hundreds of megabytes are read once.

    A digest is taken from memory, or from `<root>/digests.json`, where each of
    the files has the real path, size, times of modification and of change, and
    inode that it had when it was read. A list that cannot be read or written,
    was damaged or was changed is passed over without a word.

    Args:
        root: The store's root, which need not exist; None keeps digests in this
            process alone.
        write: False only reads what is listed there.
    """

    _of_process: ClassVar[dict[tuple[Any, ...], str]] = {}

    def __init__(self, root: str | Path | None = None, write: bool = True) -> None:
        self.path, self.write = None if root is None else Path(root) / DIGESTS_FILE, write

    def of(self, files: Sequence[Path]) -> str:
        """Return the XXH3-128, as hex, of some files' bytes in their order.

        Raises:
            PresetError: A file cannot be read.
        """
        identity = _identity(files)
        listed = self._read()
        line = {"files": [list(file) for file in identity]}
        digest = self._of_process.get(identity)
        if digest is None and identity:
            digest = next((old["digest"] for old in listed if old["files"] == line["files"]), None)
        if digest is None:
            started = time.time()
            with working("hashing an encoder's weights"):
                digest = _digest_files(files)
            changed = max((max(file[2:4]) for file in identity), default=0) / 1e9
            if _identity(files) != identity or started - changed < _RACY_SECONDS:
                return digest
        if identity:
            self._of_process[identity] = digest
            self._write(listed, {**line, "digest": digest})
        return digest

    def _read(self) -> list[dict[str, Any]]:
        try:
            found = read_checked(self.path)["weights"] if self.path else []
            sound = all(isinstance(old["digest"], str) and _paths(old) for old in found)
            return found if sound else []
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return []

    def _write(self, listed: list[dict[str, Any]], line: dict[str, Any]) -> None:
        if not (self.path and self.write and self.path.parent.is_dir()) or line in listed:
            return
        # What is known of the same files as they were before goes.
        others = [old for old in listed if _paths(old) != _paths(line)]
        with contextlib.suppress(FeatstoreError):
            write_checked(self.path, {"weights": [*others, line]})


def _paths(line: dict[str, Any]) -> list[str]:
    return [file[0] for file in line["files"]]


def _identity(files: Sequence[Path]) -> tuple[tuple[str, int, int, int, int], ...]:
    """Return what tells whether files changed; empty where one cannot be asked."""
    found = []
    try:
        for path in files:
            status = path.stat()
            times = (status.st_mtime_ns, status.st_ctime_ns)
            found.append((os.path.realpath(path), status.st_size, *times, status.st_ino))
    except OSError:
        return ()
    return tuple(found)


@dataclass(frozen=True)
class Preset:
    """One keras-hub preset: where it is and what it holds.

    Attributes:
        name: As the user wrote it.
        location: What keras-hub loads from: an absolute folder, or the handle.
        config: The parsed `config.json`; `config["config"]` holds the
            constructor's arguments.
        class_name: The backbone's class, such as `ViTBackbone`.
        weights_files: The local files that hold the weights.
        digests: Where the digest of the weights is kept.
        part: Of a tower: the attribute of the preset's backbone that holds it.
    """

    name: str
    location: str
    config: dict[str, Any] = field(repr=False)
    class_name: str
    weights_files: tuple[Path, ...] = field(repr=False)
    digests: Digests = field(repr=False, compare=False)
    part: str = ""

    def tower(self, kind: str) -> Preset:
        """Return the tower for photos or sentences of a preset that has both; else itself.

        Args:
            kind: "vision" or "text".

        Raises:
            PresetError: The preset's configuration does not hold it.
        """
        if self.class_name not in TWO_TOWERS:
            return self
        part = TOWERS[kind]
        inner = self.config["config"].get(part)
        if not isinstance(inner, dict) or not isinstance(inner.get("config"), dict):
            raise PresetError(
                f"preset {self.name}: config.json of a {self.class_name} has no {part}; fetch or"
                " save the preset again, with the installed keras-hub"
            )
        class_name = str(inner.get("class_name"))
        return dataclasses.replace(self, config=inner, class_name=class_name, part=part)

    @functools.cached_property
    def weights_digest(self) -> str:
        """xxh3_128 of the weights' bytes, in hexadecimal.

        Raises:
            PresetError: They cannot be read.
        """
        return self.digests.of(self.weights_files)

    def local_file(self, file: str) -> Path | None:
        """Return the local path of one of the preset's files, or None where it has none.

        Raises:
            PresetError: The preset's hub cannot be reached.
        """
        return _local_file(self.name, self.location, file)

    def read_json(self, file: str) -> dict[str, Any] | None:
        """Return one of the preset's JSON files, or None where it has none.

        Raises:
            PresetError: The file is not JSON, or the hub cannot be reached.
        """
        path = self.local_file(file)
        return None if path is None else _read_json(self.name, path)


def resolve_preset(name: str | Path, digests: Digests | None = None) -> Preset:
    """Find a preset; its weights are not read before their digest is asked for.

    A folder is read without TensorFlow or Keras. Anything else is fetched by
    keras-hub's own resolver, which keeps what it fetched.

    Args:
        name: A preset folder, a keras-hub preset name, or a handle such as
            `kaggle://...` or `hf://...`.
        digests: Where the digest of its weights is kept; by default in this
            process.

    Raises:
        PresetError: No such folder or name, a file is missing or damaged, or
            the hub cannot be reached.
    """
    name = str(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        location = str(folder.resolve())
    elif "://" in name:
        location = name
    else:
        location = _builtin_name(name)
    config_path = _local_file(name, location, "config.json")
    if config_path is None:
        raise PresetError(
            f"preset {name}: no config.json; expected a keras-hub preset, as written by"
            " backbone.save_to_preset(folder)"
        )
    config = _read_json(name, config_path)
    if "class_name" not in config or not isinstance(config.get("config"), dict):
        raise _not_of_keras_hub(name, config)
    return Preset(
        name=name,
        location=location,
        config=config,
        class_name=str(config["class_name"]),
        weights_files=_weights_files(name, location),
        digests=digests or Digests(),
    )


def _not_of_keras_hub(name: str, config: dict[str, Any]) -> PresetError:
    """Say what the `config.json` of a preset is instead, and what can be used."""
    # Of transformers, and of timm.
    found = config.get("model_type") or config.get("architecture")
    known = {model_type for family in FAMILIES.values() for model_type in family.model_types}
    if isinstance(found, str) and found not in known:
        return PresetError(
            f"preset {name}: a {found} model, which keras-hub converts into no supported family;"
            f" choose a {titles('vision')} preset for photos, a {titles('text')} preset for"
            " sentences"
        )
    return PresetError(
        f"preset {name}: config.json is not keras-hub's; convert it with"
        f" keras_hub.models.Backbone.from_preset({name!r}).save_to_preset(folder), save the"
        " image converter or tokenizer there too, and give that folder"
    )


def image_converter_fields(preset: Preset) -> dict[str, Any]:
    """Return what decides the pixels that the vision encoder sees.

    Returns:
        `class_name`, `image_size` ([height, width]), `scale`, `offset` (None,
        a number, or one number a channel), `interpolation`, `antialias`,
        `crop_to_aspect_ratio`, `pad_to_aspect_ratio`. JSON values only.

    Raises:
        PresetError: The preset ships no image converter, or one that leaves
            the image's size open.
    """
    saved = preset.read_json(IMAGE_CONVERTER_FILE)
    if saved is None:
        raise PresetError(
            f"preset {preset.name}: no {IMAGE_CONVERTER_FILE}, so its pixel scaling is unknown;"
            " save it with keras_hub.layers.ImageConverter(...).save_to_preset(folder), or choose a"
            " vision preset that has one"
        )
    given = dict(saved.get("config", {}))
    # Older presets hold the names that keras-hub's ImageConverter still accepts.
    if "height" in given and "width" in given:
        given["image_size"] = [given["height"], given["width"]]
    if "variance" in given and "mean" in given:
        deviation = [math.sqrt(value) for value in given["variance"]]
        given["offset"] = [
            -mean / value for mean, value in zip(given["mean"], deviation, strict=True)
        ]
        given["scale"] = [given["scale"] / value for value in deviation]
    size = given.get("image_size")
    if not size or None in size:
        raise PresetError(
            f"preset {preset.name}: {IMAGE_CONVERTER_FILE} has no image_size; set it to the"
            " backbone's [height, width] there"
        )
    return {
        "class_name": saved.get("class_name"),
        "image_size": [int(length) for length in size],
        "scale": given.get("scale"),
        "offset": given.get("offset"),
        "interpolation": given.get("interpolation", "bilinear"),
        "antialias": bool(given.get("antialias", False)),
        "crop_to_aspect_ratio": bool(given.get("crop_to_aspect_ratio", True)),
        "pad_to_aspect_ratio": bool(given.get("pad_to_aspect_ratio", False)),
    }


def tokenizer_digest(preset: Preset) -> str:
    """Return the xxh3_128 of the tokenizer's settings and vocabulary, in hexadecimal.

    Raises:
        PresetError: The preset has no tokenizer or no vocabulary.
    """
    saved = preset.read_json(TOKENIZER_FILE)
    if saved is None:
        raise PresetError(
            f"preset {preset.name}: no {TOKENIZER_FILE}; save the tokenizer beside the backbone"
            " with tokenizer.save_to_preset(folder), or choose a text preset"
        )
    # The layer's own name and dtype do not decide a token.
    settings = {
        key: value
        for key, value in saved.get("config", {}).items()
        if key not in ("name", "dtype", "trainable")
    }
    digest = xxhash.xxh3_128()
    digest.update(json.dumps([saved.get("class_name"), settings], sort_keys=True).encode())
    assets = [(asset, preset.local_file(f"assets/tokenizer/{asset}")) for asset in TOKENIZER_ASSETS]
    found = [(asset, path) for asset, path in assets if path is not None]
    if not found:
        raise PresetError(
            f"preset {preset.name}: no vocabulary in assets/tokenizer; expected one of"
            f" {', '.join(TOKENIZER_ASSETS)}; save it again with tokenizer.save_to_preset(folder)"
        )
    for asset, path in found:
        _update_with_file(digest, path, asset)
    return digest.hexdigest()


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def load_failure(preset: Preset, part: str, error: Exception) -> PresetError:
    """Return the error that keras-hub cannot load a part of a preset."""
    return PresetError(
        f"preset {preset.name}: its {part} cannot be loaded ({one_line(error)}); fetch or save the"
        " preset again, with the installed keras-hub"
    )


def _builtin_name(name: str) -> str:
    """Return `name` where keras-hub knows it."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise PresetError(
            f"preset {name}: no such folder; give a preset folder, a keras-hub preset name, or"
            " hf://owner/name"
        )
    import_framework()
    from keras_hub.src.utils.preset_utils import BUILTIN_PRESETS

    if name not in BUILTIN_PRESETS:
        raise PresetError(
            f"preset {name}: neither a folder nor a keras-hub preset name"
            f"{suggest(name, BUILTIN_PRESETS)}; give a preset folder, a name from"
            " https://keras.io/keras_hub/presets, or hf://owner/name"
        )
    return name


def _local_file(name: str, location: str, file: str) -> Path | None:
    """Return the local path of a preset's file, fetched if need be; None where it has none."""
    folder = Path(location)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    import_framework()
    from keras_hub.src.utils.preset_utils import get_file

    try:
        return Path(get_file(location, file))
    except FileNotFoundError:
        return None
    except Exception as error:
        raise PresetError(
            f"preset {name}: {file} cannot be fetched ({one_line(error)}); check the name and the"
            " network, or fetch the preset on another machine and give its folder"
        ) from error


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PresetError(
            f"preset {name}: {path.name} cannot be read ({one_line(error)}); fetch or save the"
            " preset again"
        ) from error
    if not isinstance(content, dict):
        raise PresetError(
            f"preset {name}: {path.name} must hold an object, found {type(content).__name__}; fetch"
            " or save the preset again"
        )
    return content


def _weights_files(name: str, location: str) -> tuple[Path, ...]:
    """Return the file of the weights, or the index and its shards in order."""
    single = _local_file(name, location, WEIGHTS_FILE)
    if single is not None:
        return (single,)
    index = _local_file(name, location, SHARDED_WEIGHTS_FILE)
    if index is None:
        raise PresetError(
            f"preset {name}: neither {WEIGHTS_FILE} nor {SHARDED_WEIGHTS_FILE}; save it again with"
            " backbone.save_to_preset(folder)"
        )
    shards: set[str] = set()
    for entry in _read_json(name, index).get("weight_map", {}).values():
        shards.update(entry if isinstance(entry, list) else [entry])
    paths = [(shard, _local_file(name, location, shard)) for shard in sorted(shards)]
    missing = [shard for shard, path in paths if path is None]
    if missing or not shards:
        raise PresetError(
            f"preset {name}: {SHARDED_WEIGHTS_FILE} names {', '.join(missing) or 'no shard'}, which"
            " is missing; fetch or save the preset again"
        )
    return (index, *(path for _, path in paths if path is not None))


def _digest_files(files: Sequence[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        # One file: the digest is the file's own, which any xxhsum can check.
        _update_with_file(digest, path, path.name if len(files) > 1 else "")
    return digest.hexdigest()


def _update_with_file(digest: Any, path: Path, label: str) -> None:
    try:
        with path.open("rb") as stream:
            if label:
                digest.update(f"{label}\0{path.stat().st_size}\0".encode())
            while block := stream.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise PresetError(
            f"preset file {path}: cannot be read ({error.strerror}); fetch or save the preset again"
        ) from error
