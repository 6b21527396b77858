"""What the user's surroundings set decides no number, and ends in no traceback."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state
from PIL import Image, ImageFile
from tiny_runs import tiny_config

from featstore.data.images import decode_image
from featstore.encoders import framework
from featstore.encoders.families import FAMILIES, titles
from featstore.encoders.framework import (
    _without_collecting,
    _without_jax,
    import_framework,
    pinned_framework,
)
from featstore.encoders.presets import resolve_preset
from featstore.encoders.spec import vision_spec
from featstore.encoders.tower import VisionEncoder
from featstore.errors import ImageError, PresetError, UsageError
from featstore.pinned import Outermost, setting
from featstore.progress import SILENT
from featstore.project import Project
from trainer.commands.streams import show_plainly
from trainer.config import render_config
from trainer.run.training import Reporter

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


class Held:
    """A setting that is somebody else's."""

    def __init__(self) -> None:
        self.value = "theirs"

    def context(self) -> Any:
        return setting(lambda: self.value, lambda new: setattr(self, "value", new), "ours")


def test_nested_calls_share_one_context() -> None:
    held = Held()
    outermost = Outermost(held.context)
    with outermost:
        with outermost:
            assert held.value == "ours"
        assert held.value == "ours"
    assert held.value == "theirs"
    with pytest.raises(ZeroDivisionError), outermost:
        _ = 1 / 0
    assert held.value == "theirs"


def test_a_thread_that_ends_first_puts_nothing_back() -> None:
    held = Held()
    outermost = Outermost(held.context)
    entered, leave, left = (threading.Event() for _ in range(3))

    def first() -> None:
        with outermost:
            entered.set()
            leave.wait()
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with outermost:
        leave.set()
        left.wait()
        assert held.value == "ours"
    thread.join()
    assert held.value == "theirs"


def test_a_context_of_a_thread_is_its_own() -> None:
    held: dict[int, Held] = {}
    outermost = Outermost(
        lambda: held.setdefault(threading.get_ident(), Held()).context(), of_thread=True
    )
    seen: list[list[str]] = []

    def other() -> None:
        with outermost:
            seen.append([one.value for one in held.values()])
        seen.append([one.value for one in held.values()])

    with outermost:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [["ours", "ours"], ["ours", "theirs"]]
    assert [one.value for one in held.values()] == ["theirs", "theirs"]


def keras_settings() -> dict[str, Any]:
    return {
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "image_data_format": keras.config.image_data_format(),
        "policy": global_state.get_global_attribute("dtype_policy"),
        "flash": keras.config.is_flash_attention_enabled(),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
        "eager": tf.config.functions_run_eagerly(),
    }


@pytest.fixture
def theirs() -> Any:
    """Settings of a caller, each another than Keras's own."""
    before = keras_settings()
    keras.config.set_floatx("float16")
    keras.config.set_epsilon(0.1)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.disable_flash_attention()
    tf.config.experimental.enable_tensor_float_32_execution(True)
    tf.config.run_functions_eagerly(True)
    yield keras_settings()
    keras.config.set_floatx(before["floatx"])
    keras.config.set_epsilon(before["epsilon"])
    keras.config.set_image_data_format(before["image_data_format"])
    global_state.set_global_attribute("dtype_policy", before["policy"])
    keras.config.enable_flash_attention()
    tf.config.experimental.enable_tensor_float_32_execution(before["tf32"])
    tf.config.run_functions_eagerly(before["eager"])


def test_what_a_caller_set_is_held_and_put_back(theirs: dict[str, Any]) -> None:
    with pinned_framework():
        held = keras_settings()
    assert held.pop("policy").name == "float32"
    assert held == {
        "floatx": "float32",
        "epsilon": 1e-7,
        "image_data_format": "channels_last",
        "flash": None,
        "tf32": False,
        "eager": False,
    }
    assert keras_settings() == theirs


def test_a_policy_that_was_never_set_stays_so() -> None:
    before = global_state.get_global_attribute("dtype_policy")
    global_state.set_global_attribute("dtype_policy", None)
    try:
        with pinned_framework():
            keras.layers.Dense(1)
        assert global_state.get_global_attribute("dtype_policy") is None
    finally:
        global_state.set_global_attribute("dtype_policy", before)


def test_an_encoder_ignores_its_callers_settings(
    tiny_vit: Path, request: pytest.FixtureRequest
) -> None:
    photo = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)

    def features() -> np.ndarray:
        encoder = VisionEncoder(str(tiny_vit))
        return encoder.encode(encoder.to_pixels(photo)[None])

    expected = features()
    settings = request.getfixturevalue("theirs")
    np.testing.assert_array_equal(features(), expected)
    assert keras_settings() == settings


HOSTILE = {
    "floatx": "float16",
    "epsilon": 0.1,
    "image_data_format": "channels_first",
    "backend": "tensorflow",
    "nnx_enabled": True,
}
TRAIN = """
import json, os, sys
sys.path.insert(0, "tests")
import trainer
from featstore.config import DataConfig
from featstore.progress import SILENT
from featstore.project import Project
from trainer.config import load_config
config = load_config(sys.argv[1], {"store": {"root": sys.argv[2]}})
assert "keras" not in sys.modules
project = Project(config)
project.extract("vit", show=SILENT)
# TensorFlow's converter would take it, where it is installed; who wants it still has it.
assert "jax" not in sys.modules
import jax
import keras
assert (keras.config.floatx(), keras.config.epsilon()) == ("float16", 0.1)
assert keras.config.image_data_format() == "channels_first"
keras.config.set_dtype_policy("mixed_float16")
assert os.environ["TF_USE_LEGACY_KERAS"] == "1"
run = trainer.train(project, name="theirs", runs=sys.argv[3], show=SILENT)
print(json.dumps(run.evaluate("test", show=SILENT)["loss"]))
"""


@pytest.mark.slow
def test_the_same_numbers_under_another_environment(
    tiny_vit: Path, tiny_text: Path, tmp_path: Path
) -> None:
    import trainer
    from trainer.config import render_config

    config = tiny_config(tmp_path / "data", tiny_vit, tiny_text, k_txt=1, epochs=1)
    (tmp_path / "featstore.toml").write_text(render_config(config))
    project = Project(config)
    project.extract("vit", show=SILENT)
    run = trainer.train(
        project, name="ours", runs=tmp_path / "runs", reporter=Reporter(), show=SILENT
    )
    home = tmp_path / "keras"
    home.mkdir()
    (home / "keras.json").write_text(json.dumps(HOSTILE))
    root = tmp_path / "theirs"
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path / "featstore.toml", root, tmp_path / "runs"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_HOME": str(home),
            "KERAS_NNX_ENABLED": "true",
            "KERAS_MAX_EPOCHS": "1",
            "KERAS_MAX_STEPS_PER_EPOCH": "1",
            "TF_USE_LEGACY_KERAS": "1",
            "PYTHONHASHSEED": "3",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind, spec in project.asked.items():
        folders = [spec.folder(Path(config.store.root)), spec.folder(root)]
        ours, others = (
            {path.name: path.read_bytes() for path in folder.glob("shard-*.h5")}
            for folder in folders
        )
        assert ours, kind
        assert ours == others, kind
    assert json.loads(done.stdout.splitlines()[-1]) == run.evaluate("test", show=SILENT)["loss"]
    theirs = trainer.load_run("theirs", tmp_path / "runs")
    for name in ("loss", "val_loss"):
        assert theirs.history[name].tolist() == run.history[name].tolist()


JAX = """
import sys
import numpy as np
from featstore.encoders import framework
from featstore.encoders.tower import TextEncoder, VisionEncoder
import jax

framework.COMPILED_SECONDS = 0.0

def features():
    vision, text = VisionEncoder(sys.argv[1]), TextEncoder(sys.argv[2], 12)
    photo = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    return vision.encode(vision.to_pixels(photo)[None]), text.encode(*text.tokenize(["a dog"]), 1)

photo = np.random.default_rng(0).integers(0, 255, (400, 500, 3), np.uint8)
np.testing.assert_array_equal(
    VisionEncoder(sys.argv[1]).to_pixels(photo), np.load(sys.argv[3])
)
ours = features()
for name, value in {
    "jax_enable_x64": True,
    "jax_default_matmul_precision": "bfloat16",
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}.items():
    jax.config.update(name, value)
for mine, theirs in zip(ours, features(), strict=True):
    np.testing.assert_array_equal(theirs, mine)
assert jax.numpy.zeros(1, "float64").dtype == "float64"
print("same")
"""


@pytest.mark.slow
def test_jax_has_the_same_pixels_and_ignores_what_its_caller_configured(
    tiny_vit: Path, tiny_text: Path, tmp_path: Path
) -> None:
    # Many, so that some lie between two levels, where the last bit decides.
    photo = np.random.default_rng(0).integers(0, 255, (400, 500, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", VisionEncoder(str(tiny_vit)).to_pixels(photo))
    arguments = (str(tiny_vit), str(tiny_text), str(tmp_path / "pixels.npy"))
    environment = {
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "home"),
    }
    done = python("-c", JAX, *arguments, **environment)
    assert done.stdout.strip() == "same", done.stderr[-3000:]
    (compiled,) = (tmp_path / "home" / "featstore" / "jax").glob("cpu-*")
    kept = {path.name for path in compiled.glob("*-cache")}
    assert len(kept) > 2
    done = python("-c", JAX, *arguments, **environment)
    assert done.stdout.strip() == "same", done.stderr[-3000:]
    # Nothing was compiled anew.
    assert {path.name for path in compiled.glob("*-cache")} == kept


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "numpy"])
@pytest.mark.parametrize("where", ["variable", "file"])
def test_jax_is_kept_away_where_it_is_not_the_backend(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str, where: str
) -> None:
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if where == "variable":
        monkeypatch.setenv("KERAS_BACKEND", backend)
    else:
        (tmp_path / "keras.json").write_text(json.dumps({"backend": backend}))
    with _without_jax():
        assert ("jax" in sys.modules) == (backend == "tensorflow")
        assert sys.modules.get("jax") is None
    assert "jax" not in sys.modules


def test_nothing_is_collected_while_keras_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[int]] = []

    def frozen() -> int:
        """Return how many objects are never looked at again."""
        before = gc.get_freeze_count()
        with _without_collecting():
            assert not gc.isenabled()
            made.extend([] for _ in range(1000))
        assert gc.isenabled()
        return gc.get_freeze_count() - before

    # A caller's objects would be kept for ever.
    monkeypatch.setattr(framework, "_own_process", False)
    assert frozen() <= 0
    framework.in_own_process()
    assert frozen() >= 2000
    # Its user's choice stays.
    gc.disable()
    try:
        with _without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_xla_is_told_is_the_users_to_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=there")
    import_framework()
    import_framework()
    given = "--xla_dump_to=there --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == given
    # What is no flag is the name of a file that has them.
    file = tmp_path / "flags"
    file.write_text("--xla_dump_to=there\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    import_framework()
    assert os.environ["XLA_FLAGS"] == given
    file.unlink()
    for theirs in ("--xla_gpu_deterministic_ops=false", str(file)):
        monkeypatch.setenv("XLA_FLAGS", theirs)
        import_framework()
        assert os.environ["XLA_FLAGS"] == theirs


COMPILED = """
import os, sys, warnings
from pathlib import Path
from featstore.encoders import framework
warnings.simplefilter("error")
framework.COMPILED_SECONDS = 0.0
framework.import_framework()
import jax
from jax._src import xla_bridge
# A search's driver computes nothing, and must not keep a GPU's memory.
assert not xla_bridge._backends
assert jax.jit(lambda x: 3 * x + 1)(2.0) == 7
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.slow
def test_jax_keeps_what_it_compiles_where_it_can(tmp_path: Path) -> None:
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def folder(home: Path) -> str:
        done = python("-c", COMPILED, **environment, XDG_CACHE_HOME=str(home))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.strip()

    # A home that cannot be written.
    (tmp_path / "file").touch()
    assert folder(tmp_path / "file") == "None"
    compiled = Path(folder(tmp_path))
    (of_lambda,) = compiled.glob("*lambda*-cache")
    size = of_lambda.stat().st_size
    # A process that ended while it wrote.
    of_lambda.write_bytes(of_lambda.read_bytes()[:100])
    Path(f"{str(of_lambda).removesuffix('-cache')}-atime").unlink()
    folder(tmp_path)
    assert of_lambda.stat().st_size == size


@pytest.mark.slow
def test_a_device_that_jax_has_not_is_one_line(tiny_vit: Path) -> None:
    code = (
        "import sys\nfrom featstore.encoders.tower import VisionEncoder\n"
        "from featstore.encoders.framework import open_device\n"
        "try: VisionEncoder(sys.argv[1])\nexcept Exception as e: print(type(e).__name__, e)\n"
        "try: open_device()\nexcept Exception as e: print(type(e).__name__, e)"
    )
    environment = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "tpu", "PYTHONPATH": str(ROOT)}
    done = python("-c", code, str(tiny_vit), **environment)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr[-3000:]
    for line in lines:
        assert line.startswith(f"{UsageError.__name__} JAX finds no device (")
        assert "set JAX_PLATFORMS=cpu" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"floatx": "bfloat16"}', "Invalid `floatx`"),
        ('{"epsilon": 1}', "Invalid `epsilon`"),
        ("[1]", "list"),
    ],
)
def test_settings_that_keras_refuses_are_one_line(
    tmp_path: Path, content: str, reason: str
) -> None:
    (tmp_path / "keras.json").write_text(content)
    code = "import trainer\ntry: trainer.train\nexcept Exception as e: print(type(e).__name__, e)"
    done = python("-c", code, KERAS_HOME=str(tmp_path), PYTHONPATH=str(ROOT))
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{UsageError.__name__} Keras refuses its settings (")
    assert reason in line
    assert f"mend {tmp_path / 'keras.json'}" in line


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(data, "JPEG")
    return data.getvalue()


def test_a_cut_photo_is_damaged_whatever_pillow_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = jpeg()
    with pytest.raises(ImageError, match="damaged or cut short"):
        decode_image(data[: len(data) // 2], "half.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_pillows_limit_of_pixels_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(jpeg(), "small.jpg").shape == (48, 64, 3)
    with pytest.raises(ImageError, match="64×48 pixels; expected at most 3071 pixels"):
        decode_image(jpeg(), "small.jpg", max_pixels=64 * 48 - 1)
    assert Image.MAX_IMAGE_PIXELS == 100


SHOWN = "τ = 0.5 – 3×4 … é 中"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", SHOWN),
        ("latin-1", "tau = 0.5 - 3×4 ... é \\u4e2d"),
        ("cp1252", "tau = 0.5 – 3×4 … é \\u4e2d"),
        ("ascii", "tau = 0.5 - 3x4 ... \\xe9 \\u4e2d"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [
        lambda text: click.echo(text),
        lambda text: click.echo(text, err=True),
        lambda text: print(text),
        lambda text: print(text, file=sys.stderr),
    ],
    ids=["echo", "echo-err", "print", "print-err"],
)
def test_a_stream_shows_what_it_can(
    encoding: str,
    expected: str,
    write: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, err = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(raw, encoding=encoding, newline="\n") for raw in (out, err)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    show_plainly()
    write(SHOWN)
    for stream in streams:
        stream.flush()
    assert (out.getvalue() + err.getvalue()).decode(encoding) == expected + "\n"


def test_a_stream_of_the_callers_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    show_plainly()
    print(SHOWN)
    assert sys.stdout.getvalue() == SHOWN + "\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["PYTHONPATH", "folder"])
@pytest.mark.parametrize("program", ["cli.py", "-m featstore"])
def test_other_modules_of_the_same_names_are_passed_over(
    place: str, program: str, tmp_path: Path
) -> None:
    for name in ("trainer", "cli", "tests"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('another module')")
    path = [ROOT] if program.startswith("-m") else []
    path = [tmp_path, *path] if place == "PYTHONPATH" else path
    given = [str(ROOT / program)] if program == "cli.py" else program.split()
    done = subprocess.run(
        [sys.executable, *given, "train", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train the fusion head" in done.stdout


LEAVES_NOTHING = """
import os, signal, sys
from pathlib import Path
from trainer.config import load_config
from featstore.progress import SILENT
from featstore.project import Project
import trainer
folder = Path(sys.argv[1])
project = Project(load_config(folder / "featstore.toml"))
project.extract("vit", show=SILENT)
run = trainer.train(project, name="a", runs=folder / "runs", epochs=1, show=SILENT)
run.evaluate("test", show=SILENT)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_in_the_temporary_folder(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    """As autograph's Python files, which are removed only where a process ends by itself."""
    (tmp_path / "featstore.toml").write_text(
        render_config(tiny_config(tmp_path, tiny_vit, tiny_text))
    )
    (temporary := tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    done = python("-c", LEAVES_NOTHING, str(tmp_path), **environment)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "runs" / "a" / "evaluate-test.json").exists()
    assert [path.name for path in temporary.iterdir()] == []


@pytest.mark.parametrize("model_type", ["clip", "siglip", "vit_mae"])
def test_a_model_of_no_family_is_told_the_families(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(PresetError) as caught:
        resolve_preset(tmp_path)
    line = str(caught.value)
    assert f"a {model_type} model, which keras-hub converts into no supported family" in line
    assert titles("vision") == "ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP"
    assert all(family.title in line for family in FAMILIES.values())


def test_a_model_of_a_family_is_told_how_to_convert_it(tmp_path: Path) -> None:
    for family in FAMILIES.values():
        for model_type in family.model_types:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
            with pytest.raises(PresetError, match="is not keras-hub's; convert it with"):
                resolve_preset(tmp_path)


@pytest.mark.parametrize("class_name", ["SwinTransformerBackbone", "ResNetBackbone"])
def test_a_backbone_of_no_family_is_told_the_families(tmp_path: Path, class_name: str) -> None:
    content = {"class_name": class_name, "config": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.weights.h5").write_bytes(b"weights")
    config = tiny_config(tmp_path / "data", tmp_path, tmp_path)
    with pytest.raises(PresetError) as caught:
        vision_spec(config.encoders, config.store)
    assert "choose a ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP preset" in str(caught.value)
