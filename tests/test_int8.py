"""int8 stores: the rounding, the shard of format 2, its damage, and everything that reads it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorflow as tf
import xxhash
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny_runs import extracted, tiny_config, with_train

from featstore.care.verify import verify_folder
from featstore.config import StoreConfig
from featstore.errors import CorruptShardError
from featstore.project import Project
from featstore.store.folder import reconcile_manifest, shard_paths, write_manifest
from featstore.store.numbers import Numbers, feature_dtype, quantise, token_bytes
from featstore.store.shard import digest_bytes, open_shard
from featstore.store.store import TextStore, open_store
from featstore.store.write import ShardRows, write_shard
from trainer.commands.main import cli
from trainer.config import Config, TrainConfig, render_config
from trainer.features import prepare
from trainer.model.cached import build_cached_model
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Training

FINGERPRINT = "f" * 32
KEYS = ["a", "sub/é 图", "", "dog"]
LENGTHS = (3, 0, 1, 7)

finite = arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    # Larger ones than any encoder gives overflow when they are rounded up.
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(finite)
def test_each_number_is_within_half_a_step(values: NDArray[np.float32]) -> None:
    levels, scales = quantise(values)
    assert (levels.dtype, scales.dtype) == (np.int8, np.float32)
    assert (levels.shape, scales.shape) == (values.shape, values.shape[:-1])
    assert levels.min() >= -127
    found = Numbers(levels, scales).plain().astype(np.float64)
    step = scales.astype(np.float64)[:, None]
    # The product itself is rounded to float32.
    assert (np.abs(found - values) <= step * (0.5 + 2**-16)).all()
    peaks = np.abs(values).max(axis=-1)
    ordinary = peaks > 1e-30
    assert (np.abs(levels).max(axis=-1)[ordinary] == 127).all()
    assert np.isfinite(scales).all()


@given(finite, st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_token_that_is_not_finite_has_such_a_scale(
    values: NDArray[np.float32], odd: float
) -> None:
    sound, _ = quantise(values)
    values = values.copy()
    values[0, -1] = odd
    levels, scales = quantise(values)
    assert not np.isfinite(scales[0])
    assert np.isfinite(scales[1:]).all()
    assert np.array_equal(levels[1:], sound[1:])


def test_a_token_of_zeros_stays_zero() -> None:
    levels, scales = quantise(np.zeros((2, 3), np.float32))
    assert not levels.any()
    assert not scales.any()
    assert not Numbers(levels, scales).plain().any()


def rows_of(kind: str, seed: int = 0) -> tuple[ShardRows, NDArray[np.float32]]:
    """Rows as an extraction makes them, and the numbers that they were made from."""
    rng = np.random.default_rng(seed)
    if kind == "vit":
        values = rng.normal(size=(len(KEYS), 1, 5, 4)).astype(np.float32)
        digests = [digest_bytes(key.encode()) for key in KEYS]
        return ShardRows(KEYS, Numbers.rounded(values, "int8"), digests), values
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int64)
    values = rng.normal(size=(offsets[-1], 4)).astype(np.float32)
    ids = rng.integers(0, 99, offsets[-1]).astype(np.int32)
    numbers = Numbers.rounded(values, "int8")
    return ShardRows(KEYS, numbers, offsets=offsets, token_ids=ids), values


def write(path: Path, kind: str) -> Path:
    write_shard(path, kind, FINGERPRINT, "int8", rows_of(kind)[0], {"numpy": "2"})
    return path


@pytest.mark.parametrize("kind", ["vit", "text"])
def test_a_shard_keeps_levels_and_scales(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "shard-00000.h5", kind)
    rows, values = rows_of(kind)
    with h5py.File(path) as file:
        assert file.attrs["format"] == 2
        assert file["scales"].id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        assert np.array_equal(file["scales"][...], rows.features.scales)
        assert np.array_equal(file["features"][...], rows.features.values)
        found = file["features"][...] * file["scales"][...][..., None]
        assert np.abs(found - values).max() <= np.abs(values).max() / 254 * 1.001
        sums = file["checksums"][...].tolist()
    shard = open_shard(path, kind, FINGERPRINT, "int8")
    assert not any(array.flags.writeable for array in shard.features.arrays)
    assert all(shard.row_is_intact(row) for row in range(len(KEYS)))
    ends = rows.offsets
    for row, found in enumerate(sums):
        part: Any = row if ends is None else slice(ends[row], ends[row + 1])
        ids = b"" if rows.token_ids is None else rows.token_ids[part].tobytes()
        content = b"".join(array[part].tobytes() for array in rows.features.arrays)
        assert found == xxhash.xxh3_64_intdigest(ids + content)


@pytest.mark.parametrize("kind", ["vit", "text"])
@pytest.mark.parametrize("name", ["features", "scales"])
def test_a_flipped_byte_is_found_in_its_row(tmp_path: Path, kind: str, name: str) -> None:
    path = write(tmp_path / "shard-00000.h5", kind)
    with h5py.File(path) as file:
        offset, size = file[name].id.get_offset(), file[name].id.get_storage_size()
    for at in range(0, size, max(1, size // 40)):
        data = bytearray(path.read_bytes())
        data[offset + at] ^= 0x40
        changed = tmp_path / "shard-00001.h5"
        changed.write_bytes(data)
        (tmp_path / "x").mkdir(exist_ok=True)
        target = tmp_path / "x" / path.name
        shutil.copy(changed, target)
        shard = open_shard(target, kind, FINGERPRINT, "int8")
        broken = [row for row in range(len(KEYS)) if not shard.row_is_intact(row)]
        tokens = at // (size // (20 if kind == "vit" else 11))
        row = (
            tokens // 5
            if kind == "vit"
            else int(np.searchsorted(np.cumsum(LENGTHS), tokens, "right"))
        )
        assert broken == [row]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.__delitem__("scales"), "/scales is missing"),
        (lambda file: put(file, file["scales"][...].astype(np.float16)), "/scales is float16"),
        (lambda file: put(file, file["scales"][...][:-1]), "/scales is float32"),
        (lambda file: put(file, file["scales"][...], chunks=True), "not contiguous"),
        (lambda file: file.attrs.__setitem__("format", 1), "format is 1, expected 2"),
    ],
)
@pytest.mark.parametrize("kind", ["vit", "text"])
def test_other_scales_are_refused(tmp_path: Path, kind: str, change: Any, words: str) -> None:
    path = write(tmp_path / "shard-00000.h5", kind)
    with h5py.File(path, "a") as file:
        change(file)
    with pytest.raises(CorruptShardError, match=words):
        open_shard(path, kind, FINGERPRINT, "int8")


def put(file: h5py.File, values: Any, **options: Any) -> None:
    del file["scales"]
    file.create_dataset("scales", data=values, **options)


def test_a_format_is_of_its_dtypes_only(tmp_path: Path) -> None:
    path = write(tmp_path / "shard-00000.h5", "vit")
    with pytest.raises(CorruptShardError):
        open_shard(path, "vit", FINGERPRINT, "float16")
    rows = rows_of("vit")[0]
    numbers = Numbers(rows.features.values.astype(np.float16))
    rows = ShardRows(rows.keys, numbers, rows.source_digests)
    plain = tmp_path / "shard-00001.h5"
    write_shard(plain, "vit", FINGERPRINT, "float16", rows, {})
    with pytest.raises(CorruptShardError, match="/scales is missing"):
        open_shard(plain, "vit", FINGERPRINT, "int8")


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[Any, list[Any]]:
    with tf.GradientTape() as tape:
        logits = model(inputs)[:, 0]
        loss = tf.reduce_sum(logits * tf.range(1.0, len(logits) + 1))
    return logits.numpy(), [g.numpy() for g in tape.gradient(loss, model.trainable_variables)]


@pytest.mark.parametrize("k_txt", [0, 2])
@pytest.mark.parametrize("fast", [False, True])
def test_the_model_reads_levels_as_the_numbers_they_stand_for(
    tiny_text: Path, k_txt: int, fast: bool
) -> None:
    config = json.loads((tiny_text / "config.json").read_text())
    train = TrainConfig(k_txt=k_txt, num_heads=2, head_dim=4, mlp_dim=8, fast_path=fast)
    rng = np.random.default_rng(0)
    features, hidden = (
        quantise(rng.normal(size=(3, n, width)).astype(np.float32))
        for n, width in ((6, 12), (5, 16))
    )
    mask = np.arange(5) < np.array([[5], [2], [3]])
    shared = {"padding_mask": mask}
    models = {
        dtype: build_cached_model(config, 12, 6, train, feature_dtype=dtype)
        for dtype in ("int8", "float32")
    }
    levels = {
        "features": features[0],
        "feature_scales": features[1],
        "hidden": hidden[0],
        "hidden_scales": hidden[1],
    }
    numbers = {"features": Numbers(*features).plain(), "hidden": Numbers(*hidden).plain()}
    one = gradients(models["int8"], {**shared, **levels})
    two = gradients(models["float32"], {**shared, **numbers})
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6, atol=1e-6)
    assert len(one[1]) == len(two[1])
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def project(tiny_vit: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("int8")
    config = tiny_config(folder, tiny_vit, tiny_text, k_txt=1, epochs=2)
    store = dataclasses.replace(config.store, dtype="int8")
    config = dataclasses.replace(config, store=store)
    (folder / "featstore.toml").write_text(render_config(config))
    extracted(config)
    prepare(Project(config), config.train.k_txt)
    return config


def folders(config: Config) -> dict[str, Path]:
    root = Path(config.store.root)
    return {kind: next((root / kind).iterdir()) for kind in ("vit", "text")}


def command(config: Config, *arguments: str, code: int = 0) -> str:
    file = str(Path(config.store.root).parent / "featstore.toml")
    done = CliRunner().invoke(cli, [*arguments, "--config", file])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return str(done.stdout)


def test_damage_is_named_and_mended_to_the_same_bytes(project: Config) -> None:
    for kind, folder in folders(project).items():
        path = shard_paths(folder)[0]
        sound = path.read_bytes()
        with h5py.File(path) as file:
            offset = file["scales"].id.get_offset()
        damaged = bytearray(sound)
        damaged[offset] ^= 1
        path.write_bytes(damaged)
        report = verify_folder(folder)
        assert [problem.what for problem in report.problems], kind
        key = open_shard(path, kind, folder.name, "int8").keys()[0]
        shown = command(project, "store", "verify", code=1)
        assert key in shown
        command(project, "store", "repair")
        assert path.read_bytes() == sound
        assert verify_folder(folder).problems == []


def test_the_store_gives_what_float32_gives_within_half_a_step(
    project: Config, tmp_path: Path
) -> None:
    exact = dataclasses.replace(project.store, dtype="float32", root=str(tmp_path / "cache"))
    config = dataclasses.replace(project, store=exact)
    dataset = extracted(config)
    store, floats = (Project(settings).images() for settings in (project, config))
    ids = dataset.examples.image_ids.tolist()
    found = store.gather(ids)
    stored = store.gather_stored(store.lookup(ids))
    assert (found.dtype, stored.values.dtype) == (np.float32, np.int8)
    assert stored.scales is not None
    assert np.array_equal(found, stored.values.astype(np.float32) * stored.scales[..., None])
    assert np.array_equal(store[ids[5]], found[5])
    filled = store.empty(len(ids))
    assert store.gather(ids, filled) is filled
    assert np.array_equal(filled, found)
    wanted = floats.gather(ids)
    half = np.abs(wanted).max(axis=-1, keepdims=True) / 254
    assert (np.abs(found - wanted) <= half * 1.001).all()
    assert np.abs(found - wanted).max() > 0
    out = tmp_path / "features.npy"
    command(project, "store", "export", "--out", str(out))
    exported = np.load(out)
    assert (exported.dtype, exported.shape[1:]) == (np.dtype(np.float32), found.shape[1:])
    assert {row.tobytes() for row in exported} == {row.tobytes() for row in found}


def trained(config: Config, folder: Path) -> Training:
    project = Project(config)
    prepare(project, config.train.k_txt)
    training = Training(Run(folder), project, config.train)
    fit(training)
    return training


@pytest.mark.slow
def test_runs_on_int8_features(project: Config) -> None:
    root = Path(project.store.root).parent / "runs"
    losses = {}
    for name, changes in (
        ("fast", {}),
        ("plain", {"fast_path": False}),
        ("head", {"k_txt": 0}),
    ):
        training = trained(with_train(project, **changes), root / name)
        losses[name] = [record["val_loss"] for record in training.progress.history]
        shown = CliRunner().invoke(cli, ["parity", str(root / name), "--rows", "30"])
        assert shown.exit_code == 0, (shown.stdout, shown.stderr, shown.exception)
        done = CliRunner().invoke(cli, ["evaluate", str(root / name), "--split", "test"])
        assert done.exit_code == 0, done.stderr
    assert losses["fast"] == pytest.approx(losses["plain"], abs=1e-4)
    assert losses["head"] != losses["fast"]


@pytest.mark.slow
def test_a_scale_that_no_encoder_gives_fails_parity(project: Config, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(project.store.root).parent, tmp_path / "copy"))
    text = (folder / "featstore.toml").read_text()
    config = dataclasses.replace(
        project,
        store=dataclasses.replace(project.store, root=str(folder / "cache")),
    )
    (folder / "featstore.toml").write_text(text.replace(project.store.root, config.store.root))
    trained(config, folder / "runs" / "x")
    vit = folders(config)["vit"]
    for path in shard_paths(vit):
        shard = open_shard(path, "vit", vit.name, "int8")
        pairs = [tuple(pair) for pair in shard.index["source_digests"].tolist()]
        numbers = shard.features.copy()
        assert numbers.scales is not None
        numbers.scales[...] *= np.float32(1.02)
        rows = ShardRows(shard.keys(), numbers, pairs)
        path.unlink()
        write_shard(path, "vit", vit.name, "int8", rows, shard.versions)
    write_manifest(vit, vit.name, reconcile_manifest(vit))
    done = CliRunner().invoke(cli, ["parity", str(folder / "runs" / "x"), "--rows", "30"])
    assert done.exit_code == 1, done.stdout


def test_the_disk_that_a_plan_asks_for_counts_the_scales() -> None:
    assert token_bytes("int8", 768) == 768 + 4
    assert token_bytes("float16", 768) == 1536
    assert StoreConfig(dtype="int8").dtype == "int8"


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_numbers_are_taken_set_and_joined_like_an_array(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(4, 3, 8)).astype(np.float32)
    numbers = Numbers.rounded(values, dtype)
    plain = numbers.plain()
    assert plain.dtype == (np.float32 if dtype == "int8" else feature_dtype(dtype))
    assert np.abs(plain.astype(np.float32) - values).max() < 0.02
    assert (len(numbers), numbers.shape) == (4, (4, 3, 8))
    assert numbers.nbytes == 4 * 3 * token_bytes(dtype, 8)
    for where in (1, slice(1, 3), (2, slice(2)), np.array([3, 0]), plain[..., 0] > 0):
        assert numbers[where].plain().tobytes() == plain[where].tobytes()
    again = Numbers.zeros((4, 3, 8), dtype)
    assert not again.plain().any()
    again[2:] = numbers[:2]
    joined = Numbers.concatenate([Numbers.zeros((2, 3, 8), dtype), numbers[:2]])
    assert again.plain().tobytes() == joined.plain().tobytes()
    assert numbers.copy().checksum() == numbers.checksum() != again.checksum()
    assert numbers.is_finite()
    values[3, 1, 2] = np.inf
    assert not Numbers.rounded(values, dtype).is_finite()
    assert Numbers.rounded(values, dtype)[:3].is_finite()


def test_what_does_not_fit_a_format_is_not_finite() -> None:
    large = np.full((1, 4), 1e5, np.float32)
    assert not Numbers.rounded(large, "float16").is_finite()
    for dtype in ("float32", "bfloat16", "int8"):
        assert Numbers.rounded(large, dtype).is_finite()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_two_bytes_is_known_as_finite_or_not(dtype: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(feature_dtype(dtype))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(every.astype(np.float32))
    found = [Numbers(every[i : i + 1]).is_finite() for i in range(len(every))]
    assert found == finite.tolist()
    assert Numbers(every[finite].reshape(-1, 2)[::2]).is_finite()
    assert not Numbers(every.reshape(2, -1)).is_finite()


def test_a_text_store_of_int8_gives_float32(project: Config) -> None:
    store = open_store(folders(project)["text"])
    assert isinstance(store, TextStore)
    keys = store.keys()
    hidden, mask = store.gather(keys)
    stored, same = store.gather_stored(store.lookup(keys), hidden.shape[1])
    assert hidden.dtype == store.dtype == np.float32
    assert np.array_equal(mask, same)
    assert stored.scales is not None
    assert np.array_equal(hidden, stored.values.astype(np.float32) * stored.scales[..., None])
    assert not stored.scales[~mask].any()
    assert np.array_equal(store[keys[1]], hidden[1][mask[1]])
