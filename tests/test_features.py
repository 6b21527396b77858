"""Cached features for other loops: PyTorch's and Grain's protocol, tf.data, scikit-learn."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from tiny_runs import SENTENCES, tiny_config

from featstore.errors import MissingFeaturesError, StoreError
from featstore.features import FeatureRows
from featstore.store.store import TextStore, VisionStore, open_store
from trainer.commands.main import cli
from trainer.config import Config, render_config

ROOT = Path(__file__).resolve().parent.parent
TOKENS = 16  # 32 pixels in patches of 8
WIDTH = 16


@dataclasses.dataclass
class Stores:
    """One extraction of the tiny data set."""

    vision: VisionStore
    text: TextStore
    table: dict[str, list[dict[str, str]]]

    def column(self, split: str, name: str) -> list[str]:
        return [row[name] for row in self.table[split]]

    def labels(self, split: str) -> NDArray[np.int8]:
        return np.array([label == "entailment" for label in self.column(split, "Label")], np.int8)

    def rows(self, split: str = "train", **options: Any) -> FeatureRows:
        ids, sentences = self.column(split, "Image_ID"), self.column(split, "Hypothesis")
        return FeatureRows(self.vision, self.text, ids, sentences, self.labels(split), **options)


Extract = Callable[..., Stores]


@pytest.fixture(scope="module")
def extract(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Extract:
    """Give the stores of some `[store]` settings; the same settings share them."""
    folder = tmp_path_factory.mktemp("features")
    config: Config = tiny_config(folder / "data", tiny_vit, tiny_text, k_txt=2)
    file = folder / "featstore.toml"
    file.write_text(render_config(config))
    rows = [json.loads(line) for line in Path(str(config.data.rows)).read_text().splitlines()]
    splits = json.loads(Path(config.data.split_file).read_text())
    table = {
        split: [row for row in rows if row["Image_ID"] in set(ids)] for split, ids in splits.items()
    }
    made: dict[tuple[str, ...], Stores] = {}

    def extract(*settings: str) -> Stores:
        if settings not in made:
            root = folder / f"cache{len(made)}"
            for kind in ("vit", "text"):
                command = (f"extract-{kind}", "--config", str(file), "--root", str(root))
                result = CliRunner().invoke(cli, [*command, *settings])
                assert result.exit_code == 0, (result.stderr, result.exception)
            (vit,), (text,) = ((root / kind).glob("*") for kind in ("vit", "text"))
            vision, sentences = open_store(vit), open_store(text)
            assert isinstance(vision, VisionStore)
            assert isinstance(sentences, TextStore)
            made[settings] = Stores(vision, sentences, table)
        return made[settings]

    return extract


@pytest.fixture(scope="module")
def stores(extract: Extract) -> Stores:
    return extract("--dtype", "float16")


def assert_same_row(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert np.array_equal(found[name], value), name


def test_a_row_is_its_photo_its_sentence_and_its_label(stores: Stores) -> None:
    rows = stores.rows("val")
    assert len(rows) == len(stores.table["val"]) == 48
    for i, (row, given) in enumerate(zip(rows, stores.table["val"], strict=True)):
        assert row.keys() == {"features", "hidden", "label"}
        photo = stores.vision.gather(stores.vision.lookup([given["Image_ID"]]))[0]
        hidden, mask = stores.text.gather(stores.text.lookup([given["Hypothesis"]]), 24)
        assert row["features"].dtype == row["hidden"].dtype == np.float16
        assert row["features"].shape == (TOKENS, WIDTH)
        assert row["features"].tobytes() == photo.tobytes()
        assert row["hidden"].tobytes() == hidden[mask].tobytes()
        assert row["label"] == (given["Label"] == "entailment")
        assert_same_row(rows[i - len(rows)], row)
    assert len({len(row["hidden"]) for row in rows}) == len(SENTENCES)


def test_positions_do_as_well_as_keys(stores: Stores) -> None:
    by_key = stores.rows("val")
    by_position = FeatureRows(
        stores.vision,
        stores.text,
        by_key.image_positions,
        by_key.text_positions.tolist(),
        by_key.labels,
    )
    for found, expected in zip(by_position, by_key, strict=True):
        assert_same_row(found, expected)


def test_photos_alone(stores: Stores) -> None:
    rows = FeatureRows(stores.vision, None, stores.column("val", "Image_ID"))
    expected = stores.rows("val")
    assert [set(row) for row in rows] == [{"features"}] * 48
    assert all(np.array_equal(rows[i]["features"], expected[i]["features"]) for i in (0, 7, 47))
    found, labels = rows.arrays()
    assert found.shape == (48, WIDTH)
    assert labels is None
    (batch,) = rows.to_tf_dataset(48)
    assert np.array_equal(batch["features"], rows.batch(range(48))["features"])


def torch_loader(
    dataset: Any, batches: list[list[int]], collate: Callable[[list[Any]], Any]
) -> Iterator[Any]:
    """Read a map-style data set as PyTorch's `_MapDatasetFetcher` does."""
    for indices in batches:
        if hasattr(dataset, "__getitems__") and dataset.__getitems__:
            yield collate(dataset.__getitems__(indices))
        else:
            yield collate([dataset[i] for i in indices])


def stack(rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """Stack rows as the loaders' own collating does; it makes tensors of what can be written."""
    assert all(row["features"].flags.writeable for row in rows)
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def test_pytorch_reads_a_batch_by_one_gather(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = stores.rows("train")
    reads: list[int] = []
    for kind in (VisionStore, TextStore):
        plain = kind.gather

        def counted(
            store: Any, positions: NDArray[np.int64], *rest: Any, plain: Any = plain
        ) -> Any:
            reads.append(len(positions))
            return plain(store, positions, *rest)

        monkeypatch.setattr(kind, "gather", counted)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    batches = [order[i : i + 10] for i in range(0, len(order), 10)]
    found = [row for batch in torch_loader(rows, batches, list) for row in batch]
    assert reads == [10] * 24 + [8] * 2
    for i, row in zip(order, found, strict=True):
        assert_same_row(row, rows[i])


@pytest.mark.parametrize("length", [1, 15, 24])
def test_rows_of_one_length_can_be_stacked(stores: Stores, length: int) -> None:
    rows, plain = stores.rows("val", pad_to=length), stores.rows("val")
    (batch,) = torch_loader(rows, [list(range(48))], stack)
    assert batch["hidden"].shape == (48, length, WIDTH)
    assert batch["padding_mask"].shape == (48, length)
    for i, row in enumerate(plain):
        kept = batch["hidden"][i][batch["padding_mask"][i]]
        assert np.array_equal(kept, row["hidden"][:length])
        assert not batch["hidden"][i][~batch["padding_mask"][i]].any()
    assert_same_row(batch, rows.batch(range(48)))


def test_what_a_row_holds_is_the_callers_own(stores: Stores) -> None:
    rows = stores.rows("val")
    first, twin = rows.__getitems__([3, 3])
    first["features"][:] = 7
    first["hidden"][:] = 7
    assert_same_row(twin, rows[3])


def test_grain_takes_it(stores: Stores) -> None:
    grain = pytest.importorskip("grain")
    from grain._src.python.dataset.base import SupportsBatchedReadRandomAccessDataSource

    rows = stores.rows("train", pad_to=24)
    assert isinstance(rows, SupportsBatchedReadRandomAccessDataSource)
    numbered = FeatureRows(
        rows.vision, rows.text, rows.image_positions, rows.text_positions, range(128), pad_to=24
    )
    batches = list(grain.MapDataset.source(numbered).shuffle(seed=1).batch(32))
    order = np.concatenate([batch["label"] for batch in batches])
    assert sorted(order) == list(range(128)) != list(order)
    for batch in batches:
        assert_same_row(batch, numbered.batch(batch["label"]))


def test_tf_data_has_every_row_once(stores: Stores) -> None:
    rows = stores.rows("val")
    dataset = rows.to_tf_dataset(10)
    batches = [(dict(inputs), labels) for inputs, labels in dataset.as_numpy_iterator()]
    assert len(dataset) == len(batches) == 5
    for number, (inputs, labels) in enumerate(batches):
        assert_same_row(inputs | {"label": labels}, rows.batch(range(48)[number * 10 :][:10]))
    spec = dataset.element_spec
    assert spec[0]["hidden"].shape.as_list() == [None, None, WIDTH]
    assert spec[0]["features"].shape.as_list() == [None, TOKENS, WIDTH]
    fixed = stores.rows("val", pad_to=24).to_tf_dataset(10).element_spec
    assert fixed[0]["padding_mask"].shape.as_list() == [None, 24]


def test_tf_data_is_shuffled_by_its_seed(stores: Stores) -> None:
    rows = stores.rows("val")
    rows.labels = np.arange(48)

    def passes(seed: int) -> list[list[int]]:
        dataset = rows.to_tf_dataset(10, shuffle_seed=seed)
        return [
            [int(label) for _, labels in dataset.as_numpy_iterator() for label in labels]
            for _ in range(2)
        ]

    first, again, other = passes(5), passes(5), passes(6)
    assert first == again
    assert len({tuple(order) for order in (range(48), *first, *other)}) == 5
    assert all(sorted(order) == list(range(48)) for order in (*first, *other))
    inputs, labels = next(iter(rows.to_tf_dataset(10, shuffle_seed=5)))
    assert np.array_equal(inputs["features"], rows.batch(labels.numpy())["features"])


def test_scikit_learn_learns_the_rule_from_the_photo_alone(stores: Stores) -> None:
    features, labels = stores.rows("train").arrays()
    assert features.shape == (128, WIDTH + WIDTH)
    assert features.dtype == np.float32
    assert labels is not None
    model = LogisticRegression(max_iter=1000).fit(features, labels)
    assert model.score(*stores.rows("test").arrays()) > 0.95
    # Without the photo there is nothing to learn.
    blind = LogisticRegression(max_iter=1000).fit(features[:, WIDTH:], labels)
    assert blind.score(stores.rows("test").arrays()[0][:, WIDTH:], stores.labels("test")) == 0.5


@pytest.mark.parametrize("chunk", [256, 7])
def test_arrays_pools_as_asked(
    extract: Extract, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("featstore.features.CHUNK_ROWS", chunk)
    rows = extract("--dtype", "float16", "--tokens", "all").rows("val")
    pooled: dict[str | None, Callable[[NDArray[Any]], NDArray[Any]]] = {
        "mean": lambda tokens: tokens.astype(np.float64).mean(axis=0),
        "cls": lambda tokens: tokens[0],
        None: lambda tokens: tokens.ravel(),
    }
    for pool, of in pooled.items():
        expected = [np.concatenate([of(row["features"]), row["hidden"][0]]) for row in rows]
        found, labels = rows.arrays(pool)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert np.array_equal(labels, rows.labels)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_numbers_that_others_do_not_know_become_float32(extract: Extract, dtype: str) -> None:
    rows, exact = (extract("--dtype", name).rows("val") for name in (dtype, "float32"))
    step = {"int8": 1 / 254, "bfloat16": 1 / 256, "float32": 0}[dtype]
    differs = 0.0
    for found, expected in zip(rows, exact, strict=True):
        for name in ("features", "hidden"):
            assert found[name].dtype == np.float32
            peaks = np.abs(expected[name]).max(axis=-1, keepdims=True)
            error = np.abs(found[name] - expected[name])
            assert (error <= peaks * step * 1.001).all()
            differs = max(differs, error.max())
    assert (differs > 0) == (dtype != "float32")
    if dtype == "int8":
        positions = rows.image_positions
        wanted = rows.vision.gather_stored(positions).plain()
        assert rows.batch(range(48))["features"].tobytes() == wanted.tobytes()


def test_a_pickle_holds_no_features(stores: Stores) -> None:
    rows = stores.rows("train")
    pickled = pickle.dumps(rows)
    assert len(pickled) < stores.vision.gather(rows.image_positions[:8]).nbytes
    again = pickle.loads(pickled)
    assert again.vision is not rows.vision
    for found, expected in zip(again, rows, strict=True):
        assert_same_row(found, expected)
    photos = pickle.loads(pickle.dumps(FeatureRows(stores.vision, None, [0, 1])))
    assert np.array_equal(photos[1]["features"], stores.vision.gather(np.array([1]))[0])


def test_a_pickle_of_other_shards_is_refused(
    stores: Stores, extract: Extract, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stores.vision.folder, tmp_path / stores.vision.folder.name))
    vision = open_store(folder)
    assert isinstance(vision, VisionStore)
    pickled = pickle.dumps(FeatureRows(vision, None, stores.column("train", "Image_ID")))
    assert len(pickle.loads(pickled)) == 128
    other = extract("--dtype", "float16", "--shard-rows", "9").vision.folder
    assert other.name == folder.name
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    with pytest.raises(StoreError, match="its shards changed since"):
        pickle.loads(pickled)


WORKERS = """
import multiprocessing, sys
import h5py
import numpy as np
from featstore.features import FeatureRows
from featstore.store.store import open_store

def digest(rows):
    batch = rows.batch(range(len(rows)))
    return [batch[name].tobytes() for name in sorted(batch)]

def send(rows, queue):
    queue.put(digest(rows))

if __name__ == "__main__":
    vision, text = map(open_store, sys.argv[1:])
    images, sentences = np.arange(40) % len(vision), np.arange(40) % len(text)
    rows = FeatureRows(vision, text, images, sentences, np.arange(40))
    expected = digest(rows)
    kinds = h5py.h5f.OBJ_FILE | h5py.h5f.OBJ_DATASET | h5py.h5f.OBJ_GROUP
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, kinds) == 0
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        workers = [context.Process(target=send, args=(rows, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        found = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
        assert found == [expected] * 2, method
    assert not {"tensorflow", "keras", "jax"} & sys.modules.keys()
    print("same")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_worker_processes_read_the_same_rows(stores: Stores, tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, str(script), str(stores.vision.folder), str(stores.text.folder)],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


def test_what_cannot_be_read_is_refused_at_once(stores: Stores) -> None:
    vision, text = stores.vision, stores.text
    ids, sentences = ["photo000", "photo001"], list(SENTENCES[:2])
    with pytest.raises(MissingFeaturesError, match=r"1 of 3 rows .*'nobody'.*extract-vit"):
        FeatureRows(vision, None, [*ids, "nobody"])
    with pytest.raises(MissingFeaturesError, match=r"1 of 2 rows .*'never said'.*extract-text"):
        FeatureRows(vision, text, ids, ["a dog", "never said"])
    for position in (-1, len(vision)):
        with pytest.raises(IndexError, match=r"positions must lie in \[0, 56\)"):
            FeatureRows(vision, None, [0, position])
    with pytest.raises(ValueError, match="give both or neither"):
        FeatureRows(vision, text, ids)
    with pytest.raises(ValueError, match="give both or neither"):
        FeatureRows(vision, None, ids, sentences)
    with pytest.raises(ValueError, match=r"different lengths: .*'images': 2.*'sentences': 1"):
        FeatureRows(vision, text, ids, sentences[:1])
    with pytest.raises(ValueError, match=r"different lengths: .*'labels': 3"):
        FeatureRows(vision, text, ids, sentences, [0, 1, 0])
    for length in (0, 2):
        with pytest.raises(ValueError, match=f"pad_to is {length}; the longest .* 15 tokens"):
            stores.rows(pad_to=length)
    rows = stores.rows("val")
    for index in (48, -49):
        with pytest.raises(IndexError):
            rows[index]
    with pytest.raises(ValueError, match="pool is 'max', expected 'mean', 'cls' or None"):
        rows.arrays("max")
    with pytest.raises(StoreError, match=r"pool 'cls' needs the class token.*--tokens all"):
        rows.arrays("cls")
