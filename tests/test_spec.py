"""The spec: its fingerprint, its canonical JSON, and the file that records it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.data.views import View
from featstore.encoders.spec import (
    FORMAT,
    FeatureSpec,
    TextSpec,
    VisionSpec,
    canonical_json,
    differing_fields,
)
from featstore.errors import CorruptShardError, StoreError
from featstore.store.folder import read_spec

VISION = VisionSpec(
    encoder="ViTBackbone",
    weights="00ff",
    architecture={"num_layers": 12, "image_shape": [224, 224, 3], "dropout": 0.1},
    boundary=12,
    dtype="float16",
    precision="float32",
    final_norm=True,
    converter={"image_size": [224, 224], "scale": 1 / 255, "offset": [-1.0, 0.0, 1.0]},
    decoder="v1",
    tokens="patches",
)
TEXT = TextSpec(
    encoder="DistilBertBackbone",
    weights="11ee",
    architecture={"num_layers": 6, "hidden_dim": 768},
    boundary=3,
    dtype="float16",
    precision="float32",
    tokenizer="22dd",
    sequence_length=24,
)
VIEWED = dataclasses.replace(VISION, view=View(2, seed=1).to_dict())
SPECS = [VISION, VIEWED, TEXT]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list):
        return [leaf for i, inner in enumerate(value) for leaf in leaves(inner, (*path, i))]
    return [path]


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy of `value` with the leaf at `path` changed."""
    if not path:
        if isinstance(value, bool):
            return not value
        return value + (1 if isinstance(value, int | float) else "x")
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:])
    return copy


def every_leaf() -> list[Any]:
    return [
        pytest.param(spec, path, id=f"{spec.kind}-{'.'.join(map(str, path))}")
        for spec in SPECS
        for path in leaves(dataclasses.asdict(spec))
    ]


def test_every_field_of_both_specs_is_covered() -> None:
    for spec in SPECS:
        covered = {path[0] for path in leaves(dataclasses.asdict(spec))}
        # The spec of a plain photo has no view.
        named = {field.name for field in dataclasses.fields(spec)}
        assert covered == (named if spec is VIEWED else named - {"view"})


@pytest.mark.parametrize(("spec", "path"), every_leaf())
def test_every_leaf_decides_the_fingerprint(spec: FeatureSpec, path: tuple[Any, ...]) -> None:
    fields = changed(dataclasses.asdict(spec), path)
    other = type(spec)(**fields)
    assert other.fingerprint != spec.fingerprint
    (line,) = differing_fields(other.to_dict(), spec.to_dict())
    name = ".".join(part for part in path if isinstance(part, str))
    assert line.startswith(f"{name}: wanted ")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind)
def test_an_added_or_removed_architecture_key_decides_the_fingerprint(spec: FeatureSpec) -> None:
    more = dataclasses.replace(spec, architecture={**spec.architecture, "new": None})
    less = dataclasses.replace(spec, architecture={"num_layers": 6})
    assert len({spec.fingerprint, more.fingerprint, less.fingerprint}) == 3


def test_kind_and_format_are_part_of_it() -> None:
    assert VISION.to_dict()["kind"] == "vit"
    assert TEXT.to_dict()["kind"] == "text"
    assert VISION.to_dict()["format"] == FORMAT
    assert VISION.folder(Path("r")) == Path("r", "vit", VISION.fingerprint)


def test_the_order_of_keys_does_not_count() -> None:
    turned = dict(reversed(VISION.architecture.items()))
    assert dataclasses.replace(VISION, architecture=turned).fingerprint == VISION.fingerprint


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "nan cannot be fingerprinted"),
        (float("inf"), "inf cannot be fingerprinted"),
        (-float("inf"), "-inf cannot be fingerprinted"),
        ({1: "a"}, "key 1 is not a string"),
        ({None: "a"}, "key None is not a string"),
        (np.float64(1.5), "float64 cannot be fingerprinted"),
        (np.float32(1.5), "float32 cannot be fingerprinted"),
        (np.int64(3), "int64 cannot be fingerprinted"),
        (np.bool_(True), "cannot be fingerprinted"),
        (np.str_("a"), "str_ cannot be fingerprinted"),
        (np.zeros(2), "ndarray cannot be fingerprinted"),
        ({"a"}, "set cannot be fingerprinted"),
        (b"a", "bytes cannot be fingerprinted"),
        (Path("a"), "PosixPath cannot be fingerprinted"),
        pytest.param(object(), "object cannot be fingerprinted", id="object"),
        ("a\ud800", "cannot be fingerprinted"),
        ({"a\ud800": 1}, "cannot be fingerprinted"),
    ],
    ids=repr,
)
def test_what_json_cannot_hold_is_refused(value: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        canonical_json({"a": [value]})
    assert "spec.a[0]" in str(caught.value)


def test_a_circle_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(StoreError, match="nested too deep"):
        canonical_json(circle)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_canonical_json_is_read_back(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@given(values, values)
def test_canonical_json_tells_values_apart(a: Any, b: Any) -> None:
    if canonical_json(a) == canonical_json(b):
        assert repr(a) == repr(b) or a == b


def test_differing_fields_lists_leaves() -> None:
    ours = {"a": 1, "b": {"c": 1, "d": {"e": [1]}}, "f": 1}
    theirs = {"a": 1, "b": {"c": 2, "d": {"e": [2]}}, "g": None}
    assert differing_fields(ours, theirs) == [
        "b.c: wanted 1, stored 2",
        "b.d.e: wanted [1], stored [2]",
        "f: wanted 1, stored nothing",
        "g: wanted nothing, stored None",
    ]
    assert differing_fields(ours, ours) == []
    assert differing_fields({"a": 1}, {"a": True}) == ["a: wanted 1, stored True"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = VISION.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps({"spec": VISION.to_dict(), "names": {}}))
    return folder


def test_read_spec_reads_what_was_written(folder: Path) -> None:
    assert canonical_json(read_spec(folder)) == canonical_json(VISION.to_dict())


@pytest.mark.parametrize(
    "path", leaves(VISION.to_dict()), ids=lambda path: ".".join(map(str, path))
)
def test_an_edited_spec_is_found(folder: Path, path: tuple[Any, ...]) -> None:
    edited = changed(VISION.to_dict(), path)
    (folder / "spec.json").write_text(json.dumps({"spec": edited}))
    with pytest.raises(CorruptShardError, match="does not match its folder"):
        read_spec(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b'{"spec": NaN}',
        b'{"spec": []}',
        b'{"spec": "x"}',
        b"[" * 100_000,
        b'{"spec": "\\ud800"}',
    ],
)
def test_an_unreadable_spec_is_an_error(folder: Path, content: bytes) -> None:
    (folder / "spec.json").write_bytes(content)
    with pytest.raises(CorruptShardError) as caught:
        read_spec(folder)
    assert "spec.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_spec_is_an_error(folder: Path) -> None:
    (folder / "spec.json").unlink()
    with pytest.raises(CorruptShardError, match="no readable spec"):
        read_spec(folder)


def test_another_format_is_named(tmp_path: Path) -> None:
    spec = {**VISION.to_dict(), "format": 99}
    name = hashlib.blake2b(canonical_json(spec).encode(), digest_size=16).hexdigest()
    (tmp_path / name).mkdir()
    (tmp_path / name / "spec.json").write_text(json.dumps({"spec": spec}))
    with pytest.raises(StoreError, match="store format 99; this version reads format 1"):
        read_spec(tmp_path / name)
