"""What data show before training: each figure against what was put into the data."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import check_page
from click.testing import CliRunner
from PIL import Image
from tiny_runs import write_data

import trainer
from featstore.config import SPLITS
from featstore.data.dataset import Dataset
from featstore.data.examples import Examples
from featstore.data.images import ImageIndex, decode_image, glance
from featstore.data.labels import labels_of
from featstore.data.splits import Splits
from featstore.errors import ImageError, UsageError
from featstore.progress import SILENT
from featstore.project import Project
from trainer.buckets import load_buckets
from trainer.commands.main import cli
from trainer.exploration import photos
from trainer.exploration.baseline import hypothesis_only, sentence_of
from trainer.exploration.duplicates import near_pairs
from trainer.exploration.kinds import SPATIAL, kinds
from trainer.exploration.photos import perceptual_hash
from trainer.exploration.sentences import words_of
from trainer.exploration.words import PRIOR_WORDS, log_odds

DOCS = Path(__file__).resolve().parent.parent / "docs"


def table(*rows: tuple[str, str, int]) -> Examples:
    ids, sentences, labels = zip(*rows, strict=True)
    return Examples(
        np.array(ids, object),
        np.array(sentences, object),
        np.array(labels, np.int8),
        np.arange(1, len(rows) + 1),
        np.array(["rows.jsonl"] * len(rows), object),
    )


def scene(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """Return a photo with something to see: coarse random colours, smoothly joined."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# --- photos


def test_a_glance_is_what_decoding_gives() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    for data in (
        encoded(scene(1, (800, 600)), quality=95),
        encoded(scene(1, (800, 600)), exif=turned),
        encoded(scene(1).convert("L")),
        encoded(scene(1).convert("CMYK")),
        encoded(scene(1), "PNG"),
        encoded(scene(1).convert("P"), "GIF"),
    ):
        found, whole = glance(data, "photo"), decode_image(data, "photo")
        assert (found.height, found.width) == whole.shape[:2]
        grey = Image.fromarray(whole).convert("L").resize((32, 32), Image.Resampling.BOX)
        assert np.abs(found.grey.astype(int) - np.asarray(grey)).max() <= 12
        hashes = perceptual_hash(np.stack([found.grey, np.asarray(grey)]))
        assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 2


@pytest.mark.parametrize("data", [b"", b"no photo", encoded(scene(2), quality=95)[:900]])
def test_a_glance_says_of_damage_what_decoding_says(data: bytes) -> None:
    said = []
    for decode in (glance, decode_image):
        with pytest.raises(ImageError) as error:
            decode(data, "photo.jpg")
        said.append(error.value.message)
    assert said[0] == said[1]


def test_copies_have_near_hashes_and_others_have_not() -> None:
    first = scene(3, (400, 300))
    copies = [first.resize((100, 75)), first.convert("L"), first.point(lambda v: min(255, 1.2 * v))]
    others = [scene(seed, (400, 300)) for seed in range(4, 44)]
    greys = [glance(encoded(image, quality=60), "x").grey for image in (first, *copies, *others)]
    bits = np.bitwise_count(perceptual_hash(np.stack(greys))[1:] ^ perceptual_hash(greys[0][None]))
    assert bits[:3].max() <= 8
    assert bits[3:].min() > 12


def test_near_pairs_are_those_of_comparing_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.exploration.duplicates._CHUNK_VALUES", 700)
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 90, np.uint64)
    hashes[40:60] = hashes[:20] ^ (np.uint64(1) << rng.integers(0, 64, 20, np.uint64))
    hashes[60:63] = hashes[0]
    expected = sorted(
        ((int(hashes[i]) ^ int(hashes[j])).bit_count(), i, j)
        for i in range(90)
        for j in range(i + 1, 90)
    )
    found = near_pairs(hashes, 3)
    pairs = list(zip(found.bits, found.first, found.second, strict=True))
    assert pairs == [pair for pair in expected if pair[0] <= 3]
    assert found.histogram.tolist() == np.bincount([p[0] for p in expected], minlength=65).tolist()
    # Too many: the nearest are kept, and the distance says so.
    fewer = near_pairs(hashes, 3, most=10)
    assert fewer.distance == 0
    assert fewer.bits.tolist() == [0] * 6
    same = near_pairs(np.zeros(40, np.uint64), 3, most=10)
    assert (len(same.first), same.histogram[0]) == (10, 40 * 39 // 2)


# --- sentences


def test_words_keep_their_apostrophes() -> None:
    assert words_of("A man isn’t (really) 12 years_old — no!") == [
        *("a", "man", "isn't", "really", "12", "years", "old", "no"),
    ]


def test_log_odds_are_those_of_the_paper() -> None:
    rows = [("a", "sleeping dog dog", 0)] * 6 + [("b", "playing dog", 1)] * 4 + [("c", "dog", 1)]
    found = log_odds(table(*rows), 2)
    # Words by rows: dog 6 and 5, sleeping 6 and 0, playing 0 and 4; 11 and 6, 0 and 4 above.
    prior = PRIOR_WORDS * 6 / 21
    first = np.log((6 + prior) / (12 + PRIOR_WORDS - 6 - prior))
    second = np.log(prior / (9 + PRIOR_WORDS - prior))
    deviation = np.sqrt(1 / (6 + prior) + 1 / prior)
    assert found["words"] == 2  # playing has four rows
    (word,) = found["classes"]["contradiction"]["top"]
    assert (word["word"], word["rows"], word["share"]) == ("sleeping", 6, 1.0)
    assert word["log_odds"] == pytest.approx(first - second)
    assert word["z"] == pytest.approx((first - second) / deviation)
    assert found["limit"] == pytest.approx(2.2414, abs=1e-4)


def test_log_odds_of_a_class_without_rows_have_no_words() -> None:
    found = log_odds(table(*[("a", "a dog runs", 1)] * 9), 3)
    assert [at["top"] for at in found["classes"].values()] == [[], [], []]


def test_words_alone_are_learnt_from_train_and_measured_on_the_others() -> None:
    rows = [(f"a{i}", ("red ball", "blue ball")[i % 2], i % 2) for i in range(8)]
    rows += [(f"b{i}", ("red ball", "blue ball")[i % 2], i % 2) for i in range(4)]
    rows += [(f"c{i}", ("red ball", "blue ball")[i % 2], 1 - i % 2) for i in range(4)]
    examples = table(*rows)
    ids = examples.image_ids
    splits = Splits({"train": tuple(ids[:8]), "val": tuple(ids[8:12]), "test": tuple(ids[12:])}, "")
    images = ImageIndex(Path("photos"), {}, {})
    dataset = Dataset(examples, splits, images, [], Path("cache"))
    found = hypothesis_only(dataset, 2, draws=20)
    assert [at["accuracy"] for at in found["splits"].values()] == [1, 0]
    assert found["splits"]["test"]["above_majority"]["difference"] == -0.5
    assert "reaches 0.0 %" in sentence_of(found)
    without = dataclasses.replace(splits, assignment={**splits.assignment, "train": ()})
    found = hypothesis_only(dataclasses.replace(dataset, splits=without), 2)
    assert sentence_of(found) == (
        "Not measured: train has fewer than two rows of contradiction, entailment."
    )


@pytest.mark.parametrize(
    ("entailment", "of", "others", "verdict"),
    [(11, 20, 0, "fit"), (12, 20, 0, "skewed"), (9, 20, 180, "fit"), (9, 20, 181, "rare")],
)
def test_which_buckets_may_be_oversampled(
    entailment: int, of: int, others: int, verdict: str
) -> None:
    rows = [(f"p{i}", "a red ball", int(i < entailment)) for i in range(of)]
    rows += [(f"q{i}", "a ball", 1) for i in range(others)]
    found = kinds(load_buckets(), table(*rows), 2, draws=20)
    assert found["colors"]["verdict"] == verdict
    assert found["negation"]["verdict"] == "empty"
    assert found["negation"]["entailment"] is None
    assert found["colors"]["entailment"]["share"] == entailment / of
    assert found["any"]["rows"] == of


def test_the_spatial_keywords_are_the_eleven_of_the_study() -> None:
    patterns = load_buckets(SPATIAL)
    assert list(patterns) == [
        *("inside", "on", "outside", "near", "front", "back", "bottom", "top", "center"),
        *("right", "left"),
    ]
    assert patterns["near"].search("He sits next  to a dog")
    assert not patterns["inside"].search("An inn")


# --- the whole


def settings_of(folder: Path, classes: int = 2) -> dict[str, Any]:
    """Write data with a photo in two splits, an unreadable one, and a word that tells."""
    data = write_data(folder, classes=classes)
    images = Path(data["images"])
    for number, path in enumerate(sorted(images.iterdir())):
        scene(number).save(path)
    scene(0).resize((80, 60)).save(images / "copy.jpg")
    (images / "bad.png").write_bytes(b"no photo")
    rows, split = Path(data["rows"]), Path(data["split_file"])
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        line["Hypothesis"] += {"entailment": " outside", "contradiction": " asleep"}.get(
            line["Label"], ""
        )
    lines += [
        {"Image_ID": name, "Hypothesis": "a $ <b> cat asleep", "Label": "contradiction"}
        for name in ("copy", "bad")
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = json.loads(split.read_text())
    parts["test"] += ["copy", "bad"]
    split.write_text(json.dumps(parts))
    return {**data, "classes": classes, "root": str(folder / "cache"), "text": str(folder / "no")}


@pytest.fixture(scope="module", params=[2, 3])
def explored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder that is left, and what is returned, of two and of three classes."""
    folder = tmp_path_factory.mktemp("eda")
    project = Project(**settings_of(folder, request.param))
    out = folder / "out"
    return out, trainer.eda(project, out, draws=50, samples=2, show=SILENT)


def test_what_was_put_into_the_data_is_found(explored: tuple[Path, dict[str, Any]]) -> None:
    out, found = explored
    near = found["duplicates"]
    (pair,) = near["named"]
    assert (pair["photos"], pair["splits"]) == (["photo000", "copy"], ["train", "test"])
    assert (pair["confirmed"], near["across_splits"]) == (None, 1)
    assert near["by_splits"] == {"train and test": 1}
    assert near["reason"] == "no photo features have been extracted"
    assert found["photos"]["unreadable"] == 1
    assert found["tokens"]["reason"]
    for name, word in (("entailment", "outside"), ("contradiction", "asleep")):
        assert found["log_odds"]["classes"][name]["top"][0]["word"] == word
    assert found["hypothesis_only"]["splits"]["test"]["accuracy"] == 1
    assert found["repeats"]["seen"]["val"]["learnable"]
    said = " ".join(found["warnings"])
    for part in ("possible leak: 1 pair", "reaches 100.0 %", "bad", "learnt by heart"):
        assert part in said
    left = json.loads((out / "eda.json").read_text())
    assert left == {k: v for k, v in found.items() if k not in ("folder", "files")}
    for name in found["files"].values():
        assert (out / name).stat().st_size
    assert "<b>" not in (out / "eda.html").read_text()


def test_every_field_of_the_file_is_described(explored: tuple[Path, dict[str, Any]]) -> None:
    described = set(re.findall(r"`(\w+)`", (DOCS / "EDA.md").read_text()))
    left = json.loads((explored[0] / "eda.json").read_text())
    # Keys that are data.
    data = {*load_buckets(), *load_buckets(SPATIAL), *left["versions"], *labels_of(3), *SPLITS}
    data |= {"bad", "JPEG", "PNG", "train and test"}

    def names(value: Any) -> set[str]:
        if isinstance(value, list):
            return set[str]().union(*map(names, value))
        if not isinstance(value, dict):
            return set()
        return set(value).union(*map(names, value.values()))

    assert names(left) - data - described == set()


def test_a_photo_is_decoded_once_for_each_state_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featstore.extract.photos.RACY_NS", -(10**12))
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        scene(number).save(path)
    paths[2].write_bytes(b"no photo")
    looked: list[str] = []

    def look(data: bytes, name: str, side: int) -> Any:
        looked.append(name)
        return glance(data, name, side)

    monkeypatch.setattr(photos, "glance", look)

    def looks() -> photos.Looks:
        looked.clear()
        return photos.look_at(["a", "b", "c"], paths, tmp_path / "cache", tmp_path, 2)

    first = looks()
    assert len(looked) == 3
    again = looks()
    assert looked == ["2.png"]
    assert (again.ids, again.formats, again.unreadable) == (
        *(["a", "b"], ["PNG", "PNG"]),
        first.unreadable,
    )
    assert (again.hashes == first.hashes).all()
    assert again.sizes.tolist() == [[96, 72], [96, 72]]
    scene(9, (60, 50)).save(paths[0])
    changed = looks()
    assert sorted(looked) == ["0.png", "2.png"]
    assert changed.sizes[0].tolist() == [60, 50]
    # A list that is damaged is made anew.
    (kept,) = (tmp_path / "cache" / "photo-digests").glob("*-looks.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert (looks().hashes == changed.hashes).all()
    assert len(looked) == 3


def test_a_balanced_set_has_nothing_to_warn_of(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    for number, path in enumerate(sorted(Path(data["images"]).iterdir())):
        scene(number).save(path)
    project = Project(**data, root=str(tmp_path / "cache"), text=str(tmp_path / "no"))
    found = trainer.eda(project, tmp_path / "out", draws=50, show=SILENT)
    assert found["hypothesis_only"]["splits"]["test"]["accuracy"] == 0.5
    assert "nothing away that 12 photos could show" in found["hypothesis_only"]["meaning"]
    (only,) = found["warnings"]
    assert only.startswith("tokens are not counted")
    assert found["duplicates"]["pairs"] == 0


def test_a_folder_of_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    project = Project(rows="none.jsonl", images="none")
    with pytest.raises(UsageError, match="name another folder with --out"):
        trainer.eda(project, tmp_path)
    with pytest.raises(UsageError, match=r"manifest.json: is a file; name a folder with --out"):
        trainer.eda(project, tmp_path / "manifest.json")


@pytest.mark.slow
def test_the_command_counts_tokens_and_confirms_by_features(
    tmp_path: Path, tiny_vit: Path, tiny_text: Path
) -> None:
    settings = settings_of(tmp_path) | {"vit": str(tiny_vit), "text": str(tiny_text)}
    rows = Path(settings["rows"])
    long = {"Image_ID": "photo001", "Hypothesis": "a dog " * 50, "Label": "entailment"}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    project = Project(**settings)
    project.extract("vit", show=SILENT)
    found = trainer.eda(project, tmp_path / "out", draws=20, show=SILENT)
    assert (found["tokens"]["source"], found["tokens"]["max"]) == ("tokenizer", 102)
    assert found["tokens"]["cut"] == 1
    (pair,) = found["duplicates"]["named"]
    assert pair["confirmed"]
    assert found["duplicates"]["across_confirmed"] == 1
    assert found["warnings"][0].startswith("leak: 1 pair")
    project.extract("text", show=SILENT)
    stored = trainer.eda(Project(**settings), tmp_path / "out", draws=20, show=SILENT)
    assert stored["tokens"] == found["tokens"] | {"source": "stored features"}

    flags = ("rows", "images", "split_file", "root", "vit", "text")
    args = [part for name in flags for part in (f"--{name.replace('_', '-')}", settings[name])]
    done = CliRunner().invoke(cli, ["eda", *args, "--out", str(tmp_path / "out"), "--draws", "20"])
    assert done.exit_code == 0, done.output
    assert "warning: leak: 1 pair" in done.stderr
    assert f"written: {tmp_path / 'out' / 'eda.html'}" in done.stdout
    check_page(tmp_path / "out" / "eda.html")
