"""What a run looks at: maps of some rows, and how well they predict what hiding patches does.

All of it from the store: no layer of an encoder runs but those that train. What is found is put
on a page by `trainer.results.explain.drawn`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featstore.encoders.presets import resolve_preset
from featstore.encoders.words import Word, Words
from featstore.errors import UsageError
from featstore.progress import SILENT, Show, says
from featstore.project import Project
from featstore.publish import publish
from trainer.batches import CachedRows
from trainer.logits import by_class, probabilities_of
from trainer.metrics import threshold_of
from trainer.model.apart import Entering
from trainer.results.explain.agreement import agreement, correlations, deletion
from trainer.results.explain.chosen import Called, IntArray
from trainer.results.explain.maps import Deleted, Explainer, Maps
from trainer.results.explain.patches import Patches
from trainer.results.explain.row import Explained, shown_photo
from trainer.results.score import Scorer
from trainer.results.unseen import score_rows

if TYPE_CHECKING:
    from featstore.data.dataset import RowSource

ROWS, SAMPLE = 12, 64


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a run looks at in some rows.

    Attributes:
        run: Its name.
        source: The split, or the file, that the rows are of.
        choice: How they were chosen, in words.
        threshold: The run's, on the probability of entailment; None of three classes.
        queries: "cls" or "all": what asks the image.
        k_txt, k_vit: The layers that train.
        control: How the run was trained.
        patches: The grid.
        rows: The rows; see `Explained` and `Maps` for arrays and their shapes.
        agreement: How well the maps predict occlusion over a sample; see `agreement.agreement`.
        deletion: How far the log odds move without the first patches; see `agreement.deletion`.
        called: The rows that were there to choose from.
    """

    run: str
    source: str
    choice: str
    threshold: float | None
    queries: str
    k_txt: int
    k_vit: int
    control: str
    patches: Patches
    rows: list[Explained]
    agreement: dict[str, Any]
    deletion: list[dict[str, Any]]
    called: Called

    def __repr__(self) -> str:
        return f"<Explanation of {self.run!r}: {len(self.rows)} rows of {self.source}>"

    @property
    def layers(self) -> int:
        """Fusion layers."""
        return len(self.rows[0].maps.attention)

    @property
    def heads(self) -> int:
        """Heads of each."""
        return int(self.rows[0].maps.attention.shape[1])

    def summary(self) -> dict[str, Any]:
        """Return JSON-able figures: docs/JSON.md has the fields."""
        return {
            "run": self.run,
            "source": self.source,
            "choice": self.choice,
            "threshold": self.threshold,
            "grid": [self.patches.rows, self.patches.columns],
            "leading_tokens": self.patches.leading,
            "layers": self.layers,
            "heads": self.heads,
            "queries": self.queries,
            "rows": [row.summary(self.patches.leading) for row in self.rows],
            "agreement": self.agreement,
            "deletion": self.deletion,
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all arrays by name: those of row i end in `_i`; see `Maps` for the shapes."""
        found: dict[str, NDArray[Any]] = {}
        for i, row in enumerate(self.rows):
            names = ("logits", "attention", "token_parts", "text_parts", "occlusion")
            found |= {f"{name}_{i}": getattr(row.maps, name) for name in names}
            found[f"words_{i}"] = np.array([word.text for word in row.words])
            found[f"word_parts_{i}"] = row.word_parts
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the arrays as one .npz file, whole or not at all.

        Raises:
            FeatstoreError: It cannot be written.
        """
        with publish(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **self.arrays())  # type: ignore[arg-type]

    def page(self, path: str | os.PathLike[str]) -> int:
        """Write everything as one HTML page; return its bytes.

        Raises:
            FeatstoreError: It cannot be written.
        """
        from trainer.results.explain.drawn import write_explanation

        return write_explanation(self, path)

    def pngs(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write a PNG of each row into a folder; return the files.

        Raises:
            FeatstoreError: One cannot be written.
        """
        from trainer.results.explain.drawn import write_pngs

        return write_pngs(self, Path(folder))


@says("explaining")
def explain(
    scorer: Scorer,
    split: str = "test",
    *,
    rows: int | None = None,
    ids: Sequence[str] | str = (),
    errors: int | None = None,
    file: RowSource | None = None,
    images: str | os.PathLike[str] | None = None,
    encoding: str = "",
    sample: int = SAMPLE,
    seed: int = 0,
    show: Show = SILENT,
) -> Explanation:
    """Show what a run looks at in some rows.

    Args:
        scorer: The run over its project.
        split: "test", "val" or "train"; not used with `file`.
        rows: A seeded sample of so many rows, as many right as wrong; `ROWS` where no choice is
            given.
        ids: All rows of these photos.
        errors: So many errors, the most confident first.
        file: Rows in place of a split's, labelled or not; features that the store lacks are
            extracted. See `trainer.results.predict.predict`.
        images: Folder of the photos of `file`; None: the run's own.
        encoding: Of the text of `file`.
        sample: Rows over which maps are held against occlusion, a seeded sample of all.
        seed: Of both samples.
        show: Shows the work.

    Returns:
        The rows with their maps, and how well the maps predict occlusion.

    Raises:
        UsageError: Two choices; a photo that no row has; a run that was trained without photos.
        DataError: No row is wrong, or none could be read.
        MissingFeaturesError: A photo of the split was never extracted.
    """
    given = [name for name, value in (("rows", rows), ("errors", errors)) if value is not None]
    given += ["ids"] if len(ids) else []
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other: choose rows in one way")
    for name, value in (("rows", rows), ("errors", errors), ("sample", sample)):
        if value is not None and value < 1:
            raise UsageError(f"{name} = {value}: expected a number of rows, at least 1")
    if scorer.train.control == "hypothesis-only":
        raise UsageError(
            f"{scorer.run.folder}: trained on the sentence alone: it is given zeros for every"
            " photo, so that there is nothing to look at; choose a run that was trained with photos"
        )
    threshold = threshold_of(scorer.run.metrics)
    if file is None:
        where, project = f"split {split!r}", scorer.project
        scores = scorer.score(split, "none", show)
        dataset = project.dataset
    else:
        where = os.fspath(file) if isinstance(file, str | os.PathLike) else "the rows"
        photos = scorer.photos(images, file)
        dataset, scores = score_rows(
            scorer, file, photos, show=show, control="none", encoding=encoding
        )
        project = scorer.project.with_dataset(dataset)
    called = Called.of(dataset, scores, threshold)
    if errors is not None:
        chosen, choice = called.errors(errors), "the most confident errors"
    elif len(ids):
        listed = [ids] if isinstance(ids, str) else list(ids)
        chosen, choice = called.of_photos(listed, where), "all rows of the photos asked for"
    else:
        chosen = called.balanced(ROWS if rows is None else rows, seed)
        choice = f"a sample (seed {seed}), as many right as wrong where there are enough"
    maker = _Maker(scorer, project, called)
    shown, deleted, sampled = maker.explained(chosen, called.sample(sample, seed), seed, show)
    return Explanation(
        run=scorer.run.name,
        source=split if file is None else where,
        choice=choice,
        threshold=threshold,
        queries=scorer.train.queries,
        k_txt=scorer.train.k_txt,
        k_vit=scorer.train.k_vit,
        control=scorer.train.control,
        patches=maker.explainer.patches,
        rows=shown,
        agreement=agreement(maker.explainer, list(sampled.values()), maker.ids(sampled), seed),
        deletion=deletion(deleted, maker.ids(sampled), seed),
        called=called,
    )


class _Maker:
    """Makes the maps of rows that were scored.

    Args:
        scorer: The run.
        project: Its encoders and store, over the rows.
        called: The rows.
    """

    def __init__(self, scorer: Scorer, project: Project, called: Called) -> None:
        self.scorer, self.project, self.called = scorer, project, called
        self.examples = called.dataset.examples.select(called.rows)
        vision, self.text = project.images(), project.sentences(scorer.train.k_txt)
        self.cached = CachedRows(
            vision,
            self.text,
            vision.lookup(self.examples.image_ids),
            self.text.lookup(self.examples.hypotheses),
            called.labels,
            whole=scorer.train.reads_sentences,
        )
        self.apart = scorer.apart

    @functools.cached_property
    def explainer(self) -> Explainer:
        """What makes the maps."""
        tokens = self._entering(0).tokens.shape[1]
        return Explainer(self.apart, Patches.of(self.project.vision_spec, tokens))

    @functools.cached_property
    def _words(self) -> Words:
        return Words(resolve_preset(self.project.config.encoders.text))

    def ids(self, positions: Any) -> list[str]:
        """Return the image ids of some rows."""
        return [str(self.examples.image_ids[position]) for position in positions]

    def _entering(self, position: int) -> Entering:
        return self.apart.entering(self.cached.batch(np.array([position]), 1))

    def explained(
        self, chosen: IntArray, sample: IntArray, seed: int, show: Show
    ) -> tuple[list[Explained], list[Deleted], dict[int, Maps]]:
        """Return the chosen rows, and of the sampled ones the check by deletion and the maps."""
        maps: dict[int, Maps] = {}
        deleted = []
        wanted = list(dict.fromkeys([*sample.tolist(), *chosen.tolist()]))
        with show.bar(len(wanted), "rows") as progress:
            for i, position in enumerate(wanted):
                row = self._entering(position)
                maps[position] = self.explainer.maps(row, int(self.called.called[position]))
                if i < len(sample):
                    # By the row, so that it does not depend on the others.
                    rng = np.random.default_rng([seed, position])
                    deleted.append(self.explainer.deleted(row, maps[position], rng))
                progress(1)
        shown = [self._explained(position, maps[position]) for position in chosen.tolist()]
        return shown, deleted, {position: maps[position] for position in sample.tolist()}

    def _explained(self, position: int, maps: Maps) -> Explained:
        called, examples = self.called, self.examples
        probabilities = by_class("probability", probabilities_of(called.logits[position][None]))
        image_id, hypothesis = examples.image_ids[position], examples.hypotheses[position]
        words = [Word("the one state that is read", 0, 1)]
        if self.scorer.train.reads_sentences:
            words = self._words.of(self.text.token_ids(hypothesis))
        return Explained(
            image_id=str(examples.written_ids[position]),
            hypothesis=str(hypothesis),
            label=int(called.labels[position]),
            called=int(called.called[position]),
            probabilities={name: float(values[0]) for name, values in probabilities.items()},
            confidence=float(called.confidence[position]),
            maps=maps,
            words=words,
            spearman=correlations(self.explainer, maps),
            photo=shown_photo(called.dataset.images, str(image_id), self.explainer.patches),
        )
