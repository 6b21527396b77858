"""Compare stored rows with the photos that they were made from."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featstore.care.info import open_folder
from featstore.care.report import Problem
from featstore.data.images import ImageIndex
from featstore.encoders.spec import blocks_left, view_of
from featstore.errors import Advice, Command, FeatstoreError
from featstore.extract.photos import photo_digest
from featstore.progress import Progress
from featstore.project import Project
from featstore.store.folder import read_names, read_spec
from featstore.store.store import VisionStore


def extract_again(project: Project, folder: Path) -> Command | Advice:
    """Return what extracts photos anew into a folder, whatever the configuration asks for."""
    found, config = read_spec(folder), project.config
    k_vit = blocks_left(found)
    # Before the last blocks all tokens are kept, whatever [store] tokens.
    names = ("dtype", "precision") if k_vit else ("dtype", "tokens", "precision")
    free = {name: found[name] for name in names if name in found}
    view = view_of(found)
    if view:
        free["view_seed"] = found["view"]["seed"]
    store = dataclasses.replace(config.store, **free)
    for vit in (config.encoders.vit, *read_names(folder)):
        encoders = dataclasses.replace(config.encoders, vit=vit)
        try:
            other = project.with_config(dataclasses.replace(config, encoders=encoders, store=store))
            spec = other.at_k_vit(k_vit).view_spec(view)
        except FeatstoreError:
            continue
        if spec.fingerprint == folder.name:
            own = {"vit": config.encoders.vit, "k_vit": project.k_vit} | {
                name: getattr(config.store, name) for name in free
            }
            needed = {"vit": vit, "k_vit": k_vit} | free
            if view >= project.views:
                own, needed = own | {"views": project.views}, needed | {"views": view + 1}
            options: dict[str, Any] = {
                name: value for name, value in needed.items() if value != own[name]
            }
            return Command("extract-vit", **options)
    presets = ", ".join(read_names(folder)) or str(found.get("encoder"))
    return Advice(
        f"no settings at hand make these features (of {presets}); if nothing needs them, ",
        Command("store", "gc"),
        " deletes them",
    )


def compare_sources(
    folder: Path,
    index: ImageIndex,
    threads: int,
    progress: Progress = lambda n: None,
    again: Command | Advice | None = None,
) -> list[Problem]:
    """Compare each live row's photo with the bytes that the row was made from.

    Args:
        folder: Of image features; undamaged.
        index: Where the photos are.
        threads: That read them.
        progress: Called with the number of photos just read.
        again: What extracts photos anew into this very folder.

    Returns:
        At most two problems: the photos that changed, and those that are gone.
    """
    opened = open_folder(folder)
    if not isinstance(opened, VisionStore):
        return []
    live, ids = opened.live(), opened.keys()
    stored = [tuple(pair) for pair in opened.source_digests(live).tolist()]
    paths = [index.lookup(image_id) for image_id in ids]

    def compare(number: int) -> str:
        path = paths[number]
        found = None if path is None else photo_digest(path)
        if found is None:
            return "vanished"
        return "same" if found == stored[number] else "changed"

    verdicts = []
    with ThreadPoolExecutor(max(4, threads)) as pool:
        for verdict in pool.map(compare, range(len(ids))):
            verdicts.append(verdict)
            progress(1)
    problems = []
    for verdict, detail, mend in (
        (
            "changed",
            "photos have other bytes than their features were made from",
            again or Command("extract-vit"),
        ),
        ("vanished", "stored photos are not there or cannot be read", Command("store", "info")),
    ):
        named = tuple(key for key, found in zip(ids, verdicts, strict=True) if found == verdict)
        if named:
            problems.append(
                Problem(
                    f"{verdict} photos",
                    index.folder,
                    f"{len(named)} of {len(ids)} {detail}",
                    keys=named,
                    mend=mend,
                )
            )
    return problems
