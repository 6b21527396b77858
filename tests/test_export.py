"""`export` writes one model that is the run, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import filelock
import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner
from PIL import Image
from tiny_presets import TINY_FAMILIES, randomise
from tiny_runs import SENTENCES, prepared, read_again_here, tiny_config

import trainer.results.export.export as exporting
from featstore.data.images import decode_image
from featstore.errors import RunError, UsageError
from trainer.api import Run
from trainer.commands.main import cli
from trainer.config import TrainConfig
from trainer.logits import sigmoid
from trainer.model.end_to_end import build_end_to_end
from trainer.model.head import HEAD_LAYERS
from trainer.model.plain import build_plain, plain_weights, transfer_to_plain
from trainer.model.weights import trained_weights
from trainer.results.export import fresh
from trainer.results.export.graph import _decode
from trainer.results.export.target import target_of
from trainer.run.fit import fit
from trainer.run.training import Training

NAMES = ["pixel_values", "input_ids", "attention_mask"]


def tiny(name: str) -> Any:
    class_name, settings = TINY_FAMILIES[name]
    backbone = getattr(keras_hub.models, class_name)(**settings)
    randomise(backbone, seed=3)
    return backbone


@pytest.mark.parametrize(
    ("vision", "text", "tokens", "k_txt", "k_vit", "head", "classes"),
    [
        ("vit", "distil_bert", "all", 0, 0, {}, 2),
        ("vit", "bert", "patches", 2, 1, {}, 2),
        ("vit", "distil_bert", "patches", 1, 0, {"queries": "all", "fusion_layers": 2}, 3),
        pytest.param("deit", "distil_bert", "patches", 3, 2, {}, 2, marks=pytest.mark.slow),
        pytest.param("dinov2_registers", "roberta", "patches", 1, 3, {}, 2, marks=pytest.mark.slow),
        pytest.param("deit", "bert", "all", 0, 1, {"queries": "all"}, 2, marks=pytest.mark.slow),
    ],
)
def test_the_plain_model_is_the_end_to_end_model(
    vision: str,
    text: str,
    tokens: str,
    k_txt: int,
    k_vit: int,
    head: dict[str, Any],
    classes: int,
) -> None:
    train = TrainConfig(k_txt=k_txt, k_vit=k_vit, num_heads=2, head_dim=4, mlp_dim=8, **head)
    expected = build_end_to_end(tiny(vision), tiny(text), train, tokens, classes)
    rng = np.random.default_rng(0)
    for weight in trained_weights(expected).values():
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    plain = build_plain(tiny(vision), tiny(text), train, tokens, classes)
    transfer_to_plain(expected, plain, train)
    assert plain_weights(plain, k_txt, k_vit).keys() == trained_weights(expected).keys()
    trained = {id(weight) for weight in plain_weights(plain, k_txt, k_vit).values()}
    assert {id(weight) for weight in plain.trainable_weights} == trained
    lengths = np.array([3, 9, 5])[:, None]
    rows = {
        "pixel_values": rng.normal(size=(3, 32, 32, 3)).astype(np.float32),
        "input_ids": rng.integers(0, 40, (3, 9)).astype(np.int32),
        "attention_mask": (np.arange(9) < lengths).astype(np.int32),
    }
    np.testing.assert_allclose(
        plain.predict_on_batch(rows), expected.predict_on_batch(rows), atol=1e-5
    )
    names = {layer.name for layer in plain.layers}
    if not head:
        assert {*NAMES, "vit_backbone", "txt_backbone", *HEAD_LAYERS} <= names
    modules = {type(layer).__module__.partition(".")[0] for layer in plain._flatten_layers()}
    assert modules == {"keras", "keras_hub"}


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photos() -> dict[str, bytes]:
    """Return a photo in every form that the endpoint decodes as extraction does."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    image = coarse.resize((45, 32))
    found = {
        "progressive": encoded(image, "JPEG", progressive=True),
        "grey": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "webp": encoded(image, "WEBP", quality=70),
    }
    for subsampling in (0, 1, 2):
        found[f"4:{subsampling}"] = encoded(image, "JPEG", quality=80, subsampling=subsampling)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif.endian = "<" if orientation % 2 else ">"
        exif[0x010F] = "maker"
        exif[0x0112] = orientation
        found[f"turned {orientation}"] = encoded(image, "JPEG", exif=exif.tobytes())
    clear = Image.fromarray(rng.integers(0, 256, (32, 45, 4), np.uint8), "RGBA")
    for mode in ("RGBA", "LA", "P"):
        found[f"png {mode}"] = encoded(clear.convert(mode), "PNG")
    found["webp RGBA"] = encoded(clear, "WEBP", lossless=True)
    return found


def test_photos_are_decoded_in_the_graph_as_in_extraction() -> None:
    decode = tf.function(_decode, input_signature=[tf.TensorSpec((), tf.string)])
    for name, data in photos().items():
        np.testing.assert_array_equal(decode(data).numpy(), decode_image(data, name), name)


@pytest.mark.parametrize(
    ("path", "format", "names"),
    [
        ("a/m.keras", None, ("m.keras.json", "m.keras")),
        ("m.onnx", "onnx", ("m.onnx.json", "m.onnx")),
        ("m.safetensors", None, ("m.weights.h5.json", "m.safetensors", "m.weights.h5")),
        ("m.weights.h5", None, ("m.weights.h5.json", "m.safetensors", "m.weights.h5")),
        ("m", "weights", ("m.weights.h5.json", "m.safetensors", "m.weights.h5")),
        ("served/1", "saved_model", ("1",)),
    ],
)
def test_a_path_says_what_is_written(path: str, format: str | None, names: tuple[str]) -> None:
    assert target_of(path, format).names == names


@pytest.mark.parametrize(
    ("path", "format", "said"),
    [
        ("model", None, "does not say the format"),
        ("model.keras", "onnx", "--format keras"),
        ("model", "onnx", "model.onnx"),
        ("model.pt", "torch", "expected one of keras"),
        (".keras", None, "expected a name"),
    ],
)
def test_a_path_that_says_something_else_is_refused(
    path: str, format: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        target_of(path, format)


def write(stage: Path, names: tuple[str, ...], text: str) -> None:
    for name in names:
        (stage / name).write_text(text)


def test_files_appear_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(tmp_path / "m.weights.h5")
    with contextlib.suppress(KeyboardInterrupt), target.staged() as stage:
        write(stage, target.names, "half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with target.staged() as stage:
        write(stage, target.names, "old")
    assert {path.name for path in tmp_path.iterdir()} == set(target.names)
    replace = os.replace

    def refuse(source: Path, destination: Path) -> None:
        if Path(destination) == tmp_path / target.model and Path(source).name == target.model:
            raise PermissionError(13, "no")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(RunError, match="cannot be written"), target.staged() as stage:
        write(stage, target.names, "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        target.names, "old"
    )


def test_what_a_killed_export_left_is_removed_and_a_running_one_is_not(tmp_path: Path) -> None:
    target = target_of(tmp_path / "served", "saved_model")
    left = tmp_path / ".tmp-export-served"
    (left / "served").mkdir(parents=True)
    (left / "served" / "half").touch()
    with filelock.FileLock(left / ".lock"):
        with pytest.raises(RunError, match="another process"), target.staged():
            pass
        assert (left / "served" / "half").exists()
    with target.staged() as stage:
        assert {path.name for path in stage.iterdir()} == {".lock"}
        (stage / "served").mkdir()
        (stage / "served" / "saved_model.pb").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_only_an_export_is_replaced(tmp_path: Path) -> None:
    target = target_of(tmp_path / "thesis", "saved_model")
    target.check_free(force=False)
    target.path.mkdir()
    (target.path / "chapter.tex").touch()
    with pytest.raises(UsageError, match="--force replaces it"):
        target.check_free(force=False)
    with pytest.raises(UsageError, match="SavedModel's folder"):
        target.check_free(force=True)
    (target.path / "saved_model.pb").touch()
    target.check_free(force=True)
    (tmp_path / "m.keras").mkdir()
    with pytest.raises(UsageError, match="a file"):
        target_of(tmp_path / "m.keras").check_free(force=True)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="B are free"):
        target_of(tmp_path / "m.keras").check_space(1 << 60)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Run:
    """A run in mixed precision on an int8 store."""
    folder = tmp_path_factory.mktemp("export")
    config = tiny_config(
        folder / "data", tiny_vit, tiny_text, k_txt=1, epochs=1, dtype_policy="mixed_bfloat16"
    )
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, dtype="int8"))
    run = Run(folder / "runs" / "first")
    fit(Training(run, prepared(config), config.train))
    return run


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.keras").touch()
    done = CliRunner().invoke(cli, ["export", str(run.folder), str(tmp_path / "m.keras")])
    assert done.exit_code == 2
    assert "--force" in done.stderr
    blind = Run(run.folder)
    train = dataclasses.replace(run.config.train, control="hypothesis-only")
    monkeypatch.setattr(blind.scorer, "train", train)
    with pytest.raises(RunError, match="hypothesis-only"):
        blind.export(tmp_path / "b.keras")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tf2onnx.*featstore\[onnx\]"):
        run.export(tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.keras"]


@pytest.mark.slow
def test_a_model_that_is_not_the_runs_is_not_left(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer = exporting.transfer_to_plain

    def differently(source: keras.Model, plain: keras.Model, k_txt: int) -> None:
        transfer(source, plain, k_txt)
        bias = plain.get_layer("logit").bias
        bias.assign(bias + 1.0)

    monkeypatch.setattr(exporting, "transfer_to_plain", differently)
    with pytest.raises(RunError, match=r"the stored features differ by 1.*hypothesis"):
        run.export(tmp_path / "m.weights.h5", rows=5)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_read_back(run: Run, tmp_path: Path) -> None:
    from safetensors import safe_open

    done = CliRunner().invoke(
        cli, ["export", str(run.folder), str(tmp_path / "m.weights.h5"), "--rows", "9", "--json"]
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    result = json.loads(done.stdout)
    assert result["check"]["rows"] == 9
    assert result["check"]["end_to_end"]["largest_difference"] < 1e-5
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert result["files"] == sizes
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        for name, weight in trained_weights(run.model).items():
            np.testing.assert_array_equal(file.get_tensor(name), np.asarray(weight))
    card = json.loads((tmp_path / "m.weights.h5.json").read_text())
    assert {key: card[key] for key in metadata} == metadata
    assert card["labels"] == {"contradiction": 0, "entailment": 1}
    assert card["threshold"] == run.metrics["threshold"]
    fingerprints = {key: card["encoders"][key]["fingerprint"] for key in ("vision", "text")}
    recorded = run.manifest["features"]
    assert fingerprints == {key: recorded[key]["fingerprint"] for key in ("vision", "text")}


@pytest.mark.slow
def test_a_fresh_process_loads_the_keras_file(run: Run, tmp_path: Path) -> None:
    arguments = ["export", str(run.folder), str(tmp_path / "m.keras")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "largest difference of a logit over 16 test rows" in done.stdout
    assert "32 rows" in done.stdout
    loaded = keras.models.load_model(tmp_path / "m.keras")
    rows = np.zeros((2, 32, 32, 3), np.float32), np.ones((2, 7), np.int32), np.ones((2, 7))
    assert loaded.predict_on_batch(dict(zip(NAMES, rows, strict=True))).shape == (2, 1)
    with read_again_here():
        assert CliRunner().invoke(cli, [*arguments, "--force", "--rows", "2"]).exit_code == 0


@pytest.mark.slow
def test_a_fresh_process_refuses_this_projects_classes(run: Run, tmp_path: Path) -> None:
    models = exporting.load_models(run.scorer)
    models.end_to_end.save(tmp_path / "ours.keras")
    exporting.draw_sample(run.scorer, models, "test", 2, exporting.SILENT).save(
        tmp_path / "inputs.npz"
    )
    done = subprocess.run(
        [sys.executable, "-I", fresh.__file__, "keras", "ours.keras", "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    assert "VisionTower" in done.stderr
    assert not (tmp_path / "outputs.npz").exists()


SERVE = """
import json, sys
import tensorflow as tf
import tensorflow_text
served = tf.saved_model.load("served").signatures["serve_bytes"]
images = [open(name, "rb").read() for name in sys.argv[1:3]]
found = served(images=tf.constant(images), sentences=tf.constant(sys.argv[3:]))
print(json.dumps({name: value.numpy().tolist() for name, value in found.items()}))
"""


@pytest.mark.slow
def test_a_server_needs_no_python_of_ours(run: Run, tmp_path: Path) -> None:
    result = run.export(tmp_path / "served", "saved_model", rows=6)
    assert result["check"]["serve_bytes"]["rows"] == 6
    assert result["check"]["serve_bytes"]["largest_difference"] < 1e-5
    folder = Path(run.config.data.images)
    pairs = [("photo044", SENTENCES[1]), ("photo045", SENTENCES[3])]
    names = [str(folder / f"{name}.png") for name, _ in pairs]
    sentences = [sentence for _, sentence in pairs]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SERVE, *names, *sentences],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    served = json.loads(done.stdout)
    scores = run.scorer.score("test")
    examples = run.project.dataset.examples
    rows = list(
        zip(
            examples.image_ids[scores.rows].tolist(),
            examples.hypotheses[scores.rows].tolist(),
            strict=True,
        )
    )
    expected = scores.logits[[rows.index(pair) for pair in pairs]]
    np.testing.assert_allclose(served["logit"], expected, atol=0.05)
    np.testing.assert_allclose(served["probability"], sigmoid(served["logit"]), atol=1e-6)
    called = np.array(served["probability"]) >= run.metrics["threshold"]
    assert served["label"] == called.astype(int).tolist()


@pytest.mark.slow
def test_onnx_runs_with_any_batch_and_length(run: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    result = run.export(path, rows=3)
    assert result["check"]["end_to_end"]["largest_difference"] < 1e-5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert {given.name for given in session.get_inputs()} == set(NAMES)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["threshold"]) == run.metrics["threshold"]
    for batch, length in ((1, 5), (4, 24)):
        rows = (
            np.zeros((batch, 32, 32, 3), np.float32),
            np.ones((batch, length), np.int32),
            np.ones((batch, length), np.int32),
        )
        (logit,) = session.run(None, dict(zip(NAMES, rows, strict=True)))
        assert logit.shape == (batch, 1)
