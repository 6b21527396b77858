"""Runs on the encoders of every family: parity at every k_txt, training, export; JAX too."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from on_jax import run_on_jax
from test_parity import assert_same_numbers, settings
from tiny_presets import TINY_FAMILIES
from tiny_runs import read_again_here, tiny_config, with_train

import featstore
import trainer
from featstore.encoders.families import FAMILIES
from featstore.encoders.presets import resolve_preset
from featstore.encoders.spec import text_spec, vision_spec
from featstore.encoders.tower import TextEncoder, Tower, load_backbone
from featstore.errors import ConfigError, PresetError
from featstore.progress import SILENT
from trainer.config import render_config
from trainer.model.cached import build_cached_model, load_pretrained
from trainer.model.description import differences
from trainer.model.end_to_end import build_end_to_end
from trainer.model.plain import build_plain, transfer_to_plain
from trainer.model.sizes import count_parameters
from trainer.model.weights import trained_weights

BLOCKS, LENGTH = 3, 16
# DistilBERT is in most other tests, and ALBERT's groups differ from its one in the model alone.
OTHERWISE_RUN = ("distil_bert", "albert_groups")
# Each family once at the least; "clip" and "siglip" have both towers.
PAIRS = {
    "distil_bert": "vit_without_class_token",
    "bert": "deit",
    "roberta": "dinov2_registers",
    "xlm_roberta": "dinov3",
    "albert": "siglip",
    "albert_groups": "vit",
    "clip_text": "clip_vision",
    "clip": "clip",
}
# Of ALBERT's one layer the last runs cannot train alone.
CUTS = [(text, k) for text in PAIRS for k in range(BLOCKS + 1) if text != "albert" or k % 3 == 0]

Preset = Callable[[str], Path]
Pair = Callable[[str], tuple[Tower, Tower]]


@pytest.fixture(scope="module")
def pair(tiny_family: Preset) -> Pair:
    """Both towers of a pair, by its text family, loaded once; what a model takes over is these."""

    @functools.cache
    def opened(text: str) -> tuple[Tower, Tower]:
        names = {"vision": PAIRS[text], "text": text}
        presets = {k: resolve_preset(tiny_family(name)).tower(k) for k, name in names.items()}
        loaded = {k: Tower(load_backbone(preset, "float32"), k) for k, preset in presets.items()}
        return loaded["vision"], loaded["text"]

    return opened


def rows_of(vision: Tower, text: Tower, k_txt: int) -> SimpleNamespace:
    """Return the same three rows as both models want them."""
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    ids = rng.integers(5, 40, (3, 9), np.int32)
    mask = np.arange(9) < np.array([[9], [4], [2]])
    cached = {
        "features": np.asarray(vision.lower(0)(vision.inputs(pixels)))[:, vision.leading_tokens :],
        "hidden": np.asarray(text.lower(k_txt)(text.inputs(ids, mask))),
        "padding_mask": mask,
    }
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask.astype(np.int32)}
    return SimpleNamespace(cached=cached, end_to_end=given)


def test_every_family_is_run() -> None:
    towers = {"clip": ("clip_vision", "clip_text"), "siglip": ("siglip_vision",)}
    run = {part for name in [*PAIRS, *PAIRS.values()] for part in towers.get(name, (name,))}
    assert {TINY_FAMILIES[name][0] for name in run} == set(FAMILIES)


@pytest.mark.parametrize(("name", "k_txt"), CUTS)
def test_cached_is_end_to_end(tiny_family: Preset, pair: Pair, name: str, k_txt: int) -> None:
    vision, text = pair(name)
    rows, num_tokens = rows_of(vision, text, k_txt), vision.num_tokens - vision.leading_tokens
    preset = resolve_preset(tiny_family(name)).tower("text")
    oracle = build_end_to_end(vision.backbone, text.backbone, settings(k_txt))
    for fast in (True, False) if k_txt == BLOCKS else (True,):
        train = settings(k_txt, fast_path=fast)
        model = build_cached_model(
            preset.config, vision.width, num_tokens, train, feature_dtype="float32"
        )
        load_pretrained(model, preset)
        assert_same_numbers(model, oracle, rows)
        assert (
            count_parameters(preset.config, {"hidden_dim": vision.width}, train)
            == model.count_params()
        )


@pytest.mark.parametrize("name", ["xlm_roberta", "albert", "clip"])
def test_the_plain_model_is_the_end_to_end_model(pair: Pair, name: str) -> None:
    vision, text = pair(name)
    rows = rows_of(vision, text, BLOCKS).end_to_end
    expected = build_end_to_end(vision.backbone, text.backbone, settings(BLOCKS))
    logits = np.asarray(expected(rows))
    plain = build_plain(vision.backbone, text.backbone, settings(BLOCKS))
    transfer_to_plain(expected, plain, settings(BLOCKS))
    np.testing.assert_allclose(np.asarray(plain(rows)), logits, atol=1e-6)
    # As it is imported again, when its operations have other names.
    described = json.loads(plain.to_json())
    again = json.loads(build_plain(vision.backbone, text.backbone, settings(BLOCKS)).to_json())
    assert differences(described, again, vision.leading_tokens) == []
    modules = {type(layer).__module__.partition(".")[0] for layer in plain._flatten_layers()}
    assert modules == {"keras", "keras_hub"}


def test_the_query_of_clip_is_its_end_token(tiny_family: Preset) -> None:
    """As keras-hub's own pooler has it; what stands behind it, or is cut off, changes nothing."""
    from keras_hub.src.models.clip.clip_layers import CLIPTextPooler

    text = TextEncoder(tiny_family("clip"), LENGTH)
    ids, mask = text.tokenize(["a dog", "The DOG runs in the park , the man is not on a red ball"])
    end = text.preprocessor.tokenizer.end_token_id
    assert ids[1, -1] == ids[0, mask[0].sum() - 1] == end
    states = text.encode(ids, mask)
    pooled = np.asarray(CLIPTextPooler()(states, ids))
    config = text.preset.config
    tail = build_cached_model(config, 8, 16, settings(0)).get_layer("text_tail")
    np.testing.assert_array_equal(np.asarray(tail(states, padding_mask=mask))[:, 0], pooled)
    ids[0, mask[0].sum() :] = 3
    np.testing.assert_array_equal(text.encode(ids, mask)[0, : mask[0].sum()], states[0, mask[0]])


def test_a_tower_of_two_is_the_tower_alone(tiny_family: Preset) -> None:
    pair = resolve_preset(tiny_family("clip"))
    whole = load_backbone(pair, "float32")
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(whole.vision_encoder({"images": image}))
    vision = pair.tower("vision")
    for precision, tolerance in (("float32", 0), ("bfloat16", 0.1)):
        tower = Tower(load_backbone(vision, precision), "vision")
        assert tower.backbone.dtype_policy.name == precision
        found = np.asarray(tower.lower(0)(tower.inputs(image)), np.float32)
        np.testing.assert_allclose(found, expected, atol=tolerance)
    assert vision.tower("vision") is vision
    assert vision.weights_digest == pair.weights_digest


def test_what_cannot_be_cut_is_one_line(tiny_family: Preset, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", tiny_family("siglip"), tiny_family("siglip"))
    assert vision_spec(config.encoders, config.store).encoder == "SigLIPVisionEncoder"
    with pytest.raises(PresetError, match=r"a SigLIPTextEncoder cannot .* ALBERT or CLIP preset$"):
        text_spec(config.encoders, config.store, 0)
    albert = tiny_config(tmp_path / "other", tiny_family("vit"), tiny_family("albert"))
    with pytest.raises(
        ConfigError, match=r"k_txt = 2: .* 3 in a row with the same weights, .* choose 0 or 3$"
    ):
        text_spec(albert.encoders, albert.store, 2)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.weights.h5").touch()
    (broken / "config.json").write_text(json.dumps({"class_name": "CLIPBackbone", "config": {}}))
    with pytest.raises(PresetError, match="a CLIPBackbone has no vision_encoder"):
        resolve_preset(broken).tower("vision")


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in PAIRS if text not in OTHERWISE_RUN])
def test_from_photos_to_an_export(tiny_family: Preset, tmp_path: Path, text: str) -> None:
    vision = tiny_family(PAIRS[text])
    k_txt = BLOCKS if text == "albert" else 2
    config = tiny_config(tmp_path, vision, tiny_family(text), k_txt=k_txt, epochs=1)
    project = featstore.Project(config)
    project.extract("vit", show=SILENT)
    run = trainer.train(project, name="run", runs=tmp_path / "runs", show=SILENT)
    preset = resolve_preset(tiny_family(text)).tower("text")
    model = build_cached_model(preset.config, 8, 16, config.train)
    load_pretrained(model, preset)
    before, after = trained_weights(model), trained_weights(run.model)
    assert before.keys() == after.keys()
    moved = [name for name in after if np.abs(after[name] - before[name].numpy()).max() > 0]
    # Softmax ignores the bias of the keys.
    assert set(after) - set(moved) <= {name for name in after if name.endswith("key/bias")}
    # Compared from pixels on.
    with read_again_here():
        check = run.export(tmp_path / "model.keras", rows=4, show=SILENT)["check"]
    assert check["rows"] == 4


JAX = """
import dataclasses, sys
from pathlib import Path
import keras
import featstore, trainer
from featstore.progress import SILENT
from tiny_runs import read_again_here
from trainer.config import load_config

assert keras.backend.backend() == "jax"
for folder in map(Path, sys.argv[1:]):
    config = load_config(folder / "config.toml")
    project = featstore.Project(config)
    project.extract("vit", show=SILENT)
    run = trainer.train(project, name="run", runs=folder, show=SILENT)
    figures = run.evaluate("test", show=SILENT)
    found = run.predict(Path(config.data.rows), show=SILENT)
    assert not found["reason"].any() and found["Label"].notna().all()
    assert run.parity(rows=16, show=SILENT)["failure"] is None
    with read_again_here():
        check = run.export(folder / "model.keras", rows=8, show=SILENT)["check"]
    assert check["rows"] == 8
    print(folder.name, figures["loss"], figures["at_threshold"]["accuracy"])
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="jax is not installed")
def test_the_main_ways_on_jax(tiny_family: Preset, tmp_path: Path) -> None:
    folders = [tmp_path / text for text in ("clip", "roberta")]
    for folder in folders:
        presets = (tiny_family(PAIRS[folder.name]), tiny_family(folder.name))
        config = tiny_config(folder / "data", *presets, k_txt=2, epochs=1)
        (folder / "config.toml").write_text(render_config(with_train(config, dropout=0.0)))
    printed = run_on_jax("-c", JAX, *map(str, folders)).splitlines()[-2:]
    for folder, line in zip(folders, printed, strict=True):
        name, loss, accuracy = line.split()
        assert name == folder.name
        assert np.isfinite(float(loss))
        assert 0 <= float(accuracy) <= 1
