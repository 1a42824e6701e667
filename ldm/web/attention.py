"""Where the network looks at each word of a prompt, as pictures."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image

from ldm.errors import UserError
from ldm.jobs import grammar

if TYPE_CHECKING:
    from ldm.unet.maps import Maps

MOST_BYTES = 512 * 2**20  # of one batch's maps


def bound(maps: Maps) -> None:
    """Raise UserError where the maps that are kept become too large."""
    if maps.kept and len(maps.kept) * maps.kept[0].weights.numel() * 2 > MOST_BYTES:
        raise UserError("too much is looked at to keep it all; ask for fewer steps or pictures, or leave attention out")


def words(maps: Maps, prompt: str, weighted: bool, row: int) -> tuple[tuple[str, bytes], ...]:
    """Each word of a prompt, in order, and a grey PNG, white where picture `row` looks at it most, black where least.

    Nothing of a prompt that is joined by AND, or that has several chunks.
    """
    if weighted:
        chunks = [chunk for clause in grammar.clauses(prompt) for chunk in grammar.chunks(clause.text)]
        if len(chunks) != 1:
            return ()
        prompt = "".join(part.text for part in chunks[0])
    found = []
    for word, looked in maps.words(prompt, row):
        content = io.BytesIO()
        between = (looked - looked.min()) / (looked.max() - looked.min()).clamp(min=1e-6)
        levels = (255 * between).round().byte()
        Image.fromarray(levels.numpy()).save(content, "PNG")
        found.append((word, content.getvalue()))
    return tuple(found)
