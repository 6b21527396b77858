"""The public face: a project, and the care of its store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featstore import project
from featstore.care import gc
from featstore.care.dump import STORED, dump_features
from featstore.care.info import describe_store
from featstore.care.repair import RepairReport, repair_store
from featstore.care.report import FolderReport
from featstore.care.verify import verify_store
from featstore.extract.plan import KINDS
from featstore.progress import SHOWN, Show, says, shows_work


class Project(project.Project):
    __doc__ = project.Project.__doc__

    @says("reading the store")
    def info(self) -> dict[str, Any]:
        """Say what is stored, and what of it the configuration asks for; see `describe_store`."""
        return describe_store(self)

    @shows_work
    def verify(
        self,
        kinds: Sequence[str] = KINDS,
        mine: bool = False,
        sample: int | None = None,
        photos: bool = False,
        show: Show = SHOWN,
    ) -> list[FolderReport]:
        """Check every byte of the stored features; see `featstore.care.verify.verify_store`."""
        return verify_store(self, kinds, mine, sample, photos, show)

    @shows_work
    def repair(
        self, kinds: Sequence[str] = KINDS, dry_run: bool = False, show: Show = SHOWN
    ) -> list[RepairReport]:
        """Mend what `verify` finds; see `featstore.care.repair.repair_store`."""
        return repair_store(self, kinds, show, dry_run)

    @says("looking for what nobody needs")
    def garbage(
        self,
        runs: str | os.PathLike[str] = "runs",
        delete: bool = False,
        forget: Sequence[str | os.PathLike[str]] = (),
        unrecorded: bool = False,
    ) -> gc.Collection:
        """List what nobody needs who uses the store; see `featstore.care.gc`.

        Args:
            runs: Folder of the runs.
            delete: Delete it.
            forget: Users that are gone for good, by their paths.
            unrecorded: Features whose users were never recorded are garbage too.
        """
        found = gc.find_garbage(self, Path(runs), forget, unrecorded)
        if delete:
            gc.delete(found)
        return found

    @shows_work
    def dump(
        self,
        out: str | os.PathLike[str],
        kind: str = "vit",
        split: str = STORED,
        show: Show = SHOWN,
    ) -> dict[str, Any]:
        """Write features to one file for other tools; see `featstore.care.dump.dump_features`."""
        return dump_features(self, kind, Path(out), split, show)
