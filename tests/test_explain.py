"""What `explain` shows is what the model computes, where it says, and honest about the rest."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from browser import check_page
from click.testing import CliRunner
from on_jax import run_on_jax
from PIL import Image
from scipy.stats import spearmanr
from tiny_runs import prepared, tiny_config

import trainer
from benchmarks import named_objects
from featstore import Project, demo
from featstore.demo import scenes
from featstore.encoders.presets import resolve_preset
from featstore.encoders.spec import VisionSpec
from featstore.encoders.words import Words, merge_pieces
from featstore.errors import DataError, UsageError
from featstore.progress import SILENT
from featstore.store.numbers import Numbers
from trainer.batches import Batch
from trainer.commands.main import cli
from trainer.config import TrainConfig
from trainer.model.apart import Apart, log_odds
from trainer.model.cached import build_cached_model
from trainer.model.head import fusion_names
from trainer.results.explain import patches as patches_module
from trainer.results.explain.agreement import spearman
from trainer.results.explain.chosen import Called
from trainer.results.explain.drawn import colored, maps_of
from trainer.results.explain.maps import Explainer
from trainer.results.explain.patches import Patches
from trainer.results.explain.row import ShownPhoto, shown_photo
from trainer.run.training import Reporter

TOKENS, WIDTH = 6, 16


# --- the model taken apart


def model_of(
    text: Path, vit: Path | None = None, dtype: str = "float32", classes: int = 2, **train: Any
) -> keras.Model:
    """Return a model of random weights over six tokens; with k_vit over all 17 of the tiny ViT."""
    own = TrainConfig(**{"k_txt": 1, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, **train})
    tokens = 17 if own.k_vit else TOKENS
    model = build_cached_model(
        resolve_preset(text).config,
        WIDTH,
        tokens,
        own,
        feature_dtype=dtype,
        classes=classes,
        vision_config=None if vit is None else resolve_preset(vit).config,
    )
    rng = np.random.default_rng(1)
    for weight in model.trainable_weights:
        weight.assign(weight.numpy() + rng.normal(scale=0.3, size=weight.shape))
    return model


def batch_of(model: keras.Model, whole: bool = True, length: int = 5, real: int = 4) -> Batch:
    """Return a row of random numbers in the model's own stored format."""
    rng = np.random.default_rng(0)
    dtype = str(model.input["features"].dtype)
    length, real = (length, real) if whole else (1, 1)
    features, hidden = (
        Numbers.rounded(rng.normal(size=(1, count, WIDTH)).astype(np.float32), dtype)
        for count in (model.input["features"].shape[1], length)
    )
    mask = np.arange(length)[None] < real
    return Batch(
        features, hidden, mask, np.zeros(1, np.float32), np.ones(1, np.float32), np.arange(1)
    )


def plain_attention(attention: Any, query: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return softmax(q·k / sqrt(width)) by the layer's weights: (heads, queries, tokens)."""
    q = np.einsum("qw,whd->hqd", query, attention.query_dense.kernel.numpy())
    k = np.einsum("tw,whd->htd", tokens, attention.key_dense.kernel.numpy())
    q += attention.query_dense.bias.numpy()[:, None]
    k += attention.key_dense.bias.numpy()[:, None]
    scores = np.einsum("hqd,htd->hqt", q, k) / np.sqrt(attention.key_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fast_path": False},
        {"k_txt": 0},
        {"queries": "all"},
        {"queries": "all", "fast_path": False, "fusion_layers": 2},
        {"fusion_layers": 2},
        {"k_vit": 1},
        {"dtype": "int8"},
        {"dtype": "float16", "classes": 3},
    ],
    ids=str,
)
def test_attention_is_what_the_model_computes(
    tiny_text: Path, tiny_vit: Path, settings: dict[str, Any]
) -> None:
    """The logits are the model's, and the weights those of each layer's query over its tokens."""
    model = model_of(tiny_text, tiny_vit, **settings)
    batch = batch_of(model, settings.get("k_txt", 1) > 0)
    apart = Apart(model)
    row = apart.entering(batch)
    logits, attention, states = apart.look(row)
    np.testing.assert_allclose(logits, model(batch.inputs())[0], atol=2e-5)
    real = 4 if settings.get("queries") == "all" else 1
    layers = settings.get("fusion_layers", 1)
    assert attention.shape == (layers, 2, real, row.tokens.shape[1])
    x = states[0]
    for number, found in enumerate(attention, start=1):
        name, residual, norm = fusion_names(number)
        expected = plain_attention(model.get_layer(name), x, row.tokens[0])
        np.testing.assert_allclose(found, expected[:, :real], atol=2e-5)
        attended = model.get_layer(name)(x[None], row.tokens)
        x = model.get_layer(norm)(model.get_layer(residual)([x[None], attended]))[0].numpy()
    assert attention.std() > 0.01


def test_tokens_are_those_that_leave_the_trained_blocks(tiny_text: Path, tiny_vit: Path) -> None:
    model = model_of(tiny_text, tiny_vit, k_vit=1)
    batch = batch_of(model)
    row = Apart(model).entering(batch)
    tail = model.get_layer("vision_tail")(batch.features.values)
    assert row.tokens.shape == (1, 16, WIDTH)
    np.testing.assert_allclose(row.tokens, tail, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"k_txt": 2}, {"queries": "all", "k_txt": 0}, {"classes": 3}], ids=str
)
def test_gradients_are_differences(tiny_text: Path, settings: dict[str, Any]) -> None:
    """Gradient × input is the slope of the log odds as a token, or a word's state, is scaled."""
    apart = Apart(model_of(tiny_text, **settings))
    batch = batch_of(model_of(tiny_text, **settings))
    row, step = apart.entering(batch), 1e-2
    of_tokens, of_hidden = apart.gradients(row, 2)

    def slope(name: str, at: int) -> float:
        odds = []
        for factor in (1 + step, 1 - step):
            changed = getattr(row, name).copy()
            changed[:, at] *= factor
            logits = apart.look(dataclasses.replace(row, **{name: changed}))[0]
            odds.append(float(log_odds(logits[None], 2)[0]))
        return (odds[0] - odds[1]) / (2 * step)

    for name, gradient in (("tokens", of_tokens), ("hidden", of_hidden)):
        parts = (gradient * getattr(row, name)).sum(axis=-1)[0]
        for at in (0, 3):
            assert parts[at] == pytest.approx(slope(name, at), abs=1e-3), (name, at)
        assert np.abs(parts).max() > 0.01
    # Padding says nothing.
    assert not of_hidden[0, 4:].any()


def test_log_odds_of_three_classes() -> None:
    logits = np.array([[1.0, -2.0, 0.5], [400.0, 0.0, 1.0]], np.float32)
    p = np.exp(logits[0].astype(float)) / np.exp(logits[0].astype(float)).sum()
    found = [log_odds(logits, label)[0] for label in range(3)]
    np.testing.assert_allclose(found, np.log(p / (1 - p)), rtol=1e-6)
    assert log_odds(logits, 0)[1] == pytest.approx(399 - np.log1p(np.exp(-1)), rel=1e-6)


def spec_of(grid: tuple[int, int], patch: Any = 8, crop: bool = False, pad: bool = False) -> Any:
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return VisionSpec(
        encoder="ViTBackbone",
        weights="",
        architecture={"image_shape": [grid[0] * high, grid[1] * wide, 3], "patch_size": patch},
        boundary=1,
        dtype="float32",
        precision="float32",
        final_norm=True,
        converter={"crop_to_aspect_ratio": crop, "pad_to_aspect_ratio": pad},
        decoder="",
        tokens="all",
    )


def test_occlusion_is_the_model_on_zeroed_features(tiny_text: Path) -> None:
    """Of a grid of 1 × 5 after a class token, which stays."""
    model = model_of(tiny_text)
    batch, apart = batch_of(model), Apart(model)
    explainer = Explainer(apart, Patches.of(spec_of((1, 5)), TOKENS))
    row = apart.entering(batch)
    maps = explainer.maps(row, 1)
    whole = float(model(batch.inputs())[0, 0])
    for i, hidden in enumerate(([1], [2], [3], [4], [5], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5])):
        values = batch.features.values.copy()
        values[:, hidden] = 0
        inputs = batch.inputs() | {"features": values}
        expected = whole - float(model(inputs)[0, 0])
        assert maps.occlusion.reshape(-1)[i] == pytest.approx(expected, abs=1e-5)
    assert np.abs(maps.occlusion).min() > 1e-4


def test_hiding_by_what_counts_moves_more_than_at_random(tiny_text: Path) -> None:
    model = model_of(tiny_text)
    apart = Apart(model)
    explainer = Explainer(apart, Patches.of(spec_of((1, 5)), TOKENS))
    row = apart.entering(batch_of(model))
    maps = explainer.maps(row, 1)
    moved = explainer.deleted(row, maps, np.random.default_rng(0)).moved
    first = np.abs(maps.occlusion[0])
    # One cell of five at the first three shares.
    assert moved["occlusion"][0] == pytest.approx(first.max(), abs=1e-5)
    strongest = maps.mean_attention[0, 1:].argmax()
    assert moved["attention"][1] == pytest.approx(first[strongest], abs=1e-5)
    assert first.min() < moved["random"][0] < first.max()


# --- where patches are


def test_windows_are_of_neighbours_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = Patches.of(spec_of((3, 4)), 13)
    assert (patches.leading, patches.cell) == (1, 1)
    assert (patches.windows(1) == np.eye(12, dtype=bool)).all()
    around = patches.grid(patches.windows(3)[5])
    assert around.tolist() == [[True, True, True, False]] * 3
    assert patches.grid(patches.windows(3)[0]).sum() == 4
    assert patches.kept(patches.windows(1))[2].tolist() == [i != 3 for i in range(13)]
    monkeypatch.setattr(patches_module, "MOST_CELLS", 4)
    coarse = Patches.of(spec_of((3, 4)), 12)
    assert (coarse.leading, coarse.cell, coarse.cells) == (0, 2, (2, 2))
    assert coarse.grid(coarse.windows(1)[3]).tolist() == [
        *[[False] * 4] * 2,
        [False, False, True, True],
    ]
    assert coarse.windows(1).sum(axis=0).tolist() == [1] * 12


@pytest.mark.parametrize(
    ("options", "box"),
    [
        ({}, (0, 0, 40, 100)),
        ({"crop": True}, (0, 10, 40, 80)),
        ({"pad": True}, (-5, 0, 50, 100)),
    ],
)
def test_the_grid_lies_on_what_the_encoder_sees(
    options: dict[str, bool], box: tuple[float, ...]
) -> None:
    """An encoder twice as wide as high, and a photo of 40 × 100."""
    assert Patches.of(spec_of((2, 4)), 8)
    assert Patches.of(spec_of((2, 4), **options), 8).box((40, 100)) == box


def test_pixels_beyond_the_last_patch_have_none() -> None:
    spec = spec_of((2, 4))
    spec.architecture["image_shape"] = [20, 32, 3]
    patches = Patches.of(spec, 8)
    assert patches.box((200, 320)) == (0, 0, 160, 320)


def test_a_photo_is_turned_as_its_features_were(tmp_path: Path) -> None:
    from featstore.data.images import index_images

    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:10, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    images = index_images(tmp_path)
    found = shown_photo(images, "turned", Patches.of(spec_of((2, 2), pad=True), 4))
    assert isinstance(found, ShownPhoto)
    # Turned clockwise: red is on the right; black above and below.
    assert found.image.size == (40, 40)
    assert found.image.getpixel((35, 20)) == (255, 0, 0)
    assert found.image.getpixel((5, 20)) == (0, 0, 0)
    assert found.box == (0, 0, 1, 1)
    assert "not a JPEG" in str(shown_photo(images, "bad", Patches.of(spec_of((2, 2)), 4)))
    assert "not there" in str(shown_photo(images, "gone", Patches.of(spec_of((2, 2)), 4)))


# --- words


@pytest.mark.parametrize(
    ("pieces", "names", "words"),
    [
        ("##", "[CLS] un ##able to , [SEP]", "[CLS] unable to , [SEP]"),
        ("##", "[CLS] ##odd [SEP]", "[CLS] odd [SEP]"),
        ("Ġ", "<s> A Ġdog Ġru ns . Ġ , Ġca f Ã© </s>", "<s> A dog runs. , café </s>"),
        ("▁", "[CLS] ▁a ▁ d o g s ▁run s [SEP]", "[CLS] a dogs runs [SEP]"),
        ("</w>", "<start> a</w> d o g</w> .</w> <end>", "<start> a dog . <end>"),
    ],
)
def test_pieces_make_words(pieces: str, names: str, words: str) -> None:
    found = merge_pieces(names.split(), pieces)
    assert [word.text for word in found] == words.split()
    tokens = [token for word in found for token in range(word.start, word.stop)]
    assert tokens == list(range(len(names.split())))


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm_roberta", "albert", "clip"])
def test_words_of_every_tokenizer(name: str, tiny_family: Any) -> None:
    from featstore.encoders.tokens import load_preprocessor

    preset = resolve_preset(tiny_family(name))
    packed = load_preprocessor(preset.tower("text"), 24)(["a dog runs , a man in"])
    ids = np.asarray(packed["token_ids"])[0][np.asarray(packed["padding_mask"])[0].astype(bool)]
    found = Words(preset).of(ids)
    assert [word.text for word in found][1:-1] == ["a", "dog", "runs", ",", "a", "man", "in"]
    assert (found[0].stop, found[-1].stop) == (1, len(ids))


# --- figures and choices


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    maps, target = rng.integers(0, 5, (3, 30)).astype(float), rng.normal(size=30)
    maps[2] = 1
    expected = [spearmanr(one, target).statistic for one in maps[:2]]
    found = spearman(maps, target)
    np.testing.assert_allclose(found[:2], expected)
    assert np.isnan(found[2])


def called_of(labels: list[int], confidence: list[float]) -> Called:
    count = len(labels)
    return Called(
        None,  # type: ignore[arg-type]
        np.arange(count),
        np.zeros(count, np.float32),
        np.array(labels, np.int8),
        np.ones(count, np.int8),
        np.array(confidence),
    )


def test_a_sample_is_balanced_and_errors_are_confident() -> None:
    called = called_of([1] * 20 + [0] * 4 + [-1], [0.9] * 20 + [0.6, 0.9, 0.7, 0.9] + [1])
    for count, wrong in ((6, 3), (12, 4), (25, 4), (1, 0), (40, 4)):
        found = called.balanced(count, 0)
        assert len(set(found)) == min(count, 25)
        assert np.isin(found, range(20, 24)).sum() == wrong
    assert called.balanced(6, 0).tolist() != called.balanced(6, 1).tolist()
    assert called.errors(3).tolist() == [21, 23, 22]
    with pytest.raises(DataError, match="no errors among 1 labelled"):
        called_of([1], [0.9]).errors(2)


def test_a_maps_colours_follow_its_numbers() -> None:
    signed = colored(np.array([[0.5, -1.0, 0.0]]), signed=True)
    assert signed[0, :, 3].tolist() == [115, 230, 0]
    assert (signed[0, 0, 2], signed[0, 1, 0]) == (178, 213)
    plain = colored(np.array([[0.2, 0.1]]), signed=False)
    assert plain[0, 0, 3] > plain[0, 1, 3]
    assert colored(np.zeros((1, 2)), signed=True)[..., 3].tolist() == [[0, 0]]


# --- a run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> trainer.Run:
    """A run of every text token asking in two layers, over all tokens of the images."""
    folder = tmp_path_factory.mktemp("explain")
    settings = {"queries": "all", "fusion_layers": 2, "k_txt": 1, "epochs": 1, "lr": 1e-6}
    config = tiny_config(folder / "data", tiny_vit, tiny_text, **settings)
    config = dataclasses.replace(config, store=dataclasses.replace(config.store, tokens="all"))
    run = trainer.train(
        prepared(config), name="first", runs=folder / "runs", show=SILENT, reporter=Reporter()
    )
    return trainer.load_run(run.folder)


@pytest.fixture(scope="module")
def explained(made: trainer.Run) -> Any:
    return made.explain(rows=4, sample=9, show=SILENT)


def test_what_is_found_of_a_run(made: trainer.Run, explained: Any) -> None:
    summary = explained.summary()
    json.dumps(summary, allow_nan=False)
    assert (summary["grid"], summary["leading_tokens"]) == ([4, 4], 1)
    assert (summary["layers"], summary["heads"], summary["queries"]) == (2, 2, "all")
    frame = made.predict(made.config.data.rows, show=SILENT)
    for row in explained.rows:
        (line,) = frame[
            (frame["Image_ID"] == row.image_id) & (frame["Hypothesis"] == row.hypothesis)
        ].to_dict("records")
        expected = line["probability_entailment"]
        assert row.probabilities["probability_entailment"] == pytest.approx(expected, abs=1e-5)
        assert 1 / (1 + np.exp(-row.maps.log_odds)) == pytest.approx(expected, abs=1e-5)
        assert [word.text for word in row.words][1:-1] == row.hypothesis.split()
        length = len(row.maps.text_parts)
        assert row.maps.attention.shape == (2, 2, length, 17)
        assert row.word_attention.shape == (2, len(row.words), 17)
        np.testing.assert_allclose(row.maps.attention.sum(axis=-1), 1, atol=1e-5)
        assert row.word_parts.sum() == pytest.approx(row.maps.text_parts.sum(), abs=1e-5)
    agreement = summary["agreement"]
    assert (agreement["rows"], [w["patches"] for w in agreement["windows"]]) == (9, [1, 3])
    maps = agreement["windows"][0]["maps"]
    assert list(maps)[:3] == ["attention of layer 1", "attention of layer 2", "best head"]
    for found in maps.values():
        assert -1 <= found["interval"]["low"] <= found["mean"] <= found["interval"]["high"] <= 1
    assert [found["share"] for found in summary["deletion"]] == [0.05, 0.1, 0.2, 0.5]


def test_choices_are_the_same_again(made: trainer.Run, explained: Any) -> None:
    again = made.explain(rows=4, sample=9, show=SILENT)
    assert again.summary() == explained.summary()
    image_id = explained.rows[0].image_id
    of_photo = made.explain(ids=image_id, sample=2, show=SILENT)
    assert [row.image_id for row in of_photo.rows] == [image_id] * 4
    with pytest.raises(UsageError, match=r"photo000.*another split.*--split"):
        made.explain(ids=["photo000"], sample=1, show=SILENT)
    with pytest.raises(UsageError, match=r"phot044.*did you mean 'photo044'"):
        made.explain(ids=["phot044"], sample=1, show=SILENT)
    with pytest.raises(UsageError, match="rows and errors exclude"):
        made.explain(rows=1, errors=1, show=SILENT)
    with pytest.raises(UsageError, match="sample = 0: expected"):
        made.explain(sample=0, show=SILENT)


def test_the_page_and_the_arrays(explained: Any, tmp_path: Path) -> None:
    size = explained.page(tmp_path / "explain.html")
    text = (tmp_path / "explain.html").read_text()
    assert size == len(text.encode()) < 400_000
    # Of each row four maps, of each layer the heads and their mean, and of each word a map a layer.
    words = sum(len(row.words) for row in explained.rows)
    assert text.count('<img src="data:image/png') == 4 * (4 + 2 * 3) + 2 * words
    assert len(re.findall(r'src="data:image/jpeg', text)) == 4
    assert "each token of the sentence asks" in text
    assert "on the class token" in text
    explained.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["attention_0"], explained.rows[0].maps.attention)
        assert arrays["occlusion_3"].shape == (2, 16)
    (first, *others) = explained.pngs(tmp_path / "png")
    assert len(others) == 3
    with Image.open(first) as image:
        assert image.width > 1000
    alt = maps_of(explained.rows[0], explained)[0].alt
    assert re.search(r"Attention, mean of heads, layer 2 of 2: at most .* strongest at row \d", alt)


@pytest.mark.slow
def test_the_page_in_a_browser(explained: Any, tmp_path: Path) -> None:
    gone = dataclasses.replace(explained.rows[1], photo="gone.png: cannot be read", label=-1)
    rows = [explained.rows[0], gone]
    dataclasses.replace(explained, rows=rows).page(tmp_path / "explain.html")
    text = (tmp_path / "explain.html").read_text()
    assert "cannot be read now: gone.png" in text
    assert "No label" in text
    check_page(tmp_path / "explain.html")


def line_of(run: trainer.Run) -> list[str]:
    return ["explain", str(run.folder), "--sample", "2", "--json"]


def test_the_command(made: trainer.Run, tmp_path: Path) -> None:
    line = line_of(made)
    page, npz = tmp_path / "p.html", tmp_path / "p.npz"
    done = CliRunner().invoke(cli, [*line, "--errors", "1", "--out", str(page), "--npz", str(npz)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert row["Label"] != row["predicted"]
    assert found["choice"] == "the most confident errors"
    assert page.exists()
    assert npz.exists()
    for wrong in (["--rows", "1", "--errors", "1"], ["--images", "x"], ["--npz", "x.json"]):
        assert CliRunner().invoke(cli, [*line, *wrong]).exit_code == 2


@pytest.mark.slow
def test_the_command_on_rows_of_a_file(made: trainer.Run, tmp_path: Path) -> None:
    """Without labels, one photo new and one bad; and the page cannot be written."""
    line = line_of(made)
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 30), "red").save(images / "new.png")
    (images / "bad.jpg").write_bytes(b"")
    rows = [{"Image_ID": name, "Hypothesis": "a dog"} for name in ("new", "bad")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--file", str(tmp_path / "rows.jsonl"), "--images", str(images)]
    nowhere = tmp_path / "rows.jsonl" / "p.html"
    done = CliRunner().invoke(cli, [*line, *given, "--out", str(nowhere)])
    assert done.exit_code == 1, done.output
    found = json.loads(done.stdout)
    (row,) = found["rows"]
    assert (row["Image_ID"], row["Label"], row["without_photo"]) == ("new", None, None)
    assert "--out FILE" in found["error"]["mend"]


def test_a_run_without_photos_has_nothing_to_look_at(made: trainer.Run, tmp_path: Path) -> None:
    run = trainer.load_run(made.folder)
    train = dataclasses.replace(run.config.train, control="hypothesis-only")
    run.scorer.train = train
    with pytest.raises(UsageError, match="trained on the sentence alone"):
        run.explain(show=SILENT)


JAX = """
import json, sys
import trainer
from featstore.progress import SILENT
run = trainer.load_run(sys.argv[1])
found = run.explain(rows=2, sample=1, show=SILENT)
rows = [[r.maps.attention.tolist(), r.maps.token_parts.tolist(), r.word_parts.tolist(),
         r.maps.occlusion.tolist()] for r in found.rows]
print(json.dumps(rows))
"""


@pytest.mark.slow
def test_the_same_on_jax(made: trainer.Run) -> None:
    expected = made.explain(rows=2, sample=1, show=SILENT)
    found = json.loads(run_on_jax("-c", JAX, str(made.folder)).splitlines()[-1])
    for row, (attention, tokens, words, occlusion) in zip(expected.rows, found, strict=True):
        np.testing.assert_allclose(attention, row.maps.attention, atol=1e-5)
        np.testing.assert_allclose(tokens, row.maps.token_parts, atol=1e-5)
        np.testing.assert_allclose(words, row.word_parts, atol=1e-5)
        np.testing.assert_allclose(occlusion, row.maps.occlusion, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_taught_to_look_looks_at_what_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On scenes whose shapes stand at known places, and sentences such as "a red circle"."""
    monkeypatch.setattr(demo, "IMAGES", 1200)
    kinds = {each.text: each.kind for each in scenes.STATEMENTS}
    rows, images = demo.ensure_demo_data(tmp_path)
    lines = rows.read_text().splitlines(keepends=True)
    chosen = [line for line in lines if kinds[json.loads(line)["Hypothesis"]] == "exists"]
    (tmp_path / "rows.jsonl").write_text("".join(chosen))
    project = Project(
        rows=str(tmp_path / "rows.jsonl"),
        images=str(images),
        root=str(tmp_path / "cache"),
        vit=demo.VIT_PRESET,
        text=demo.TEXT_PRESET,
    )
    project.extract("vit", show=SILENT)
    settings = {**demo.DEMO_TRAIN, "k_txt": 0, "lr": 1e-3, "epochs": 5}
    run = trainer.train(
        project, name="taught", runs=tmp_path / "runs", show=SILENT, reporter=Reporter(), **settings
    )
    assert run.metrics["at_half"]["accuracy"] > 0.85
    figures = named_objects.measure(run.folder, rows=120)
    assert figures["rows"] > 20
    for name, maps in figures["maps"].items():
        low = maps["named shapes"]["interval"]["low"]
        assert low > 2, name
        assert low > 1.5 * maps["other shapes"]["interval"]["high"], name
        assert maps["strongest"]["mean"] > 5 * figures["area"], name
    assert "named shapes" in named_objects.report(figures)
