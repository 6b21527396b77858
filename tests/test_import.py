"""`import`: the study's own model becomes a run with its logits; nothing is guessed or run."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from tiny_presets import randomise, tiny_text_backbone, tiny_vision_backbone
from tiny_runs import tiny_config

import trainer
from featstore.data.images import decode_image
from featstore.encoders.presets import resolve_preset
from featstore.encoders.tower import TextEncoder, Tower, VisionEncoder, load_backbone
from featstore.errors import (
    FeatstoreError,
    MissingFeaturesError,
    RunError,
    StaleFeaturesError,
    UsageError,
)
from featstore.progress import SILENT
from featstore.project import Project
from trainer.commands.main import cli
from trainer.config import Config, render_config
from trainer.metrics import evaluate_logits
from trainer.model.description import differences, foreign_classes
from trainer.model.plain import build_plain
from trainer.model.weights import trained_weights
from trainer.model.weights_file import kind_of, open_weights, read_tensors
from trainer.results.foreign import check_shapes, trained_layers
from trainer.results.imported import read_labels
from trainer.run.folder import HISTORY_COLUMNS, Run, find_run

ROOT = Path(__file__).resolve().parent.parent
HEAD = ("xattn", "xattn_norm", "mlp_1", "logit")


def study_model(vision: Any, text: Any, activation: str = "gelu", token: int = 0) -> keras.Model:
    """Build the model as the study did: 24 tokens, `[CLS]` over all 197 tokens of a photo."""
    vision.name, text.name = "vit_backbone", "txt_backbone"
    pixels = keras.Input(vision.input_shape[1:], name="pixel_values")
    ids = keras.Input((24,), dtype="int32", name="input_ids")
    mask = keras.Input((24,), dtype="int32", name="attention_mask")
    tokens = vision(pixels)
    states = text({"token_ids": ids, "padding_mask": mask})
    cls = states[:, token : token + 1, :]
    attend = keras.layers.MultiHeadAttention(num_heads=2, key_dim=4, dropout=0.1, name="xattn")
    attended = attend(query=cls, key=tokens, value=tokens)
    x = keras.layers.Add(name="xattn_residual")([cls, attended])
    x = keras.layers.LayerNormalization(epsilon=1e-6, name="xattn_norm")(x)
    x = keras.layers.Flatten(name="flatten_cls")(x)
    x = keras.layers.Dense(8, activation=activation, name="mlp_1")(x)
    x = keras.layers.Dropout(0.1, name="drop_1")(x)
    logit = keras.layers.Dense(1, dtype="float32", name="logit")(x)
    return keras.Model(
        {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}, logit, name="study"
    )


@dataclasses.dataclass
class Made:
    """A project with features, and a trained model of the study with its files."""

    folder: Path
    project: Project
    model: keras.Model
    towers: dict[str, Tower]

    def bring(self, file: Path, name: str, **options: Any) -> trainer.Run:
        runs = self.folder / "runs"
        options = {"show": SILENT, **options}
        return trainer.import_weights(file, self.project, name=name, runs=runs, **options)

    def compare(self, file: Path) -> tuple[dict[str, int], str]:
        """Compare a file with the presets as an import does; see `trained_layers`."""
        with (
            open_weights(file, kind_of(file), 10**6) as opened,
            open_weights(self.folder / "preset.weights.h5", "weights", 10**6) as preset,
        ):
            check_shapes(file, opened, preset)
            return trained_layers(file, opened, preset, self.towers)

    def mismatch(self, file: Path) -> str:
        """Compare a file that must be refused; return the line."""
        with pytest.raises(RunError) as found:
            self.compare(file)
        assert "\n" not in str(found.value)
        return str(found.value)

    def refuse(self, file: Path, error: type[FeatstoreError] = RunError, **options: Any) -> str:
        """Import what must be refused; return the line."""
        with pytest.raises(error) as found:
            self.bring(file, "refused", **options)
        assert not (self.folder / "runs" / "refused" / "manifest.json").exists()
        assert not (self.folder / "runs" / "refused" / "best.weights.h5").exists()
        line = str(found.value)
        assert "\n" not in line
        return line

    def logits(self, split: str) -> NDArray[np.float32]:
        """Return what the study's own model says of a split, from the photos' bytes."""
        encoders, dataset = self.project.config.encoders, self.project.dataset
        vision, text = VisionEncoder(encoders.vit, "all"), TextEncoder(encoders.text, 24)
        examples = dataset.examples.select(dataset.rows(split))
        pixels = []
        for image_id in examples.image_ids:
            path = dataset.images.lookup(image_id)
            assert path is not None
            pixels.append(vision.to_pixels(decode_image(Path(path).read_bytes(), str(path))))
        ids, mask = text.tokenize(examples.hypotheses.tolist())
        inputs = {"pixel_values": np.stack(pixels), "input_ids": ids, "attention_mask": mask * 1}
        return np.asarray(self.model(inputs, training=False))[:, 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Made:
    folder = tmp_path_factory.mktemp("import")
    config = tiny_config(folder / "data", tiny_vit, tiny_text)
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, tokens="all"))
    project = Project(config)
    project.extract("vit", show=SILENT)
    encoders = config.encoders
    vision, text = (
        load_backbone(resolve_preset(name), "float32") for name in (encoders.vit, encoders.text)
    )
    model = study_model(vision, text)
    model.save_weights(folder / "preset.weights.h5")
    for layer in [*map(model.get_layer, HEAD), *text.transformer_layers[-2:]]:
        randomise(layer, seed=5)
    # With what a training leaves in the files beside the weights.
    model.compile("adamw", "binary_crossentropy", metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)
    model.save_weights(folder / "best.weights.h5")
    model.save(folder / "model.keras")
    towers = {"vit_backbone": Tower(vision, "vision"), "txt_backbone": Tower(text, "text")}
    return Made(folder, project, model, towers)


@pytest.fixture(scope="module")
def run(made: Made) -> trainer.Run:
    return made.bring(made.folder / "best.weights.h5", "study", labels="contradiction=1")


def edited(made: Made, name: str, edit: Callable[[h5py.File], None]) -> Path:
    """Return a copy of the weights file that was changed."""
    path = made.folder / f"{name}.weights.h5"
    shutil.copy(made.folder / "best.weights.h5", path)
    with h5py.File(path, "r+") as file:
        edit(file)
    return path


def described(made: Made, name: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of the `.keras` file whose description was changed."""
    path = made.folder / f"{name}.keras"
    with zipfile.ZipFile(made.folder / "model.keras") as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            data = old.read(item)
            if item == "config.json":
                config = json.loads(data)
                edit(config)
                data = json.dumps(config).encode()
            new.writestr(item, data)
    return path


def layer_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (layer for layer in config["config"]["layers"] if layer["name"] == name)
    return dict(found)


def test_a_model_of_the_study_keeps_its_logits(made: Made, run: trainer.Run) -> None:
    """Its positive class was contradiction: the run's logit is minus its own, for every row."""
    expected = made.logits("test")
    assert np.ptp(expected) > 0.1
    scores = run.scorer.score("test")
    np.testing.assert_allclose(scores.logits, -expected, atol=1e-5)
    truth = made.project.dataset.examples.select(made.project.dataset.rows("test")).labels
    np.testing.assert_array_equal(scores.labels, truth)
    assert run.config.train.k_txt == 2
    imported = run.manifest["imported"]
    assert imported["labels"] == "contradiction=1"
    assert imported["layers"] == ["transformer_layer_2", "transformer_layer_3", *HEAD]
    assert "tokens" in imported["note"]


def test_what_a_run_can_do_an_imported_one_can(made: Made, run: trainer.Run) -> None:
    assert "imported: val accuracy" in repr(run)
    assert list(run.history.columns) == list(HISTORY_COLUMNS)
    assert len(run.history) == 0
    val = run.scorer.score("val")
    for key, value in evaluate_logits(val.labels, val.logits).items():
        assert run.metrics[key] == value, key
    result = run.evaluate("test", show=SILENT)
    assert result["threshold"] == run.metrics["threshold"]
    parity = run.parity("test", rows=12, show=SILENT)
    assert parity["failure"] is None
    assert parity["quantities"]["logits"]["largest"] < 1e-4


@pytest.mark.slow
def test_a_run_starts_from_an_imported_one(made: Made, run: trainer.Run) -> None:
    runs = made.folder / "runs"
    started = trainer.train(
        made.project, name="next", runs=runs, init_from="study", k_txt=2, epochs=1, show=SILENT
    )
    assert started.manifest["initialised_layers"] == [
        *HEAD,
        *run.manifest["imported"]["layers"][:2],
    ]
    # Its columns are those that an imported run has none of.
    assert tuple(started.history.columns) == HISTORY_COLUMNS
    with pytest.raises(UsageError, match="finished run"):
        trainer.train(made.project, name="study", runs=runs, show=SILENT)


@pytest.mark.slow
def test_a_keras_file_gives_the_same_and_is_not_inverted_unasked(made: Made) -> None:
    same = made.bring(made.folder / "model.keras", "keras", k_txt=3, threshold=0.25)
    np.testing.assert_allclose(same.scorer.score("test").logits, made.logits("test"), atol=1e-5)
    assert same.config.train.k_txt == 3
    assert same.metrics["threshold"] == 0.25
    assert same.manifest["imported"]["labels"] == "entailment=1"


@pytest.mark.slow
def test_an_export_comes_back_with_its_threshold(made: Made, run: trainer.Run) -> None:
    run.export(made.folder / "whole.weights.h5")
    with safe_open(made.folder / "whole.safetensors", "numpy") as file:
        card = {key: json.loads(value) for key, value in file.metadata().items()}
    card["threshold"] = 0.37

    def write(name: str, **changes: Any) -> Path:
        tensors = {key: np.asarray(w) for key, w in trained_weights(run.model).items()}
        said = {key: json.dumps(value) for key, value in {**card, **changes}.items()}
        path = made.folder / f"{name}.safetensors"
        save_file(tensors, path, said)
        return path

    beside = made.folder / "whole.weights.h5.json"
    beside.write_text(json.dumps({**json.loads(beside.read_text()), "threshold": 0.41}))
    whole = made.bring(made.folder / "whole.weights.h5", "whole")
    expected = run.scorer.score("test").logits
    np.testing.assert_array_equal(whole.scorer.score("test").logits, expected)
    assert whole.metrics["threshold"] == 0.41
    again = made.bring(made.folder / "whole.safetensors", "again")
    assert again.metrics["threshold"] == run.metrics["threshold"]
    back = made.bring(write("back"), "back")
    np.testing.assert_array_equal(back.scorer.score("test").logits, run.scorer.score("test").logits)
    assert back.metrics["threshold"] == 0.37
    assert "leave --labels out" in made.refuse(
        made.folder / "back.safetensors", UsageError, labels="contradiction=1"
    )
    assert "found 1" in made.refuse(made.folder / "back.safetensors", UsageError, k_txt=1)
    assert "found nothing" in made.refuse(write("fewer", k_txt=3))
    encoders = {**card["encoders"], "text": {**card["encoders"]["text"], "weights": "another"}}
    assert "weights.text" in made.refuse(write("other", encoders=encoders))
    assert "labels are" in made.refuse(write("inverted", labels={"entailment": 0}))
    silent = made.folder / "silent.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, silent)
    assert "which encoders" in made.refuse(silent)


@pytest.mark.slow
def test_options_that_contradict_are_refused(made: Made, run: trainer.Run) -> None:
    file = made.folder / "best.weights.h5"
    line = made.refuse(file, UsageError, k_txt=1)
    assert "transformer_layer_2" in line
    assert "--k-txt 2" in line
    assert "--labels 'neutral=1'" in made.refuse(file, UsageError, labels="neutral=1")
    assert "0 to 1" in made.refuse(file, UsageError, threshold=1.5)
    with pytest.raises(UsageError, match="there already"):
        made.bring(file, "study")
    assert "--num-heads 2 --head-dim 4 --mlp-dim 8" in made.refuse(file, mlp_dim=5)


@pytest.mark.parametrize(
    ("text", "positive"),
    [("entailment=1", 1), ("contradiction=1", 0), ("entailment=0", 0), ("contradiction=0", 1)],
)
def test_labels_say_what_the_positive_side_means(text: str, positive: int) -> None:
    assert read_labels(text) == positive


def test_frozen_weights_must_be_the_presets(made: Made) -> None:
    vit, txt = "layers/vi_t_backbone", "layers/distil_bert_backbone/layers"

    def add(*paths: str) -> Callable[[h5py.File], None]:
        def edit(file: h5py.File) -> None:
            for path in paths:
                file[path][...] = file[path][...] + np.float32(1e-3)

        return edit

    patches = f"{vit}/layers/vi_t_patching_and_embedding/patch_embedding/vars/0"
    line = made.mismatch(edited(made, "tuned", add(patches)))
    assert "vit_backbone/" in line
    assert "in 1 layers" in line
    assert "save_to_preset" in line
    words = f"{txt}/token_and_position_embedding/token_embedding/vars/0"
    line = made.mismatch(edited(made, "words", add(words)))
    assert "txt_backbone/token_and_position_embedding by up to 0.001" in line


@pytest.mark.parametrize(
    ("path", "blocks"),
    [
        ("encoder_layers/vi_t_encoder_block_1/mha/key_dense/vars/0", 1),
        ("encoder_layers/vi_t_encoder_block/layer_norm_1/vars/0", 2),
        ("layer_norm/vars/1", 1),
    ],
)
def test_the_first_vision_layer_that_is_not_the_presets_tells_k_vit(
    made: Made, path: str, blocks: int
) -> None:
    path = f"layers/vi_t_backbone/layers/vi_t_encoder/{path}"

    def edit(file: h5py.File) -> None:
        file[path][...] = file[path][...] + np.float32(1e-3)

    file = edited(made, "tuned", edit)
    assert made.compare(file)[0] == {"vit_backbone": blocks, "txt_backbone": 2}
    line = made.refuse(file, UsageError, k_vit=blocks - 1)
    assert f"expected --k-vit {blocks}" in line
    assert f"extract-vit --k-vit {blocks}" in made.refuse(file, StaleFeaturesError)


def test_frozen_weights_may_be_rounded_to_16_bits(made: Made) -> None:
    def halve(file: h5py.File) -> None:
        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and name.startswith("layers/vi_t"):
                item[...] = item[...].astype(np.float16)

        file.visititems(visit)

    frozen = {"vit_backbone": 0, "txt_backbone": 0}
    trained = {**frozen, "txt_backbone": 2}
    assert made.compare(made.folder / "best.weights.h5") == (trained, "")
    assert made.compare(made.folder / "preset.weights.h5") == (frozen, "")
    found, note = made.compare(edited(made, "half", halve))
    assert found == trained
    assert "rounded to 16 bits" in note


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda file: file.move("layers/dense_1", "layers/dense_9"), "logit/0: expected (8, 1)"),
        (lambda file: file.copy("layers/dense", "layers/dense_7"), "expected nothing, found (16"),
        (
            lambda file: file["layers/dense/vars"].attrs.__setitem__("name", "fc"),
            "layer mlp_1: found one named 'fc'",
        ),
    ],
    ids=["missing", "more", "renamed"],
)
def test_layers_that_do_not_fit_are_named(
    made: Made, edit: Callable[[h5py.File], None], expected: str
) -> None:
    assert expected in made.mismatch(edited(made, "misfit", edit))


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named(made: Made) -> None:
    def spoil(file: h5py.File) -> None:
        file["layers/dense_1/vars/1"][...] = np.nan

    line = made.refuse(edited(made, "nan", spoil))
    assert "logit/bias has numbers that are not finite" in line


def test_another_text_encoder_is_told_by_its_shapes(made: Made) -> None:
    path = made.folder / "fewer.weights.h5"
    study_model(tiny_vision_backbone(), tiny_text_backbone(num_layers=3)).save_weights(path)
    line = made.mismatch(path)
    assert "txt_backbone/transformer_layer_3" in line
    assert "--vit and --text" in line


def put(name: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return edit


def claim(file: h5py.File) -> None:
    """Make a weight of 16 TB that takes no place in the file."""
    del file["layers/dense/vars/0"]
    file.create_dataset("layers/dense/vars/0", (2**21, 2**21), np.float32, chunks=(64, 64))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (put("layers/dense/vars/0", h5py.ExternalLink("other.h5", "/x")), "a link to elsewhere"),
        (put("layers/dense/vars/0", h5py.SoftLink("/layers/x")), "a link to elsewhere"),
        (put("layers/dense/vars/0", np.zeros((16, 8), np.int64)), "is of int64"),
        (put("layers/dense/vars/0", h5py.Empty("f")), "found ()"),
        (claim, "found (2097152, 2097152)"),
        (lambda file: file.attrs.__setitem__("layer_names", ["a"]), "of Keras 2"),
    ],
    ids=["external", "soft", "integers", "empty", "huge", "keras2"],
)
def test_hostile_weights_files_are_one_line(
    made: Made, edit: Callable[[h5py.File], None], expected: str
) -> None:
    assert expected in made.mismatch(edited(made, "hostile", edit))


class Payload:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


@pytest.mark.parametrize(
    "kind", ["pickle", "torch", "npz", "folder", "saved_model", "onnx", "text"]
)
def test_files_of_other_kinds_are_one_line(tmp_path: Path, kind: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / "file.keras"
    payload = pickle.dumps(Payload(ran))
    expected = "expected a .keras, .weights.h5 or .safetensors file"
    if kind == "pickle":
        path.write_bytes(payload)
    elif kind == "torch":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/data.pkl", payload)
    elif kind == "npz":
        np.savez(path.with_suffix(".npz"), a=np.zeros(2))
        path = path.with_suffix(".npz")
    elif kind == "onnx":
        path = path.with_suffix(".onnx")
        path.write_bytes(b"\x08\x09\x12\x07pytorch")
    elif kind == "text":
        path.write_text("weights")
    else:
        path.mkdir()
        if kind == "saved_model":
            (path / "saved_model.pb").write_bytes(b"")
    names = {"folder": "a folder", "text": "of no kind", "saved_model": "SavedModel"}
    with pytest.raises(RunError, match=f"(?i){names.get(kind, kind)}.*{expected}"):
        kind_of(path)
    assert not ran.exists()


def test_files_that_are_cut_short_are_one_line(made: Made, tmp_path: Path) -> None:
    for name in ("best.weights.h5", "model.keras"):
        data = (made.folder / name).read_bytes()
        for size in (len(data) // 2, 20):
            path = tmp_path / name
            path.write_bytes(data[:size])
            with (
                pytest.raises(RunError, match="cut short or damaged"),
                open_weights(path, kind_of(path), 10**6),
            ):
                pass
    path = tmp_path / "a.safetensors"
    for header in (b"{", b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}'):
        path.write_bytes(
            (1 << 60 if header == b"{" else len(header)).to_bytes(8, "little") + header
        )
        with pytest.raises(RunError, match="cut short or damaged"):
            read_tensors(path)


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(2**27))
    assert path.stat().st_size < 2**18
    with (
        pytest.raises(RunError, match="would unpack to 134,217,728 bytes"),
        open_weights(path, kind_of(path), 1000),
    ):
        pass


def lambda_layer(config: dict[str, Any]) -> None:
    layer = layer_of(config, "drop_1")
    code = {"class_name": "__lambda__", "config": {"code": "YQ==", "defaults": None}}
    layer.update(class_name="Lambda", name="evil", config={"name": "evil", "function": code})
    config["config"]["layers"].append(layer)


def foreign_layer(config: dict[str, Any]) -> None:
    layer = layer_of(config, "drop_1")
    layer.update(module="os", class_name="system", name="evil", registered_name="mine>System")
    config["config"]["layers"].append(layer)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda_layer, "names what is not Keras's: Lambda 'evil'"),
        (foreign_layer, "names what is not Keras's: os.system"),
    ],
    ids=["lambda", "foreign"],
)
def test_a_description_with_code_is_refused(
    made: Made, edit: Callable[[dict[str, Any]], None], expected: str
) -> None:
    assert expected in made.refuse(described(made, "code", edit))


@pytest.fixture(scope="module")
def descriptions(made: Made) -> tuple[dict[str, Any], dict[str, Any]]:
    """The study's description and ours."""
    with zipfile.ZipFile(made.folder / "model.keras") as archive:
        study = json.loads(archive.read("config.json"))
    train = made.project.config.train
    plain = build_plain(tiny_vision_backbone(), tiny_text_backbone(), train, "all")
    return study, json.loads(plain.to_json())


def test_the_studys_description_is_ours(
    descriptions: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    study, ours = descriptions
    assert foreign_classes(study) == foreign_classes(ours) == []
    assert differences(study, ours, 0) == []
    assert "tokens" in " ".join(differences(study, ours, 1))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("mlp_1", {"config": {"activation": "relu"}}, "expected activation 'gelu', found 'relu'"),
        ("xattn_norm", {"config": {"epsilon": 0.001}}, "expected epsilon 1e-06"),
        ("mlp_1", {"class_name": "Conv1D"}, "expected a Dense, found a Conv1D"),
        ("vit_backbone", {"config": {"num_heads": 4}}, "expected num_heads 2, found 4"),
        ("mlp_1", {"name": "fc"}, "expected a layer mlp_1"),
    ],
)
def test_another_function_of_the_same_shapes_is_told(
    descriptions: tuple[dict[str, Any], dict[str, Any]],
    name: str,
    change: dict[str, Any],
    expected: str,
) -> None:
    study, ours = json.loads(json.dumps(descriptions))
    for layer in study["config"]["layers"]:
        if layer["name"] == name:
            config = {**layer["config"], **change.get("config", {})}
            layer.update({**change, "config": config})
    assert expected in "; ".join(differences(study, ours, 0))


def test_other_connections_are_told(
    descriptions: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    _, ours = descriptions
    last = json.loads(study_model(tiny_vision_backbone(), tiny_text_backbone(), token=3).to_json())
    assert "asks for token 3 of txt_backbone" in "; ".join(differences(last, ours, 0))
    study = json.loads(json.dumps(descriptions[0]))
    text = json.dumps(study).replace('["xattn_norm", 0, 0]', '["xattn_residual", 0, 0]')
    found = differences(json.loads(text), ours, 0)
    assert found == ["flatten_cls reads xattn_residual; expected xattn_norm"]
    # What picks from itself would go round for ever.
    pick = next(x for x in study["config"]["layers"] if x["class_name"] == "GetItem")
    text = json.dumps(study).replace('["txt_backbone", 0, 0]', f'["{pick["name"]}", 0, 0]')
    assert differences(json.loads(text), ours, 0)
    for odd in ({"config": []}, {}, {"config": {"layers": [{"name": "xattn"}]}}):
        assert "functional model of Keras 3" in " ".join(differences(odd, ours, 0))


def test_keras_3_6_wrote_the_same_layout(made: Made) -> None:
    """The study's versions: Keras 3.6 (keras-hub 0.19) wrote this list of this very model."""
    lines = (ROOT / "tests" / "keras_3_6_layout.txt").read_text().split("\n")
    expected = {path: shape for path, _, shape in (line.partition(" ") for line in lines if line)}
    with open_weights(made.folder / "best.weights.h5", "weights", 10**6) as opened:
        assert opened.shapes.keys() == expected.keys()
        backbones = [path for path in expected if "_backbone/" in path]
        assert len(backbones) > 80
        for path in backbones:
            assert "x".join(map(str, opened.shapes[path])) == expected[path]


@pytest.mark.slow
def test_a_killed_import_leaves_no_run(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: Run, manifest: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            made.bring(made.folder / "best.weights.h5", "killed")
    with pytest.raises(RunError, match="no such run"):
        find_run(made.folder / "runs", "killed")
    made.bring(made.folder / "best.weights.h5", "killed")
    assert find_run(made.folder / "runs", "killed").manifest["status"] == "finished"


def test_the_command(made: Made, tmp_path: Path) -> None:
    def invoke(config: Config, *args: str) -> Any:
        file = tmp_path / "featstore.toml"
        file.write_text(render_config(config))
        where = ("--config", str(file), "--runs", str(tmp_path / "runs"))
        weights = str(made.folder / "best.weights.h5")
        return CliRunner().invoke(cli, ["import", weights, *args, *where], prog_name="featstore")

    config = made.project.config
    assert isinstance(config, Config)
    done = invoke(config, "--as", "one", "--labels", "contradiction=1", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    found = json.loads(done.stdout)
    assert found["imported"]["labels"] == "contradiction=1"
    assert found["split"] == "val"
    again = invoke(config, "--as", "one")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "choose another name" in again.stderr.splitlines()[-1]
    elsewhere = dataclasses.replace(
        config, store=dataclasses.replace(config.store, root=str(tmp_path / "cache"))
    )
    bare = invoke(elsewhere, "--as", "two")
    assert bare.exit_code == MissingFeaturesError.exit_code
    assert "extract-vit" in bare.stderr.splitlines()[-1]
    assert not (tmp_path / "runs" / "two").exists()
