"""Make a run one model from pixels and token ids, and see that it is the run before it is there.

The model is written into a folder beside its final name, loaded from there by a fresh process in
which this project cannot be imported, and run on real rows. Its logits must be those of the run,
computed from the stored features and from the pixels; only then do the files get their names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from featstore.data.images import DECODER
from featstore.data.labels import labels_of
from featstore.encoders.framework import pinned_framework
from featstore.encoders.spec import FeatureSpec
from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import RunError, UsageError, counted
from featstore.progress import SILENT, Show, says, working
from featstore.publish import command_line, package_versions
from featstore.quantities import size
from trainer.features import prepare
from trainer.metrics import decided, threshold_of
from trainer.model.head import attention_dropout, head_heads
from trainer.model.plain import build_plain, transfer_to_plain
from trainer.model.weights import trained_weights
from trainer.results.export import fresh
from trainer.results.export.graph import check_onnx_packages, save_onnx, save_saved_model
from trainer.results.export.sample import Sample, draw_sample
from trainer.results.export.target import Target, target_of
from trainer.results.export.weights import read_weights_back, save_weights
from trainer.results.models import load_models
from trainer.results.score import Scorer
from trainer.results.tolerance import EXACT_LOGITS, logit_tolerance

EXPORT_ROWS = 16
_OUTPUT = {
    2: "logit of entailment, float32 (batch, 1); entailment where its sigmoid, the probability,"
    " is at least the threshold",
    3: "logits, float32 (batch, 3), in the order of labels; their softmax is the probabilities, the"
    " largest is the label",
}
CARD = "model.json"
# What of a tokenizer's configuration decides its tokens.
_TOKENS = ("lowercase", "strip_accents", "split", "suffix_indicator", "oov_token")


@dataclasses.dataclass(frozen=True)
class _Exported:
    """A run's model in plain Keras, and what it was made of."""

    model: keras.Model
    trained: Mapping[str, Any]
    vision: VisionEncoder
    text: TextEncoder
    card: dict[str, Any]


@pinned_framework()
@says("exporting")
def export(
    scorer: Scorer,
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    split: str = "test",
    rows: int = EXPORT_ROWS,
    force: bool = False,
    show: Show = SILENT,
) -> dict[str, Any]:
    """Write a run as one model from pixels and token ids, checked on real rows.

    Args:
        scorer: The run over its project.
        path: `NAME.keras`, `NAME.onnx`, `NAME.weights.h5` (beside it `NAME.safetensors`), or the
            folder of a SavedModel. Beside a file stands a card, such as `NAME.keras.json`:
            threshold, label order, how pixels and token ids are made, fingerprints; in a folder
            it is `model.json`.
        format: "keras", "saved_model", "onnx" or "weights"; None: as the name says.
        split: Where the rows come from that it is checked on.
        rows: How many.
        force: Replace what is there.
        show: Shows the rows, and what is being done.

    Returns:
        `format`, `path`, `files` (name to bytes), `check` (rows, largest differences of a logit
        from both paths, and their tolerances), `times` in seconds.

    Raises:
        UsageError: The name is taken or does not fit the format, or a package is missing.
        RunError: The run has a control, the disk is too small, or what was written does not
            agree with the run; nothing is left under the name then.
        MissingFeaturesError: A photo of the split was never extracted.
    """
    target, run, train = target_of(path, format), scorer.run, scorer.train
    if rows < 1:
        raise UsageError(f"rows = {rows}: an export is checked on one row at the least")
    if train.control != "none":
        raise RunError(
            f"{run.folder}: trained with control {train.control}, whose features are not the"
            " photo's: no model from pixels equals it; name a run with control none"
        )
    if target.format in ("saved_model", "onnx") and keras.backend.backend() != "tensorflow":
        raise UsageError(
            f"--format {target.format} is made of TensorFlow's operations; set"
            " KERAS_BACKEND=tensorflow"
        )
    if target.format == "onnx":
        check_onnx_packages()
    target.check_free(force)
    prepare(scorer.project, train.k_txt, show, compare=False)
    models = load_models(scorer)
    sample = draw_sample(scorer, models, split, rows, show)
    exported = _exported(scorer, models.vision, models.text)
    num_bytes = 4 * exported.model.count_params()
    target.check_space(num_bytes + num_bytes // 8)
    with target.staged() as stage:
        show.note(f"writing {target.path} ({size(num_bytes)} of weights)")
        started = time.perf_counter()
        _write(exported, target, stage, threshold_of(run.metrics))
        times = {"write_seconds": time.perf_counter() - started}
        logits, figures = _read_again(exported, target, stage, sample, show)
        check = _compare(scorer, sample, logits, split)
        exported.card["check"] = check
        card, text = _card_file(exported, target, stage)
        card.write_text(text, encoding="utf-8")
        target.check_free(force)
    files = {name: _size(target.folder / name) for name in target.names}
    return {
        "run": run.name,
        "format": target.format,
        "path": str(target.path),
        "files": files,
        "parameters": exported.model.count_params(),
        "check": check,
        "times": {**times, **figures},
    }


def _exported(scorer: Scorer, vision: VisionEncoder, text: TextEncoder) -> _Exported:
    """Build the plain model of a run from the backbones of its encoders."""
    train = dataclasses.replace(scorer.train, dtype_policy="float32")
    tokens = scorer.project.config.store.tokens
    model = build_plain(vision.backbone, text.backbone, train, tokens, scorer.classes)
    transfer_to_plain(scorer.model, model, train)
    return _Exported(model, trained_weights(scorer.model), vision, text, _card(scorer, text))


def _card(scorer: Scorer, text: TextEncoder) -> dict[str, Any]:
    """Return what a user of the model must know, and where it comes from."""
    run, project, train = scorer.run, scorer.project, scorer.train
    vision_spec, text_spec = project.vision_spec, project.text_spec(train.k_txt)

    def encoder(name: str, spec: FeatureSpec) -> dict[str, Any]:
        return {
            "preset": name,
            "class": spec.encoder,
            "weights": spec.weights,
            "fingerprint": spec.fingerprint,
        }

    tokenizer = text.preprocessor.tokenizer
    config, width = project.config, int(text_spec.architecture["hidden_dim"])
    return {
        "run": run.name,
        "command": command_line(),
        "versions": package_versions(),
        "labels": labels_of(scorer.classes),
        "threshold": threshold_of(run.metrics),
        "output": _OUTPUT[scorer.classes],
        "k_txt": train.k_txt,
        "k_vit": train.k_vit,
        "head": {
            "num_heads": head_heads(train, width),
            "head_dim": train.head_dim,
            "mlp_dim": train.mlp_dim,
            "queries": train.queries,
            "fusion_layers": train.fusion_layers,
            "dropout": train.dropout,
            "attention_dropout": attention_dropout(train),
        },
        "encoders": {
            "vision": {**encoder(config.encoders.vit, vision_spec), "tokens": config.store.tokens},
            "text": encoder(config.encoders.text, text_spec),
        },
        "pixel_values": {
            "layout": "float32 (batch, height, width, 3), red green blue",
            "made": "decoded to 8-bit RGB, resized as the converter says, rounded to whole levels"
            " 0 to 255, then times scale plus offset, by channel",
            "decoder": DECODER,
            "converter": vision_spec.converter,
        },
        "input_ids": {
            "layout": "input_ids and attention_mask (1 where a token is real), int32 (batch,"
            " length)",
            "sequence_length": text.sequence_length,
            "tokenizer": {
                "class": type(tokenizer).__name__,
                "digest": text_spec.tokenizer,
                **{key: value for key, value in tokenizer.get_config().items() if key in _TOKENS},
            },
        },
        "validation": decided(run.metrics),
    }


def _card_file(exported: _Exported, target: Target, stage: Path) -> tuple[Path, str]:
    """Return the file of the card, and its text; with the words where a user must split text."""
    import keras_hub

    card, tokenizer = exported.card, exported.text.preprocessor.tokenizer
    path = stage / (f"{target.model}/{CARD}" if target.format == "saved_model" else target.names[0])
    if target.format != "saved_model" and isinstance(
        tokenizer, keras_hub.tokenizers.WordPieceTokenizer
    ):
        # Last, for it is long: a word's id is its place.
        card = {**card, "vocabulary": tokenizer.get_vocabulary()}
    return path, json.dumps(card, indent=2, ensure_ascii=False) + "\n"


def _write(exported: _Exported, target: Target, stage: Path, threshold: float | None) -> None:
    """Write the model's own files.

    Raises:
        RunError: The packages of the format cannot write it.
    """
    model, path = exported.model, stage / target.model
    try:
        if target.format == "keras":
            model.save(path)
        elif target.format == "saved_model":
            save_saved_model(model, path, exported.vision, exported.text, threshold)
        elif target.format == "onnx":
            save_onnx(model, path, exported.card)
        else:
            _, *names = target.names
            save_weights(model, exported.trained, stage, (names[0], names[1]), exported.card)
    except (RunError, OSError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RunError(
            f"{target.path}: {target.format} cannot be written by the installed packages"
            f" ({reason}); nothing was left there; choose another --format"
        ) from error


def _read_again(
    exported: _Exported, target: Target, stage: Path, sample: Sample, show: Show
) -> tuple[dict[str, NDArray[np.float32]], dict[str, float]]:
    """Return the logits of what was written, read again, and the times of that."""
    rows = counted(len(sample), "real row")
    if target.format == "weights":
        show.note(f"reading the weights back into an emptied model; {rows}")
        _, *names = target.names
        read_weights_back(exported.model, exported.trained, stage, (names[0], names[1]))
        found = exported.model.predict(sample.inputs, batch_size=fresh.BATCH, verbose=0)
        return {"logits": fresh.flat(found)}, {}
    show.note(f"loading it in a fresh process without this project; {rows}, then the times")
    sample.save(stage / "inputs.npz")
    # Isolated: no PYTHONPATH, no working folder, so that nothing of a checkout is found.
    command = [sys.executable, "-I", fresh.__file__, target.format, target.model, "."]
    # Keras's own settings rather than this user's.
    plain = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_HOME": str(stage / "keras")}
    environment = {**os.environ, **plain}
    with working("loading it in a fresh process"):
        done = subprocess.run(
            command, cwd=stage, env=environment, capture_output=True, text=True, errors="replace"
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RunError(
            f"{target.path}: it was written, and a fresh process cannot use it"
            f" ({lines[-1].strip() if lines else f'exit code {done.returncode}'}); nothing was left"
            " there; compare the installed packages with those that the project names"
        )
    with np.load(stage / "outputs.npz", allow_pickle=False) as stored:
        logits = dict(stored)
    return logits, json.loads((stage / "outputs.json").read_text())


def _compare(
    scorer: Scorer, sample: Sample, logits: Mapping[str, NDArray[np.float32]], split: str
) -> dict[str, Any]:
    """Compare the logits of an export with the run's.

    Raises:
        RunError: A difference is beyond what the number formats allow.
    """
    store = scorer.project.config.store
    every, logit = np.arange(len(sample)), logits["logits"]
    stored = logit_tolerance(store.dtype, store.precision)
    checks = {
        "cached": (every, logit, sample.cached, stored, "the stored features"),
        "end_to_end": (every, logit, sample.end_to_end, EXACT_LOGITS, "the end-to-end model"),
    }
    if "raw_logits" in logits:
        expected = sample.end_to_end[sample.raw]
        what = "the end-to-end model, from the photos' bytes,"
        checks["serve_bytes"] = (sample.raw, logits["raw_logits"], expected, EXACT_LOGITS, what)
    result: dict[str, Any] = {"split": split, "rows": len(sample)}
    for name, (rows, found, expected, tolerance, what) in checks.items():
        difference = np.abs(found.astype(np.float64) - expected)
        # Not a number must not pass for a small difference.
        difference[np.isnan(difference)] = np.inf
        worst = np.unravel_index(int(difference.argmax()), difference.shape)
        if difference[worst] > tolerance:
            raise RunError(
                f"{scorer.run.folder}: the exported model and {what} differ by"
                f" {difference[worst]:.3g} in a logit, expected at most {tolerance:.2g}; worst:"
                f" {sample.names[rows[worst[0]]]}: {found[worst]:.6g}, expected"
                f" {expected[worst]:.6g}; nothing was left under the export's name"
            )
        result[name] = {
            "rows": len(rows),
            "largest_difference": float(difference[worst]),
            "tolerance": tolerance,
        }
    return result


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
