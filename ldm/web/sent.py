"""The pictures that a client sends to begin from: bounded by what their headers say, opened when its turn comes."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ldm import pictures
from ldm.commands.files import SMALL
from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.web.job import Job
from ldm.web.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

    from ldm.canvas import Canvas
    from ldm.model import Model

MOST_FEATHER = 128  # pixels, each a walk over the whole mask


def check(job: Job, limits: Limits, side: int) -> None:
    """Raise UserError for pictures, and for sizes to draw, that are more than a client may ask for.

    `side`: pixels, of what the model draws where nobody says it.
    """
    asked = job.settings.height, job.settings.width
    size = asked[0] or side, asked[1] or side
    if job.image is not None:
        height, width = _size(job.image, "image", limits)
        if job.mask is not None and _size(job.mask, "mask", limits) != (height, width):
            raise UserError(f"the mask is not of the picture's size, {width} x {height} pixels; send one that is")
        given = asked[0] or (asked[1] and round(asked[1] * height / width)) or height
        size = given, asked[1] or (asked[0] and round(asked[0] * width / height)) or width
    left, right, top, bottom = job.begin.extend or (0, 0, 0, 0)
    tall, wide = size[0] * job.begin.enlarge + top + bottom, size[1] * job.begin.enlarge + left + right
    whole = job.begin.only_masked is None
    if (whole and max(tall, wide) > max(limits.most_side, side)) or tall * wide > limits.most_pixels:
        raise UserError(
            f"a picture of {wide:.0f} x {tall:.0f} pixels would be drawn, and this server's limit is "
            f"{limits.most_side}; give a smaller width, or draw only what is masked of it (only_masked)"
        )
    if job.begin.feather > MOST_FEATHER:
        raise UserError(f"feather is {job.begin.feather} pixels, and this server's limit is {MOST_FEATHER}")


def canvas_of(job: Job, model: Model) -> tuple[Settings, Canvas | None, dict[str, Any], tuple[str, ...]]:
    """The settings with the size that is drawn, what is drawn of the picture, what a record says of it, and notices."""
    if job.image is None:
        return job.settings, None, {}, ()
    from ldm import redraw

    picture, inputs = _opened(job.image, "image"), {"init": _described(job.image, "image")}
    mask = None if job.mask is None else _opened(job.mask, "mask")
    if mask is not None and job.mask is not None:
        inputs["mask"] = _described(job.mask, "mask") | _within(mask)
    size = redraw.size_of(picture.size, (job.settings.height, job.settings.width))
    made = redraw.composed(model, picture, job.begin, mask, size)
    return replace(job.settings, height=size[0], width=size[1]), made, inputs, redraw.notices(model, job.begin, made)


def _size(content: bytes, name: str, limits: Limits) -> tuple[int, int]:
    try:
        height, width = pictures.size(content)
    except pictures.BadPicture as error:
        raise _refused(name, error) from error
    if height * width > limits.most_pixels:
        raise UserError(f"the {name} has {height * width:,} pixels, and this server's limit is {limits.most_pixels:,}")
    return height, width


def _opened(content: bytes, name: str) -> Image.Image:
    try:
        return pictures.decode(content)
    except pictures.BadPicture as error:
        raise _refused(name, error) from error


def _refused(name: str, error: pictures.BadPicture) -> UserError:
    return UserError(f"{name}: {error}; send a sound PNG, JPEG or WebP")


def _described(content: bytes, name: str) -> dict[str, Any]:
    return {"name": name, "hash": hashlib.sha256(content).hexdigest()}


def _within(mask: Image.Image) -> dict[str, Any]:
    content = io.BytesIO()
    pictures.rgb(mask).convert("L").save(content, "PNG", optimize=True)
    return {"png": base64.b64encode(content.getvalue()).decode()} if content.tell() <= SMALL else {}
