"""Presets: identity without TensorFlow, errors of one line, exact pixels, cut text towers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
import xxhash
from tiny_presets import randomise

from featstore.encoders.presets import (
    Preset,
    image_converter_fields,
    resolve_preset,
    tokenizer_digest,
)
from featstore.encoders.tower import TextEncoder, Tower, VisionEncoder
from featstore.errors import ConfigError, PresetError

SIZES = [(32, 32), (224, 224), (375, 500), (500, 333), (33, 31), (1, 1), (20000, 1), (1, 20000)]

PINNED_VISION = [0.74558, 1.18042, -1.5349]
PINNED_TEXT = [1.4451, 2.73981, -1.50672]


def image(size: tuple[int, int], kind: str) -> np.ndarray:
    rng = np.random.default_rng(size)
    if kind == "noise":
        return rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    grey = np.add.outer(np.arange(size[0]) * 3, np.arange(size[1]) * 2) % 256
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)


def copy_of(preset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(preset, tmp_path / "copy"))


@pytest.fixture(scope="module")
def vision(tiny_vit: Path) -> VisionEncoder:
    return VisionEncoder(str(tiny_vit))


@pytest.fixture(scope="module")
def text(tiny_text: Path) -> TextEncoder:
    return TextEncoder(str(tiny_text), 12)


class TestResolve:
    def test_folder_needs_no_tensorflow(self, tiny_vit: Path, tiny_text: Path) -> None:
        code = (
            "import sys; from featstore.encoders.presets import *\n"
            f"image_converter_fields(resolve_preset({str(tiny_vit)!r}))\n"
            f"tokenizer_digest(resolve_preset({str(tiny_text)!r}))\n"
            "print([m for m in ('tensorflow', 'keras', 'keras_hub', 'jax') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent.parent,
        )
        assert done.stdout.strip() == "[]"

    def test_digest_is_the_weights_content(self, tiny_vit: Path, tmp_path: Path) -> None:
        preset = resolve_preset(tiny_vit)
        content = (tiny_vit / "model.weights.h5").read_bytes()
        assert preset.weights_digest == xxhash.xxh3_128_hexdigest(content)
        assert preset.class_name == "ViTBackbone"
        folder = copy_of(tiny_vit, tmp_path)
        assert resolve_preset(folder).weights_digest == preset.weights_digest
        changed = bytearray(content)
        changed[-1] ^= 1
        (folder / "model.weights.h5").write_bytes(changed)
        assert resolve_preset(folder).weights_digest != preset.weights_digest

    def test_sharded_weights(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        backbone = keras_hub.models.Backbone.from_preset(str(folder))
        (folder / "model.weights.h5").unlink()
        backbone.save_weights(str(folder / "model.weights.json"), max_shard_size=2e-5)
        preset = resolve_preset(folder)
        before = preset.weights_digest
        assert len(preset.weights_files) > 2
        last = preset.weights_files[-1]
        content = last.read_bytes()
        last.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert resolve_preset(folder).weights_digest != before
        last.unlink()
        with pytest.raises(PresetError, match=last.name):
            resolve_preset(folder)

    @pytest.mark.parametrize(
        ("name", "says"),
        [
            ("./no/such/folder", "no such folder"),
            ("vit_base_patch16_224_imagenet2k", "did you mean 'vit_base_patch16_224_imagenet"),
            ("qqqq", "neither a folder nor a keras-hub preset name"),
            ("kaggle://one/two", "kaggle://"),
        ],
    )
    def test_unknown_name_is_one_line(self, name: str, says: str) -> None:
        with pytest.raises(PresetError, match=name) as caught:
            resolve_preset(name)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_no_network_is_one_line(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        # A proxy that answers nothing: the same with and without a network.
        for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(variable, "http://127.0.0.1:9")
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
        with pytest.raises(PresetError, match="give its folder") as caught:
            resolve_preset("vit_base_patch16_224_imagenet21k")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("missing", ["config.json", "model.weights.h5"])
    def test_missing_file_is_named(self, tiny_vit: Path, tmp_path: Path, missing: str) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        (folder / missing).unlink()
        with pytest.raises(PresetError, match=missing):
            resolve_preset(folder)

    def test_broken_or_foreign_config(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        (folder / "config.json").write_text("{")
        with pytest.raises(PresetError, match=r"config\.json cannot be read"):
            resolve_preset(folder)
        (folder / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(PresetError, match="save_to_preset"):
            resolve_preset(folder)

    def test_damaged_weights_are_one_line(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        (folder / "model.weights.h5").write_bytes(b"not HDF5")
        with pytest.raises(PresetError, match="backbone cannot be loaded") as caught:
            VisionEncoder(str(folder))
        assert "\n" not in str(caught.value)


class TestConverterFields:
    def test_fields_are_those_of_the_loaded_converter(
        self, tiny_vit: Path, vision: VisionEncoder
    ) -> None:
        fields = image_converter_fields(resolve_preset(tiny_vit))
        config = vision.converter.get_config()
        assert fields.pop("class_name") == type(vision.converter).__name__
        assert tuple(fields.pop("image_size")) == vision.image_size
        assert fields == {key: config[key] for key in fields}
        assert {"scale", "offset", "interpolation", "antialias", "crop_to_aspect_ratio"} <= set(
            fields
        )

    def test_old_names_give_the_same_fields(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        path = folder / "image_converter.json"
        saved = json.loads(path.read_text())
        for key in ("image_size", "offset"):
            del saved["config"][key]
        saved["config"] |= {
            "height": 32,
            "width": 32,
            "scale": 1 / 255,
            "mean": [0.4, 0.5, 0.6],
            "variance": [0.04, 0.05, 0.06],
        }
        path.write_text(json.dumps(saved))
        fields = image_converter_fields(resolve_preset(folder))
        loaded = keras_hub.layers.ImageConverter.from_preset(str(folder)).get_config()
        assert fields["image_size"] == list(loaded["image_size"])
        assert fields["scale"] == loaded["scale"]
        assert fields["offset"] == loaded["offset"]

    def test_no_converter_is_an_error(self, tiny_text: Path) -> None:
        with pytest.raises(PresetError, match=r"image_converter\.json"):
            image_converter_fields(resolve_preset(tiny_text))

    def test_open_size_is_an_error(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        path = folder / "image_converter.json"
        saved = json.loads(path.read_text())
        saved["config"]["image_size"] = None
        path.write_text(json.dumps(saved))
        with pytest.raises(PresetError, match="image_size"):
            image_converter_fields(resolve_preset(folder))


class TestTokenizerDigest:
    def test_follows_settings_and_vocabulary(self, tiny_text: Path, tmp_path: Path) -> None:
        before = tokenizer_digest(resolve_preset(tiny_text))
        folder = copy_of(tiny_text, tmp_path)
        assert tokenizer_digest(resolve_preset(folder)) == before
        path = folder / "tokenizer.json"
        saved = json.loads(path.read_text())
        saved["config"]["name"] = "renamed"
        path.write_text(json.dumps(saved))
        assert tokenizer_digest(resolve_preset(folder)) == before
        saved["config"]["lowercase"] = False
        path.write_text(json.dumps(saved))
        assert tokenizer_digest(resolve_preset(folder)) != before
        shutil.copy(tiny_text / "tokenizer.json", path)
        vocabulary = folder / "assets" / "tokenizer" / "vocabulary.txt"
        vocabulary.write_text(vocabulary.read_text().replace("dog", "fox"))
        assert tokenizer_digest(resolve_preset(folder)) != before
        vocabulary.unlink()
        with pytest.raises(PresetError, match="vocabulary"):
            tokenizer_digest(resolve_preset(folder))

    def test_no_tokenizer_is_an_error(self, tiny_vit: Path) -> None:
        with pytest.raises(PresetError, match=r"tokenizer\.json"):
            tokenizer_digest(resolve_preset(tiny_vit))


class TestVision:
    @pytest.mark.parametrize("kind", ["noise", "grey"])
    @pytest.mark.parametrize("size", SIZES)
    def test_pixels_have_the_bits_of_the_converter(
        self, vision: VisionEncoder, size: tuple[int, int], kind: str
    ) -> None:
        photo = image(size, kind)
        expected = np.asarray(vision.converter(photo))
        pixels = vision.to_pixels(photo)
        assert pixels.dtype == np.float32
        assert pixels.shape == (32, 32, 3)
        np.testing.assert_array_equal(pixels, expected)

    @pytest.mark.parametrize(
        "options",
        [
            {"crop_to_aspect_ratio": False},
            {"interpolation": "bilinear", "antialias": False, "scale": 1 / 127.5, "offset": -1.0},
            {"interpolation": "lanczos3", "scale": None, "offset": None},
        ],
    )
    def test_pixels_for_other_converters(
        self, tiny_vit: Path, tmp_path: Path, options: dict[str, object]
    ) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        path = folder / "image_converter.json"
        saved = json.loads(path.read_text())
        saved["config"] |= options
        path.write_text(json.dumps(saved))
        encoder = VisionEncoder(str(folder))
        for size in [(32, 32), (37, 61), (90, 20)]:
            photo = image(size, "noise")
            expected = np.asarray(encoder.converter(photo), np.float32)
            np.testing.assert_array_equal(encoder.to_pixels(photo), expected)

    def test_pixels_from_threads(self, vision: VisionEncoder) -> None:
        photos = [image((20 + i, 60 - i), "noise") for i in range(24)]
        with ThreadPoolExecutor(4) as pool:
            threaded = list(pool.map(vision.to_pixels, photos))
        for photo, pixels in zip(photos, threaded, strict=True):
            np.testing.assert_array_equal(pixels, np.asarray(vision.converter(photo)))

    def test_pixels_ignore_the_global_policy(self, tiny_vit: Path) -> None:
        photo = image((40, 40), "noise")
        before = VisionEncoder(str(tiny_vit)).to_pixels(photo)
        keras.config.set_dtype_policy("bfloat16")
        try:
            after = VisionEncoder(str(tiny_vit)).to_pixels(photo)
        finally:
            keras.config.set_dtype_policy("float32")
        np.testing.assert_array_equal(before, after)

    def test_wrong_image_is_refused(self, vision: VisionEncoder) -> None:
        with pytest.raises(ValueError, match="uint8"):
            vision.to_pixels(np.zeros((4, 4, 3), np.float32))
        with pytest.raises(ValueError, match="3"):
            vision.to_pixels(np.zeros((4, 4), np.uint8))

    def test_features_are_the_backbones(self, tiny_vit: Path, vision: VisionEncoder) -> None:
        pixels = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
        expected = np.asarray(vision.backbone(pixels, training=False))
        assert expected.shape == (3, 17, 16)
        assert (vision.num_tokens, vision.width, vision.tower.leading_tokens) == (16, 16, 1)
        np.testing.assert_allclose(vision.encode(pixels), expected[:, 1:], atol=1e-5)
        whole = VisionEncoder(str(tiny_vit), tokens="all")
        assert whole.num_tokens == 17
        np.testing.assert_allclose(whole.encode(pixels), expected, atol=1e-5)

    def test_pinned_values(self, vision: VisionEncoder) -> None:
        features = vision.encode(vision.to_pixels(image((50, 40), "grey"))[None])
        np.testing.assert_allclose(features[0, 0, :3], PINNED_VISION, atol=2e-4)

    def test_plain_precision_equals_mixed(self, tiny_vit: Path) -> None:
        pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
        plain = VisionEncoder(str(tiny_vit), precision="bfloat16")
        mixed = keras_hub.models.Backbone.from_preset(str(tiny_vit), dtype="mixed_bfloat16")
        assert {str(weight.dtype) for weight in plain.backbone.weights} == {"bfloat16"}
        features = plain.encode(pixels)
        assert features.dtype.name == "bfloat16"
        expected = np.asarray(keras.ops.cast(mixed(pixels, training=False)[:, 1:], "float32"))
        np.testing.assert_allclose(features.astype(np.float32), expected, atol=0.06)

    def test_converter_of_another_size_is_an_error(self, tiny_vit: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_vit, tmp_path)
        path = folder / "image_converter.json"
        saved = json.loads(path.read_text())
        saved["config"]["image_size"] = [40, 32]
        path.write_text(json.dumps(saved))
        with pytest.raises(PresetError, match=r"\(40, 32\).*\(32, 32\)"):
            VisionEncoder(str(folder))

    def test_backbone_without_tokens_is_an_error(self) -> None:
        resnet = keras_hub.models.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64],
            stackwise_num_blocks=[1],
            stackwise_num_strides=[1],
            block_type="basic_block",
            image_shape=(32, 32, 3),
        )
        with pytest.raises(
            PresetError,
            match=r"a ResNetBackbone cannot .* choose a ViT, DeiT, DINOv2, ",
        ):
            Tower(resnet, "vision")


class TestText:
    def test_tokenize(self, text: TextEncoder) -> None:
        ids, mask = text.tokenize(["A dog runs.", "", "the cat " * 40])
        assert ids.shape == mask.shape == (3, 12)
        assert (ids.dtype, mask.dtype) == (np.int32, bool)
        start, end = 2, 3
        assert ids[0, 0] == start
        assert mask.sum(1).tolist() == [6, 2, 12]
        assert [row[row > 0][-1] for row in ids] == [end] * 3
        np.testing.assert_array_equal(mask, ids != 0)
        assert text.tokenize([])[0].shape == (0, 12)

    def test_tokenize_in_pieces(self, text: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        sentences = [f"a dog {'runs ' * (i % 5)}" for i in range(11)]
        whole = text.tokenize(sentences)
        monkeypatch.setattr("featstore.encoders.tower.TOKENIZE_ROWS", 3)
        pieces = text.tokenize(sentences)
        np.testing.assert_array_equal(whole[0], pieces[0])
        np.testing.assert_array_equal(whole[1], pieces[1])

    @pytest.mark.parametrize("k_txt", range(5))
    def test_remaining_layers_give_the_backbones_output(
        self, text: TextEncoder, k_txt: int
    ) -> None:
        ids, mask = text.tokenize(["a dog runs in the park", "two cats"])
        expected = text.backbone({"token_ids": ids, "padding_mask": mask}, training=False)
        x = text.encode(ids, mask, k_txt)
        x = text.tower.upper(k_txt)(x, mask)
        np.testing.assert_allclose(np.asarray(x), np.asarray(expected), atol=2e-5)

    def test_pinned_values(self, text: TextEncoder) -> None:
        ids, mask = text.tokenize(["a dog runs"])
        np.testing.assert_allclose(text.encode(ids, mask, 1)[0, 0, :3], PINNED_TEXT, atol=2e-4)

    @pytest.mark.parametrize("k_txt", [-1, 5])
    def test_k_txt_out_of_range(self, text: TextEncoder, k_txt: int) -> None:
        ids, mask = text.tokenize(["a dog"])
        with pytest.raises(ConfigError, match=f"k_txt = {k_txt}: .* choose 0 to 4"):
            text.encode(ids, mask, k_txt)

    def test_too_long_a_sequence(self, tiny_text: Path) -> None:
        with pytest.raises(ConfigError, match="at most 32"):
            TextEncoder(str(tiny_text), 33)

    def test_blocks_are_in_their_order(self) -> None:
        bert = keras_hub.models.BertBackbone(
            vocabulary_size=20,
            num_layers=11,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=8,
            max_sequence_length=8,
        )
        randomise(bert, 3)
        # Eleven layers: sorting names as text would put layer_10 before layer_2.
        assert [layer.name for layer in Tower(bert, "text").blocks] == [
            f"transformer_layer_{i}" for i in range(11)
        ]

    def test_other_families_are_errors(self) -> None:
        gpt2 = keras_hub.models.GPT2Backbone(
            vocabulary_size=20, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8
        )
        with pytest.raises(PresetError, match=r"gpt2.* choose a DistilBERT, BERT"):
            Tower(gpt2, "text", "gpt2")
        albert = keras_hub.models.AlbertBackbone(
            vocabulary_size=20,
            num_layers=2,
            num_heads=2,
            embedding_dim=8,
            hidden_dim=8,
            intermediate_dim=8,
            num_inner_repetitions=2,
        )
        with pytest.raises(PresetError, match="2 layers in a group cannot be cut"):
            Tower(albert, "text")

    def test_no_tokenizer_is_an_error(self, tiny_text: Path, tmp_path: Path) -> None:
        folder = copy_of(tiny_text, tmp_path)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(PresetError, match="tokenizer cannot be loaded") as caught:
            TextEncoder(str(folder), 12)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
class TestRealPresets:
    def test_pixels_of_photos(self, shared_dir: Path) -> None:
        from PIL import Image

        encoder = VisionEncoder(str(shared_dir / "presets" / "vit_small_patch14_196_dinov2"))
        photos = [
            np.asarray(Image.open(path).convert("RGB"))
            for path in sorted((shared_dir / "data" / "images").glob("*.jpg"))[:8]
        ]
        photos += [image(size, kind) for size in SIZES for kind in ("noise", "grey")]
        for photo in photos:
            expected = np.asarray(encoder.converter(photo))
            np.testing.assert_array_equal(encoder.to_pixels(photo), expected)
        pixels = np.stack([encoder.to_pixels(photo) for photo in photos[:2]])
        expected = np.asarray(encoder.backbone(pixels, training=False))[:, 1:]
        assert encoder.num_tokens == 196
        np.testing.assert_allclose(encoder.encode(pixels), expected, atol=2e-4)

    def test_text(self, shared_dir: Path) -> None:
        preset: Preset = resolve_preset(shared_dir / "presets" / "distil_bert_minilm_l6_en_uncased")
        encoder = TextEncoder(preset, 24)
        ids, mask = encoder.tokenize(["The dog ran away from it's owner.", "Two men."])
        expected = np.asarray(
            encoder.backbone({"token_ids": ids, "padding_mask": mask}, training=False)
        )
        np.testing.assert_allclose(encoder.encode(ids, mask, 0), expected, rtol=1e-3, atol=1e-4)
