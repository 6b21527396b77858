"""Measure a run on a split: the run's own threshold, on probabilities, each row once."""

from __future__ import annotations

from typing import Any

from featstore.progress import SILENT, Show
from featstore.publish import command_line, package_versions, write_json
from trainer.metrics import evaluate_logits
from trainer.results.score import Scorer, check_same_data


def evaluate(
    scorer: Scorer, split: str, control: str | None = None, show: Show = SILENT
) -> dict[str, Any]:
    """Compute a run's metrics over exactly the rows of a split.

    Args:
        scorer: The run over its own project, see `trainer.results.score.project_of`.
        split: "train", "val" or "test".
        control: Measure without the picture: "hypothesis-only" or
            "shuffled-images"; None: as the run was trained.
        show: Shows the encoding of sentences that the store lacks.

    Returns:
        `evaluate_logits` at the run's threshold, with run, split, control and
        photos that could not be read. Also written into the run's folder.

    Raises:
        RunError: The run, its data or its features do not fit together.
        MissingFeaturesError: The split was not extracted.
    """
    run, project = scorer.run, scorer.project
    check_same_data(run, project)
    control = control or scorer.train.control
    threshold = float(run.metrics["threshold"])
    scores = scorer.score(split, control, show)
    result = {
        "run": run.name,
        "split": split,
        "control": control,
        "rows_of_split": len(project.dataset.rows(split)),
        "quarantined_photos": scores.unread,
        **evaluate_logits(scores.labels, scores.logits, threshold),
    }
    suffix = "" if control == "none" else f"-{control}"
    write_json(
        run.folder / f"evaluate-{split}{suffix}.json",
        {"command": command_line(), "versions": package_versions(), **result},
    )
    return result
