"""What a `.keras` file says its model is: checked as text, never made.

Weights of the right shapes can belong to another function: another activation, one
more layer, the last token in place of the first. The description in the archive tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from featstore.publish import text_digest
from trainer.model.head import HEAD_LAYERS, TEXT_NAME, VISION_NAME

PACKAGES = ("keras", "keras_hub")
# Of a setting that decides no prediction.
FREE_SETTINGS = (
    *("name", "trainable", "dtype", "seed", "noise_shape", "data_format", "output_shape"),
    *("rate", "dropout", "dropout_rate", "attention_dropout"),
)
FREE_ENDINGS = ("_initializer", "_regularizer", "_constraint")
# What each layer of the study reads.
READS: dict[str, set[str]] = {
    VISION_NAME: {"pixel_values"},
    TEXT_NAME: {"input_ids", "attention_mask"},
    "xattn": {TEXT_NAME, VISION_NAME},
    "xattn_residual": {TEXT_NAME, "xattn"},
    **dict(zip(HEAD_LAYERS[2:], ({name} for name in HEAD_LAYERS[1:]), strict=False)),
}
# Operations that only pick or arrange tokens, and so may stand between two layers.
PICKING = ("GetItem", "ExpandDims", "Reshape", "Squeeze")


def foreign_classes(config: Any) -> list[str]:
    """Return what a description names that is not Keras's or keras-hub's, and Lambda layers.

    Args:
        config: The parsed `config.json`. What it was compiled with is passed over:
            nothing of it is read.
    """
    found = []
    for part in _objects(config):
        name, module = part.get("class_name"), part.get("module")
        registered = str(part.get("registered_name") or "")
        package = registered.partition(">")[0] if ">" in registered else ""
        if name in ("Lambda", "__lambda__", "function"):
            found.append(f"{name} {part.get('name') or part.get('config')!r:.60}")
        elif module is not None and str(module).split(".")[0] not in PACKAGES:
            found.append(f"{module}.{name}")
        elif package and package not in PACKAGES:
            found.append(registered)
    return found


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object that names a class."""
    stack = [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            if "class_name" in part:
                yield part
            stack += [inner for key, inner in part.items() if key != "compile_config"]
        elif isinstance(part, list):
            stack += part


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], skipped: int) -> list[str]:
    """Say how a description differs from that of our model with the study's layers.

    Args:
        found: The parsed `config.json` of the file.
        expected: That of `trainer.model.plain.build_plain`, as `model.to_json()` has it.
        skipped: Leading tokens of an image that the head does not see.

    Returns:
        One phrase for each layer, setting or connection that differs.
    """
    try:
        ours, theirs = _layers(expected), _layers(found)
        lines = [line for name in READS for line in _differing_settings(name, ours, theirs)]
        return lines or _differing_connections(ours, theirs, found, skipped)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError):
        return ["its description is not that of a functional model of Keras 3"]


def _layers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["name"]: layer for layer in config["config"]["layers"]}


def _differing_settings(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[str]:
    if name not in theirs:
        yield f"expected a layer {name}, found {', '.join(theirs)}"
        return
    kinds = ours[name]["class_name"], theirs[name]["class_name"]
    if kinds[0] != kinds[1]:
        yield f"{name}: expected a {kinds[0]}, found a {kinds[1]}"
        return
    left, right = ours[name]["config"], theirs[name]["config"]
    for key in left.keys() & right.keys() - set(FREE_SETTINGS):
        if not key.endswith(FREE_ENDINGS) and _plain(left[key]) != _plain(right[key]):
            yield f"{name}: expected {key} {left[key]!r:.60}, found {right[key]!r:.60}"


def _plain(value: Any) -> Any:
    """Return a setting as it is compared: a size may be one number or two equal ones."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return json.dumps(value, sort_keys=True) if isinstance(value, dict) else value


def _ways(layers: Mapping[str, Any], name: str) -> set[str]:
    """Return the `_way` of each thing that a layer reads."""
    return {_way(layers, source, {}) for source in _sources(layers[name])}


def _way(layers: Mapping[str, Any], name: str, known: dict[str, str]) -> str:
    """Return a digest of how a layer is made of the study's layers and of inputs.

    Operations between them are named by a counter, so their names decide nothing.
    """
    layer = layers[name]
    if name in READS or layer["class_name"] == "InputLayer":
        return name
    if name not in known:

        def plain(part: Any) -> Any:
            if isinstance(part, dict) and part.get("class_name") == "__keras_tensor__":
                return _way(layers, part["config"]["keras_history"][0], known)
            if isinstance(part, dict):
                return {key: plain(value) for key, value in part.items()}
            return [plain(value) for value in part] if isinstance(part, list) else part

        (node,) = layer["inbound_nodes"]
        settings = {key: value for key, value in layer["config"].items() if key != "name"}
        made = [layer["class_name"], settings, plain(node["args"]), plain(node["kwargs"])]
        known[name] = text_digest(json.dumps(made, sort_keys=True))
    return known[name]


def _differing_connections(
    ours: Mapping[str, Any], layers: Mapping[str, Any], config: Mapping[str, Any], skipped: int
) -> list[str]:
    lines: list[str] = []
    for name, expected in READS.items():
        if _ways(layers, name) == _ways(ours, name):
            continue
        found: set[str] = set()
        for source in _sources(layers[name]):
            for _ in layers:  # A description may go in circles.
                if source in READS or layers[source]["class_name"] not in PICKING:
                    break
                lines += _wrong_pick(layers[source], skipped)
                source = _sources(layers[source])[0]
            found.add(source)
        if name == "xattn" and VISION_NAME in _sources(layers[name]) and skipped:
            lines.append(
                f"xattn attends over every token of {VISION_NAME}, {skipped} of them before the"
                ' patches; set [store] tokens to "all"'
            )
        if found != expected:
            lines.append(
                f"{name} reads {', '.join(sorted(found))}; expected {', '.join(sorted(expected))}"
            )
    outputs = config["config"]["output_layers"]
    if "logit" not in (outputs[0], *outputs[0]):
        lines.append(f"its output is {outputs}; expected the layer logit")
    return list(dict.fromkeys(lines))


def _sources(layer: Mapping[str, Any]) -> list[str]:
    """Return the layers whose output a layer reads, in the order of its arguments."""
    (node,) = layer["inbound_nodes"]
    found, stack = [], [node["args"], node["kwargs"]]
    while stack:
        part = stack.pop()
        if isinstance(part, dict) and part.get("class_name") == "__keras_tensor__":
            found.append(part["config"]["keras_history"][0])
        elif isinstance(part, dict):
            stack += part.values()
        elif isinstance(part, list):
            stack += part
    return found


def _wrong_pick(layer: Mapping[str, Any], skipped: int) -> Iterator[str]:
    """Say where an operation takes other tokens than the first of the text or the image's."""
    if layer["class_name"] != "GetItem":
        return
    picked = layer["inbound_nodes"][0]["args"][1][1]
    source = _sources(layer)[0]
    if isinstance(picked, dict):
        limits = picked["config"]
        start, stop = limits["start"] or 0, limits["stop"]
    else:
        start, stop = picked, picked + 1
    if source == VISION_NAME and (start, stop) != (skipped, None):
        yield (
            f"xattn attends over the tokens of {VISION_NAME} from {start} on; expected {skipped}:"
            ' set [store] tokens to "patches", or to "all" where it starts at 0'
        )
    elif source == TEXT_NAME and (start, stop) != (0, 1):
        yield f"xattn asks for token {start} of {TEXT_NAME}; expected the first"
