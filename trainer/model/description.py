"""What a `.keras` file says its model is: checked as text, never made.

Weights of the right shapes can belong to another function: another activation, one
more layer, the last token in place of the first. The description in the archive tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from featstore.publish import text_digest
from trainer.model.head import POOL_NAME, TEXT_NAME, VISION_NAME, is_of_head

PACKAGES = ("keras", "keras_hub")
# Of a setting that decides no prediction.
FREE_SETTINGS = (
    *("name", "trainable", "dtype", "seed", "noise_shape", "data_format", "output_shape"),
    *("rate", "dropout", "dropout_rate", "attention_dropout"),
)
FREE_ENDINGS = ("_initializer", "_regularizer", "_constraint")
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
        names = _compared(ours)
        lines = [line for name in names for line in _differing_settings(name, ours, theirs)]
        lines += [f"expected no layer {name}" for name in _compared(theirs) if name not in names]
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


def _ways(layers: Mapping[str, Any], name: str, names: Sequence[str]) -> set[str]:
    """Return the `_way` of each thing that a layer reads."""
    return {_way(layers, source, names, {}) for source in _sources(layers[name])}


def _way(layers: Mapping[str, Any], name: str, names: Sequence[str], known: dict[str, str]) -> str:
    """Return a digest of how a layer is made of the study's layers and of inputs.

    Operations between them are named by a counter, so their names decide nothing.
    """
    layer = layers[name]
    if name in names or layer["class_name"] == "InputLayer":
        return name
    if name not in known:

        def plain(part: Any) -> Any:
            if isinstance(part, dict) and part.get("class_name") == "__keras_tensor__":
                return _way(layers, part["config"]["keras_history"][0], names, known)
            if isinstance(part, dict):
                return {key: plain(value) for key, value in part.items()}
            return [plain(value) for value in part] if isinstance(part, list) else part

        (node,) = layer["inbound_nodes"]
        settings = {key: value for key, value in layer["config"].items() if key != "name"}
        made = [layer["class_name"], settings, plain(node["args"]), plain(node["kwargs"])]
        known[name] = text_digest(json.dumps(made, sort_keys=True))
    return known[name]


def _differing_connections(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], config: Mapping[str, Any], skipped: int
) -> list[str]:
    lines: list[str] = []
    names = _compared(ours)
    known = {*names, *(n for n, layer in theirs.items() if layer["class_name"] == "InputLayer")}
    for name in names:
        if _ways(theirs, name, names) == _ways(ours, name, names):
            continue
        expected, _ = _read(ours, name, names)
        found, picked = _read(theirs, name, names)
        for layer in picked:
            lines += _wrong_pick(layer, POOL_NAME in names, skipped)
        if VISION_NAME in expected and VISION_NAME in _sources(theirs[name]) and skipped:
            lines.append(
                f"{name} attends over every token of {VISION_NAME}, {skipped} of them before the"
                ' patches; set [store] tokens to "all"'
            )
        if found != expected or not found <= known:
            lines.append(
                f"{name} reads {', '.join(sorted(found))}; expected {', '.join(sorted(expected))}"
            )
    outputs = config["config"]["output_layers"]
    if "logit" not in (outputs[0], *outputs[0]):
        lines.append(f"its output is {outputs}; expected the layer logit")
    return list(dict.fromkeys(lines))


def _compared(layers: Mapping[str, Any]) -> list[str]:
    """Return the layers that decide a prediction: backbones and head."""
    return [name for name in layers if name in (VISION_NAME, TEXT_NAME) or is_of_head(name)]


def _read(
    layers: Mapping[str, Any], name: str, names: Sequence[str]
) -> tuple[set[str], list[dict[str, Any]]]:
    """Return which of the layers that count a layer reads, and what picks tokens in between."""
    found: set[str] = set()
    picked: list[dict[str, Any]] = []
    for source in _sources(layers[name]):
        for _ in layers:  # A description may go in circles.
            if source in names or layers[source]["class_name"] not in PICKING:
                break
            picked.append(layers[source])
            source = _sources(layers[source])[0]
        found.add(source)
    return found, picked


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


def _wrong_pick(layer: Mapping[str, Any], every: bool, skipped: int) -> Iterator[str]:
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
    elif source == TEXT_NAME and every:
        yield f"xattn asks for a token of {TEXT_NAME} alone; expected every one, or --queries cls"
    elif source == TEXT_NAME and (start, stop) != (0, 1):
        yield f"xattn asks for token {start} of {TEXT_NAME}; expected the first"
