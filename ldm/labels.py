"""Words under pictures: what a sheet's pictures are of, in the font that Pillow brings."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.errors import UserError, printable

SMALLEST = 11  # pixels of the letters; larger pictures, which are looked at from further away, have larger ones
NARROWEST = 96  # pixels of a cell, so that two or three words fit on a line
LINES = 4
LONGEST = 1000  # letters that are looked at; no line of these has room for more


def below(images: Tensor, labels: Sequence[str]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H', W') on white, each picture in the middle above its label.

    A label is cut after four lines. The font has Latin letters without accents, which are left out; others are a box.
    Raises UserError unless there is a label for each.
    """
    if len(labels) != len(images):
        raise UserError(f"{len(labels)} labels were given for {len(images)} pictures; give one for each")
    height, width = images.shape[2:]
    cell, letters = max(width, NARROWEST), max(SMALLEST, width // 32)
    font = ImageFont.load_default(letters)
    lines = [wrapped(label, font, cell) for label in labels]
    line = letters * 5 // 4
    strip = line * max(map(len, lines)) + line // 2
    made = images.new_ones(len(images), 3, height + strip, cell)
    left = (cell - width) // 2
    made[:, :, :height, left : left + width] = images
    for one, words in zip(made, lines, strict=True):
        picture = Image.new("L", (cell, strip), "white")
        draw = ImageDraw.Draw(picture)
        for i, text in enumerate(words):
            draw.text((cell / 2, i * line + line // 4), text, "black", font, anchor="ma")
        one[:, height:] = torch.from_numpy(np.array(picture)).to(one) / 127.5 - 1
    return made


def wrapped(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`label` in at most LINES lines of `width` pixels; longer words are broken, and what is cut ends in "…"."""
    letters = unicodedata.normalize("NFKD", printable(label[:LONGEST]))
    words = "".join(letter for letter in letters if not unicodedata.combining(letter)).split()
    lines = [""]
    while words and len(lines) <= LINES:
        word = words.pop(0)
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif lines[-1]:
            lines.append("")
            words.insert(0, word)
        else:
            fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines[-1] = word[:fits]
            words[:0] = [word[fits:]] if word[fits:] else []
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], f"{lines[LINES - 1][:-1]}…"]
