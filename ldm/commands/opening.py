"""The pictures that a command begins with, opened: their canvas, and what is told of them in what is drawn."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import image_io
from ldm.commands import files
from ldm.commands.order import Batch, Order
from ldm.errors import UserError
from ldm.jobs import Settings

if TYPE_CHECKING:
    from PIL import Image

    from ldm.canvas import Canvas
    from ldm.model import Model
    from ldm.redraw import Pair

OTHER = "choose another --out, or move it away"


def told(notices: Iterable[str]) -> None:
    for notice in dict.fromkeys(notices):
        print(f"warning: {notice}", file=sys.stderr)


Opened = tuple[Settings, "Canvas | Pair | None", "Sequence[dict[str, Any]]"]
"""The settings with the picture's size, what is drawn of it, and what each picture's record says of it."""


class Opener:
    """A batch -> what its picture is, opened. The last one's is kept: the next batch may be of the same picture."""

    def __init__(self, model: Model, order: Order) -> None:
        self.model, self.order = model, order
        self.last: tuple[Path | None, Any] = (None, None)

    def __call__(self, batch: Batch) -> Opened:
        if batch.init is None:
            return self.order.settings, None, [{}] * len(batch.requests)
        if batch.other is not None:
            return self._pair(batch, batch.init, batch.other)
        if batch.init != self.last[0]:
            self.last = (batch.init, self._open(batch.init))
        settings, made, inputs = self.last[1]
        return settings, made, [inputs] * len(batch.requests)

    def _read(self, path: Path, name: str) -> tuple[Image.Image, dict[str, Any]]:
        """A picture, and what is told of it; warns of what is not as it was."""
        from ldm import pictures

        picture, about = pictures.read(path), files.described(path)
        notices = [f"{path} is animated; its first picture is taken"] if files.animated(picture) else []
        then = {} if self.order.recipe is None else self.order.recipe.inputs.get(name, {})
        if then and then.get("hash") != about["hash"]:
            notices.append(f"{path} is not the file that the picture was made with")
        told(notices)
        return picture, about

    def _open(self, init: Path) -> tuple[Settings, Canvas, dict[str, Any]]:
        from ldm import redraw
        from ldm.inputs import as_depths

        order, settings = self.order, self.order.settings
        picture, about = self._read(init, "init")
        inputs = {"init": about}
        mask = self._mask(inputs)
        size = redraw.size_of(picture.size, (settings.height, settings.width))
        made = redraw.composed(self.model, picture, order.begin, mask, size, order.alpha)
        if order.alpha and mask is None and picture.has_transparency_data:
            inputs["mask"] = {"alpha": True}
        if order.depth is not None:
            depth, inputs["depth"] = self._read(order.depth, "depth")
            if size != (picture.height, picture.width):  # it is the given picture's, and cut as that is
                depth = redraw.sized(depth.resize(picture.size), size)
            made = dataclasses.replace(made, depth=as_depths(depth, 1))
        told(redraw.notices(self.model, order.begin, made))
        return dataclasses.replace(settings, height=size[0], width=size[1]), made, inputs

    def _pair(self, batch: Batch, init: Path, other: Path) -> Opened:
        from ldm import redraw

        settings = self.order.settings
        (one, about_one), (two, about_two) = self._read(init, "init"), self._read(other, "other")
        size = redraw.size_of(one.size, (settings.height, settings.width))
        made = redraw.paired(one, two, size, batch.shares)
        inputs = [{"init": about_one, "other": {**about_two, "share": share}} for share in batch.shares]
        return dataclasses.replace(settings, height=size[0], width=size[1]), made, inputs

    def _mask(self, inputs: dict[str, Any]) -> Image.Image | None:
        """The mask, and word of it into `inputs`."""
        from ldm import pictures

        order, within = self.order, {} if self.order.recipe is None else self.order.recipe.inputs.get("mask", {})
        if order.mask is not None:
            mask = pictures.read(order.mask)
            inputs["mask"] = files.described_mask(order.mask, mask)
            if within and within.get("hash") != inputs["mask"]["hash"]:
                told([f"{order.mask} is not the mask that the picture was made with"])
            return mask
        if not within or order.alpha:
            return None
        inputs["mask"] = within
        mask = files.mask_within(within, "the picture")
        if mask is None:
            raise UserError(
                f"the mask {within.get('name')} is too large to be in the picture; give it to inpaint as --mask"
            )
        return mask


def is_there(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the picture was drawn before. Raises UserError if something else is there."""
    if not path.exists():
        return False
    try:
        found = image_io.read_metadata(path)
    except UserError as error:
        raise UserError(f"{path} is there and was not drawn by this command ({error}); {OTHER}") from error
    wanted = json.loads(json.dumps(image_io.finite(record)))
    other = sorted(
        name for name in (wanted.keys() | found.keys()) - {"made_on", "size"} if found.get(name) != wanted.get(name)
    )
    if other:
        raise UserError(f"{path} is there and was drawn with another {' and '.join(other)}; {OTHER}")
    return True
