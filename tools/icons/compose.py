"""Sprites with transparency -> (picture, caption): plain on white, on a coloured background, in pairs, tinted.

What a caption says is exactly what is drawn: a background of a named colour is that colour to the last pixel of the
border, "to the left of" means that one sprite lies wholly in the left half and the other in the right one. So the
control a model has learnt can be measured by looking at pixels.

Every random choice takes its generator as an argument (a `random.Random` or a `numpy.random.Generator`: only `random()`
is asked of it) and nothing here keeps state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
T = TypeVar("T")

PALETTE: dict[str, Colour] = {
    "red": (220, 38, 38),
    "orange": (249, 115, 22),
    "yellow": (250, 204, 21),
    "green": (34, 160, 75),
    "blue": (37, 99, 235),
    "light blue": (147, 197, 253),
    "purple": (126, 34, 206),
    "pink": (244, 143, 177),
    "brown": (120, 72, 40),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
    "white": (255, 255, 255),
}
BACKGROUNDS: tuple[str, ...] = tuple(name for name in PALETTE if name != "white")  # white is what plain pictures have

_CLOSE = 80.0  # Euclidean distance in 8-bit RGB under which an object's pixel melts into the background
_CLOSE_SHARE = 0.1  # of an object's pixels that may do so
_CONTRAST = 100.0  # least distance of a tint from its background: refuses red on orange and orange on yellow
_INSET = 0.8  # side of a sprite's frame on a coloured background: nothing but background touches the border


class Random(Protocol):
    """Uniform numbers in [0, 1); random.Random and numpy.random.Generator are such."""

    def random(self) -> float: ...


@dataclass(frozen=True)
class Sprite:
    """A drawing with transparency. `picture` is RGBA, square; `phrase` is the name with its article."""

    picture: Image.Image
    name: str  # red apple
    phrase: str  # a red apple
    style: str = ""  # flat emoji; empty where the phrase says all there is to say


@dataclass(frozen=True)
class Composition:
    """An RGB picture of the sprite's size, its caption, and what was drawn, as the sample's json keeps it."""

    picture: Image.Image
    caption: str
    settings: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------- the four kinds


def plain(sprite: Sprite) -> Composition:
    """On white, as large as it is drawn: "a red apple, flat emoji"."""
    caption = f"{sprite.phrase}, {sprite.style}" if sprite.style else sprite.phrase
    return Composition(over(sprite.picture, PALETTE["white"]), caption, {"kind": "plain", "background": "white"})


def on_background(sprite: Sprite, rng: Random, colours: Sequence[str] = BACKGROUNDS) -> Composition | None:
    """On one of `colours` that it does not melt into: "a red apple on a gray background, flat emoji".

    None if every one of `colours` is refused (see `melts`).
    """
    fit = [name for name in colours if not melts(sprite.picture, PALETTE[name])]
    if not fit:
        return None
    name = choose(rng, fit)
    picture = over(inset(sprite.picture), PALETTE[name])
    caption = f"{sprite.phrase} on {a(name)} background, {sprite.style}"
    return Composition(picture, caption, {"kind": "background", "background": name})


RELATIONS: dict[str, tuple[int, int]] = {  # where the first sprite's box is, in halves of the picture (column, row)
    "to the left of": (0, -1),
    "to the right of": (1, -1),
    "above": (-1, 0),
    "below": (-1, 1),
}


def pair(first: Sprite, second: Sprite, rng: Random, relations: Sequence[str] = tuple(RELATIONS)) -> Composition:
    """Two sprites of one style on white: "a snail above a peach, flat emoji". Each lies wholly in its half."""
    if first.style != second.style or first.picture.size != second.picture.size:
        raise ValueError(f"a pair is of one style and size, not {first.style!r} and {second.style!r}")
    relation = choose(rng, relations)
    column, row = RELATIONS[relation]
    side = first.picture.width
    canvas = Image.new("RGB", first.picture.size, PALETTE["white"])
    _place(canvas, first.picture, _half(side, column, row))
    _place(canvas, second.picture, _half(side, 1 - column if column >= 0 else -1, 1 - row if row >= 0 else -1))
    settings = {"kind": "pair", "background": "white", "relation": relation, "partner": second.name}
    return Composition(canvas, f"{first.phrase} {relation} {second.phrase}, {first.style}", settings)


def tint(silhouette: Sprite, rng: Random) -> Composition:
    """A black silhouette in one colour on another: "a red anchor icon on a blue background".

    Only the silhouette's alpha counts. The two colours are at least 100 apart in RGB.
    """
    colour = choose(rng, tuple(PALETTE))
    grounds = [name for name in PALETTE if np.linalg.norm(np.subtract(PALETTE[name], PALETTE[colour])) >= _CONTRAST]
    ground = choose(rng, grounds)
    shape = inset(silhouette.picture).getchannel("A")
    picture = Image.new("RGB", silhouette.picture.size, PALETTE[ground])
    picture.paste(Image.new("RGB", silhouette.picture.size, PALETTE[colour]), mask=shape)
    caption = f"{a(colour)} {silhouette.name} icon on {a(ground)} background"
    return Composition(picture, caption, {"kind": "tint", "background": ground, "colour": colour})


# ---------------------------------------------------------------- what they are made of


def over(picture: Image.Image, colour: Colour) -> Image.Image:
    """An RGBA picture over a plain colour, RGB."""
    canvas = Image.new("RGB", picture.size, colour)
    canvas.paste(picture, mask=picture.getchannel("A"))
    return canvas


def inset(picture: Image.Image, share: float = _INSET) -> Image.Image:
    """The RGBA picture shrunk to `share` of its side, in the middle of a transparent one of the same size."""
    width, height = picture.size
    small = picture.resize((max(1, round(width * share)), max(1, round(height * share))), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    canvas.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    return canvas


def melts(picture: Image.Image, colour: Colour) -> bool:
    """Whether a background is too close to the object: more than a tenth of its pixels are nearer than 80 in RGB.

    Its pixels are those at least half opaque; the distance is Euclidean, of 441 at most.
    """
    pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] >= 128, :3]
    if not len(pixels):
        return False
    near = np.linalg.norm(pixels - np.asarray(colour, dtype=np.float32), axis=1) < _CLOSE
    return bool(near.mean() > _CLOSE_SHARE)


def choose(rng: Random, options: Sequence[T]) -> T:
    """One of `options`, all equally likely, for one number of the generator."""
    return options[int(float(rng.random()) * len(options))]


def a(colour: str) -> str:
    """A colour's name with its article."""
    return f"an {colour}" if colour[0] in "aeiou" else f"a {colour}"


def _half(side: int, column: int, row: int) -> tuple[int, int, int, int]:
    """left, top, right, bottom of half a picture, less a margin; -1: the whole extent of that axis."""
    margin = max(1, side // 32)

    def extent(half: int) -> tuple[int, int]:
        low, high = (0, side) if half < 0 else (half * side // 2, (half + 1) * side // 2)
        return low + margin, high - margin

    (left, right), (top, bottom) = extent(column), extent(row)
    return left, top, right, bottom


def _place(canvas: Image.Image, picture: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Paste what is drawn of an RGBA picture, as large as fits, into the middle of `box`."""
    drawn = picture.getchannel("A").getbbox()
    if drawn is None:
        return
    picture = picture.crop(drawn)
    left, top, right, bottom = box
    scale = min((right - left) / picture.width, (bottom - top) / picture.height)
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    corner = (left + right - picture.width) // 2, (top + bottom - picture.height) // 2
    canvas.paste(picture, corner, mask=picture.getchannel("A"))
