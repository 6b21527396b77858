"""The built-in demo: a small data set made on first use, and two small encoders.

Imports neither TensorFlow nor Keras, and NumPy only to draw the scenes.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from featstore.errors import DataError

_PRESETS = Path(__file__).resolve().parent / "presets"
VIT_PRESET = str(_PRESETS / "vit_demo")
TEXT_PRESET = str(_PRESETS / "text_demo")

# `[train]` settings that suit these encoders: 64 wide instead of 768.
DEMO_TRAIN: dict[str, Any] = {
    "k_txt": 3,
    "lr": 5e-4,
    "dropout": 0.1,
    "epochs": 10,
    "num_heads": 4,
    "head_dim": 64,
    "mlp_dim": 512,
}
# What takes the place of the defaults where no rows are named, section by section.
SETTINGS: dict[str, dict[str, Any]] = {
    "encoders": {"vit": VIT_PRESET, "text": TEXT_PRESET},
    "train": DEMO_TRAIN,
}

# A change of what the generator writes needs a new version.
VERSION = 1
SEED = 0
IMAGES = 2400


def ensure_demo_data(root: Path) -> tuple[Path, Path]:
    """Return the demo's rows and images; make them on first use.

    The folder `root/demo/scenes-v<version>-s<seed>` appears whole or not at
    all: it is written beside its place and renamed. Processes that start
    together wait for one another.

    Args:
        root: The store's folder; created if missing.

    Returns:
        The row file (JSONL) and the folder of PNG images.

    Raises:
        DataError: The folder cannot be written.
    """
    parent = root / "demo"
    folder = parent / f"scenes-v{VERSION}-s{SEED}"
    if not folder.exists():
        try:
            _create(parent, folder)
        except OSError as error:
            raise DataError(
                f"{folder}: the demo's data cannot be written ({error.strerror or error});"
                " set [store] root to a folder with free space that you may write to"
            ) from error
    return folder / "rows.jsonl", folder / "images"


def _create(parent: Path, folder: Path) -> None:
    # Here, since `--help` shows the settings above, and answers at once without these.
    from filelock import FileLock

    from featstore.demo.scenes import write_demo

    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / ".lock"):
        if folder.exists():
            return
        # Under the lock, any temporary folder is what a killed process left.
        for abandoned in parent.glob(".making-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=parent))
        try:
            # mkdtemp makes a private folder; the finished one follows the umask.
            content = making / folder.name
            content.mkdir()
            write_demo(content, IMAGES, SEED)
            content.rename(folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
