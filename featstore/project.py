"""A configuration and its stores: which rows have features, and how they get them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from featstore.configured import Configured
from featstore.encoders.spec import FeatureSpec
from featstore.errors import DataError, MissingFeaturesError, UsageError, counted
from featstore.extract.extract import ALL, Summary, estimate, extract
from featstore.extract.lengths import Cut, find_cut
from featstore.extract.plan import Job, Plan, check_space, make_plan, refuse_replaced
from featstore.extract.speed import record_speed
from featstore.features import FeatureRows
from featstore.progress import SHOWN, SILENT, Show, says, shows_work
from featstore.ray_cluster import Actors
from featstore.store.folder import read_quarantine, shard_paths
from featstore.store.store import TextStore, VisionStore, open_features_of
from featstore.store.users import record_use

# "train", "val", "test", "all", or some of them.
Split = str | Sequence[str]


class Project(Configured):
    """What a configuration means, opened, with the stores of its features.

    Nothing is read or made before it is asked for, and nothing twice.

    Args:
        config: The settings; None: `settings` under the defaults.
        dry_run: Write nothing: no note beside the store of what was computed on the way, and
            the demo's scenes, where they are not there yet, into a temporary folder.
        file: Where the settings come from, so that the store knows its user.
        settings: Settings by their names, such as `rows="a2.jsonl"`,
            `images="photos"`, `vit="vit_base_patch16_224_imagenet21k"`,
            `text="distil_bert_base_en_uncased"`, `root="cache"`.

    Raises:
        ConfigError: Unknown setting, wrong type, or a value out of bounds.
    """

    def images(self, view: int = 0) -> VisionStore:
        """Open the image features.

        Args:
            view: Of which photometric view; 0: of the plain photos.

        Raises:
            MissingFeaturesError: Nothing of this kind was ever extracted.
            StaleFeaturesError: What was extracted is of other specs.
            CorruptShardError: The features are damaged.
        """
        spec = self.view_spec(view)
        if view and not shard_paths(folder := spec.folder(self.root)):
            raise MissingFeaturesError(
                f"{folder}: view {view} of the photos was never extracted", spec.command()
            )
        return cast(VisionStore, self._opened(spec))

    def sentences(self, k_txt: int | None = None) -> TextStore:
        """Open the sentence features of `k_txt`; see `images`."""
        return cast(TextStore, self._opened(self.text_spec(k_txt)))

    def _opened(self, spec: FeatureSpec) -> VisionStore | TextStore:
        folder = spec.folder(self.root)
        key, state = f"store {folder}", _state(folder)
        if key not in self._made or self._made[key][0] != state:
            self._made[key] = state, open_features_of(self.root, spec)
        return cast(VisionStore | TextStore, self._made[key][1])

    def keys(self, kind: str, split: Split = "all") -> list[str]:
        """Return the distinct image ids or sentences of a split, in the order of the rows."""
        examples, rows = self.dataset.examples, self.dataset.rows(split)
        column = examples.image_ids if kind == "vit" else examples.hypotheses
        return list(dict.fromkeys(column[rows].tolist()))

    @says("looking at the stored features")
    def usable(self, split: str, views: int = 1) -> tuple[NDArray[np.int64], dict[str, str]]:
        """Return a split's rows whose photo has features.

        Args:
            split: "train", "val", "test" or "all".
            views: Of each of so many photometric views, from view 0 on.

        Returns:
            int64 rows of the dataset's examples, and image id to reason of the
            split's photos that are quarantined.

        Raises:
            MissingFeaturesError: A photo was never extracted.
            DataError: No row is left.
        """
        rows = self.dataset.rows(split)
        # Asked first: what is wrong with the photos themselves goes before their views.
        self.images()
        if not len(rows):
            raise DataError(f"split {split!r} has no rows; give it a share in [data] fractions")
        ids = self.dataset.examples.image_ids[rows]
        every, reasons = np.ones(len(rows), bool), dict[str, str]()
        for view in range(views):
            present, failed = self._present(ids, split, view, views)
            every &= present
            reasons |= failed
        if not every.any():
            raise DataError(f"split {split!r} has no row whose photo could be read")
        return rows[every], reasons

    def _present(
        self, ids: NDArray[Any], split: str, view: int, views: int
    ) -> tuple[NDArray[np.bool_], dict[str, str]]:
        """Tell which photos have features of a view, and why others have none."""
        spec = self.view_spec(views - 1)
        mend = spec.command(split=split)
        try:
            opened = self.images(view)
        except MissingFeaturesError as error:
            raise MissingFeaturesError(error.message, mend) from error
        present = opened.lookup(ids) >= 0
        absent = dict.fromkeys(ids[~present])
        quarantine = read_quarantine(opened.folder) if absent else {}
        missing = [image_id for image_id in absent if image_id not in quarantine]
        if missing:
            of_view = f" under view {view}" if view else ""
            raise MissingFeaturesError(
                f"{opened.folder}: no features{of_view} of {len(missing)} of"
                f" {counted(len(set(ids)), 'photo')} of split {split!r} (first: {missing[0]!r})",
                mend,
            )
        return present, {key: quarantine[key]["reason"] for key in absent}

    def compare_photos(self, split: str, show: Show = SILENT, views: int = 1) -> None:
        """Refuse features of photos that were replaced, once; see `forget_photos`.

        Photos whose size and times are those of the extraction are not read.

        Args:
            split: "train", "val", "test" or "all".
            show: Shows the reading of photos where it takes long.
            views: The features of so many photometric views, from view 0 on.

        Raises:
            StaleFeaturesError: A photo was replaced; names the first.
        """
        for view in range(views):
            self._compare_photos(split, show, view)

    def _compare_photos(self, split: str, show: Show, view: int) -> None:
        opened = self.images(view)

        def compare() -> bool:
            job = self.job("vit", split, view=view)
            refuse_replaced(job, opened, split, show)
            if self._digests.write and job.photos is not None:
                job.photos.save()
            return True

        self.once(
            f"photos {self._rows_key} {opened.folder} {split} {_state(opened.folder)}", compare
        )

    def forget_photos(self) -> None:
        """Have photos compared again before the next use: time has passed."""
        for key in [key for key in self._made if key.startswith("photos ")]:
            del self._made[key]

    def cut_sentences(self, split: Split = "all", k_txt: int | None = None) -> Cut:
        """Say which of a split's sentences were cut at `sequence_length`; see `Cut`.

        Extraction counts them; this reads what it found.
        """
        return find_cut(self.sentences(k_txt), self.keys("text", split))

    def features(
        self,
        split: str = "train",
        k_txt: int | None = None,
        *,
        pad_to: int | None = None,
        k_vit: int | None = None,
    ) -> FeatureRows:
        """Return a split's rows as a map-style data set, for loops that are not the trainer's.

        Args:
            split: "train", "val", "test" or "all".
            k_txt: Which sentence features; None: as the configuration says.
            pad_to: Tokens of every sentence, see `FeatureRows`.
            k_vit: Which image features; None: as the configuration says.

        Returns:
            The rows whose photo could be read.

        Raises:
            MissingFeaturesError: A photo or a sentence was never extracted.
            StaleFeaturesError: A photo was replaced since it was extracted.
        """
        if k_vit is not None and k_vit != self.k_vit:
            return self.at_k_vit(k_vit).features(split, k_txt, pad_to=pad_to)
        rows, _ = self.usable(split)
        self.compare_photos(split)
        examples = self.dataset.examples.select(rows)
        return FeatureRows(
            self.images(),
            self.sentences(k_txt),
            examples.image_ids,
            examples.hypotheses,
            examples.labels,
            pad_to=pad_to,
        )

    def job(
        self,
        kind: str,
        split: Split = "all",
        k_txt: int | None = None,
        source: str = "times",
        view: int = 0,
    ) -> Job:
        """Return what it takes to have a split's features of one kind, "vit" or "text".

        Args:
            kind, split, k_txt, source: As in `extract`.
            view: Of photos, which photometric view; 0: the plain photo.
        """
        spec = self.spec(kind, k_txt, view)
        images = self.dataset.images if kind == "vit" else None
        keys, name, store = self.keys(kind, split), self.preset_name(kind), self.config.store
        return Job(spec, name, store, keys, images, lambda: self.encoder(spec), source)

    def plan(self, kind: str, split: Split = "all", k_txt: int | None = None) -> Plan:
        """Find what is missing of a split's features; change nothing. See `make_plan`."""
        return make_plan(self.job(kind, split, k_txt))

    def estimate(
        self,
        kind: str,
        split: Split = "all",
        k_txt: int | None = None,
        source: str = "times",
        view: int = 0,
        speed: float | None = None,
    ) -> tuple[Plan, float]:
        """Say what `extract` would do, of photos for one view, and how many inputs a second.

        Nothing is changed. With `speed`, the inputs a second are known already.
        """
        return estimate(self.job(kind, split, k_txt, source, view), speed)

    @shows_work
    def extract(
        self,
        kind: str = "vit",
        split: Split = "all",
        k_txt: int | None = None,
        *,
        k_vit: int | None = None,
        views: int | None = None,
        shards: range = ALL,
        source: str = "times",
        ray: str | None = None,
        actors: Actors | None = None,
        show: Show = SHOWN,
    ) -> tuple[Plan, Summary]:
        """Run a frozen encoder once for each photo or sentence of a split that has no features.

        Args:
            kind: "vit" for photos, "text" for sentences.
            split: "train", "val", "test", "all", or some of them.
            k_txt: Last text layers that will train, with kind "text"; None: as
                the configuration says.
            k_vit: Last vision blocks that will train, with kind "vit"; None: as
                the configuration says.
            views: Photometric views of each photo, from the plain photo on, with kind "vit";
                None: as the configuration says. One is made after the other, so memory holds
                a shard of one view; those that are stored stay.
            shards: Which planned shards this process makes, of each view.
            source: How photos that are stored are compared with their files: "times" reads
                those whose size or times differ, "bytes" all of them.
            ray: Address of a Ray cluster to extract on; see `featstore.ray_cluster.connect`.
            actors: Those on Ray.
            show: How it is shown.

        Returns:
            What was missing, and what was done. Of several views the plan is that of the plain
            photos, the summary that of all of them, and its `views` has each.

        Raises:
            StoreError: The store cannot be written or read, or the disk is too small.
            PresetError: The encoder cannot be loaded.
            UsageError: `views` is less than 1.
        """
        views = self.views if views is None else views
        if views < 1:
            raise UsageError(f"views = {views}: expected at least 1, the plain photo")
        own = self if k_vit is None or k_vit == self.k_vit else self.at_k_vit(k_vit)
        if kind != "vit" or views == 1:
            return own._extract_job(own.job(kind, split, k_txt, source), shards, ray, actors, show)
        jobs = [own.job(kind, split, k_txt, source, view) for view in range(views)]
        plans = [make_plan(job, show) for job in jobs]
        check_space(plans)
        made = []
        for view, (job, plan) in enumerate(zip(jobs, plans, strict=True)):
            show.note(f"view {view} of 0 to {views - 1}")
            made.append(own._extract_job(job, shards, ray, actors, show, plan))
        return made[0][0], Summary.of_views(made)

    def _extract_job(
        self,
        job: Job,
        shards: range,
        ray: str | None,
        actors: Actors | None,
        show: Show,
        plan: Plan | None = None,
    ) -> tuple[Plan, Summary]:
        if ray is None:
            return self._extract(job, show, shards, plan)
        self._record(job)
        from featstore.extract.ray import extract_on_ray

        return extract_on_ray(job, ray, actors, show, shards)

    @shows_work
    def extract_planned(self, plan: Plan, show: Show = SHOWN) -> tuple[Plan, Summary]:
        """Do what a plan of this project's says; see `extract`."""
        return self._extract(plan.job, show, plan=plan)

    def _extract(
        self, job: Job, show: Show, shards: range = ALL, plan: Plan | None = None
    ) -> tuple[Plan, Summary]:
        self._record(job)
        plan, summary = extract(job, show, shards, plan)
        record_speed(self.root, job.spec, summary.extracted, summary.rows_per_second)
        return plan, summary

    def _record(self, job: Job) -> None:
        """Have the store know its rows, and who uses it."""
        self.save_dataset()
        dataset, digests = self.dataset, [job.spec.fingerprint]
        if dataset.splits.source != "none":
            digests += [dataset.splits.digest(), dataset.examples.digest()]
        record_use(self.root, self.user, digests)


def _state(folder: Path) -> tuple[Any, ...]:
    """Return what tells whether a features folder changed since it was opened."""
    found: list[Any] = []
    for name in ("manifest.json", "quarantine.json"):
        try:
            status = (folder / name).stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
    return tuple(found)
