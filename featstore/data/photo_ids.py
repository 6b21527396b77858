"""Which photo an image id means where it names none as it is written, and what is there instead.

Rules are taken where none of a file's ids names a photo, so that they change nothing for rows
that have photos; each leads to one photo or to none:

* `name.jpg#0` of caption sets, and `12.0` of a table whose integers became floats, without
  their end;
* a name whose folder is not written, where one file below the folder of photos has it;
* a folder that is written and is the folder of photos itself: `photos/12` in `photos`.

All else (lost zeros, another case, another suffix) may mean another photo: it is said, not done.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath

from featstore.data.images import IMAGE_SUFFIXES, ImageIndex, Photo
from featstore.errors import DataError, short

_END = re.compile(r"#\d+$|(?<=\d)\.0+$")
_NUMBER = re.compile(r"(?:^|\D)0*(\d+)$")
_NAMED = 3


def one_spelling(files: Iterable[Iterable[str]], index: ImageIndex) -> list[dict[str, str]]:
    """Find the photos of image ids, and one id for each photo.

    Args:
        files: The ids of each row file, as written.
        index: Where the photos are.

    Returns:
        For each file, of each of its ids that has a photo, the id that all ids of this photo
        become in all files: of several spellings (`12` and `12.jpg`) the shortest, so that
        neither the order of the rows nor that of the files counts.

    Raises:
        DataError: Two photos answer an id.
    """
    meant: list[dict[str, str]] = []
    spellings: defaultdict[Photo | None, set[str]] = defaultdict(set)
    for ids in files:
        distinct = list(dict.fromkeys(ids))
        taken = {image_id: image_id for image_id in distinct if index.lookup(image_id)}
        if not taken:
            below = _Below(index)
            found = ((image_id, below.meant(image_id)) for image_id in distinct)
            taken = {image_id: other for image_id, other in found if other is not None}
        for image_id in taken.values():
            spellings[index.lookup(image_id)].add(image_id)
        meant.append(taken)
    chosen = {
        image_id: min(several, key=lambda spelled: (len(spelled), spelled))
        for several in spellings.values()
        for image_id in several
    }
    return [{given: chosen[other] for given, other in taken.items()} for taken in meant]


class _Below:
    """The photos of an index by what is left of their names."""

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        self.by_name: defaultdict[str, list[str]] = defaultdict(list)
        for name in index.names():
            base = name.rpartition("/")[2]
            for spelled in (base, _stem(base)):
                self.by_name[spelled].append(name)

    def meant(self, image_id: str) -> str | None:
        """Return the id that another one means by the rules of the module, or None.

        Raises:
            DataError: Two photos of other folders have its name.
        """
        image_id = _END.sub("", image_id)
        folder, _, base = image_id.rpartition("/")
        if folder and folder.split("/")[-1] == self.index.folder.absolute().name:
            image_id, folder = base, ""
        if self.index.lookup(image_id):
            return image_id
        named = [] if folder else self.by_name[base]
        if len(named) > 1:
            raise DataError(
                f"{self.index.folder}: two files answer image id {image_id!r}: {named[0]!r} and"
                f" {named[1]!r}; write the folder in the rows"
            )
        if not named:
            return None
        return f"{named[0].rpartition('/')[0]}/{base}"


class Nearest:
    """What is there in place of the photo of an id.

    Args:
        index: Where the photos are.
    """

    def __init__(self, index: ImageIndex) -> None:
        self.index = index
        photos = list(index.names())
        self.tables = [
            (key, {key(name): name for name in reversed(names)}, why)
            for key, names, why in (
                (_stem, photos, "with another suffix"),
                (_any_stem, index.others, "whose suffix is not read"),
                (_folded_stem, photos, "in another case"),
                (_base_stem, photos, "in another folder"),
                (_number, photos, "with the same number, but other zeros or words before it"),
            )
        ]

    def instead(self, image_id: str) -> str:
        """Say what is near, such as `'0012.jpg' is there, …`; "" for nothing."""
        bare = _END.sub("", image_id)
        for key, table, why in self.tables:
            if (wanted := key(bare)) and (name := table.get(wanted)):
                return f"{name!r} is there, {why}"
        return ""

    def folder(self) -> str:
        """Say what the folder has, for ids to which nothing is near."""
        if photos := sorted(self.index.names()):
            more = f" and {len(photos) - _NAMED} more" if len(photos) > _NAMED else ""
            return f"photos there are {', '.join(map(repr, photos[:_NAMED]))}{more}"
        if not self.index.others:
            return "there is no file"
        suffixes = {PurePosixPath(name).suffix.lower() or "none" for name in self.index.others}
        return (
            f"the suffixes there ({', '.join(sorted(suffixes)[:8])}) are not read;"
            f" read are {', '.join(IMAGE_SUFFIXES)}"
        )


def tried(image_id: str) -> str:
    """Say which names were looked for."""
    if _stem(image_id) != image_id:
        return short(image_id)
    first, second, *_ = IMAGE_SUFFIXES
    return f"{short(image_id + first)}, {second} and so on"


def _stem(name: str) -> str:
    """Return a name without its image suffix."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in IMAGE_SUFFIXES and stem else name


def _any_stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _folded_stem(name: str) -> str:
    return _stem(name).casefold()


def _base_stem(name: str) -> str:
    return _stem(name).rpartition("/")[2]


def _number(name: str) -> str:
    found = _NUMBER.search(_base_stem(name))
    return found[1] if found else ""
