"""What a search records of itself: how it is started, opened and gone on with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featstore.config import material
from featstore.encoders.spec import differing_fields
from featstore.errors import Advice, Command, RunError, UsageError
from featstore.extract.plan import Job
from featstore.project import Project
from featstore.publish import command_line, package_versions, write_json
from featstore.settings import complete
from featstore.store.users import record_use, user_of
from trainer.config import SECTIONS, Config
from trainer.features import read_by_training
from trainer.run.folder import SEARCH_FILE, Run, find_run, moved_run
from trainer.tuning.space import Space, space_from_json
from trainer.tuning.storage import masked
from trainer.tuning.study import Search

FORMAT = 1
LONGEST_CHANGE = 80
CHANGEABLE = ("trials", "together", "keep")
"""What of `[search]` may change while a search goes on."""


def _identity(
    base: Config, space: Space, init_from: Run | None, url: str | None, project: Project
) -> dict[str, Any]:
    """Return what must stay the same while a search goes on."""
    varied = space.to_json()
    varied["search"] = {
        key: value for key, value in varied["search"].items() if key not in CHANGEABLE
    }
    features = set()
    for config in space.feature_configs(base):
        own = project.with_config(config)
        features |= own.fingerprints
    content = {
        "space": varied,
        "settings": dataclasses.asdict(base),
        "init_from": None if init_from is None else str(init_from.folder.resolve()),
        "storage": None if url is None else masked(url),
        "rows": project.dataset.examples.digest(),
        "split": project.dataset.splits.digest(),
        "features": sorted(features),
    }
    return dict(json.loads(json.dumps(content)))


def jobs_of(project: Project, configs: Sequence[Config]) -> list[Job]:
    """Return what has to be in the store before trials can start, each set of features once.

    Args:
        project: The search's.
        configs: `Space.feature_configs`.
    """
    found: dict[str, Job] = {}
    for config in configs:
        own, train = project.with_config(config), config.train
        for kind, split, view in read_by_training(train.views):
            fingerprint = own.spec(kind, train.k_txt, view).fingerprint
            if fingerprint not in found:
                found[fingerprint] = own.job(kind, split, train.k_txt, view=view)
    return list(found.values())


def exists(folder: Path) -> bool:
    """Tell whether a search was started in a folder."""
    return (folder / SEARCH_FILE).exists()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SEARCH_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise RunError(f"{path}: format {content['format']}, expected {FORMAT}")
        space_from_json(content["space"])
    except FileNotFoundError as error:
        raise RunError(
            f"{folder}: no search there",
            Advice("start one with ", Command("search", name=folder.name)),
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error})",
            Advice("restore it, or start a search of another --name"),
        ) from error
    return dict(content)


def open_search(
    folder: Path,
    url: str | None = None,
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
) -> Search:
    """Open a search that was started.

    Args:
        folder: Its folder.
        url: Its storage, where that is not the journal; a password is not kept.
        elsewhere: Where its data are now; see `Run`.

    Raises:
        RunError: There is none, or its file is damaged.
        UsageError: `url` is missing, or another one.
    """
    expected, found = _read(folder)["storage"], None if url is None else masked(url)
    if expected != found:
        raise UsageError(
            f"{folder}: its storage is {expected or 'its own journal'}; give"
            f" {'that as --storage' if expected else 'no --storage'}"
        )
    search = Search(folder, *known_search(folder, {}, elsewhere), url)
    search.elsewhere = elsewhere or {}
    return search


def start_search(
    folder: Path,
    base: Config,
    space: Space,
    init_from: Run | None,
    url: str | None,
    project: Project,
) -> Search:
    """Start a search, or go on with the one of that folder.

    Args:
        folder: Its folder; made where it is missing.
        base: The settings that all trials share.
        space: What is varied. Another number of trials than before is taken over.
        init_from: Run that each trial starts from.
        url: The study's storage; None: a journal in the folder.
        project: Of `base`.

    Raises:
        UsageError: The folder has a run, or a search of something else.
    """
    if Run(folder).exists:
        raise UsageError(f"{folder}: a run, not a search; choose another --name")
    earlier = _read(folder) if exists(folder) else None
    if earlier is not None and earlier["storage"] != (None if url is None else masked(url)):
        open_search(folder, url)  # says what is wrong
    identity = _identity(base, space, init_from, url, project)
    settings = identity["settings"]
    if earlier is not None:
        before = {key: earlier[key] for key in identity}
        if before["init_from"] is not None:
            was = str(earlier.get("folder", ""))
            before["init_from"] = moved_run(before["init_from"], folder, was)
        before["settings"] = {
            name: complete(section, before["settings"].get(name, {}))
            for name, section in SECTIONS.items()
        }
        # Where things are is no part of what a search is of; digests are.
        for one in (before, identity):
            one["settings"] = material(SECTIONS, one["settings"])
        before["space"]["search"] = {
            key: before["space"]["search"][key] for key in identity["space"]["search"]
        }
        changed = differing_fields(identity, before)
        identity["settings"] = settings
        if changed:
            # Of lists, such as the whole space, the name says enough.
            told = [c if len(c) <= LONGEST_CHANGE else c.partition(":")[0] for c in changed]
            raise UsageError(
                f"{folder}: a search of something else ({'; '.join(told)})",
                Advice(
                    "choose another --name, or go on with ",
                    Command("search", name=folder.name, bare=True),
                    " and no other settings",
                ),
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        search = Search(folder, base, space, init_from, url)
    except UsageError:
        # A folder of nothing, where the storage cannot be opened.
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    Run(folder).write_config(base)
    about = {"format": FORMAT, "command": command_line(), "versions": package_versions()}
    place = {"folder": os.path.abspath(folder)}
    write_json(folder / SEARCH_FILE, {**about, **place, **identity, "space": space.to_json()})
    needed = [*identity["features"], identity["rows"], identity["split"]]
    record_use(project.root, user_of(folder / "config.toml"), needed)
    return search


def known_search(
    folder: Path,
    search_flags: Mapping[str, Any],
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Config, Space, Run | None]:
    """Return what a search that was started varies, under the flags that may change.

    Args:
        folder: Its folder.
        search_flags: Key to value of `[search]`.
        elsewhere: Where its data are now; see `Run`.

    Returns:
        The settings that all trials share, the space, and the run to start from.
    """
    content = _read(folder)
    space = space_from_json(content["space"])
    searched = dataclasses.replace(space.search, **search_flags)
    init_from = content["init_from"]
    if init_from:
        init_from = moved_run(init_from, folder, str(content.get("folder", "")))
    source = find_run(folder.parent, init_from) if init_from else None
    return (
        Run(folder, elsewhere).config,
        dataclasses.replace(space, search=searched),
        source,
    )
