"""Make a run of weights that were trained elsewhere: end to end, as the reference study did.

The settings say which rows, encoders and features the run is of. The file gives the
trained numbers: the head, and the layers that differ from the presets'. All that is
frozen must be the presets' own, for otherwise the stored features are not what the head
was trained on.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np

from featstore.data.examples import require_every_class
from featstore.data.labels import LABELS, labels_of
from featstore.encoders.framework import pinned_framework
from featstore.encoders.presets import Digests
from featstore.errors import UsageError
from featstore.progress import SILENT, Show, says
from featstore.project import Project
from featstore.publish import write_json, write_text
from featstore.settings import plain_path
from trainer.config import Config
from trainer.features import cached_rows
from trainer.metrics import evaluate_logits
from trainer.model.weights import copy_weights, seeded, trained_layers, trained_weights
from trainer.model.weights_file import kind_of, refused
from trainer.results.foreign import read_model, read_tensors
from trainer.run.checkpoint import build_model, save_weights
from trainer.run.folder import HISTORY_COLUMNS, Run
from trainer.run.manifest import new_manifest
from trainer.run.step import make_predictor, predict_logits


def read_labels(text: str) -> int:
    """Return the label that the logit's positive side means, of `contradiction=1` and the like.

    Raises:
        UsageError: Another text.
    """
    name, _, number = text.partition("=")
    if name not in LABELS or number not in ("0", "1"):
        raise UsageError(
            f"--labels {text!r}: expected entailment=1, or contradiction=1 where the file's model"
            " was trained with contradiction as the positive class"
        )
    return LABELS[name] if number == "1" else 1 - LABELS[name]


def _said(classes: int, inverted: bool, order: list[int]) -> str:
    """Return how the labels of a file are said, see `read_labels` and `read_order`."""
    if classes == 2:
        return "contradiction=1" if inverted else "entailment=1"
    names = list(labels_of(classes))
    return ",".join(names[label] for label in order)


def read_order(text: str) -> list[int]:
    """Return the labels of a file's three logits, of `entailment,neutral,contradiction` and such.

    Raises:
        UsageError: Another text.
    """
    known = labels_of(3)
    names = [name.strip() for name in text.split(",")]
    if sorted(names) != sorted(known):
        raise UsageError(
            f"--labels {text!r}: expected the file's three logits in their order, such as"
            f" {','.join(known)}"
        )
    return [known[name] for name in names]


@pinned_framework()
@says("reading the weights")
def import_run(
    run: Run,
    project: Project,
    file: Path,
    *,
    labels: str | None = None,
    k_txt: int | None = None,
    k_vit: int | None = None,
    threshold: float | None = None,
    show: Show = SILENT,
) -> Run:
    """Make a run of a weights file.

    The val split is scored with it, which sets the threshold. Nothing is written before
    that is done; the run appears with its manifest, which is written last.

    Args:
        run: The folder, in which no run is.
        project: The rows and features, with the head's settings (`Config`).
        file: `.weights.h5` or `.keras` of the whole model as the study built it, or a
            `.safetensors` export.
        labels: "contradiction=1": the file's positive class is contradiction, so the
            last layer is negated. None: "entailment=1". Of three classes the file's logits in
            their order, by which the last layer is reordered; None: as here.
        k_txt: The last text layers that were trained; None: those that differ from the
            preset's.
        k_vit: The last vision blocks that were trained, likewise.
        threshold: On the probability of entailment; None: as an export says, else swept on
            the val split.
        show: Shows what goes on.

    Raises:
        RunError: The file cannot be read, does not fit, or would run code.
        MissingFeaturesError: A photo of the val split was not extracted.
        UsageError: The name is taken, or an option contradicts the file.
    """
    started, config = time.perf_counter(), project.config
    assert isinstance(config, Config)
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold}: expected a probability, 0 to 1")
    classes = config.data.classes
    order = list(range(classes)) if labels is None or classes == 2 else read_order(labels)
    positive = read_labels(labels) if labels is not None and classes == 2 else None
    if threshold is not None and classes > 2:
        raise UsageError("--threshold: a run of three classes has none; leave it out")
    run.check_new()
    kind = kind_of(file)
    val = project.dataset.examples.select(project.dataset.rows("val"))
    require_every_class(val, "split 'val'", classes)
    project.usable("val")
    row_shape = project.images().row_shape
    if kind == "safetensors":
        found = read_tensors(file, project)
    else:
        found = read_model(file, kind, project, k_txt, k_vit)
    for setting, given in (("k_txt", k_txt), ("k_vit", k_vit)):
        if given not in (None, own := getattr(found, setting)):
            raise UsageError(f"{file}: trained with {setting} {own}; expected that, found {given}")
    inverted, reordered = positive == LABELS["contradiction"], order != sorted(order)
    if found.card and (inverted or reordered):
        raise UsageError(f"{file}: an export, in which entailment is 1; leave --labels out")
    if found.note:
        show.note(f"{file}: {found.note}")
    for name, weight in found.weights.items():
        if not np.isfinite(np.asarray(weight)).all():
            raise refused(file, f"{name} has numbers that are not finite")
    train = dataclasses.replace(config.train, k_txt=found.k_txt, k_vit=found.k_vit)
    config = Config.of(config, train)
    project = project.with_config(config)
    project.usable("val")
    row_shape = project.images().row_shape
    with seeded("spared"):
        model = build_model(config, row_shape)
    expected = trained_weights(model)
    copy_weights(found.weights, expected)
    for weight in model.get_layer("logit").weights:
        if inverted:
            weight.assign(-weight)
        elif reordered:
            weight.assign(np.asarray(weight)[..., np.argsort(order)])
    project.extract("text", "val", found.k_txt, show=show)
    project.forget_encoders()
    rows = cached_rows(project, train, "val", train.control)
    (logits,) = predict_logits(make_predictor([model]), rows, train.batch_size)
    if not np.isfinite(logits).all():
        raise refused(file, "its logits are not finite on the val split")
    if threshold is None and found.card:
        threshold = found.card.threshold
    metrics = evaluate_logits(rows.labels, logits, threshold)
    manifest = {
        **new_manifest(run.name, project, train, model, row_shape, ["val"]),
        "status": "finished",
        "imported": {
            "file": plain_path(str(file.absolute())),
            "xxh3_128": Digests().of([file]),
            "kind": kind,
            "labels": _said(classes, inverted, order),
            "layers": [name for name, layer in trained_layers(model).items() if layer.weights],
            "note": found.note,
        },
        "wall_seconds": {"total": round(time.perf_counter() - started, 3)},
    }
    project.save_dataset(run.folder)
    with run.writing():
        run.check_new()
        save_weights(run, model)
        run.write_config(config)
        write_text(run.history_path, ",".join(HISTORY_COLUMNS) + "\n")
        what = {"monitor": train.monitor, "control": train.control}
        write_json(run.metrics_path, {"split": "val", "epoch": 0, **what, **metrics})
        run.write_manifest(manifest)
        run.record_use(project.root)
    return run
