"""Where an export goes: its format, its files, and how they appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from featstore.errors import Advice, RunError, UsageError
from featstore.extract.plan import free_space
from featstore.publish import TEMPORARY, check_may_write
from featstore.quantities import size

FORMATS = ("keras", "saved_model", "onnx", "weights")
_SUFFIXES = {
    ".keras": "keras",
    ".onnx": "onnx",
    ".weights.h5": "weights",
    ".safetensors": "weights",
}
_SAVED_MODEL_FILE = "saved_model.pb"


@dataclass(frozen=True)
class Target:
    """What an export writes.

    Attributes:
        path: The name that was asked for.
        format: One of `FORMATS`.
        names: Files, or the one folder, beside each other in `path.parent`, in the order in
            which they get their names: the last one says that the export is whole.
    """

    path: Path
    format: str
    names: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where the names are."""
        return self.path.parent

    @property
    def model(self) -> str:
        """The name of the model's own file or folder."""
        return self.names[-1]

    def check_free(self, force: bool) -> None:
        """Refuse to replace something, unless it is asked for and is what an export replaces.

        Raises:
            UsageError: A name is taken.
            WriteError: The folder cannot be written.
        """
        check_may_write(self.path, Advice("name a file elsewhere"))
        for path in (self.folder / name for name in self.names):
            if not os.path.lexists(path):
                continue
            if not force:
                raise UsageError(f"{path}: there already; --force replaces it")
            whole = (path / _SAVED_MODEL_FILE).is_file() or (
                path.is_dir() and not any(path.iterdir())
            )
            fits = whole if self.format == "saved_model" else path.is_file()
            if not fits:
                expected = "a SavedModel's folder" if self.format == "saved_model" else "a file"
                raise UsageError(
                    f"{path}: expected {expected} to replace, found something else; choose"
                    " another name"
                )

    def check_space(self, num_bytes: int) -> None:
        """Refuse to start what cannot end.

        Raises:
            RunError: The disk has less room than the export takes.
        """
        free = free_space(self.folder.absolute())
        if num_bytes > free:
            raise RunError(
                f"{self.folder}: the export takes about {size(num_bytes)} and"
                f" {size(free)} are free; free some space, or name a file on another disk"
            )

    @contextlib.contextmanager
    def staged(self) -> Iterator[Path]:
        """Yield a folder beside the target to write its names in; on success they move out.

        Whatever happens, the folder is gone afterwards; what a killed export left in it is
        removed by the next one of that name.

        Raises:
            RunError: Another process is exporting to this name, or the disk refused.
        """
        stage = self.folder / f"{TEMPORARY}export-{self.model}"
        lock = filelock.FileLock(stage / ".lock", timeout=0)
        try:
            stage.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except filelock.Timeout as error:
            raise RunError(
                f"{self.path}: another process is exporting to it; wait for it"
            ) from error
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be written ({error.strerror})") from error
        try:
            for left in stage.iterdir():
                if left.name != ".lock":
                    _remove(left)
            yield stage
            self._publish(stage)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror or error}); nothing was changed;"
                " free space or permissions, then export again"
            ) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            lock.release()

    def _publish(self, stage: Path) -> None:
        """Give what was written its names, undoing all of them where one is refused."""
        for name in self.names:
            for path in (stage / name, *(stage / name).rglob("*")):
                if path.is_file():
                    with open(path, "rb+") as file:
                        os.fsync(file.fileno())
        done: list[str] = []
        try:
            for name in self.names:
                final = self.folder / name
                if os.path.lexists(final):
                    os.replace(final, stage / f"old-{name}")
                done.append(name)
                os.replace(stage / name, final)
        except BaseException:
            for name in done:
                with contextlib.suppress(OSError):
                    _remove(self.folder / name)
                if os.path.lexists(stage / f"old-{name}"):
                    os.replace(stage / f"old-{name}", self.folder / name)
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def target_of(path: str | os.PathLike[str], format: str | None = None) -> Target:
    """Return what an export to a path writes.

    Args:
        path: Such as `model.keras`, `model.onnx`, `model.weights.h5`, or a folder.
        format: One of `FORMATS`; None: as the path's suffix says.

    Raises:
        UsageError: The path does not say the format, or says another one.
    """
    path = Path(path)
    suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), "")
    said = _SUFFIXES.get(suffix)
    if format is None and said is None:
        raise UsageError(
            f"{path}: its name does not say the format; name a file such as model.keras, model.onnx"
            " or model.weights.h5, or give --format saved_model and a folder's name"
        )
    format = format or said
    if format not in FORMATS:
        raise UsageError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    if said not in (format, None):
        raise UsageError(f"{path}: a name of --format {said}, but --format {format} was given")
    stem = path.name.removesuffix(suffix)
    if not stem or stem in (".", ".."):
        raise UsageError(f"{path}: expected a name before {suffix or 'the end'}")
    if format == "saved_model":
        return Target(path, format, (path.name,))
    if format == "weights":
        names = (f"{stem}.safetensors", f"{stem}.weights.h5")
        return Target(path, format, (f"{names[1]}.json", *names))
    if not suffix:
        raise UsageError(f"{path}: expected a name that ends in .{format}, such as {path}.{format}")
    return Target(path, format, (f"{path.name}.json", path.name))
