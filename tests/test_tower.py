"""The text layers that train: the first token's shortcut, sizes, seeds, weights, saving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest
from tiny_presets import tiny_text_backbone

from featstore.encoders.presets import resolve_preset
from featstore.errors import ConfigError, PresetError, RunError
from trainer.config import TrainConfig
from trainer.model.cached import build_cached_model, load_text_layers, text_layer_configs
from trainer.model.tails import TextTail
from trainer.model.weights import random_state, set_random_state

STUDY_TEXT = {
    "class_name": "DistilBertBackbone",
    "config": {
        "vocabulary_size": 30522,
        "num_layers": 6,
        "num_heads": 12,
        "hidden_dim": 768,
        "intermediate_dim": 3072,
        "dropout": 0.1,
        "max_sequence_length": 512,
    },
}


def tiny(k_txt: int = 2, **kwargs: Any) -> TrainConfig:
    return TrainConfig(k_txt=k_txt, num_heads=2, head_dim=4, mlp_dim=6, **kwargs)


@pytest.fixture(scope="module")
def config(tiny_text: Path) -> dict[str, Any]:
    return resolve_preset(tiny_text).config


def batch(rows: int = 3, length: int = 5, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "features": rng.normal(size=(rows, 7, 9)).astype(dtype),
        "hidden": rng.normal(size=(rows, length, 16)).astype(dtype),
        "padding_mask": np.arange(length) < rng.integers(1, length + 1, size=(rows, 1)),
    }


@pytest.mark.parametrize(("k_txt", "count"), [(0, 2_758_145), (2, 16_933_889), (3, 24_021_761)])
def test_sizes_of_the_study(k_txt: int, count: int) -> None:
    model = build_cached_model(STUDY_TEXT, 768, 196, TrainConfig(k_txt=k_txt))
    assert model.count_params() == count
    assert sum(weight.value.shape.num_elements() for weight in model.trainable_weights) == count
    names = [layer.name for layer in model.get_layer("text_tail").transformer_layers]
    assert names == [f"transformer_layer_{i}" for i in range(6 - k_txt, 6)]


@pytest.mark.parametrize("fast", [True, False])
def test_tail_is_the_backbones_end(config: dict[str, Any], fast: bool) -> None:
    backbone = tiny_text_backbone()
    hidden, mask = batch()["hidden"], batch()["padding_mask"]
    for k_txt in range(5):
        model = build_cached_model(
            config, 9, 7, tiny(k_txt, fast_path=fast), feature_dtype="float32"
        )
        load_text_layers(model, backbone)
        expected = hidden
        for layer in backbone.transformer_layers[4 - k_txt :]:
            expected = layer(expected, padding_mask=mask, training=False)
        found = model.get_layer("text_tail")(hidden, padding_mask=mask, training=False)
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected)[:, :1], atol=1e-5)


def test_layer_configs_are_the_backbones() -> None:
    families = [
        (tiny_text_backbone(num_layers=11), "DistilBertBackbone"),
        (
            keras_hub.models.BertBackbone(
                vocabulary_size=50,
                num_layers=3,
                num_heads=2,
                hidden_dim=8,
                intermediate_dim=10,
                dropout=0.2,
            ),
            "BertBackbone",
        ),
        (
            keras_hub.models.RobertaBackbone(
                vocabulary_size=50, num_layers=3, num_heads=2, hidden_dim=8, intermediate_dim=10
            ),
            "RobertaBackbone",
        ),
    ]
    for backbone, class_name in families:
        saved = {"class_name": class_name, "config": backbone.get_config()}
        expected = [layer.get_config() for layer in backbone.transformer_layers[-3:]]
        for layer_config in expected:
            del layer_config["dtype"]
        assert text_layer_configs(saved, 3) == expected


def test_other_text_configs_are_errors(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"k_txt = 5: .* choose 0 to 4"):
        text_layer_configs(config, 5)
    with pytest.raises(PresetError, match="NoSuchBackbone"):
        text_layer_configs({"class_name": "NoSuchBackbone", "config": {"num_layers": 2}}, 1)


def test_features_enter_in_the_stores_dtype(config: dict[str, Any]) -> None:
    half = build_cached_model(config, 9, 7, tiny(), feature_dtype="float16")
    single = build_cached_model(config, 9, 7, tiny(), feature_dtype="float32")
    single.set_weights(half.get_weights())
    assert half.input["features"].dtype == half.input["hidden"].dtype == "float16"
    rows = batch(dtype="float16")
    widened = {
        key: value if value.dtype == bool else value.astype(np.float32)
        for key, value in rows.items()
    }
    np.testing.assert_allclose(np.asarray(half(rows)), np.asarray(single(widened)), atol=1e-6)


def test_padding_changes_nothing(config: dict[str, Any]) -> None:
    model = build_cached_model(config, 9, 7, tiny(4), feature_dtype="float32")
    rows = batch()
    longer = dict(rows)
    longer["hidden"] = np.pad(rows["hidden"], ((0, 0), (0, 6), (0, 0)), constant_values=3)
    longer["padding_mask"] = np.pad(rows["padding_mask"], ((0, 0), (0, 6)))
    np.testing.assert_allclose(np.asarray(model(longer)), np.asarray(model(rows)), atol=1e-5)


def test_seed_decides_the_weights(config: dict[str, Any]) -> None:
    first = build_cached_model(config, 9, 7, tiny(2, seed=1))
    again = build_cached_model(config, 9, 7, tiny(2, seed=1))
    other = build_cached_model(config, 9, 7, tiny(2, seed=2))
    deeper = build_cached_model(config, 9, 7, tiny(3, seed=1))
    kernel = "xattn"
    for one, two in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    head = [model.get_layer(kernel).get_weights()[0] for model in (first, other, deeper)]
    assert np.abs(head[0] - head[1]).max() > 0.01
    np.testing.assert_array_equal(head[0], head[2])
    layers = first.get_layer("text_tail").transformer_layers
    kernels = [layer.get_weights()[0] for layer in layers]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


def test_random_state_replays_dropout(config: dict[str, Any]) -> None:
    model = build_cached_model(config, 9, 7, tiny(2))
    rows = batch(dtype="float16")
    start = random_state(model)
    # Attention, after attention and after the feed-forward of each layer; the head's attention and
    # before its logit.
    assert len(start) == 2 * 3 + 2
    draws = [np.asarray(model(rows, training=True)) for _ in range(2)]
    assert np.abs(draws[0] - draws[1]).max() > 1e-3
    set_random_state(model, start)
    replayed = [np.asarray(model(rows, training=True)) for _ in range(2)]
    np.testing.assert_array_equal(draws, replayed)
    rebuilt = build_cached_model(config, 9, 7, tiny(2))
    rebuilt.set_weights(model.get_weights())
    set_random_state(rebuilt, start)
    np.testing.assert_array_equal(draws[0], np.asarray(rebuilt(rows, training=True)))
    with pytest.raises(RunError, match="random generators"):
        set_random_state(build_cached_model(config, 9, 7, tiny(1)), start)


def test_weights_of_another_encoder_are_refused(config: dict[str, Any]) -> None:
    model = build_cached_model(config, 9, 7, tiny(1))
    before = model.get_weights()
    wider = keras_hub.models.DistilBertBackbone(
        vocabulary_size=9, num_layers=4, num_heads=2, hidden_dim=16, intermediate_dim=40
    )
    with pytest.raises(RunError, match=r"shape.*expected"):
        load_text_layers(model, wider)
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_saved_model_reopens_in_a_fresh_process(config: dict[str, Any], tmp_path: Path) -> None:
    model = build_cached_model(config, 9, 7, tiny(2))
    rows = batch(dtype="float16")
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "rows.npz", **rows)
    code = (
        "import sys, keras, numpy as np, trainer.model.cached\n"
        "model = keras.models.load_model(sys.argv[1] + '/model.keras')\n"
        "out = model(dict(np.load(sys.argv[1] + '/rows.npz')))\n"
        "np.save(sys.argv[1] + '/out.npy', np.asarray(out))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), np.asarray(model(rows)), atol=1e-6)


def test_mixed_precision_runs(config: dict[str, Any]) -> None:
    exact = build_cached_model(config, 9, 7, tiny(2), feature_dtype="float16")
    mixed = build_cached_model(config, 9, 7, tiny(2, dtype_policy="mixed_bfloat16"))
    mixed.set_weights(exact.get_weights())
    assert {str(weight.dtype) for weight in mixed.weights} == {"float32"}
    rows = batch(dtype="float16")
    difference = np.abs(np.asarray(mixed(rows)) - np.asarray(exact(rows))).max()
    assert 0 < difference < 0.1


def test_tail_config_round_trip(config: dict[str, Any]) -> None:
    tail = TextTail(text_layer_configs(config, 2), fast=False, name="t")
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tail))
    assert again.get_config() == tail.get_config()
