"""What decides the value of a feature, and the fingerprint made of it.

A spec lists everything that could change one stored number. Its canonical
JSON, hashed, names the folder of the features; two specs that differ in any
field never share a folder. The *names* of presets are not in it (presets have
been published again under one name): the digest of the weights is.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import DECODER
from featstore.data.views import View
from featstore.encoders.families import FAMILIES, check_k, family_of, num_patches
from featstore.encoders.presets import (
    Digests,
    Preset,
    image_converter_fields,
    resolve_preset,
    tokenizer_digest,
)
from featstore.errors import Command, ConfigError, PresetError
from featstore.publish import canonical_json, text_digest

QUANTISED = "int8"
FORMAT = 1
# Of quantised features: readers of format 1 know no scales, and would take the levels for numbers.
QUANTISED_FORMAT = 2


def format_of(dtype: Any) -> int:
    """Return the format of a spec, and of its shards, with a stored number format."""
    return QUANTISED_FORMAT if dtype == QUANTISED else FORMAT


@dataclass(frozen=True)
class FeatureSpec:
    """Fields shared by the specs of both encoders.

    Attributes:
        encoder: Class name of the backbone.
        weights: Digest of the weights' content.
        architecture: The backbone's own configuration.
        boundary: Blocks run before the features are taken, counted from the
            input. Equal to the number of blocks: the encoder's output.
        dtype: Number format on disk.
        precision: Arithmetic of the forward pass.
    """

    kind: ClassVar[str] = ""

    encoder: str
    weights: str
    architecture: dict[str, Any]
    boundary: int
    dtype: str
    precision: str

    def to_dict(self) -> dict[str, Any]:
        """Return every field, with the format and the kind."""
        return {"format": format_of(self.dtype), "kind": self.kind, **dataclasses.asdict(self)}

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: BLAKE2b-128 of the canonical JSON."""
        return text_digest(canonical_json(self.to_dict()))

    @property
    def plain(self) -> Self:
        """The spec itself; of a photometric view that of the plain photos."""
        return self

    def command(self, **options: Any) -> Command:
        """Return what extracts such features; see `extraction_of`."""
        return extraction_of(self.to_dict(), **options)

    def folder(self, root: Path) -> Path:
        """Return the folder of these features under a store's root."""
        return root / self.kind / self.fingerprint


@dataclass(frozen=True)
class VisionSpec(FeatureSpec):
    """Features of an image, or of one photometric view of it: `(1, tokens, width)` a row.

    Attributes:
        final_norm: The encoder's last normalisation was applied.
        converter: The preset's image converter: image_size, scale, offset,
            interpolation, antialias, crop and pad rules.
        decoder: Version of the rules that turn a file into RGB pixels.
        tokens: "patches" or "all" (with the class token), which later blocks need.
        views: Views in one row: 1, for each view has a folder of its own.
        view: Which photometric view, see `featstore.data.views.View`; empty: the plain image,
            whose spec does not have the field.
    """

    kind: ClassVar[str] = "vit"

    final_norm: bool
    converter: dict[str, Any]
    decoder: str
    tokens: str
    views: int = 1
    view: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, with the format and the kind; `view` where it is one."""
        found = super().to_dict()
        if not self.view:
            # As it was before there were views: a fingerprint is of all that stands here.
            del found["view"]
        return found

    @property
    def plain(self) -> Self:
        """The spec of the plain photos."""
        return dataclasses.replace(self, view={})


@dataclass(frozen=True)
class TextSpec(FeatureSpec):
    """Features of a sentence: `(valid tokens, width)` a row.

    Attributes:
        tokenizer: Digest of the tokenizer's configuration and vocabulary.
        sequence_length: Most tokens of a sentence.
    """

    kind: ClassVar[str] = "text"

    tokenizer: str
    sequence_length: int


def blocks_left(spec: Mapping[str, Any]) -> int:
    """Return how many of the encoder's last blocks were not run, of a spec's `to_dict`."""
    if spec.get("final_norm", spec["kind"] == VisionSpec.kind):
        return 0
    return int(spec["architecture"]["num_layers"]) - int(spec["boundary"])


def view_of(spec: Mapping[str, Any]) -> int:
    """Return the number of the photometric view, of a spec's `to_dict`; 0: the plain photo."""
    return int(spec.get("view", {}).get("number", 0))


def extraction_of(spec: Mapping[str, Any], **options: Any) -> Command:
    """Return the command that extracts features of a spec under the settings in force.

    Args:
        spec: As `to_dict` has it.
        options: The command's.
    """
    # Of sentences k_txt is a setting in force, and training encodes what it lacks.
    if spec["kind"] == VisionSpec.kind and (blocks := blocks_left(spec)):
        options = {"k_vit": blocks, **options}
    if view := view_of(spec):
        options = {"views": view + 1, **options}
    return Command(f"extract-{spec['kind']}", **options)


def differing_fields(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return `field: ours → theirs` for each leaf in which two specs differ."""
    lines = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}.{line}" for line in differing_fields(a, b)]
            continue
        absent = (key in ours) != (key in theirs)
        if absent or json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            wanted, stored = (repr(s[key]) if key in s else "nothing" for s in (ours, theirs))
            lines.append(f"{key}: wanted {wanted}, stored {stored}")
    return lines


def architecture(preset: Preset, *needed: str) -> dict[str, Any]:
    """Return what a backbone was built with, less its name and its dtype.

    Raises:
        PresetError: One of `needed` is not there: another kind of encoder.
    """
    config = preset.config["config"]
    for key in needed:
        if key not in config:
            raise PresetError(
                f"{preset.name}: a {preset.class_name} has no {key!r}; expected an encoder"
                f" with {', '.join(needed)}"
            )
    return {k: v for k, v in config.items() if k not in ("name", "dtype", "trainable")}


def vision_row_shape(spec: VisionSpec) -> tuple[int, int]:
    """Return (tokens, width) of an image's features.

    Raises:
        PresetError: All tokens are kept, and the encoder is of no family.
    """
    tokens = num_patches(spec.architecture)
    if spec.tokens == "all":
        family = family_of(spec.encoder, "vision", spec.encoder)
        tokens += family.leading_tokens(spec.architecture)
    return tokens, int(spec.architecture["hidden_dim"])


def vision_spec(
    encoders: EncodersConfig,
    store: StoreConfig,
    k_vit: int = 0,
    digests: Digests | None = None,
    view: int = 0,
) -> VisionSpec:
    """Return the spec of the hidden states that enter the last `k_vit` vision blocks.

    Reads the preset's files, not the model: no framework is imported for a
    preset folder.

    Args:
        encoders, store: The configuration.
        k_vit: 0 is the encoder's output, after its final norm. Of other features all tokens
            are kept, whatever `store.tokens`: the blocks above look at each of them.
        digests: Where the digest of its weights is kept; by default in this
            process.
        view: Number of the photometric view, whose seed is `store.view_seed`; 0: the plain photo.

    Raises:
        PresetError: The preset cannot be found or is not a vision encoder.
        ConfigError: The encoder has fewer than `k_vit` blocks.
    """
    preset = resolve_preset(encoders.vit, digests).tower("vision")
    family = family_of(preset.class_name, "vision", preset.name)
    if k_vit and not family.trains:
        able = ", ".join(
            other.title for other in FAMILIES.values() if other.kind == "vision" and other.trains
        )
        raise ConfigError(
            f"[train] k_vit = {k_vit}: blocks of a {family.title} cannot train (preset"
            f" {preset.name}); expected one of {able}, or k_vit = 0"
        )
    fields = architecture(preset, "num_layers", "image_shape", "patch_size", "hidden_dim")
    layers = int(fields["num_layers"])
    check_k(k_vit, layers, "vision")
    return VisionSpec(
        encoder=preset.class_name,
        weights=preset.weights_digest,
        architecture=fields,
        boundary=layers - k_vit,
        dtype=store.dtype,
        precision=store.precision,
        final_norm=k_vit == 0,
        converter=image_converter_fields(preset),
        decoder=DECODER,
        tokens="all" if k_vit else store.tokens,
        view=View(view, store.view_seed).to_dict() if view else {},
    )


def text_spec(
    encoders: EncodersConfig, store: StoreConfig, k_txt: int, digests: Digests | None = None
) -> TextSpec:
    """Return the spec of the hidden states that enter the last `k_txt` text blocks.

    Reads the preset's files, as `vision_spec` does.

    Raises:
        PresetError: The preset cannot be found or is not a text encoder.
        ConfigError: The encoder has fewer than `k_txt` blocks, or is not to be cut there.
    """
    preset = resolve_preset(encoders.text, digests).tower("text")
    family = family_of(preset.class_name, "text", preset.name)
    fields = architecture(preset, "num_layers", "hidden_dim", "vocabulary_size")
    layers = int(fields["num_layers"])
    check_k(k_txt, layers, "text", family.shared(fields))
    return TextSpec(
        encoder=preset.class_name,
        weights=preset.weights_digest,
        architecture=fields,
        boundary=layers - k_txt,
        dtype=store.dtype,
        precision=store.precision,
        tokenizer=tokenizer_digest(preset),
        sequence_length=encoders.sequence_length,
    )
