"""What runs cost over the store, and what they would have cost end to end."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from featstore.errors import FeatstoreError, counted
from featstore.extract.speed import recorded_speed
from featstore.project import Project
from featstore.quantities import duration, share
from trainer.run.folder import Run


def epochs_of(run: Run) -> list[dict[str, Any]]:
    """Return a run's history, one mapping for each epoch; empty of one that was imported."""
    if not run.history_path.exists():
        return []
    return [
        {str(key): value for key, value in row.items()} for row in run.history.to_dict("records")
    ]


def cost_of(runs: Sequence[Run], project: Project | None) -> dict[str, Any]:
    """Add up what some runs on the same photos took.

    End to end, the frozen blocks of the ViT would run on each row of every epoch; over the
    store they ran once a photo. So the extraction is paid after as many epochs as there are
    photos to the rows of one, whatever the machine. The frozen layers of the text encoder are
    left out: the estimate is of the least that end to end would take.

    Args:
        runs: At least one, with a history; those without one add nothing.
        project: The runs'; None where it cannot be opened: its speed is then not known.

    Returns:
        `epochs`, `steps`, `training_seconds`, `validation_seconds`, `seconds` (both),
        `step_seconds` (None without a step), `wait_share` (of the training time, waiting for
        features), `visits` (rows gone through, of train and val), `rows` and `photos` of an
        epoch, `photos_per_second` (of the last extraction on this machine, None where that
        was not recorded), `extraction_seconds` (of these photos at that speed),
        `end_to_end_seconds` and `break_even_epochs` (None where not known).
    """
    training = validation = waited = 0.0
    steps = epochs = visits = rows = photos = 0
    for run in runs:
        counts = run.manifest["data"].get("counts", {})
        own = [counts[split] for split in ("train", "val") if split in counts]
        rows, photos = (sum(count[key] for count in own) for key in ("rows", "images"))
        if not epochs_of(run):
            continue
        history = run.history
        training += float(history["seconds"].sum())
        validation += float(history["val_seconds"].sum())
        steps += int(history["steps"].sum())
        epochs += len(history)
        visits += len(history) * rows
        if "wait_share" in history:
            waited += float((history["wait_share"] * history["seconds"]).sum())
    speed = None
    if project is not None:
        with contextlib.suppress(FeatstoreError):
            speed = recorded_speed(project.root, project.vision_spec)
    seconds = training + validation
    return {
        "epochs": epochs,
        "steps": steps,
        "training_seconds": training,
        "validation_seconds": validation,
        "seconds": seconds,
        "step_seconds": training / steps if steps else None,
        "wait_share": waited / training if training else None,
        "visits": visits,
        "rows": rows,
        "photos": photos,
        "photos_per_second": speed,
        "extraction_seconds": None if speed is None else photos / speed,
        "end_to_end_seconds": seconds + visits / speed if speed and visits and seconds else None,
        "break_even_epochs": photos / rows if rows else None,
    }


def cost_content(cost: Mapping[str, Any], blind: bool = False) -> dict[str, Any]:
    """Return what the part on cost says.

    Args:
        cost: Of `cost_of`.
        blind: Whether no photo is read.
    """
    if not cost["epochs"]:
        return {"facts": [], "text": "No epoch was trained here: what training cost is not known."}
    unknown = "not recorded on this machine"
    speed, whole = cost["photos_per_second"], cost["end_to_end_seconds"]
    facts = [
        (
            "Training and validation",
            duration(cost["seconds"]),
            counted(cost["epochs"], "epoch", ","),
        ),
        (
            "A step",
            f"{1000 * cost['step_seconds']:.1f} ms" if cost["step_seconds"] is not None else "–",
            f"mean of {cost['steps']:,}"
            + (f", {share(cost['wait_share'])} waiting" if cost["wait_share"] is not None else ""),
        ),
    ]
    if not blind:
        facts += [
            (
                "Extraction",
                "unknown" if speed is None else duration(cost["extraction_seconds"]),
                unknown
                if speed is None
                else f"{cost['photos']:,} photos at {speed:,.0f} a second, as last time here",
            ),
            (
                "End to end, at least",
                "unknown" if whole is None else duration(whole),
                unknown if whole is None else f"{whole / cost['seconds']:.1f} × as long",
            ),
            (
                "Break-even",
                "–"
                if cost["break_even_epochs"] is None
                else f"{cost['break_even_epochs']:.2f} epochs",
                f"{cost['photos']:,} photos, {cost['rows']:,} rows an epoch",
            ),
        ]
    text = (
        "This run reads no photo: end to end it would have cost the same."
        if blind
        else "End to end, the frozen ViT would run on each row of every epoch; over the store it"
        " ran once a photo. So the extraction has paid for itself after as many epochs as there are"
        " photos to the rows of one. The frozen text layers are left out of this estimate."
    )
    return {"facts": facts, "text": text}
