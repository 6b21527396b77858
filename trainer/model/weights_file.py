"""Files with a model's weights that others wrote: read as numbers and as text, never run.

Three kinds are read: `.weights.h5` (`model.save_weights`), `.keras` (`model.save`, of
which the weights are taken and the description is checked) and `.safetensors`. No
object is unpickled and no class that a file names is made.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.errors import RunError
from featstore.store.shard import HDF5_ERRORS

CONFIG_MEMBER, WEIGHTS_MEMBER = "config.json", "model.weights.h5"
KINDS = "a .keras, .weights.h5 or .safetensors file"
# Of a description and of a header, and what is written beside weights: such as an optimizer's.
MOST_TEXT_BYTES = 1 << 26
MOST_SPARE_BYTES = 1 << 26

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WeightsFile:
    """What a Keras weights file holds, as the file says it; no number is read.

    Attributes:
        path: The HDF5 file.
        shapes: Path of each weight below `layers`, such as `layers/dense/vars/0`, to its shape.
        names: Path of a layer, such as `layers/dense`, to its name, where the file says it.
        config: The description of the model, of a `.keras` file.
    """

    path: Path
    shapes: Shapes
    names: dict[str, str]
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Tensors:
    """What a safetensors file holds.

    Attributes:
        arrays: Weights by their names.
        metadata: Its texts by their keys.
    """

    arrays: dict[str, NDArray[Any]] = field(repr=False)
    metadata: dict[str, str]


def check_self_contained(path: Path) -> None:
    """Refuse an HDF5 file that takes numbers from another file.

    Raises:
        ValueError: It has a link, or data outside.
    """
    found: list[str] = []

    # An exception would not pass through HDF5's own loop.
    def check_link(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            found.append(f"/{name} is a link to elsewhere")

    def check_data(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
            found.append(f"/{name} has its data elsewhere")

    with h5py.File(path, "r", locking=False) as file:
        file.visititems_links(check_link)
        file.visititems(check_data)
    if found:
        raise ValueError(found[0])


def refused(path: Path, why: str) -> RunError:
    return RunError(f"{path}: {why}; nothing was imported")


def kind_of(path: Path) -> str:
    """Tell what a file is by its first bytes.

    Returns:
        "weights", "keras" or "safetensors".

    Raises:
        RunError: It is not there, cannot be read, or is of no kind that is read.
    """
    if path.is_dir():
        saved = (path / "saved_model.pb").exists()
        what = "a SavedModel, which is a program" if saved else "a folder"
        raise refused(path, f"{what}; expected {KINDS}")
    if not path.is_file():
        raise refused(path, "no such file" if not path.exists() else "not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise refused(path, f"cannot be read ({error.strerror})") from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "weights"
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path)
    if len(head) == 9 and head[8:] == b"{":
        return "safetensors"
    found = "of no kind that is known"
    if path.suffix == ".onnx":
        found = "an ONNX file, whose numbers belong to no named layers"
    elif head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5":
        found = "a pickle, which would run code to be read"
    raise refused(path, f"{found}; expected {KINDS}")


def _kind_of_archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise refused(path, f"cut short or damaged ({error})") from error
    if {CONFIG_MEMBER, WEIGHTS_MEMBER} <= names:
        return "keras"
    found = "an archive without config.json and model.weights.h5"
    if any(name.endswith(".pkl") for name in names):
        found = "a PyTorch file, whose pickle would run code to be read"
    elif names and all(name.endswith(".npy") for name in names):
        found = "a .npz file, whose arrays belong to no named layers"
    raise refused(path, f"{found}; expected {KINDS}")


@contextlib.contextmanager
def open_weights(path: Path, kind: str, preset_bytes: int) -> Iterator[WeightsFile]:
    """Open the weights of a `.weights.h5` or a `.keras` file.

    Args:
        path: The file.
        kind: As `kind_of` says.
        preset_bytes: Of the encoders that it should hold: far more in an archive is refused
            before it is unpacked.

    Raises:
        RunError: It cannot be read, is damaged, or has numbers elsewhere.
    """
    with contextlib.ExitStack() as stack:
        try:
            config, weights = None, path
            if kind == "keras":
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="import-")))
                config, weights = _unpack(path, folder, preset_bytes)
            check_self_contained(weights)
            found = _listed(path, weights, config)
        except RunError:
            raise
        except (*HDF5_ERRORS, zipfile.BadZipFile, zlib.error, EOFError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise refused(path, f"cut short or damaged ({reason})") from error
        yield found


def _unpack(path: Path, folder: Path, preset_bytes: int) -> tuple[dict[str, Any], Path]:
    # A preset may hold its weights in 16 bits; an optimizer's moments are two more for each.
    limits = {CONFIG_MEMBER: MOST_TEXT_BYTES, WEIGHTS_MEMBER: 6 * preset_bytes + MOST_SPARE_BYTES}
    with zipfile.ZipFile(path) as archive:
        for name, most in limits.items():
            size = archive.getinfo(name).file_size
            if size > most:
                raise refused(path, f"{name} would unpack to {size:,} bytes; expected {most:,}")
        text = archive.read(CONFIG_MEMBER)
        target = folder / WEIGHTS_MEMBER
        with archive.open(WEIGHTS_MEMBER) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 22)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise refused(path, f"{CONFIG_MEMBER} is not JSON") from error
    if not isinstance(config, dict):
        raise refused(path, f"{CONFIG_MEMBER} is not a description of a model")
    return config, target


def _listed(path: Path, weights: Path, config: dict[str, Any] | None) -> WeightsFile:
    shapes: Shapes = {}
    names: dict[str, str] = {}
    wrong: list[str] = []

    def visit(name: str, item: Any) -> None:
        where = name.rpartition("/")[0]
        if not name.startswith("layers/") or "/seed_generator" in name:
            return  # An optimizer's, a metric's, a random generator's.
        if isinstance(item, h5py.Dataset):
            shapes[name] = item.shape or ()  # None: a dataset without numbers.
            if item.dtype.kind != "f" and item.attrs.get("dtype") != "bfloat16":
                wrong.append(f"{name} is of {item.dtype}")
        elif name.endswith("/vars") and isinstance(item.attrs.get("name"), str):
            names[where] = item.attrs["name"]

    with h5py.File(weights, "r", locking=False) as file:
        if "layer_names" in file.attrs or "model_weights" in file:
            raise refused(
                path,
                "an .h5 file of Keras 2; load it where it was made and save it with Keras 3:"
                ' model.save_weights("model.weights.h5")',
            )
        file.visititems(visit)
    if wrong:
        raise refused(path, f"expected floating-point weights, but {wrong[0]}")
    return WeightsFile(weights, shapes, names, config)


def read_numbers(file: h5py.File, path: str) -> NDArray[Any]:
    """Return a weight, in the number format of the file; Keras's bfloat16 included."""
    import ml_dtypes

    data = file[path]
    if data.attrs.get("dtype") == "bfloat16":
        return np.array(data, dtype=ml_dtypes.bfloat16)
    return np.asarray(data[()])


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file.

    Raises:
        RunError: It is cut short or damaged, or has a number format that NumPy lacks.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > min(MOST_TEXT_BYTES, path.stat().st_size):
            raise ValueError(f"a header of {length:,} bytes")
        with safe_open(path, "numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = dict(opened.metadata() or {})
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise refused(path, f"cut short or damaged ({error})") from error
    wrong = [f"{name} is of {a.dtype}" for name, a in arrays.items() if a.dtype.kind != "f"]
    if wrong:
        raise refused(path, f"expected floating-point weights, but {wrong[0]}")
    return Tensors(arrays, metadata)


def misfits(
    expected: Shapes, found: Mapping[str, tuple[int, ...]], shown: Callable[[str], str] = str
) -> list[str]:
    """Say which weights are on one side only or have another shape.

    Args:
        expected, found: Path or name of each weight to its shape.
        shown: How a path is written.
    """
    lines = []
    for name in [*expected, *(name for name in found if name not in expected)]:
        ours, theirs = expected.get(name), found.get(name)
        if theirs is None or ours is None or tuple(ours) != tuple(theirs):
            sides = ("nothing" if side is None else str(tuple(side)) for side in (ours, theirs))
            lines.append("{}: expected {}, found {}".format(shown(name), *sides))
    return lines
