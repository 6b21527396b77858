"""Ids that name no photo as written: which are taken, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.data.images import index_images
from featstore.data.photo_ids import Nearest, one_spelling, tried
from featstore.errors import DataError


def photos(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def ids(folder: Path, *written: str) -> dict[str, str]:
    return one_spelling([written], index_images(folder))[0]


def test_ids_that_name_a_photo_stay_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path, "1.jpg", "2.png", "sub/3.jpg", "3.jpg", "4#1.jpg")
    for written in (["1", "2"], ["1.jpg", "2.PNG"], ["sub/3", "3"], ["4#1"]):
        assert ids(tmp_path, *written, "gone") == {image_id: image_id for image_id in written}


@given(st.permutations(["1", "1.jpg", "1.JPG", "2.jpg", "3", "none"]), st.integers(0, 6))
def test_a_photo_has_one_id_in_any_order(order: list[str], cut: int) -> None:
    index = FOLDER[0]
    found = one_spelling([order[:cut], order[cut:]], index)
    expected = {"1": "1", "1.jpg": "1", "1.JPG": "1", "2.jpg": "2.jpg", "3": "3"}
    assert found[0] | found[1] == expected
    assert [*found[0], *found[1]] == [image_id for image_id in order if image_id != "none"]


FOLDER: list = []


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    FOLDER.append(index_images(photos(tmp_path_factory.mktemp("p"), "1.jpg", "2.jpg", "3.jpg")))


def test_forms_that_mean_one_photo_are_taken(tmp_path: Path) -> None:
    folder = photos(tmp_path / "flickr", "1.jpg", "7.jpg", "a/deep/2.jpg", "b/3.png")
    assert ids(folder, "1.jpg#0", "1.jpg#4", "7#1") == {
        "1.jpg#0": "1.jpg", "1.jpg#4": "1.jpg", "7#1": "7"
    }  # fmt: skip
    assert ids(folder, "7.0", "9.0") == {"7.0": "7"}
    assert ids(folder, "2", "3.png", "4") == {"2": "a/deep/2", "3.png": "b/3.png"}
    assert ids(folder, "flickr/1.jpg", "flickr/7") == {"flickr/1.jpg": "1.jpg", "flickr/7": "7"}
    assert ids(folder, "data/flickr/1") == {"data/flickr/1": "1"}
    index = index_images(folder)
    for image_id in ("1.jpg", "a/deep/2", "b/3.png"):
        assert index.lookup(image_id) is not None


def test_forms_that_may_mean_another_photo_are_not_taken(tmp_path: Path) -> None:
    folder = photos(
        tmp_path / "train", "0012.jpg", "ab.jpg", "x/5.jpg", "COCO_val2014_000000099.jpg"
    )
    for written in ("12", "AB", "ab.png", "99", "val/ab", "y/5", "test/x/5", "../ab", "", "#0"):
        assert ids(folder, written) == {}


def test_forms_are_not_taken_where_ids_name_photos(tmp_path: Path) -> None:
    folder = photos(tmp_path, "1.jpg", "2.jpg", "sub/3.jpg")
    assert ids(folder, "1", "2#0", "3") == {"1": "1"}
    # Each file by itself: one may be of a caption set.
    index = index_images(folder)
    assert one_spelling([["1"], ["1.jpg#0", "2#0"]], index) == [
        {"1": "1"},
        {"1.jpg#0": "1", "2#0": "2"},
    ]


def test_a_name_in_two_folders_is_an_error(tmp_path: Path) -> None:
    folder = photos(tmp_path, "train/1.jpg", "val/1.jpg", "val/2.jpg")
    with pytest.raises(
        DataError, match=r"two files answer image id '1': .*write the folder in the"
    ):
        ids(folder, "2", "1")
    assert ids(folder, "val/1") == {"val/1": "val/1"}


@pytest.mark.parametrize(
    ("image_id", "names", "said"),
    [
        ("12", ["0012.jpg"], "'0012.jpg' is there, with the same number"),
        (
            "123456",
            ["COCO_val2014_000000123456.jpg"],
            "'COCO_val2014_000000123456.jpg' is there, w",
        ),
        ("12.0", ["0012.jpg"], "'0012.jpg' is there, with the same number"),
        ("a.png", ["a.jpg"], "'a.jpg' is there, with another suffix"),
        ("IMG_1.JPG", ["img_1.jpg"], "'img_1.jpg' is there, in another case"),
        ("x/a.jpg", ["a.jpg"], "'a.jpg' is there, in another folder"),
        ("a", ["y/z/a.jpg"], "'y/z/a.jpg' is there, in another folder"),
        ("a.jpg#0", ["a.heic"], "'a.heic' is there, whose suffix is not read"),
        ("a.heic", ["a.heic"], "'a.heic' is there, whose suffix is not read"),
        ("q", ["a.jpg", "b.svg"], ""),
        ("0", ["a.jpg"], ""),
    ],
)
def test_what_is_there_instead(tmp_path: Path, image_id: str, names: list[str], said: str) -> None:
    found = Nearest(index_images(photos(tmp_path, *names))).instead(image_id)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_what_the_folder_has(tmp_path: Path) -> None:
    def said() -> str:
        return Nearest(index_images(tmp_path)).folder()

    assert said() == "there is no file"
    photos(tmp_path, "a.heic", "b", "c.SVG")
    assert said().startswith("the suffixes there (.heic, .svg, none) are not read; read are .jpg")
    photos(tmp_path, *(f"{i}.jpg" for i in range(5)))
    assert said() == "photos there are '0.jpg', '1.jpg', '2.jpg' and 2 more"


def test_what_was_looked_for() -> None:
    assert tried("a.jpg") == "'a.jpg'"
    assert tried("a") == "'a.jpg', .jpeg and so on"
