"""Synthetic pictures: coloured shapes and printed words, drawn from a random generator and nothing else.

The same `random.Random` state gives the same picture, byte for byte, with the same Pillow: the only font is the one
Pillow bundles.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from epd.demo.words import MAX_LETTERS, printed_text

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (220, 30, 35),
    "green": (30, 150, 55),
    "blue": (30, 70, 215),
    "yellow": (245, 215, 20),
    "orange": (245, 130, 15),
    "purple": (125, 40, 165),
    "pink": (250, 130, 185),
    "black": (15, 15, 15),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross")
# Yellow and pink print too faintly on a light background to be read.
TEXT_COLOURS: tuple[str, ...] = ("black", "red", "green", "blue", "purple")
# Pixels of picture width per letter, so that no letter is smaller than a patch.
NARROWEST_LETTER = 18

# (width, height) and how often a training step uses it: multiples of 28, which the image processor does not resize.
SIZES: tuple[tuple[tuple[int, int], int], ...] = (
    ((112, 112), 24),
    ((112, 84), 12),
    ((84, 112), 6),
    ((84, 84), 6),
    ((140, 112), 12),
    ((112, 140), 6),
    ((168, 112), 10),
    ((112, 168), 4),
    ((140, 84), 8),
    ((168, 84), 8),
    ((140, 140), 6),
    ((168, 140), 4),
    ((140, 168), 2),
    ((168, 168), 3),
    ((224, 112), 3),
    ((112, 224), 1),
    ((224, 84), 2),
)


@dataclass(frozen=True)
class Thing:
    """One coloured shape."""

    shape: str
    colour: str
    box: Box

    @property
    def name(self) -> str:
        """For example "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Glyph:
    """One printed character."""

    char: str
    box: Box


@dataclass(frozen=True)
class Picture:
    """A drawing and the truth about it.

    kind: "one" (a single shape), "pair" (two shapes side by side), "many" (1 to 5 shapes of one kind) or "text".
    side: "left" or "right" when a single shape is clearly on one side, else "".
    """

    kind: str
    image: Image.Image
    things: tuple[Thing, ...] = ()
    side: str = ""
    text: str = ""
    text_colour: str = ""
    glyphs: tuple[Glyph, ...] = field(default=())


def random_size(rng: random.Random) -> tuple[int, int]:
    """(width, height) of a training picture."""
    return rng.choices([size for size, _ in SIZES], [weight for _, weight in SIZES])[0]


def draw_picture(
    rng: random.Random,
    kind: str,
    size: tuple[int, int],
    *,
    longest: int = MAX_LETTERS,
    held_out: bool | None = False,
) -> Picture:
    """Draw one picture of `kind` at `size` (width, height); `longest` and `held_out` limit what is printed."""
    if kind == "text":
        longest = min(longest, size[0] // NARROWEST_LETTER)
        return _draw_text(rng, size, printed_text(rng, longest, held_out=held_out))
    side = ""
    if kind == "one":
        side = rng.choice(("left", "right", ""))
        things = [_place_one(rng, size, side)]
    elif kind == "pair":
        things = _place_pair(rng, size)
    else:
        things = _place_many(rng, size)
    return Picture(kind, _draw_things(rng, size, things), things=tuple(things), side=side)


def draw_single(rng: random.Random, size: tuple[int, int], shape: str, colour: str) -> Picture:
    """A picture of one given shape, for comparisons."""
    placed = _place_one(rng, size, "")
    thing = Thing(shape, colour, placed.box)
    return Picture("one", _draw_things(rng, size, [thing]), things=(thing,))


def _place_one(rng: random.Random, size: tuple[int, int], side: str) -> Thing:
    width, height = size
    if side:
        extent = rng.uniform(0.28, 0.48) * min(width, height)
        low, high = extent / 2 + 2, 0.40 * width
        centre_x = rng.uniform(min(low, high), high)
        centre_x = width - centre_x if side == "right" else centre_x
    else:
        extent = rng.uniform(0.30, 0.80) * min(width, height)
        centre_x = width / 2 + rng.uniform(-0.06, 0.06) * width
    slack = max(0.0, height / 2 - extent / 2 - 2)
    centre_y = height / 2 + rng.uniform(-slack, slack)
    return Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), _square_box(centre_x, centre_y, extent))


def _place_pair(rng: random.Random, size: tuple[int, int]) -> list[Thing]:
    width, height = size
    things = []
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    for index in range(2):
        room = min(width / 2, height) - 4
        extent = rng.uniform(0.55, 0.95) * room
        slack_x, slack_y = (width / 2 - 4 - extent) / 2, (height - 4 - extent) / 2
        centre_x = width * (0.25 + 0.5 * index) + rng.uniform(-slack_x, slack_x)
        centre_y = height / 2 + rng.uniform(-slack_y, slack_y)
        things.append(Thing(shapes[index], colours[index], _square_box(centre_x, centre_y, extent)))
    return things


def _place_many(rng: random.Random, size: tuple[int, int]) -> list[Thing]:
    width, height = size
    count, shape = rng.randint(1, 5), rng.choice(SHAPES)
    one_colour = rng.choice(list(COLOURS))
    mixed = rng.random() < 0.3
    extent = rng.uniform(0.22, 0.34) * math.sqrt(width * height)
    boxes: list[Box] = []
    while len(boxes) < count:
        boxes = _scatter(rng, size, count, extent)
        extent *= 0.93  # too large to fit: try again a little smaller
    return [Thing(shape, rng.choice(list(COLOURS)) if mixed else one_colour, box) for box in boxes]


def _scatter(rng: random.Random, size: tuple[int, int], count: int, extent: float) -> list[Box]:
    """Up to `count` boxes that do not touch; fewer when chance left no room."""
    boxes: list[Box] = []
    half, gap = extent / 2 + 2, extent + 4
    for _ in range(40):
        if len(boxes) == count or half * 2 > min(size):
            break
        x, y = rng.uniform(half, size[0] - half), rng.uniform(half, size[1] - half)
        if all(abs(x - (b[0] + b[2]) / 2) > gap or abs(y - (b[1] + b[3]) / 2) > gap for b in boxes):
            boxes.append(_square_box(x, y, extent))
    return boxes


def _square_box(x: float, y: float, extent: float) -> Box:
    return (x - extent / 2, y - extent / 2, x + extent / 2, y + extent / 2)


def _background(rng: random.Random) -> Rgb:
    if rng.random() < 0.5:
        return (255, 255, 255)
    base = rng.randint(225, 250)
    red, green, blue = (max(215, min(255, base + rng.randint(-12, 12))) for _ in range(3))
    return (red, green, blue)


def _tint(rng: random.Random, colour: str) -> Rgb:
    red, green, blue = (max(0, min(255, level + rng.randint(-14, 14))) for level in COLOURS[colour])
    return (red, green, blue)


def _draw_things(rng: random.Random, size: tuple[int, int], things: list[Thing]) -> Image.Image:
    scale = 2  # drawn at twice the size and halved: smooth edges
    canvas = Image.new("RGB", (size[0] * scale, size[1] * scale), _background(rng))
    pen = ImageDraw.Draw(canvas)
    tints: dict[str, Rgb] = {}
    for thing in things:
        tint = tints.setdefault(thing.colour, _tint(rng, thing.colour))
        left, top, right, bottom = (edge * scale for edge in thing.box)
        if thing.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=tint)
        else:
            corners = [(left + x * (right - left), top + y * (bottom - top)) for x, y in _outline(thing.shape)]
            pen.polygon(corners, fill=tint)
    return _wear(rng, canvas.reduce(scale))


@lru_cache(maxsize=16)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners in the unit square, y downwards."""
    if shape == "square":
        return ((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94))
    if shape == "triangle":
        return ((0.5, 0.04), (1.0, 0.94), (0.0, 0.94))
    if shape == "diamond":
        return ((0.5, 0.0), (0.9, 0.5), (0.5, 1.0), (0.1, 0.5))
    if shape == "cross":
        a, b = 0.34, 0.66
        return ((a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a))
    points = []
    for corner in range(10):
        radius = 0.52 if corner % 2 == 0 else 0.22
        angle = -math.pi / 2 + corner * math.pi / 5
        points.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return tuple(points)


@lru_cache(maxsize=128)
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def _draw_text(rng: random.Random, size: tuple[int, int], text: str) -> Picture:
    width, height = size
    widest, highest = rng.uniform(0.70, 0.93) * width, rng.uniform(0.45, 0.75) * height
    unit = _font(100).getlength(text) / 100
    points = int(min(widest / unit, highest / 0.75, 64))
    font = _font(points)
    left, top, right, bottom = font.getbbox(text)
    slack_x, slack_y = max(0.0, width - (right - left) - 4) / 2, max(0.0, height - (bottom - top) - 4) / 2
    x = (width - (right - left)) / 2 + 0.8 * rng.uniform(-slack_x, slack_x) - left
    y = (height - (bottom - top)) / 2 + 0.6 * rng.uniform(-slack_y, slack_y) - top
    colour = rng.choice(TEXT_COLOURS) if rng.random() < 0.5 else "black"
    image = Image.new("RGB", size, _background(rng))
    ImageDraw.Draw(image).text((round(x), round(y)), text, fill=_tint(rng, colour), font=font)
    edges = [font.getlength(text[:end]) for end in range(len(text) + 1)]
    glyphs = tuple(Glyph(char, (x + edges[at], y + top, x + edges[at + 1], y + bottom)) for at, char in enumerate(text))
    return Picture("text", _wear(rng, image), text=text, text_colour=colour, glyphs=glyphs)


def _wear(rng: random.Random, image: Image.Image) -> Image.Image:
    """Mild defects that real files have: noise, a resize, JPEG. Most pictures stay clean."""
    draw = rng.random()
    if draw < 0.08:
        reach, shape = rng.randint(3, 12), (image.height, image.width, 3)
        noise = np.frombuffer(rng.randbytes(math.prod(shape)), dtype=np.uint8).reshape(shape) % (2 * reach + 1)
        worn = np.asarray(image).astype(np.int16) + noise.astype(np.int16) - reach
        return Image.fromarray(np.clip(worn, 0, 255).astype(np.uint8))
    if draw < 0.16:
        factor = rng.uniform(1.2, 2.0)
        larger = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
        return larger.resize(image.size, Image.Resampling.BICUBIC)
    if draw < 0.24:
        packed = io.BytesIO()
        image.save(packed, "JPEG", quality=rng.randint(70, 95))
        return Image.open(packed).convert("RGB")
    return image
