"""`k_vit`: the last vision blocks train over what enters them, as they do end to end."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from test_engine import CHANGING, arrays
from test_families import LEADING, presets
from test_parity import Rows, assert_same_numbers
from tiny_presets import TINY_FAMILIES
from tiny_runs import prepared, read_again_here, tiny_config, with_train, worker_here

import trainer
from featstore.config import EncodersConfig, StoreConfig
from featstore.encoders.families import FAMILIES
from featstore.encoders.presets import Preset, resolve_preset
from featstore.encoders.spec import vision_row_shape, vision_spec
from featstore.encoders.tower import TextEncoder, Tower, load_backbone
from featstore.errors import ConfigError, MissingFeaturesError, PresetError, StaleFeaturesError
from featstore.progress import SILENT
from featstore.project import Project
from featstore.store.store import VisionStore
from trainer.commands.main import cli
from trainer.config import Config, TrainConfig, load_config, render_config
from trainer.model import cached
from trainer.model.cached import build_cached_model, load_pretrained
from trainer.model.end_to_end import build_end_to_end, check_frozen
from trainer.model.sizes import count_parameters, vision_parameters
from trainer.model.tails import VisionTail
from trainer.model.weights import random_state, trained_weights
from trainer.results.parity import check_parity
from trainer.run.engine import Engine, Engines, architecture
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training

__all__ = ["presets"]
VISION = [name for name, (cls, _) in TINY_FAMILIES.items() if FAMILIES[cls].trains]
BLOCKS, ROWS = 3, 4
STUDY_VIT = {
    "class_name": "ViTBackbone",
    "config": {
        "image_shape": (224, 224, 3),
        "patch_size": 16,
        "num_layers": 12,
        "num_heads": 12,
        "hidden_dim": 768,
        "mlp_dim": 3072,
    },
}


def settings_of(k_vit: int, **kwargs: Any) -> TrainConfig:
    return TrainConfig(
        **{"k_txt": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 6} | kwargs, k_vit=k_vit
    )


@pytest.fixture(scope="module")
def text(tiny_text: Path) -> TextEncoder:
    return TextEncoder(str(tiny_text), 20)


def cached_of(
    preset: Preset,
    text: TextEncoder,
    train: TrainConfig,
    row_shape: tuple[int, int],
    tokens: str = "patches",
) -> keras.Model:
    """Return the cached model, with the presets' weights."""
    num_tokens, width = row_shape
    model = build_cached_model(
        text.preset.config,
        width,
        num_tokens,
        train,
        feature_dtype="float32",
        vision_config=preset.config,
        tokens=tokens,
    )
    load_pretrained(model, text.preset, preset if train.k_vit else None)
    return model


class Pair:
    """A cached and an end-to-end model over the same rows, each with the presets' weights."""

    def __init__(
        self, preset: Preset, text: TextEncoder, train: TrainConfig, tokens: str = "patches"
    ) -> None:
        backbone = load_backbone(preset, "float32")
        tower = Tower(backbone, "vision")
        pixels = np.random.default_rng(0).normal(size=(ROWS, 32, 32, 3)).astype(np.float32)
        features = np.asarray(tower.lower(train.k_vit)(tower.inputs(pixels)))
        if not train.k_vit and tokens == "patches":
            features = features[:, tower.leading_tokens :]
        ids, mask = text.tokenize(["a dog", "cat", "the man sits on a ball", "two dogs"])
        hidden = text.encode(ids, mask, train.k_txt)
        self.rows = Rows.__new__(Rows)
        self.rows.cached = {"features": features, "hidden": hidden, "padding_mask": mask}
        inputs = {"input_ids": ids, "attention_mask": mask.astype(np.int32)}
        self.rows.end_to_end = {"pixel_values": pixels, **inputs}
        self.cached = cached_of(preset, text, train, (features.shape[1], tower.width), tokens)
        self.end_to_end = build_end_to_end(backbone, text.backbone, train, tokens)


@pytest.mark.parametrize("k_vit", range(BLOCKS + 1))
@pytest.mark.parametrize("name", VISION)
def test_cached_equals_end_to_end(
    presets: dict[str, Path], text: TextEncoder, name: str, k_vit: int
) -> None:
    preset = resolve_preset(presets[name])
    pair = Pair(preset, text, settings_of(k_vit))
    # Logits to 1e-5, and the gradient of each variable that trains, in its own size.
    assert_same_numbers(pair.cached, pair.end_to_end, pair.rows)
    blocks = [name for name in trained_weights(pair.cached) if name.startswith("vit_backbone/")]
    assert bool(blocks) == bool(k_vit)
    assert len({name.split("/")[1] for name in blocks}) == (k_vit + 1 if k_vit else 0)
    check_frozen(pair.end_to_end)
    found = sum(weight.shape.num_elements() for weight in pair.cached.trainable_variables)
    assert found == count_parameters(
        text.preset.config, preset.config["config"], settings_of(k_vit)
    )


@pytest.mark.parametrize("name", ["deit", "dinov2_registers"])
def test_the_head_may_see_the_leading_tokens(
    presets: dict[str, Path], text: TextEncoder, name: str
) -> None:
    preset = resolve_preset(presets[name])
    pair, other = (Pair(preset, text, settings_of(2), tokens) for tokens in ("all", "patches"))
    assert_same_numbers(pair.cached, pair.end_to_end, pair.rows)
    found = [np.asarray(p.cached(p.rows.cached)) for p in (pair, other)]
    assert np.abs(found[0] - found[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2"])
def test_dropout_is_the_encoders_own_and_above_the_cut_alone(
    presets: dict[str, Path], text: TextEncoder, name: str
) -> None:
    for k_vit in (0, 1):
        train = settings_of(k_vit, k_txt=0, dropout=0.0)
        pair = Pair(resolve_preset(presets[name]), text, train)
        for model, inputs in (
            (pair.cached, pair.rows.cached),
            (pair.end_to_end, pair.rows.end_to_end),
        ):
            moved = [np.asarray(model(inputs, training=True)) for _ in range(2)]
            assert (np.abs(moved[0] - moved[1]).max() > 1e-4) == bool(k_vit)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_blocks_are_read_alone_from_the_file(
    presets: dict[str, Path], text: TextEncoder, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset, loaded = resolve_preset(presets[name]), []

    def noting(preset: Preset, precision: str) -> Any:
        loaded.append(preset.name)
        return load_backbone(preset, precision)

    tower = Tower(load_backbone(preset, "float32"), "vision")
    row_shape = (tower.num_tokens, tower.width)
    monkeypatch.setattr(cached, "load_backbone", noting)
    for k_vit in (1, 2, BLOCKS):
        models = []
        for file in (cached.WEIGHTS_FILE, "in another form"):
            monkeypatch.setattr(cached, "WEIGHTS_FILE", file)
            models.append(cached_of(preset, text, settings_of(k_vit, k_txt=0), row_shape))
            assert loaded == ([] if file.endswith(".h5") else [preset.name])
        monkeypatch.undo()
        monkeypatch.setattr(cached, "load_backbone", noting)
        loaded.clear()
        for one, two in zip(*(arrays(model.variables) for model in models), strict=True):
            np.testing.assert_array_equal(one, two)


def test_parameters_at_the_studys_size(text: TextEncoder) -> None:
    tail = VisionTail(STUDY_VIT, 1, skipped=1)
    norm = tail.trained_layers["ln"]
    assert norm.count_params() == 1_536
    assert tail.count_params() == 7_087_872 + 1_536
    assert list(tail.trained_layers) == ["transformer_block_12", "ln"]
    assert tail.compute_output_shape((None, 197, 768)) == (None, 196, 768)
    blocks = {k: vision_parameters(STUDY_VIT["config"], k) for k in (0, 1, 2, 12)}
    assert blocks == {0: 0, 1: 7_089_408, 2: 14_177_280, 12: 85_056_000}


def test_a_tail_is_rebuilt_from_its_config(presets: dict[str, Path]) -> None:
    tail = VisionTail(resolve_preset(presets["dinov2"]).config, 2, skipped=1, name="vision_tail")
    again = VisionTail.from_config(json.loads(json.dumps(tail.get_config())))
    again.set_weights(tail.get_weights())
    hidden = np.random.default_rng(0).normal(size=(2, 17, 8)).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(tail(hidden)), np.asarray(again(hidden)))


def test_swiglu_is_counted() -> None:
    config = {
        "image_shape": (16, 16, 3),
        "patch_size": 8,
        "num_layers": 4,
        "num_heads": 2,
        "hidden_dim": 8,
        "intermediate_dim": 13,
        "use_swiglu_ffn": True,
        "position_embedding_shape": (16, 16, 3),
    }
    tail = VisionTail({"class_name": "DINOV2Backbone", "config": config}, 2)
    config = {**config, "layer_scale_init_value": 1.0}
    assert tail.count_params() == vision_parameters(config, 2)


def test_paths_that_are_dropped_without_a_seed_are_refused(presets: dict[str, Path]) -> None:
    config = resolve_preset(presets["dinov2"]).config
    config = {**config, "config": {**config["config"], "drop_path_rate": 0.1}}
    with pytest.raises(PresetError, match=r"drop_path_rate is 0.1.*--k-vit 0"):
        VisionTail(config, 1)


@pytest.mark.parametrize("name", VISION)
def test_later_blocks_need_all_tokens(presets: dict[str, Path], name: str) -> None:
    encoders = EncodersConfig(vit=str(presets[name]))
    specs = {
        (tokens, k): vision_spec(encoders, StoreConfig(tokens=tokens), k)
        for tokens in ("patches", "all")
        for k in range(3)
    }
    for k in (1, 2):
        assert specs["patches", k] == specs["all", k]
        assert vision_row_shape(specs["patches", k]) == vision_row_shape(specs["all", 0])
        assert str(specs["all", k].command(split="val")).endswith(
            f"extract-vit --k-vit {k} --split val`"
        )
    assert len({spec.fingerprint for spec in specs.values()}) == 4
    assert vision_row_shape(specs["all", 1])[0] == 16 + LEADING[name]
    assert str(specs["all", 0].command()).endswith("extract-vit`")


# --- engines


def engine_config(vit: Path, text: Path, **train: Any) -> Config:
    config = tiny_config_without_data(vit, text)
    return with_train(config, **{"k_txt": 1, "k_vit": 1} | train)


def tiny_config_without_data(vit: Path, text: Path) -> Config:
    return Config(
        encoders=EncodersConfig(vit=str(vit), text=str(text)),
        train=TrainConfig(num_heads=2, head_dim=4, mlp_dim=8),
    )


@pytest.mark.parametrize("fixed", [{}, {"k_vit": 2, "k_txt": 0}, {"dtype_policy": "mixed_float16"}])
def test_a_reset_engine_is_as_new(tiny_vit: Path, tiny_text: Path, fixed: dict[str, Any]) -> None:
    engine = Engine(engine_config(tiny_vit, tiny_text, **fixed), (17, 16))

    @settings(max_examples=3, deadline=None)
    @given(CHANGING)
    def check(changes: dict[str, Any]) -> None:
        config = engine_config(tiny_vit, tiny_text, **fixed | changes)
        for variable in (*engine.model.variables, *engine.optimizer.variables):
            variable.assign(keras.ops.ones(variable.shape, variable.dtype))
        engine.reset(config.train)
        new = Engine(config, (17, 16), again=False)
        for ours, theirs in (
            (engine.model.variables, new.model.variables),
            (engine.optimizer.variables, new.optimizer.variables),
            (random_state(engine.model).values(), random_state(new.model).values()),
        ):
            for one, two in zip(arrays(ours), arrays(theirs), strict=True):
                np.testing.assert_array_equal(one, two)

    check()


def test_models_are_shared_where_the_blocks_are_the_same(tiny_vit: Path, tiny_text: Path) -> None:
    base = engine_config(tiny_vit, tiny_text)
    all_tokens = dataclasses.replace(base, store=dataclasses.replace(base.store, tokens="all"))
    keys = [
        architecture(config, (17, 16), "text", vision)
        for config, vision in (
            (base, "one"),
            (with_train(base, lr=1e-3, seed=4), "one"),
            (base, "two"),
            (all_tokens, "one"),
            (with_train(base, k_vit=2), "one"),
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    frozen = [with_train(config, k_vit=0) for config in (base, all_tokens)]
    assert len({architecture(config, (17, 16), "text", "x") for config in frozen}) == 1


# --- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Path:
    """Folder of a project, its store for `k_vit` 1, and a run."""
    folder = tmp_path_factory.mktemp("blocks")
    config = tiny_config(folder, tiny_vit, tiny_text, epochs=1, k_txt=1, k_vit=1)
    (folder / "featstore.toml").write_text(render_config(config))
    fit(Training(Run(folder / "runs" / "first"), prepared(config), config.train))
    return folder


@pytest.fixture
def project(home: Path) -> Project:
    return Project.load(home / "featstore.toml")


def command(home: Path, *arguments: str) -> tuple[int, str, str]:
    config = ["--config", str(home / "featstore.toml")]
    done = CliRunner().invoke(cli, [*arguments, *config])
    return done.exit_code, done.stdout, done.stderr


def test_a_run_is_the_end_to_end_model(home: Path) -> None:
    run = Run(home / "runs" / "first")
    result, failure = check_parity(run, "test", 12)
    assert failure is None, failure
    assert result["quantities"]["logits"]["largest"] < 1e-4
    assert run.config.train.k_vit == 1
    vision = run.manifest["features"]["vision"]
    assert vision["row_shape"] == [17, 16]
    assert vision["boundary"] == 1
    # A block of width 16 and inner width 32, the norm, a text layer and the head.
    text = resolve_preset(run.config.encoders.text).config
    vit = resolve_preset(run.config.encoders.vit).config["config"]
    expected = count_parameters(text, vit, run.config.train)
    assert run.manifest["parameters"]["trainable"] == expected


def test_the_blocks_have_moved(home: Path, tiny_vit: Path) -> None:
    model = trainer.load_run(home / "runs" / "first").model
    block = model.get_layer("vision_tail").trained_layers["transformer_block_2"]
    pretrained = Tower(load_backbone(resolve_preset(tiny_vit), "float32"), "vision").blocks[1]
    moved = [
        np.abs(one - two).max() > 1e-6
        for one, two in zip(arrays(block.weights), arrays(pretrained.weights), strict=True)
    ]
    # Softmax ignores the bias of the keys.
    assert sum(moved) >= len(moved) - 1


def test_missing_features_are_said_with_their_command(home: Path, project: Project) -> None:
    other = project.at_k_vit(2)
    with pytest.raises(StaleFeaturesError, match=r"boundary: wanted 0, stored 1") as found:
        other.images()
    assert "extract-vit --k-vit 2" in str(found.value)
    code, _, line = command(home, "train", "--k-vit", "2", "--name", "second")
    assert code == 1
    (line,) = (line for line in line.splitlines() if line.startswith("error: "))
    assert "extract-vit --k-vit 2" in line
    code, _, line = command(home, "train", "--k-vit", "3", "--name", "second")
    assert code == 2
    assert "[train] k_vit = 3: the vision encoder has 2 transformer blocks" in line


def test_a_split_that_was_not_extracted(home: Path, tmp_path: Path) -> None:
    config = Project.load(home / "featstore.toml").config
    project = Project(
        dataclasses.replace(config, store=dataclasses.replace(config.store, root=str(tmp_path)))
    ).at_k_vit(1)
    project.extract("vit", "train", show=SILENT)
    with pytest.raises(MissingFeaturesError, match="extract-vit --k-vit 1 --split val"):
        project.usable("val")


def test_the_command_extracts_what_enters_the_blocks(home: Path) -> None:
    code, out, _ = command(home, "extract-vit", "--k-vit", "2", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0
    spec = vision_spec(
        Project.load(home / "featstore.toml").config.encoders, StoreConfig(dtype="float32"), 2
    )
    assert found["folder"].endswith(spec.fingerprint)
    assert found["cached"] == 0
    # Those of the file's own k_vit are there.
    code, out, _ = command(home, "extract-vit", "--dry-run", "--json")
    assert json.loads(out)["todo"] == 0


def test_extraction_in_python(project: Project, tmp_path: Path) -> None:
    project = Project(
        dataclasses.replace(
            project.config, store=dataclasses.replace(project.config.store, root=str(tmp_path))
        ),
        file=project.file,
    )
    plan, _ = project.extract("vit", "val", k_vit=2, show=SILENT)
    assert plan.job.spec.boundary == 0
    rows = project.at_k_vit(2).images()
    assert isinstance(rows, VisionStore)
    assert rows.row_shape == (17, 16)
    project.extract("text", "val", show=SILENT)
    assert project.features("val", k_vit=2)[0]["features"].shape == (17, 16)


def test_predictions_and_figures_come_from_the_store(home: Path, tmp_path: Path) -> None:
    run = trainer.load_run(home / "runs" / "first")
    figures = run.evaluate("test", show=SILENT)
    assert 0 <= figures["at_threshold"]["accuracy"] <= 1
    examples = run.project.dataset.examples
    row = int(run.project.dataset.rows("test")[0])
    image, text = examples.image_ids[row], examples.hypotheses[row]
    path = run.project.dataset.images.lookup(image)
    one = run.predict_pair(path, text, SILENT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"Image_ID": image, "Hypothesis": text}) + "\n")
    for cache in (True, False):
        (found,) = run.predict(rows, show=SILENT, cache=cache)["probability_entailment"]
        assert found == pytest.approx(one["probability_entailment"], abs=1e-6)


@pytest.mark.slow
def test_a_run_of_other_blocks_starts_from_it(home: Path, project: Project) -> None:
    first = trainer.load_run(home / "runs" / "first")
    for k_vit, taken in ((0, set()), (1, {"vit_backbone/transformer_block_2", "vit_backbone/ln"})):
        project.at_k_vit(k_vit).extract("vit", show=SILENT)
        run = trainer.train(
            project,
            name=f"from-first-{k_vit}",
            runs=home / "runs",
            init_from="first",
            show=SILENT,
            k_vit=k_vit,
        )
        layers = set(run.manifest["initialised_layers"])
        assert {name for name in layers if name.startswith("vit_backbone")} == taken
        assert {"xattn", "mlp_1", "transformer_layer_3"} <= layers
    assert first.weights_path.exists()


@pytest.mark.slow
def test_engines_serve_one_run_after_another(home: Path, project: Project, tmp_path: Path) -> None:
    engines, figures = Engines(), []
    train = load_config(home / "featstore.toml").train
    for name, kept in (("a", engines), ("b", engines), ("c", None)):
        training = Training(Run(tmp_path / name), project, train, engines=kept)
        figures.append(fit(training)["loss"])
    assert figures[0] == figures[1] == figures[2]
    assert figures[0] == trainer.load_run(home / "runs" / "first").metrics["loss"]


@pytest.fixture(scope="module")
def exported(home: Path) -> Callable[[str], Path]:
    """Export the run, once to each name."""

    @functools.cache
    def export(name: str) -> Path:
        file = home / "exports" / name
        file.parent.mkdir(exist_ok=True)
        with read_again_here():
            trainer.load_run(home / "runs" / "first").export(file, rows=4, show=SILENT)
        return file

    return export


@pytest.mark.slow
@pytest.mark.parametrize("format", ["model.keras", "model.weights.h5", "model.safetensors"])
def test_exports_carry_the_blocks_and_are_imported(
    home: Path, exported: Callable[[str], Path], format: str
) -> None:
    run = trainer.load_run(home / "runs" / "first")
    # Which has the weights in both forms.
    written = exported("model.weights.h5" if format.endswith("safetensors") else format)
    file = written.with_name(format)
    config = load_config(home / "featstore.toml")
    frozen = Project(with_train(config, k_vit=0, k_txt=0))
    frozen.extract("vit", show=SILENT)
    again = trainer.import_weights(
        file, frozen, name=f"again-{format}", runs=home / "runs", show=SILENT
    )
    assert again.config.train.k_vit == again.config.train.k_txt == 1
    assert again.metrics["loss"] == pytest.approx(run.metrics["loss"], abs=1e-6)
    assert "vit_backbone/transformer_block_2" in again.manifest["imported"]["layers"]
    card = json.loads(written.with_name(f"{written.name}.json").read_text())
    assert (card["k_vit"], card["encoders"]["vision"]["tokens"]) == (1, "patches")


@pytest.mark.slow
def test_a_search_may_vary_it(home: Path, project: Project) -> None:
    project.at_k_vit(0).extract("vit", show=SILENT)
    with worker_here():
        found = trainer.search(
            project,
            space={
                "train": {"k_vit": {"choice": [0, 1]}, "k_txt": 0},
                "search": {"sampler": "grid"},
            },
            name="blocks",
            runs=home / "runs",
            show=SILENT,
            epochs=1,
        )
    assert sorted(found.trials["k_vit"]) == [0, 1]
    assert set(found.trials["state"]) == {"complete"}


def test_more_blocks_than_there_are(tiny_vit: Path, tiny_text: Path) -> None:
    config = engine_config(tiny_vit, tiny_text, k_vit=3)
    with pytest.raises(ConfigError, match="choose 0 to 2"):
        Engine(config, (17, 16))
