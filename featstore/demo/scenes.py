"""Rendered scenes and sentences that cannot be judged without the picture.

A scene is two to five coloured shapes on a plain background. Its sentences come
from a second scene, its *foil*, which is not shown: half are true of the scene
and false of the foil, half the reverse, and a coin decides which of the two
scenes is shown. So a sentence is true with probability 1/2 exactly, and each
image has as many true sentences as false ones: neither alone tells anything
about the label.

The counts of a single sentence are left to chance on purpose. Were they made
equal over the whole set, then a sentence that is more often true in the training
split would be more often false in the others, and a model of the sentence alone
would score below 50 %.

All lengths are in pixels of the finished image; y grows downwards.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

Item = TypeVar("Item")

IMAGE_SIZE = 96
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (217, 65, 65),
    "yellow": (242, 187, 46),
    "green": (63, 160, 98),
    "blue": (52, 118, 200),
    "purple": (143, 88, 184),
}
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three", "four")
MOST_SHAPES = 5
# Sentences of one image.
SENTENCES = 6
TRUE, FALSE, UNDEFINED = 1, 0, -1

# Two shapes closer than this along an axis have no clear order on it.
CLEAR_OFFSET = 14.0
_OVERSAMPLING = 4
_BACKGROUNDS = ((250, 246, 238), (240, 246, 250), (244, 248, 240), (249, 241, 244), (243, 242, 250))
_LIGHT = (255, 255, 255)
# How often each kind is asked: relations most, since nothing else needs positions.
_KINDS = {"relation": 6, "colour": 4, "exists": 3, "count": 3, "more": 2, "absent": 1}


@dataclass(frozen=True)
class Shape:
    """One shape: what it is, its centre, its radius and its turn in degrees."""

    name: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    background: tuple[int, int, int] = _BACKGROUNDS[0]

    def counts(self) -> Counter[str]:
        """Count shapes by name, by colour and by "colour name"."""
        counts: Counter[str] = Counter()
        for shape in self.shapes:
            counts.update((shape.name, shape.colour, f"{shape.colour} {shape.name}"))
        return counts


@dataclass(frozen=True)
class Statement:
    """A sentence and what it claims.

    `kind` is one of exists, colour, count, absent, more, relation; `subject`
    and `object` are a shape's name, a colour, or "colour name".
    """

    text: str
    kind: str
    subject: str
    object: str = ""
    number: int = 0
    direction: str = ""


def _statements() -> tuple[Statement, ...]:
    found = []
    for name in SHAPES:
        for colour in COLOURS:
            found.append(Statement(f"There is a {colour} {name}.", "exists", f"{colour} {name}"))
            found.append(Statement(f"The {name} is {colour}.", "colour", name, colour))
        found.append(Statement(f"There is no {name}.", "absent", name))
        for number, word in enumerate(NUMBERS, start=1):
            verb, plural = ("is", "") if number == 1 else ("are", "s")
            text = f"There {verb} exactly {word} {name}{plural}."
            found.append(Statement(text, "count", name, number=number))
        for other in SHAPES:
            if other != name:
                text = f"There are more {name}s than {other}s."
                found.append(Statement(text, "more", name, other))
    for colour in COLOURS:
        found.append(Statement(f"Nothing is {colour}.", "absent", colour))
        for number, word in enumerate(NUMBERS, start=1):
            subject = "shape is" if number == 1 else "shapes are"
            text = f"Exactly {word} {subject} {colour}."
            found.append(Statement(text, "count", colour, number=number))
    for direction in DIRECTIONS:
        for family, noun in ((SHAPES, ""), (tuple(COLOURS), " shape")):
            for subject in family:
                for other in family:
                    if subject != other:
                        text = f"The {subject}{noun} is {direction} the {other}{noun}."
                        found.append(
                            Statement(text, "relation", subject, other, direction=direction)
                        )
    return tuple(found)


STATEMENTS = _statements()


def _only(scene: Scene, what: str) -> Shape:
    return next(shape for shape in scene.shapes if what in (shape.name, shape.colour))


def truth(statement: Statement, scene: Scene, counts: Counter[str] | None = None) -> int:
    """Judge a statement.

    Args:
        statement: What is claimed.
        scene: What is seen.
        counts: `scene.counts()`, if the caller has it.

    Returns:
        TRUE, FALSE, or UNDEFINED where the sentence presupposes what the scene
        lacks ("the star" where there is none, or two) or where two shapes have
        no clear order.
    """
    counts = scene.counts() if counts is None else counts
    subject, other = statement.subject, statement.object
    match statement.kind:
        case "exists":
            return int(counts[subject] > 0)
        case "absent":
            return int(counts[subject] == 0)
        case "count":
            return int(counts[subject] == statement.number)
        case "more":
            return int(counts[subject] > counts[other])
        case "colour":
            if counts[subject] != 1:
                return UNDEFINED
            return int(_only(scene, subject).colour == other)
        case "relation":
            if counts[subject] != 1 or counts[other] != 1:
                return UNDEFINED
            first, second = _only(scene, subject), _only(scene, other)
            match statement.direction:
                case "left of":
                    offset = second.x - first.x
                case "right of":
                    offset = first.x - second.x
                case "above":
                    offset = second.y - first.y
                case _:
                    offset = first.y - second.y
            return UNDEFINED if abs(offset) < CLEAR_OFFSET else int(offset > 0)
    raise ValueError(f"unknown kind of statement: {statement.kind!r}")


def truth_table(scenes: Sequence[Scene]) -> np.ndarray:
    """Judge every statement on every scene.

    Returns:
        int8 of shape (scenes, len(STATEMENTS)), of TRUE, FALSE and UNDEFINED.
    """
    table = np.empty((len(scenes), len(STATEMENTS)), np.int8)
    for row, scene in zip(table, scenes, strict=True):
        counts = scene.counts()
        row[:] = [truth(statement, scene, counts) for statement in STATEMENTS]
    return table


def caption(scene: Scene) -> str:
    """Return a true sentence that lists the shapes, for the `Premise` field."""
    counts = Counter((shape.colour, shape.name) for shape in scene.shapes)
    parts = [
        f"a {colour} {name}" if count == 1 else f"{_number(count)} {colour} {name}s"
        for (colour, name), count in sorted(counts.items())
    ]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return text[0].upper() + text[1:] + "."


def _number(count: int) -> str:
    return (*NUMBERS, "five")[count - 1]


def _pick(rng: random.Random, items: Sequence[Item]) -> Item:
    return items[int(rng.random() * len(items))]


def _subset(rng: random.Random, items: Sequence[Item], size: int) -> list[Item]:
    pool = list(items)
    return [pool.pop(int(rng.random() * len(pool))) for _ in range(size)]


def _between(rng: random.Random, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _near(rng: random.Random, colour: tuple[int, int, int], spread: float) -> tuple[int, int, int]:
    """Return the colour, each channel moved by at most `spread`."""
    red, green, blue = (
        max(0, min(255, round(value + _between(rng, -spread, spread)))) for value in colour
    )
    return red, green, blue


def _placed(rng: random.Random, looks: Sequence[tuple[str, str]]) -> Scene:
    """Place shapes of the given (name, colour) at random without overlap."""
    largest = 15.5 if len(looks) <= 3 else 13.5
    while True:
        shapes: list[Shape] = []
        for name, colour in looks:
            for _ in range(20):
                radius = _between(rng, 10.5, largest)
                margin = radius + 3
                x = _between(rng, margin, IMAGE_SIZE - margin)
                y = _between(rng, margin, IMAGE_SIZE - margin)
                if all(math.hypot(x - s.x, y - s.y) > radius + s.radius + 2 for s in shapes):
                    turn = _between(rng, -12, 12)
                    tint = _near(rng, COLOURS[colour], 9)
                    shapes.append(Shape(name, colour, x, y, radius, turn, tint))
                    break
            else:
                break
        if len(shapes) == len(looks):
            return Scene(tuple(shapes), _near(rng, _pick(rng, _BACKGROUNDS), 4))


def draw_scene(rng: random.Random) -> Scene:
    """Draw a scene at random; few colours or names in some, so that counts vary."""
    names = _subset(rng, SHAPES, 1 + int(rng.random() * len(SHAPES)))
    colours = _subset(rng, tuple(COLOURS), 1 + int(rng.random() * len(COLOURS)))
    size = 2 + int(rng.random() * (MOST_SHAPES - 1))
    return _placed(rng, [(_pick(rng, names), _pick(rng, colours)) for _ in range(size)])


def vary_scene(rng: random.Random, scene: Scene) -> Scene:
    """Place the same shapes anew; half the time one of them changes name or colour."""
    looks = [(shape.name, shape.colour) for shape in scene.shapes]
    if rng.random() < 0.5:
        changed = int(rng.random() * len(looks))
        name, colour = looks[changed]
        if rng.random() < 0.5:
            name = _pick(rng, [other for other in SHAPES if other != name])
        else:
            colour = _pick(rng, [other for other in COLOURS if other != colour])
        looks[changed] = (name, colour)
    return _placed(rng, looks)


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Return the corners of a square, triangle or star around (0, 0)."""
    if shape.name == "square":
        angles, radii = [45.0, 135, 225, 315], [1.12] * 4
    elif shape.name == "triangle":
        angles, radii = [-90.0, 30, 150], [1.15] * 3
    else:
        angles, radii = [-90 + 36.0 * i for i in range(10)], [1.15, 0.52] * 5
    return [
        (
            radius * shape.radius * math.cos(math.radians(angle + shape.turn)),
            radius * shape.radius * math.sin(math.radians(angle + shape.turn)),
        )
        for angle, radius in zip(angles, radii, strict=True)
    ]


def _paint(
    draw: ImageDraw.ImageDraw, shape: Shape, fill: tuple[int, int, int], shift: float
) -> None:
    scale = _OVERSAMPLING
    x, y = shape.x + shift / 2, shape.y + shift
    if shape.name == "circle":
        r = shape.radius
        box = [(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale]
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon([((x + dx) * scale, (y + dy) * scale) for dx, dy in _outline(shape)], fill)


def _mix(
    first: tuple[int, int, int], second: tuple[int, int, int], share: float
) -> tuple[int, int, int]:
    red, green, blue = (
        round((1 - share) * a + share * b) for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def render(scene: Scene) -> Image.Image:
    """Draw a scene with smooth edges and soft shadows.

    Returns:
        An RGB image of IMAGE_SIZE × IMAGE_SIZE.
    """
    side = IMAGE_SIZE * _OVERSAMPLING
    gradient = Image.new("RGB", (1, 2))
    gradient.putpixel((0, 0), _mix(scene.background, _LIGHT, 0.5))
    gradient.putpixel((0, 1), _mix(scene.background, (0, 0, 0), 0.05))
    image = gradient.resize((side, side), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for step, share in ((2.4, 0.08), (1.6, 0.15)):
        for shape in scene.shapes:
            _paint(draw, shape, _mix(scene.background, (40, 40, 60), share), step)
    for shape in scene.shapes:
        _paint(draw, shape, shape.tint, 0.0)
    return image.reduce(_OVERSAMPLING)


def draw_scenes(count: int, seed: int) -> list[Scene]:
    """Draw `count` scenes; the same seed gives the same scenes."""
    rng = random.Random(f"scenes/{seed}")
    return [draw_scene(rng) for _ in range(count)]


@dataclass(frozen=True)
class Question:
    """One row: a scene's position, a statement, and whether it is true of the scene."""

    scene: int
    statement: Statement
    label: bool


def _choose(rng: random.Random, statements: Sequence[int], size: int) -> list[int]:
    """Choose statements; a kind comes twice only when no other is left."""
    pool = list(statements)
    chosen: list[int] = []
    while len(chosen) < size:
        used = Counter(STATEMENTS[i].kind for i in chosen)
        fewest = min(used[STATEMENTS[i].kind] for i in pool)
        left = {STATEMENTS[i].kind for i in pool if used[STATEMENTS[i].kind] == fewest}
        kind = _pick(rng, [kind for kind in _KINDS if kind in left for _ in range(_KINDS[kind])])
        index = _pick(rng, [i for i in pool if STATEMENTS[i].kind == kind])
        pool.remove(index)
        chosen.append(index)
    return chosen


def draw_questions(
    images: int, seed: int, sentences: int = SENTENCES
) -> tuple[list[Scene], list[Question]]:
    """Draw scenes and sentences that cannot be judged without them.

    Args:
        images: Number of scenes.
        seed: The same seed gives the same scenes and questions.
        sentences: Sentences of a scene, an even number; half of them true.

    Returns:
        The scenes, and `sentences` questions of each, in the scenes' order.
    """
    rng = random.Random(f"questions/{seed}")
    scenes: list[Scene] = []
    questions: list[Question] = []
    while len(scenes) < images:
        shown = draw_scene(rng)
        foil = vary_scene(rng, shown) if rng.random() < 0.6 else draw_scene(rng)
        if rng.random() < 0.5:
            shown, foil = foil, shown
        table = truth_table([shown, foil])
        true = np.flatnonzero((table[0] == TRUE) & (table[1] == FALSE)).tolist()
        false = np.flatnonzero((table[0] == FALSE) & (table[1] == TRUE)).tolist()
        if min(len(true), len(false)) < sentences // 2:
            continue
        asked = [(index, True) for index in _choose(rng, true, sentences // 2)]
        asked += [(index, False) for index in _choose(rng, false, sentences // 2)]
        rng.shuffle(asked)
        questions += [Question(len(scenes), STATEMENTS[index], holds) for index, holds in asked]
        scenes.append(shown)
    return scenes, questions


def write_demo(folder: Path, images: int, seed: int) -> None:
    """Write `images/<Image_ID>.png` and `rows.jsonl` into an existing folder.

    A row has the fields of the A2 layout: `Image_ID`, `Label` ("entailment" or
    "contradiction"), `Hypothesis`, `Premise`.
    """
    scenes, questions = draw_questions(images, seed)
    pictures = folder / "images"
    pictures.mkdir()
    for index, scene in enumerate(scenes):
        render(scene).save(pictures / f"{image_id(index)}.png")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for question in questions:
            row = {
                "Image_ID": image_id(question.scene),
                "Label": "entailment" if question.label else "contradiction",
                "Hypothesis": question.statement.text,
                "Premise": caption(scenes[question.scene]),
            }
            file.write(json.dumps(row) + "\n")


def image_id(index: int) -> str:
    return f"scene-{index:04d}"
