"""What an export says of itself: read again when it is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.data.labels import labels_of
from featstore.encoders.spec import differing_fields
from featstore.errors import RunError
from featstore.project import Project
from featstore.publish import read_json
from trainer.config import Config
from trainer.model.weights_file import refused


@dataclass(frozen=True)
class Card:
    """An export's own words.

    Attributes:
        file: The export.
        k_txt: The last text layers that it trained.
        k_vit: The last vision blocks that it trained.
        threshold: On the probability of entailment; None of three classes.
        classes: How many it tells apart.
        head: What of its head no shape of a weight tells: `queries` and `fusion_layers`.
        inputs: What its pixels and token ids are made by, as `_inputs_of` has it of a project.
        weights: Digests of the presets' weights, "vision" and "text".
    """

    file: Path
    k_txt: int
    k_vit: int
    threshold: float | None
    classes: int
    head: dict[str, Any]
    inputs: dict[str, Any]
    weights: dict[str, str]

    def check(self, project: Project, of_weights: bool = False) -> None:
        """Refuse a project whose pixels, tokens, encoders, classes or head are not the export's.

        Args:
            project: Its rows and encoders.
            of_weights: Compare the digests of the presets' weights too. Where the frozen
                weights are in the file they are compared themselves: a preset that was
                saved again has another digest.

        Raises:
            RunError: They differ; the message names the fields.
        """
        config = project.config
        assert isinstance(config, Config)
        head = {"queries": config.train.queries, "fusion_layers": config.train.fusion_layers}
        ours = {**_inputs_of(project), **head, "classes": config.data.classes}
        theirs = {**self.inputs, **self.head, "classes": self.classes}
        if of_weights:
            digests = {"vision": project.vision_spec.weights, "text": project.text_spec(0).weights}
            ours, theirs = {**ours, "weights": digests}, {**theirs, "weights": self.weights}
        # JSON has no tuples.
        lines = differing_fields(json.loads(json.dumps(ours)), theirs)
        if lines:
            phrases = (line.replace("wanted", "here").replace("stored", "there") for line in lines)
            raise RunError(
                f"{self.file}: an export of other encoders or settings ({'; '.join(phrases)});"
                " nothing was imported; give the presets and settings that it was made with"
            )


def _inputs_of(project: Project) -> dict[str, Any]:
    vision, text = project.vision_spec, project.text_spec(0)
    return {
        "tokens": project.config.store.tokens,
        "converter": vision.converter,
        "sequence_length": text.sequence_length,
        "tokenizer": text.tokenizer,
    }


def card_of(file: Path, metadata: Mapping[str, str] | None = None) -> Card | None:
    """Return what an export says of itself.

    Args:
        file: The export. Its card is `FILE.json` beside it.
        metadata: Of a safetensors file, which holds its card itself: each value as JSON.

    Returns:
        The card; None where there is none, or another program's file of that name.

    Raises:
        RunError: It is an export's, but not whole.
    """
    try:
        if metadata is None:
            said = read_json(file.with_name(f"{file.name}.json"))
        else:
            said = {key: json.loads(value) for key, value in metadata.items()}
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not {"labels", "encoders", "threshold"} <= said.keys():
        return None
    try:
        classes = len(said["labels"])
        if said["labels"] != (expected := labels_of(3 if classes == 3 else 2)):
            raise ValueError(f"labels are {said['labels']}, expected {expected}")
        # Of an export from before vision blocks trained: none.
        trained = (said["k_txt"], said.get("k_vit", 0))
        threshold = float(said["threshold"]) if classes == 2 else None
        if any(type(k) is not int or k < 0 for k in trained) or not 0 <= (threshold or 0) <= 1:
            raise ValueError(f"k_txt and k_vit are {trained!r} and the threshold {threshold}")
        # Exports of earlier versions have the study's head.
        before = {"queries": "cls", "fusion_layers": 1}
        head = before | {key: said["head"][key] for key in before.keys() & said["head"].keys()}
        vision, text = said["encoders"]["vision"], said["encoders"]["text"]
        inputs = {
            "tokens": vision["tokens"],
            "converter": said["pixel_values"]["converter"],
            "sequence_length": said["input_ids"]["sequence_length"],
            "tokenizer": said["input_ids"]["tokenizer"]["digest"],
        }
        digests = {"vision": vision["weights"], "text": text["weights"]}
    except (KeyError, TypeError, ValueError) as error:
        raise refused(file, f"what it says of itself is not whole ({error})") from error
    return Card(file, *trained, threshold, classes, head, inputs, digests)
