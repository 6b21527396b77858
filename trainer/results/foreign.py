"""Take the trained weights of a run out of a file that was made elsewhere.

The file of a whole model is compared with what Keras writes of the same model with the
presets' weights: layout, shapes, and the numbers of all that stays frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featstore.encoders.presets import resolve_preset
from featstore.encoders.spec import vision_row_shape
from featstore.encoders.tower import Tower, load_backbone
from featstore.errors import Advice, RunError, UsageError, counted
from featstore.project import Project
from featstore.quantities import size
from featstore.store.shard import HDF5_ERRORS
from trainer.config import Config
from trainer.model.description import differences, foreign_classes
from trainer.model.head import TEXT_NAME, VISION_NAME
from trainer.model.plain import build_plain, plain_weights
from trainer.model.weights import seeded, trained_weights
from trainer.model.weights_file import (
    WeightsFile,
    misfits,
    open_weights,
    read_numbers,
    refused,
)
from trainer.model.weights_file import read_tensors as read_tensors_file
from trainer.results.card import Card, card_of
from trainer.run.checkpoint import build_model

NAMED = 3


@dataclass(frozen=True)
class Found:
    """What a file gives to a run.

    Attributes:
        k_txt: The last text layers that it trained.
        k_vit: The last vision blocks that it trained.
        weights: Those of the head and of these layers, named as by `trained_weights`.
        card: What an export says of itself, or None.
        note: What a reader should know of it, or "".
    """

    k_txt: int
    k_vit: int
    weights: Mapping[str, Any]
    card: Card | None
    note: str = ""


def read_tensors(file: Path, project: Project) -> Found:
    """Take the trained weights of a `.safetensors` export.

    Raises:
        RunError: It cannot be read, says nothing of its encoders, or has others.
    """
    config, tensors = project.config, read_tensors_file(file)
    assert isinstance(config, Config)
    card = card_of(file, tensors.metadata)
    if card is None:
        raise refused(
            file,
            "its metadata does not say which encoders it belongs to; expected what `export"
            " --format weights` writes",
        )
    card.check(project, of_weights=True)
    train = dataclasses.replace(config.train, k_txt=card.k_txt, k_vit=card.k_vit)
    row_shape = vision_row_shape(project.at_k_vit(card.k_vit).vision_spec)
    with seeded("spared"):
        expected = trained_weights(build_model(Config.of(config, train), row_shape))
    shapes = {name: tuple(weight.shape) for name, weight in expected.items()}
    lines = misfits(shapes, {name: array.shape for name, array in tensors.arrays.items()})
    if lines:
        raise _misfit(file, lines, "")
    return Found(card.k_txt, card.k_vit, tensors.arrays, card)


def read_model(
    file: Path, kind: str, project: Project, k_txt: int | None, k_vit: int | None = None
) -> Found:
    """Take the trained weights of a whole model, and see that the rest are the presets'.

    Args:
        file: The file.
        kind: "weights" or "keras".
        project: The encoders, and the settings of the head.
        k_txt: The last text layers that were trained; None: those that are not the preset's.
        k_vit: The last vision blocks that were trained, likewise.

    Raises:
        RunError: It cannot be read, is another model, or has frozen weights of its own.
        UsageError: More layers differ from the preset's than `k_txt` or `k_vit` says.
    """
    config = project.config
    assert isinstance(config, Config)
    card = card_of(file)
    if card is not None:
        card.check(project)
    train = dataclasses.replace(config.train, k_txt=0, k_vit=0, dtype_policy="float32")
    presets = (
        resolve_preset(config.encoders.vit).tower("vision"),
        resolve_preset(config.encoders.text).tower("text"),
    )
    num_bytes = sum(part.stat().st_size for preset in presets for part in preset.weights_files)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_weights(file, kind, num_bytes))
        check_code(file, opened)
        vision, text = (load_backbone(preset, "float32") for preset in presets)
        plain = build_plain(vision, text, train, config.store.tokens, config.data.classes)
        towers = {VISION_NAME: Tower(vision, "vision"), TEXT_NAME: Tower(text, "text")}
        leading = towers[VISION_NAME].leading_tokens
        if opened.config is not None:
            skipped = leading if config.store.tokens == "patches" else 0
            ours = json.loads(plain.to_json())
            lines = differences(opened.config, ours, skipped)
            if lines:
                raise refused(file, f"another model than that of these settings: {_some(lines)}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="import-")))
        # What Keras itself would write of the same model with the presets' weights: the
        # layout, and the numbers that the frozen weights must have.
        pattern = folder / "preset.weights.h5"
        try:
            plain.save_weights(pattern)
        except HDF5_ERRORS as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise RunError(
                f"{folder}: {size(num_bytes)} cannot be written ({reason}); free some"
                " space, or name another temporary folder with TMPDIR"
            ) from error
        preset = stack.enter_context(open_weights(pattern, "weights", num_bytes))
        check_shapes(file, opened, preset)
        try:
            found, note = trained_layers(file, opened, preset, towers)
            weights = folder / "file.weights.h5"
            weights.symlink_to(opened.path.absolute())
            plain.load_weights(weights)
        except HDF5_ERRORS as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise refused(file, f"its weights cannot be read ({reason})") from error
    for name, given, kind in ((TEXT_NAME, k_txt, "text"), (VISION_NAME, k_vit, "vision")):
        least = found[name]
        if given is not None and given < least:
            option = "--k-txt" if kind == "text" else "--k-vit"
            raise UsageError(
                f"{file}: its {kind} layer {towers[name].blocks[-least].name} is not the preset's,"
                f" so at least the last {least} were trained; expected {option} {least}, or to"
                f" leave it out, found {given}"
            )
    if k_txt is None:
        k_txt = max(found[TEXT_NAME], card.k_txt if card else 0)
    if k_vit is None:
        k_vit = max(found[VISION_NAME], card.k_vit if card else 0)
    if card is None and opened.config is None and leading:
        note = "; ".join(filter(None, [note, _tokens_note(config.store.tokens, leading)]))
    return Found(k_txt, k_vit, plain_weights(plain, k_txt, k_vit), card, note)


def _tokens_note(tokens: str, leading: int) -> str:
    seen = f"all of them, the leading {leading} included" if tokens == "all" else "the patches"
    other = "patches" if tokens == "all" else "all"
    return (
        f"weights do not tell which image tokens their head saw; taken: {seen}, by [store] tokens"
        f' = "{tokens}" (the reference study saw "all"; --tokens {other} is the other reading)'
    )


def check_code(file: Path, opened: WeightsFile) -> None:
    """Refuse a `.keras` file that names code of its own.

    Raises:
        RunError: It has a Lambda layer, a function, or a class that is not Keras's.
    """
    foreign = foreign_classes(opened.config)
    if foreign:
        raise refused(
            file,
            f"names what is not Keras's: {_some(foreign)}; no code of a file is run: if its"
            " layers are those of the study, save their weights alone, by"
            " model.save_weights('model.weights.h5')",
        )


def check_shapes(file: Path, opened: WeightsFile, preset: WeightsFile) -> None:
    """Refuse layers of other names or shapes; they are named before any number is read."""
    # Those without weights, such as inputs, may stand in another order.
    weighted = {"/".join(path.split("/")[:2]) for path in preset.shapes}
    lines = [
        f"layer {preset.names[path]}: found one named {opened.names[path]!r:.60}"
        for path in sorted(weighted)
        if opened.names.get(path, preset.names[path]) != preset.names[path]
    ]
    lines += misfits(preset.shapes, opened.shapes, functools.partial(_label, preset.names))
    if lines:
        raise _misfit(file, lines, _other_head(opened, preset))


def _misfit(file: Path, lines: Sequence[str], mend: str) -> RunError:
    return RunError(
        f"{file}: does not fit the model of these settings, in {len(lines)} places:"
        f" {_some(lines)}; nothing was imported",
        Advice(mend or "name its own encoders with --vit and --text"),
    )


def _label(names: Mapping[str, str], path: str) -> str:
    """Return a weight's path as people know its layers: `mlp_1/0` for `layers/dense/vars/0`."""
    parts = path.split("/")
    for length in range(len(parts), 1, -1):
        if parts[length - 2] == "layers":
            parts[length - 1] = names.get("/".join(parts[:length]), parts[length - 1])
    return "/".join(part for part in parts if part not in ("layers", "vars"))


def _other_head(opened: WeightsFile, preset: WeightsFile) -> str:
    """Return the settings of the file's head where only these differ, else ""."""
    groups = {name: path for path, name in preset.names.items()}
    paths = [
        f"{groups['xattn']}/query_dense/vars/0",
        f"{groups['mlp_1']}/vars/0",
        f"{groups['logit']}/vars/1",
    ]
    query, hidden, logits = (opened.shapes.get(path, ()) for path in paths)
    backbones = [name for name in preset.shapes if not _is_of_head(preset, name)]
    same = all(opened.shapes.get(name) == preset.shapes[name] for name in backbones)
    if not same or len(query) != 3 or len(hidden) != 2 or query[0] != preset.shapes[paths[0]][0]:
        return ""
    classes = ""
    if logits != preset.shapes[paths[2]] and logits in ((1,), (3,)):
        count = 2 if logits == (1,) else 3
        classes = f" and {counted(logits[0], 'logit')}, --classes {count}"
    return (
        f"its head has --num-heads {query[1]} --head-dim {query[2]} --mlp-dim {hidden[1]}{classes}:"
        " give these"
    )


def _is_of_head(preset: WeightsFile, path: str) -> bool:
    top = "/".join(path.split("/")[:2])
    return preset.names.get(top) not in (VISION_NAME, TEXT_NAME)


def trained_layers(
    file: Path, opened: WeightsFile, preset: WeightsFile, towers: Mapping[str, Tower]
) -> tuple[dict[str, int], str]:
    """Tell how many of the last layers of each encoder are not the preset's.

    Frozen weights must equal the preset's bit for bit, or be its weights rounded to the
    16 bits in which a preset was loaded or a file was saved.

    Returns:
        Their number by the encoder's name, and a note where frozen weights are rounded.

    Raises:
        RunError: Other layers differ: then the stored features are not the file's.
    """
    # Counted from the top; of a layer that runs several times, from its first run.
    blocks = {
        (name, layer.name): tower.num_blocks - i
        for name, tower in towers.items()
        for i, layer in reversed([*enumerate(tower.blocks)])
    }
    # It trains with the last block.
    blocks |= {
        (name, tower.norm.name): 1 for name, tower in towers.items() if tower.norm is not None
    }
    counts, rounded = dict.fromkeys(towers, 0), False
    tuned: dict[str, float] = {}
    with h5py.File(opened.path, "r") as found, h5py.File(preset.path, "r") as expected:
        for path in preset.shapes:
            if _is_of_head(preset, path):
                continue
            theirs, ours = read_numbers(found, path), read_numbers(expected, path)
            equal, in_16_bits = _same_numbers(theirs, ours)
            rounded |= in_16_bits
            if equal:
                continue
            backbone, layer = _label(preset.names, path).split("/")[:2]
            if ks := [k for key in _layers_of(preset, path) if (k := blocks.get(key))]:
                counts[backbone] = max(counts[backbone], *ks)
            else:
                largest = float(np.abs(theirs.astype(np.float32) - ours).max())
                name = f"{backbone}/{layer}"
                tuned[name] = max(tuned.get(name, 0.0), largest)
    if tuned:
        lines = [f"{name} by up to {largest:.2g}" for name, largest in tuned.items()]
        raise RunError(
            f"{file}: weights that stay frozen here are not the presets' in {len(tuned)} layers:"
            f" {_some(lines)}; its features are not the stored ones; nothing was imported",
            Advice(
                "name its own encoders with --vit and --text: a backbone that was tuned becomes a"
                " preset by backbone.save_to_preset(folder)"
            ),
        )
    note = "its frozen weights are the presets' rounded to 16 bits; the presets' are used"
    return counts, note if rounded else ""


def _layers_of(preset: WeightsFile, path: str) -> list[tuple[str, str]]:
    """Return the layers in which a weight is: the backbone's name, and each one's own."""
    parts = path.split("/")
    above = ["/".join(parts[:length]) for length in range(2, len(parts))]
    names = [preset.names[layer] for layer in above if layer in preset.names]
    return [(names[0], name) for name in names[1:]]


def _same_numbers(found: NDArray[Any], expected: NDArray[Any]) -> tuple[bool, bool]:
    """Tell whether numbers are the expected ones, and whether rounded to 16 bits."""
    import ml_dtypes

    found = found.astype(np.float32)
    if np.array_equal(found, expected):
        return True, False
    for dtype in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            if np.array_equal(found, expected.astype(dtype).astype(np.float32)):
                return True, True
    return False, False


def _some(lines: Sequence[str]) -> str:
    more = f"; and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return "; ".join(lines[:NAMED]) + more
