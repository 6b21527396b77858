"""Load an exported model where this project is not, run it, and time it.

Run as a program (`python -I fresh.py FORMAT MODEL FOLDER`), it imports nothing of this project
and refuses to: what it can do, any program can that has the packages of the format. It reads
`inputs.npz` of FOLDER, and writes `outputs.npz` and `outputs.json` there.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OURS = ("featstore", "trainer")
BATCH = 32
NAMES = ("pixel_values", "input_ids", "attention_mask")

Arrays = dict[str, Any]
Predict = Callable[[Arrays], np.ndarray]


class _Absent:
    """Makes this project's packages as absent as they are elsewhere."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} is not to be had here")


def flat(logits: np.ndarray) -> np.ndarray:
    """Return logits (rows, 1) as (rows,); those of three classes stay as they are."""
    return logits[:, 0] if logits.shape[-1] == 1 else logits


def load_keras(model: str) -> tuple[Predict, None]:
    """Load a `.keras` file as any program does: by Keras, its safe mode on."""
    import keras

    loaded = keras.models.load_model(model)
    return lambda rows: flat(np.asarray(loaded.predict_on_batch(rows))), None


def load_saved_model(model: str) -> tuple[Predict, Predict]:
    """Load a SavedModel with TensorFlow's own loader; return both of its endpoints."""
    import tensorflow as tf
    import tensorflow_text  # noqa: F401  # the operations of the tokenizer

    loaded = tf.saved_model.load(model)
    default, raw = (loaded.signatures[name] for name in ("serving_default", "serve_bytes"))

    def predict(endpoint: Any, rows: Arrays) -> np.ndarray:
        found = endpoint(**{name: tf.constant(values) for name, values in rows.items()})
        return np.asarray(found["logit"])

    # The signatures live as long as what was loaded.
    predict.model = loaded  # type: ignore[attr-defined]
    return lambda rows: predict(default, rows), lambda rows: predict(raw, rows)


def load_onnx(model: str) -> tuple[Predict, None]:
    """Load an ONNX file in onnxruntime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda rows: flat(session.run(["logit"], rows)[0]), None


LOADERS = {"keras": load_keras, "saved_model": load_saved_model, "onnx": load_onnx}


def seconds(predict: Predict, rows: Arrays) -> float:
    """Return the median time of three predictions after a first one."""
    predict(rows)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        predict(rows)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(format: str, model: str, folder: Path) -> None:
    """Write the logits of the rows of `inputs.npz`, and the times in seconds."""
    sys.meta_path.insert(0, _Absent)
    with np.load(folder / "inputs.npz", allow_pickle=False) as stored:
        given = dict(stored)
    inputs = {name: given[name] for name in NAMES}
    count = len(inputs["input_ids"])
    started = time.perf_counter()
    predict, predict_raw = LOADERS[format](model)
    figures: dict[str, Any] = {"load_seconds": time.perf_counter() - started}

    def all_rows(run: Predict, rows: Arrays, count: int) -> np.ndarray:
        parts = range(0, count, BATCH)
        return np.concatenate(
            [run({name: values[i : i + BATCH] for name, values in rows.items()}) for i in parts]
        )

    logits: dict[str, Any] = {"logits": all_rows(predict, inputs, count)}
    batch = np.arange(BATCH) % count
    figures["single_seconds"] = seconds(predict, {k: v[:1] for k, v in inputs.items()})
    figures["batch_seconds"] = seconds(predict, {k: v[batch] for k, v in inputs.items()})
    ends = given["photo_ends"].tolist()
    if predict_raw is not None and ends:
        raw = {"sentences": json.loads(given["sentences"].tobytes())}
        photos = given["photos"].tobytes()
        raw["images"] = [photos[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)]
        logits["raw_logits"] = all_rows(predict_raw, raw, len(ends))
        figures["raw_single_seconds"] = seconds(predict_raw, {k: v[:1] for k, v in raw.items()})
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in OURS)
    if ours:
        raise SystemExit(f"this project was imported: {', '.join(ours)}")
    np.savez(folder / "outputs.npz", **logits)
    (folder / "outputs.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    # Python would look for circles among all that is imported, which takes seconds and finds none.
    gc.disable()
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    gc.freeze()  # nor at the end
