"""Every family of encoders: cut before any block, both parts together are the backbone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image
from tiny_presets import TINY_FAMILIES, randomise

from featstore.config import EncodersConfig, StoreConfig
from featstore.encoders.compiled import compile_forward
from featstore.encoders.families import FAMILIES
from featstore.encoders.presets import resolve_preset
from featstore.encoders.spec import text_spec, vision_row_shape, vision_spec
from featstore.encoders.tower import Tower, VisionEncoder, load_backbone, run_blocks
from featstore.errors import ConfigError, PresetError
from featstore.extract.encode import encoding_of

BLOCKS, ROWS, LENGTH = 3, 2, 7
VISION = [name for name, (cls, _) in TINY_FAMILIES.items() if FAMILIES[cls].kind == "vision"]
LEADING = {
    "vit": 1,
    "vit_without_class_token": 0,
    "deit": 2,
    "dinov2": 1,
    "dinov2_registers": 5,
    "dinov3": 3,
    "clip_vision": 1,
    "siglip_vision": 0,
}
# One layer that runs three times is not to be parted.
PARTS = [name for name in TINY_FAMILIES if name != "albert"]
CUTS = [*itertools.product(PARTS, range(BLOCKS + 1)), ("albert", 0), ("albert", BLOCKS)]
WITHOUT_DROPOUT = ("clip_vision", "siglip_vision", "clip_text")


@pytest.fixture(scope="module")
def presets(tiny_family: Callable[[str], Path]) -> dict[str, Path]:
    return {name: tiny_family(name) for name in TINY_FAMILIES}


@pytest.fixture(scope="module")
def towers(presets: dict[str, Path]) -> dict[str, Tower]:
    return {
        name: Tower(load_backbone(resolve_preset(folder), "float32"), kind_of(name))
        for name, folder in presets.items()
    }


def kind_of(name: str) -> str:
    return FAMILIES[TINY_FAMILIES[name][0]].kind


def inputs_of(tower: Tower) -> tuple[Any, np.ndarray | None]:
    """Return random inputs as the backbone wants them, and the padding mask of text."""
    rng = np.random.default_rng(0)
    if tower.family.kind == "vision":
        return tower.inputs(rng.normal(size=(ROWS, 32, 32, 3)).astype(np.float32)), None
    mask = np.arange(LENGTH) < np.array([[LENGTH], [4]])
    return tower.inputs(rng.integers(5, 40, (ROWS, LENGTH), np.int32), mask), mask


def whole(tower: Tower, inputs: Any) -> np.ndarray:
    output = tower.whole(inputs, training=False)
    return np.asarray(output["sequence_output"] if isinstance(output, dict) else output)


def test_every_entry_is_held_to_its_backbone() -> None:
    assert {class_name for class_name, _ in TINY_FAMILIES.values()} == set(FAMILIES)


@pytest.mark.parametrize(("name", "k"), CUTS)
def test_both_parts_together_are_the_backbone(towers: dict[str, Tower], name: str, k: int) -> None:
    tower = towers[name]
    inputs, mask = inputs_of(tower)
    expected = whole(tower, inputs)
    hidden = tower.lower(k)(inputs)
    assert tower.num_blocks == BLOCKS
    assert tuple(hidden.shape) == expected.shape == (ROWS, expected.shape[1], tower.width)
    found = np.asarray(tower.upper(k)(hidden, mask))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if k:
        # The cut is before the block: what enters it is not yet what leaves the encoder.
        assert np.abs(np.asarray(hidden) - expected).max() > 1e-2


@pytest.mark.parametrize("name", PARTS)
def test_each_cut_is_one_block_further_down(towers: dict[str, Tower], name: str) -> None:
    tower = towers[name]
    inputs, mask = inputs_of(tower)
    hidden = [np.asarray(tower.lower(k)(inputs)) for k in range(1, BLOCKS + 1)]
    for k in range(2, BLOCKS + 1):
        block = tower.upper_layers(k)[0]
        given = mask if tower.family.query == "first" else None
        after = run_blocks([block], hidden[k - 1], given, False, tower.arguments)
        np.testing.assert_allclose(np.asarray(after), hidden[k - 2], atol=1e-6)


@pytest.mark.parametrize(("name", "k"), CUTS)
def test_compiled_is_eager(towers: dict[str, Tower], name: str, k: int) -> None:
    tower = towers[name]
    inputs, _ = inputs_of(tower)
    expected = np.asarray(tower.lower(k)(inputs))
    compiled = compile_forward(tower.lower(k), tower.backbone.variables, first_token=1)
    np.testing.assert_allclose(compiled(inputs), expected[:, 1:], atol=1e-5)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_dropout_is_above_the_cut_alone(towers: dict[str, Tower], name: str) -> None:
    tower = towers[name]
    inputs, mask = inputs_of(tower)
    k = tower.shared
    hidden = tower.lower(k)(inputs)
    np.testing.assert_array_equal(np.asarray(hidden), np.asarray(tower.lower(k)(inputs)))
    still = np.asarray(tower.upper(k)(hidden, mask))
    moved = np.asarray(tower.upper(k)(hidden, mask, training=True))
    assert (np.abs(moved - still).max() > 1e-3) == (name not in WITHOUT_DROPOUT)


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_upper_layers_hold_the_weights_above_the_cut(towers: dict[str, Tower], name: str) -> None:
    tower = towers[name]
    assert tower.upper_layers(0) == []
    norm = [] if tower.norm is None else [tower.norm]
    if tower.shared == 1:
        assert tower.upper_layers(2) == [*tower.blocks[1:], *norm]
    assert (tower.norm is not None) == tower.family.final_norm
    known = {id(weight) for weight in tower.backbone.weights}
    found = [weight for layer in tower.upper_layers(BLOCKS) for weight in layer.weights]
    assert found
    assert {id(weight) for weight in found} < known


@pytest.mark.parametrize("k", [-1, BLOCKS + 1])
def test_a_cut_that_is_not_there(towers: dict[str, Tower], k: int) -> None:
    for name, setting in (("vit", "k_vit"), ("bert", "k_txt")):
        for part in (towers[name].lower, towers[name].upper, towers[name].upper_layers):
            with pytest.raises(ConfigError, match=f"{setting} = {k}: .* choose 0 to {BLOCKS}"):
                part(k)


def test_a_tower_changes_nothing_of_its_backbone(presets: dict[str, Path]) -> None:
    backbone = load_backbone(resolve_preset(presets["bert"]), "float32")
    before = [(weight.path, weight.trainable) for weight in backbone.weights]
    for _ in range(2):
        tower = Tower(backbone, "text")
        inputs, mask = inputs_of(tower)
        tower.upper(2)(tower.lower(2)(inputs), mask)
    assert [(weight.path, weight.trainable) for weight in backbone.weights] == before


@pytest.mark.parametrize("name", VISION)
def test_leading_tokens(towers: dict[str, Tower], presets: dict[str, Path], name: str) -> None:
    assert towers[name].leading_tokens == LEADING[name]
    tower = towers[name]
    pixels, _ = inputs_of(tower)
    assert tower.num_tokens == tower.lower(0)(pixels).shape[1] == 16 + LEADING[name]


@pytest.mark.parametrize("name", VISION)
def test_row_shape_is_the_encoders(presets: dict[str, Path], tmp_path: Path, name: str) -> None:
    encoders = EncodersConfig(vit=str(presets[name]))
    for tokens, count in (("patches", 16), ("all", 16 + LEADING[name])):
        spec = vision_spec(encoders, StoreConfig(root=str(tmp_path), tokens=tokens))
        assert vision_row_shape(spec) == (count, 8)


def test_each_boundary_has_its_own_fingerprint(presets: dict[str, Path], tmp_path: Path) -> None:
    encoders, store = EncodersConfig(vit=str(presets["vit"])), StoreConfig(root=str(tmp_path))
    specs = [vision_spec(encoders, store, k) for k in range(BLOCKS + 1)]
    assert len({spec.fingerprint for spec in specs}) == BLOCKS + 1
    assert [spec.boundary for spec in specs] == [3, 2, 1, 0]
    assert [spec.final_norm for spec in specs] == [True, False, False, False]
    assert specs[0] == vision_spec(encoders, store)
    for k in (-1, BLOCKS + 1):
        with pytest.raises(ConfigError, match=f"k_vit = {k}"):
            vision_spec(encoders, store, k)


@pytest.mark.parametrize("name", VISION)
def test_photos_are_encoded_up_to_their_specs_boundary(
    presets: dict[str, Path], tmp_path: Path, name: str
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    encoders = EncodersConfig(vit=str(presets[name]))
    trains = FAMILIES[TINY_FAMILIES[name][0]].trains
    store = StoreConfig(root=str(tmp_path), dtype="float32", encode_batch_size=1)
    if not trains:
        with pytest.raises(ConfigError, match=r"k_vit = 2: blocks of a .* cannot train .* ViT, De"):
            vision_spec(encoders, store, 2)
    for k in (0, 2) if trains else (0,):
        spec = vision_spec(encoders, store, k)
        encoder = VisionEncoder(str(presets[name]), spec.tokens)
        pixels = encoder.to_pixels(photo)[None]
        (row,) = encoding_of(spec, encoder, store).rows(["photo"], [tmp_path / "photo.png"])
        assert row.numbers is not None
        expected = np.asarray(encoder.tower.lower(k)(encoder.tower.inputs(pixels)))
        skipped = 0 if k else LEADING[name]
        np.testing.assert_allclose(row.numbers.values, expected[0, skipped:], atol=1e-5)


def test_a_preset_of_the_other_kind_is_refused(presets: dict[str, Path], tmp_path: Path) -> None:
    store = StoreConfig(root=str(tmp_path))
    encoders = EncodersConfig(vit=str(presets["bert"]), text=str(presets["vit"]))
    with pytest.raises(PresetError, match=r"a BertBackbone .* choose a ViT, DeiT, DINOv2") as one:
        vision_spec(encoders, store)
    with pytest.raises(PresetError, match=r"a ViTBackbone .* DistilBERT, BERT, RoBERTa") as two:
        text_spec(encoders, store, 0)
    assert "\n" not in f"{one.value}{two.value}"


def test_an_entry_that_counts_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class_name, settings = TINY_FAMILIES["dinov2"]
    backbone = getattr(keras_hub.models, class_name)(**settings)
    family = FAMILIES[class_name]
    monkeypatch.setitem(FAMILIES, class_name, type(family)(family.title, family.kind, family.parts))
    with pytest.raises(PresetError, match=r"expected 16 tokens .* found 17"):
        Tower(backbone, "vision")


def test_images_must_be_in_colour() -> None:
    class_name, settings = TINY_FAMILIES["vit"]
    grey = getattr(keras_hub.models, class_name)(**{**settings, "image_shape": (32, 32, 1)})
    with pytest.raises(PresetError, match=r"found \(32, 32, 1\)"):
        Tower(grey, "vision")


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_in_reduced_precision(presets: dict[str, Path], name: str) -> None:
    backbone = load_backbone(resolve_preset(presets[name]), "bfloat16")
    randomise(backbone, seed=3)
    tower = Tower(backbone, kind_of(name))
    inputs, mask = inputs_of(tower)
    hidden = tower.lower(2)(inputs)
    assert keras.backend.standardize_dtype(hidden.dtype) == "bfloat16"
    found = np.asarray(keras.ops.cast(tower.upper(2)(hidden, mask), "float32"))
    np.testing.assert_allclose(found, whole(tower, inputs).astype(np.float32), atol=0.05)
