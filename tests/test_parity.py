"""Cached training is end-to-end training: logits, gradients, freezing, weights, dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_tower import STUDY_TEXT

from featstore.encoders.tower import TextEncoder, VisionEncoder
from featstore.errors import PresetError, RunError
from trainer.config import TrainConfig
from trainer.model.cached import build_cached_model, load_text_layers
from trainer.model.end_to_end import build_end_to_end, check_frozen
from trainer.model.head import HEAD_LAYERS
from trainer.model.weights import trained_weights, transfer_weights

SENTENCES = [
    "a dog runs in the park.",
    "cat",
    "the woman is not sleeping on a red ball, the man sits",
    "two unable dogs",
]


def settings(k_txt: int, **kwargs: Any) -> TrainConfig:
    return TrainConfig(k_txt=k_txt, num_heads=2, head_dim=4, mlp_dim=6, **kwargs)


class Rows:
    """The same rows as both models want them."""

    def __init__(
        self, vision: VisionEncoder, text: TextEncoder, k_txt: int, images: list[np.ndarray]
    ) -> None:
        pixels = np.stack([vision.to_pixels(image) for image in images])
        ids, mask = text.tokenize(SENTENCES[: len(images)])
        # Cached rows are trimmed to the longest sentence; end to end they stay padded.
        length = int(mask.sum(1).max())
        self.cached = {
            "features": vision.encode(pixels),
            "hidden": text.encode(ids, mask, k_txt)[:, :length],
            "padding_mask": mask[:, :length],
        }
        self.end_to_end = {
            "pixel_values": pixels,
            "input_ids": ids,
            "attention_mask": mask.astype(np.int32),
        }


@pytest.fixture(scope="module")
def vision(tiny_vit: Path) -> VisionEncoder:
    return VisionEncoder(str(tiny_vit))


@pytest.fixture(scope="module")
def whole_vision(tiny_vit: Path) -> VisionEncoder:
    return VisionEncoder(str(tiny_vit), "all")


@pytest.fixture(scope="module")
def text(tiny_text: Path) -> TextEncoder:
    return TextEncoder(str(tiny_text), 20)


def random_images(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (30 + 9 * i, 60 - 5 * i, 3), np.uint8) for i in range(count)]


def logits_and_gradients(
    model: keras.Model, inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    labels = tf.constant([[1.0, 0.7, 0.1], [0.2, 0.0, 0.9]] * 8)
    labels = labels[: len(next(iter(inputs.values()))), : model.output.shape[-1]]
    weights = trained_weights(model)
    with tf.GradientTape() as tape:
        logits = model(inputs, training=False)
        loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=labels, logits=logits))
    gradients = tape.gradient(loss, [weight.value for weight in weights.values()])
    assert all(gradient is not None for gradient in gradients)
    named = zip(weights, gradients, strict=True)
    return logits.numpy(), {name: gradient.numpy() for name, gradient in named}


def assert_same_numbers(
    model: keras.Model, oracle: keras.Model, rows: Rows, tolerance: float = 1e-5
) -> None:
    logits, gradients = logits_and_gradients(model, rows.cached)
    expected_logits, expected = logits_and_gradients(oracle, rows.end_to_end)
    np.testing.assert_allclose(logits, expected_logits, atol=tolerance)
    assert gradients.keys() == expected.keys()
    largest = max(float(np.abs(gradient).max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # Relative to the variable's own gradient; where that is zero in exact arithmetic (key
        # biases, attention over one token), to the model's largest.
        scale = max(float(np.abs(gradient).max()), 1e-2 * largest)
        error = float(np.abs(gradients[name] - gradient).max()) / scale
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(
    ("k_txt", "tokens"), [*((k_txt, "patches") for k_txt in range(5)), (0, "all"), (2, "all")]
)
def test_cached_equals_end_to_end(
    vision: VisionEncoder,
    whole_vision: VisionEncoder,
    text: TextEncoder,
    k_txt: int,
    tokens: str,
) -> None:
    vision = vision if tokens == "patches" else whole_vision
    rows = Rows(vision, text, k_txt, random_images(4))
    train, plain_train = settings(k_txt), settings(k_txt, fast_path=False)
    config, sizes = text.preset.config, (vision.width, vision.num_tokens)
    fast = build_cached_model(config, *sizes, train, feature_dtype="float32")
    plain = build_cached_model(config, *sizes, plain_train, feature_dtype="float32")
    oracle = build_end_to_end(vision.backbone, text.backbone, train, tokens)
    for model in (fast, plain):
        # Weights from the preset and the seed alone: nothing is copied between the models.
        load_text_layers(model, text.backbone)
        assert_same_numbers(model, oracle, rows)


@pytest.fixture(scope="module")
def exact(tiny_vit: Path, tiny_text: Path) -> tuple[VisionEncoder, TextEncoder]:
    """Both encoders in float64, where nothing but a wrong formula is left to differ."""
    return (
        VisionEncoder(str(tiny_vit), precision="float64"),
        TextEncoder(str(tiny_text), 20, precision="float64"),
    )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("k_txt", "length"), [(0, 3), (1, 1), (2, 2), (3, 7), (4, 20)])
def test_same_formula_for_any_length(
    exact: tuple[VisionEncoder, TextEncoder], k_txt: int, length: int, fast: bool
) -> None:
    vision, text = exact
    rows = Rows(vision, text, k_txt, random_images(2))
    ids = np.zeros((2, 20), np.int32)
    ids[:, :length] = [np.arange(2, 2 + length), np.arange(4, 4 + length)]
    mask = ids > 0
    rows.cached["hidden"] = text.encode(ids, mask, k_txt)[:, :length]
    rows.cached["padding_mask"] = mask[:, :length]
    rows.end_to_end |= {"input_ids": ids, "attention_mask": mask.astype(np.int32)}
    train = settings(k_txt, dtype_policy="float64", fast_path=fast)
    config = text.preset.config
    model = build_cached_model(config, 16, 16, train, feature_dtype="float64")
    load_text_layers(model, text.backbone)
    oracle = build_end_to_end(vision.backbone, text.backbone, train)
    # The logit itself is float32.
    assert_same_numbers(model, oracle, rows, tolerance=1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("k_txt", "queries", "fusion_layers", "classes"),
    [(0, "all", 1, 2), (2, "all", 2, 3), (4, "all", 1, 2), (0, "cls", 2, 3), (3, "cls", 3, 2)],
)
def test_other_heads_are_the_same_formula(
    exact: tuple[VisionEncoder, TextEncoder],
    k_txt: int,
    queries: str,
    fusion_layers: int,
    classes: int,
    fast: bool,
) -> None:
    """Over sentences of several lengths, padded otherwise on either side."""
    vision, text = exact
    rows = Rows(vision, text, k_txt, random_images(4))
    head: dict[str, Any] = {"queries": queries, "fusion_layers": fusion_layers}
    train = settings(k_txt, dtype_policy="float64", fast_path=fast, **head)
    options: dict[str, Any] = {"feature_dtype": "float64", "classes": classes}
    model = build_cached_model(text.preset.config, 16, 16, train, **options)
    load_text_layers(model, text.backbone)
    oracle = build_end_to_end(vision.backbone, text.backbone, train, classes=classes)
    assert model.output.shape == oracle.output.shape == (None, 1 if classes == 2 else 3)
    assert_same_numbers(model, oracle, rows, tolerance=1e-6)


def test_one_step_gives_the_same_weights(tiny_vit: Path, tiny_text: Path) -> None:
    vision, text = VisionEncoder(str(tiny_vit)), TextEncoder(str(tiny_text), 20)
    rows = Rows(vision, text, 2, random_images(4))
    models = [
        build_cached_model(text.preset.config, 16, 16, settings(2), feature_dtype="float32"),
        build_end_to_end(vision.backbone, text.backbone, settings(2)),
    ]
    load_text_layers(models[0], text.backbone)
    start = {name: np.array(value) for name, value in trained_weights(models[0]).items()}
    for model, inputs in zip(models, (rows.cached, rows.end_to_end), strict=True):
        optimizer = keras.optimizers.SGD(0.1, weight_decay=1e-3, clipnorm=1.0)
        _, gradients = logits_and_gradients(model, inputs)
        optimizer.apply(list(gradients.values()), list(trained_weights(model).values()))
    cached, end_to_end = (trained_weights(model) for model in models)
    for name, value in cached.items():
        if name != "xattn/key/bias":  # softmax ignores it, so its gradient is zero
            assert np.abs(np.asarray(value) - start[name]).max() > 0, name
        np.testing.assert_allclose(np.asarray(value), np.asarray(end_to_end[name]), atol=1e-5)


def test_weights_go_both_ways(vision: VisionEncoder, text: TextEncoder) -> None:
    config = text.preset.config
    source = build_cached_model(config, 16, 16, settings(2, seed=5))
    oracle = build_end_to_end(vision.backbone, text.backbone, settings(2, seed=6))
    frozen = vision.backbone.get_weights()
    transfer_weights(source, oracle)
    back = build_cached_model(config, 16, 16, settings(2, seed=7, fast_path=False))
    transfer_weights(oracle, back)
    for one, two in zip(source.get_weights(), back.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(frozen, vision.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(RunError, match="transformer_layer_1"):
        transfer_weights(build_cached_model(config, 16, 16, settings(3)), oracle)
    with pytest.raises(RunError, match=r"xattn.*shape"):
        transfer_weights(build_cached_model(config, 24, 16, settings(2)), oracle)


@pytest.mark.parametrize("k_txt", [0, 1, 4])
def test_exactly_the_head_and_the_last_layers_train(
    tiny_vit: Path, tiny_text: Path, k_txt: int
) -> None:
    vision, text = VisionEncoder(str(tiny_vit)), TextEncoder(str(tiny_text), 20)
    model = build_end_to_end(vision.backbone, text.backbone, settings(k_txt))
    trained = {weight.path.split("/")[0] for weight in model.trainable_variables}
    layers = {f"transformer_layer_{i}" for i in range(4 - k_txt, 4)}
    assert trained == layers | {"xattn", "xattn_norm", "mlp_1", "logit"}
    assert not vision.backbone.trainable_variables
    # Whoever thaws the model as a whole, the frozen parts stay frozen.
    for flag in (False, True):
        model.trainable = flag
    check_frozen(model)
    vision.backbone.get_layer("vit_encoder").trainable = True
    with pytest.raises(PresetError, match="vit_encoder"):
        check_frozen(model)


def test_layers_are_named_as_in_the_study(vision: VisionEncoder, text: TextEncoder) -> None:
    model = build_end_to_end(vision.backbone, text.backbone, settings(1))
    names = [layer.name for layer in model.layers]
    assert {"vit_backbone", "txt_backbone", *HEAD_LAYERS} <= set(names)
    assert set(model.input) == {"pixel_values", "input_ids", "attention_mask"}
    assert type(model.get_layer("xattn")) is keras.layers.MultiHeadAttention


def test_frozen_dropout_is_off_and_trained_dropout_on(
    vision: VisionEncoder, text: TextEncoder
) -> None:
    rows = Rows(vision, text, 0, random_images(4)).end_to_end
    frozen = build_end_to_end(vision.backbone, text.backbone, settings(0, dropout=0.0))
    still = np.asarray(frozen(rows, training=False))
    np.testing.assert_array_equal(np.asarray(frozen(rows, training=True)), still)
    trained = build_end_to_end(vision.backbone, text.backbone, settings(1, dropout=0.0))
    moved = [np.asarray(trained(rows, training=True)) for _ in range(2)]
    assert np.abs(moved[0] - moved[1]).max() > 1e-4


def test_head_dropout_is_the_same_draw(vision: VisionEncoder, text: TextEncoder) -> None:
    """With no trained text layer, training mode too gives the same numbers, dropout included."""
    rows = Rows(vision, text, 0, random_images(4))
    train = settings(0, dropout=0.5)
    cached = build_cached_model(text.preset.config, 16, 16, train, feature_dtype="float32")
    oracle = build_end_to_end(vision.backbone, text.backbone, train)
    still = np.asarray(cached(rows.cached, training=False))
    for _ in range(2):
        logits = np.asarray(cached(rows.cached, training=True))
        np.testing.assert_allclose(
            logits, np.asarray(oracle(rows.end_to_end, training=True)), atol=1e-5
        )
        assert np.abs(logits - still).max() > 1e-3


def test_saved_end_to_end_model_stays_frozen(
    vision: VisionEncoder, text: TextEncoder, tmp_path: Path
) -> None:
    rows = Rows(vision, text, 2, random_images(3)).end_to_end
    model = build_end_to_end(vision.backbone, text.backbone, settings(2), "all")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(np.asarray(loaded(rows)), np.asarray(model(rows)), atol=1e-6)
    check_frozen(loaded)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    assert loaded.count_params() == model.count_params()


@pytest.mark.slow
def test_total_of_the_study() -> None:
    import keras_hub

    vision = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    )
    text = keras_hub.models.DistilBertBackbone(**STUDY_TEXT["config"])
    model = build_end_to_end(vision, text, TrainConfig(k_txt=3))
    assert model.count_params() == 154_919_681
    assert sum(np.prod(weight.shape) for weight in model.trainable_variables) == 24_021_761


@pytest.mark.slow
@pytest.mark.parametrize("k_txt", [0, 3, 6])
def test_real_presets_and_photos(shared_dir: Path, k_txt: int) -> None:
    from PIL import Image

    presets = shared_dir / "presets"
    vision = VisionEncoder(str(presets / "vit_small_patch14_196_dinov2"))
    text = TextEncoder(str(presets / "distil_bert_minilm_l6_en_uncased"), 24)
    paths = sorted((shared_dir / "data" / "images").glob("*.jpg"))[:4]
    images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    rows = Rows(vision, text, k_txt, images)
    train = TrainConfig(k_txt=k_txt)
    model = build_cached_model(
        text.preset.config, vision.width, vision.num_tokens, train, feature_dtype="float32"
    )
    load_text_layers(model, text.backbone)
    oracle = build_end_to_end(vision.backbone, text.backbone, train)
    # Twelve blocks in float32, compiled on one side only; measured: logits 2e-6, gradients 8e-6.
    assert_same_numbers(model, oracle, rows, tolerance=2e-5)
