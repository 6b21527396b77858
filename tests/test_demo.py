"""The demo's rows need the picture, its data appear whole, its presets load."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

from featstore import demo
from featstore.demo import scenes
from featstore.demo.scenes import STATEMENTS, Question, Scene, Shape, Statement
from featstore.errors import DataError

PRESET_LIMIT_BYTES = 3_000_000


@pytest.fixture(scope="module")
def drawn() -> tuple[list[Scene], list[Question]]:
    return scenes.draw_questions(demo.IMAGES, demo.SEED)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "IMAGES", 6)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def statement(text: str) -> Statement:
    return next(each for each in STATEMENTS if each.text == text)


class TestTruth:
    scene = Scene(
        (
            Shape("circle", "red", 20, 30, 12),
            Shape("star", "blue", 70, 35, 12),
            Shape("square", "red", 60, 75, 12),
            Shape("square", "green", 20, 75, 12),
        )
    )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("There is a red circle.", 1),
            ("There is a blue circle.", 0),
            ("The star is blue.", 1),
            ("The star is red.", 0),
            ("The square is red.", -1),
            ("The triangle is red.", -1),
            ("There is no triangle.", 1),
            ("There is no star.", 0),
            ("Nothing is purple.", 1),
            ("Nothing is red.", 0),
            ("There are exactly two squares.", 1),
            ("There is exactly one square.", 0),
            ("Exactly two shapes are red.", 1),
            ("Exactly one shape is red.", 0),
            ("There are more squares than stars.", 1),
            ("There are more stars than circles.", 0),
            ("The circle is left of the star.", 1),
            ("The circle is right of the star.", 0),
            ("The star is right of the circle.", 1),
            ("The circle is above the star.", -1),
            ("The circle is left of the square.", -1),
            ("The blue shape is above the green shape.", 1),
            ("The green shape is above the blue shape.", 0),
            ("The green shape is below the blue shape.", 1),
        ],
    )
    def test_sentence(self, text: str, expected: int) -> None:
        assert scenes.truth(statement(text), self.scene) == expected

    def test_table_agrees_with_each_statement(self) -> None:
        some = scenes.draw_scenes(20, 3)
        table = scenes.truth_table(some)
        for row, scene in zip(table, some, strict=True):
            assert row.tolist() == [scenes.truth(each, scene) for each in STATEMENTS]

    def test_caption_lists_every_shape(self) -> None:
        expected = "A blue star, a green square, a red circle and a red square."
        assert scenes.caption(self.scene) == expected

    def test_sentences_are_distinct(self) -> None:
        assert len({each.text for each in STATEMENTS}) == len(STATEMENTS)


class TestPictures:
    def test_shape_has_its_colour_at_its_place(self) -> None:
        for scene in scenes.draw_scenes(20, 4):
            pixels = np.asarray(scenes.render(scene)).astype(int)
            assert pixels.shape == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
            for shape in scene.shapes:
                found = pixels[round(shape.y), round(shape.x)]
                named = {
                    name: np.abs(found - value).sum() for name, value in scenes.COLOURS.items()
                }
                assert min(named, key=lambda name: named[name]) == shape.colour

    def test_shapes_do_not_overlap_and_lie_inside(self) -> None:
        for scene in scenes.draw_scenes(200, 5):
            for i, a in enumerate(scene.shapes):
                assert a.radius < a.x < scenes.IMAGE_SIZE - a.radius
                assert a.radius < a.y < scenes.IMAGE_SIZE - a.radius
                for b in scene.shapes[:i]:
                    assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2

    def test_varied_scene_changes_at_most_one_look(self) -> None:
        rng = random.Random(0)
        for scene in scenes.draw_scenes(50, 6):
            before = [(shape.name, shape.colour) for shape in scene.shapes]
            varied = scenes.vary_scene(rng, scene)
            after = [(shape.name, shape.colour) for shape in varied.shapes]
            assert sum(a != b for a, b in zip(before, after, strict=True)) <= 1
            assert [shape.x for shape in varied.shapes] != [shape.x for shape in scene.shapes]


class TestBalance:
    def test_labels_are_right(self, drawn: tuple[list[Scene], list[Question]]) -> None:
        all_scenes, questions = drawn
        for question in questions:
            found = scenes.truth(question.statement, all_scenes[question.scene])
            assert found == int(question.label)

    def test_each_sentence_is_true_half_the_time(
        self, drawn: tuple[list[Scene], list[Question]]
    ) -> None:
        asked = Counter(q.statement.text for q in drawn[1])
        true = Counter(q.statement.text for q in drawn[1] if q.label)
        deviations = [(true[text] - n / 2) / (n / 4) ** 0.5 for text, n in asked.items()]
        # Fair coins: each deviation is about normal, so is the sum of their squares.
        assert max(map(abs, deviations)) < 4
        excess = sum(z * z for z in deviations) - len(deviations)
        assert abs(excess) < 4 * (2 * len(deviations)) ** 0.5

    def test_each_image_has_both_labels_equally(
        self, drawn: tuple[list[Scene], list[Question]]
    ) -> None:
        all_scenes, questions = drawn
        true = Counter(q.scene for q in questions if q.label)
        false = Counter(q.scene for q in questions if not q.label)
        assert true == false == dict.fromkeys(range(len(all_scenes)), scenes.SENTENCES // 2)

    def test_no_image_has_a_sentence_twice(self, drawn: tuple[list[Scene], list[Question]]) -> None:
        asked = Counter((q.scene, q.statement.text) for q in drawn[1])
        assert set(asked.values()) == {1}

    def test_words_alone_say_nothing(self, drawn: tuple[list[Scene], list[Question]]) -> None:
        questions = drawn[1]
        words = CountVectorizer().fit_transform([q.statement.text for q in questions])
        scores = cross_val_score(
            LogisticRegression(solver="liblinear"),
            words,
            [q.label for q in questions],
            groups=[q.scene for q in questions],
            cv=GroupKFold(5),
        )
        assert 0.46 <= scores.mean() <= 0.54

    def test_memorised_sentences_say_nothing(
        self, drawn: tuple[list[Scene], list[Question]]
    ) -> None:
        right = 0.0
        for fold in range(5):
            votes: Counter[str] = Counter()
            for q in drawn[1]:
                if q.scene % 5 != fold:
                    votes[q.statement.text] += 1 if q.label else -1
            for q in drawn[1]:
                if q.scene % 5 == fold:
                    vote = votes[q.statement.text]
                    right += 0.5 if vote == 0 else (vote > 0) == q.label
        assert 0.46 <= right / len(drawn[1]) <= 0.54

    def test_every_kind_is_asked(self, drawn: tuple[list[Scene], list[Question]]) -> None:
        kinds = Counter(q.statement.kind for q in drawn[1])
        assert set(kinds) == {each.kind for each in STATEMENTS}
        assert min(kinds.values()) >= 100

    def test_seed_decides_everything(self) -> None:
        assert scenes.draw_questions(5, 1) == scenes.draw_questions(5, 1)
        assert scenes.draw_questions(5, 1) != scenes.draw_questions(5, 2)
        first, second = (scenes.render(scenes.draw_scenes(1, 1)[0]).tobytes() for _ in range(2))
        assert first == second


@pytest.mark.usefixtures("few_images")
class TestDemoData:
    def test_rows_and_images_fit(self, tmp_path: Path) -> None:
        rows, images = demo.ensure_demo_data(tmp_path)
        assert rows.parent.parent == images.parent.parent == tmp_path / "demo"
        parsed = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        assert len(parsed) == 6 * scenes.SENTENCES
        for row in parsed:
            assert set(row) == {"Image_ID", "Label", "Hypothesis", "Premise"}
            assert row["Label"] in ("entailment", "contradiction")
        stems = {path.stem for path in images.iterdir()}
        assert stems == {row["Image_ID"] for row in parsed}
        for path in images.iterdir():
            with Image.open(path) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")

    def test_same_bytes_every_time(self, tmp_path: Path) -> None:
        first = demo.ensure_demo_data(tmp_path / "a")[0].parent
        second = demo.ensure_demo_data(tmp_path / "b")[0].parent
        assert contents(first) == contents(second)

    def test_second_call_changes_nothing(self, tmp_path: Path) -> None:
        rows, images = demo.ensure_demo_data(tmp_path)
        before = rows.stat().st_mtime_ns, rows.stat().st_ino
        assert demo.ensure_demo_data(tmp_path) == (rows, images)
        assert (rows.stat().st_mtime_ns, rows.stat().st_ino) == before

    def test_interrupted_creation_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(folder: Path, images: int, seed: int) -> None:
            (folder / "rows.jsonl").write_text("half")
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(scenes, "write_demo", interrupted)
            with pytest.raises(KeyboardInterrupt):
                demo.ensure_demo_data(tmp_path)
        assert [path.name for path in (tmp_path / "demo").iterdir()] in ([], [".lock"])
        rows, _ = demo.ensure_demo_data(tmp_path)
        assert len(rows.read_text().splitlines()) == 6 * scenes.SENTENCES

    def test_killed_creation_is_swept_and_redone(self, tmp_path: Path) -> None:
        code = (
            "import os, pathlib, sys\n"
            "from featstore import demo\n"
            "from featstore.demo import scenes\n"
            "def killed(folder, images, seed):\n"
            "    (folder / 'rows.jsonl').write_text('half')\n"
            "    os._exit(9)\n"
            "scenes.write_demo = killed\n"
            "demo.ensure_demo_data(pathlib.Path(sys.argv[1]))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
        assert done.returncode == 9
        assert list((tmp_path / "demo").glob(".making-*"))
        assert not list((tmp_path / "demo").glob("scenes-*"))
        rows, _ = demo.ensure_demo_data(tmp_path)
        assert len(rows.read_text().splitlines()) == 6 * scenes.SENTENCES
        assert not list((tmp_path / "demo").glob(".making-*"))

    def test_processes_at_once(self, tmp_path: Path) -> None:
        code = (
            "import pathlib, sys, time\n"
            "from featstore import demo\n"
            "demo.IMAGES = 60\n"
            "root = pathlib.Path(sys.argv[1])\n"
            "print('ready', flush=True)\n"
            "sys.stdin.readline()\n"
            "print(demo.ensure_demo_data(root)[0])\n"
        )
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        answers = [worker.communicate(timeout=60) for worker in workers]
        assert [error for _, error in answers] == ["", "", ""]
        rows = {Path(output.strip()) for output, _ in answers}
        assert len(rows) == 1
        assert len(rows.pop().read_text().splitlines()) == 60 * scenes.SENTENCES
        left = [p.name for p in (tmp_path / "demo").iterdir() if p.name != ".lock"]
        assert left == [f"scenes-v{demo.VERSION}-s{demo.SEED}"]

    def test_newer_version_gets_its_own_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old, _ = demo.ensure_demo_data(tmp_path)
        monkeypatch.setattr(demo, "VERSION", demo.VERSION + 1)
        new, _ = demo.ensure_demo_data(tmp_path)
        assert old != new
        assert old.exists()
        assert new.exists()

    def test_unwritable_root_is_one_line(self, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("")
        with pytest.raises(DataError, match=r"cannot be written .*\[store\] root") as caught:
            demo.ensure_demo_data(blocked)
        assert "\n" not in str(caught.value)


def test_import_is_light() -> None:
    code = "import sys, featstore.demo; print({'tensorflow', 'keras'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_without_rows_a_run_trains_with_the_demos_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featstore.settings import build_section
    from trainer.config import TrainConfig, load_config

    # Of the right types, within their bounds.
    checked = build_section("train", TrainConfig, demo.DEMO_TRAIN, "the demo", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_config().train == checked
    changed = {name for name, value in vars(checked).items() if value != vars(TrainConfig())[name]}
    assert changed == {"lr", "dropout", "epochs", "num_heads"}


class TestPresets:
    @pytest.mark.parametrize("folder", [demo.VIT_PRESET, demo.TEXT_PRESET])
    def test_folder_is_small(self, folder: str) -> None:
        sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
        assert 10_000 < sum(sizes) < PRESET_LIMIT_BYTES

    def test_vision_encoder(self) -> None:
        import keras_hub

        backbone = keras_hub.models.Backbone.from_preset(demo.VIT_PRESET)
        converter = keras_hub.layers.ImageConverter.from_preset(demo.VIT_PRESET)
        assert type(backbone).__name__ == "ViTBackbone"
        assert type(converter).__name__ == "ViTImageConverter"
        assert converter.scale == pytest.approx(1 / 127.5)
        assert converter.offset == pytest.approx(-1.0)
        some = scenes.draw_scenes(2, 8)
        pixels = np.stack([np.asarray(scenes.render(scene), np.float32) for scene in some])
        converted = np.asarray(converter(pixels))
        np.testing.assert_allclose(converted, pixels / 127.5 - 1, atol=1e-5)
        features = np.asarray(backbone(converted))
        assert features.shape == (2, 65, 96)
        assert np.isfinite(features).all()

    def test_text_encoder(self) -> None:
        import keras_hub

        backbone = keras_hub.models.Backbone.from_preset(demo.TEXT_PRESET)
        assert type(backbone).__name__ == "DistilBertBackbone"
        assert backbone.num_layers == 6

    def test_tokeniser_covers_the_demo_and_any_english(
        self, drawn: tuple[list[Scene], list[Question]]
    ) -> None:
        import keras_hub

        tokenizer = keras_hub.models.Tokenizer.from_preset(demo.TEXT_PRESET)
        unknown = tokenizer.token_to_id("[UNK]")
        sentences = [each.text for each in STATEMENTS]
        sentences += [scenes.caption(scene) for scene in drawn[0][:200]]
        for sentence in sentences:
            ids = np.asarray(tokenizer.tokenize(sentence)).tolist()
            assert unknown not in ids
            assert len(ids) == len(sentence.replace(",", " ,").replace(".", " .").split())
        other = np.asarray(tokenizer.tokenize("Two quick zebras jump, don't they?")).tolist()
        assert unknown not in other

    def test_record_of_the_training(self) -> None:
        record = json.loads((Path(demo.VIT_PRESET).parent / "TRAINING.json").read_text())
        assert record["command"].startswith("python -m featstore.demo.train_encoders")
        assert min(record["held_out_balanced_accuracy"].values()) > 0.85
