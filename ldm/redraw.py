"""Pictures by a beginning: of prompts alone, once more at a larger size, or of a given picture's canvas."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm import canvas, generate, pictures
from ldm.canvas import Canvas
from ldm.data.transforms import to_tensor
from ldm.errors import UserError
from ldm.helpers import NONE, Helpers
from ldm.inputs import as_masks
from ldm.jobs import Beginning, Plan, Request
from ldm.mixture import Mixture
from ldm.model import Model
from ldm.ranges import MAX_SIDE
from ldm.sampling import Step
from ldm.start import Noise, Picture, check_window

Watch = Callable[[Iterator[Step]], Step]
"""Walks to the end of a trajectory; its last step."""

FAR = 4
"""How many times the side that the network was trained at a picture may be before it is said."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures (2, 3, H, W), and the share of the second one in each of what is drawn: as a `Canvas` is used."""

    images: Tensor
    shares: Sequence[float]

    def start(self, strength: float, count: int, window: int | None = None) -> Mixture:
        return Mixture(self.images, self.shares, strength)

    def finish(self, drawn: Tensor) -> Tensor:
        return drawn


def last(steps: Iterator[Step]) -> Step:
    return deque(steps, maxlen=1).pop()


def drawn(
    model: Model,
    requests: Sequence[Request],
    plan: Plan,
    begin: Beginning = Beginning(),
    made: Canvas | Pair | None = None,
    helpers: Helpers = NONE,
    watch: Watch = last,
) -> Tensor:
    """Pictures (B, 3, H, W), float32 in [-1, 1] on the CPU, one for each request, in one batch.

    With a canvas they are drawn of that. Without one `plan` has the size; `begin.enlarge` above 1 draws a second time,
    so much larger, at `begin.strength`: what is drawn at the trained size has one subject, and a larger one keeps it.
    Raises UserError, as `generate.sample`.
    """

    def walk(plan: Plan, start: Noise | Picture | Mixture) -> Tensor:
        step = watch(generate.sample(model, requests, plan, helpers, start))
        image = generate.decode(model, step, plan.tile).cpu()
        return image if isinstance(start, Noise) else start.paste(image)

    sizeless = replace(plan, width=None, height=None)
    if made is not None:
        return made.finish(walk(sizeless, made.start(begin.strength, len(requests), _window(model, begin))))
    if begin.enlarge == 1:
        return walk(plan, Noise())
    window, side = _window(model, begin), model.config.image_size
    size = enlarged((plan.height or side, plan.width or side), begin.enlarge, model.codec.factor)
    if window is not None:  # told before the first of the two is drawn
        check_window(plan, window, size)
    image = walk(plan, Noise())
    image = canvas.resized(image, size).clamp(-1, 1)
    return walk(sizeless, Picture(image, begin.strength, window=window))


def _window(model: Model, begin: Beginning) -> int | None:
    return model.config.image_size if begin.window == 0 else begin.window


def enlarged(size: tuple[int, int], factor: float, multiple: int = 1) -> tuple[int, int]:
    """Height and width `factor` times larger, to the nearest multiple. Raises UserError for what is too large."""
    height, width = (max(1, round(side * factor / multiple)) * multiple for side in size)
    if max(height, width) > MAX_SIDE or height * width > pictures.MAX_PIXELS:
        raise UserError(f"the picture would be enlarged to {width} x {height} pixels; choose a smaller factor")
    return height, width


def composed(
    model: Model,
    picture: Image.Image,
    begin: Beginning,
    mask: Image.Image | None = None,
    size: tuple[int | None, int | None] = (None, None),
    alpha: bool = False,
) -> Canvas:
    """The canvas of an upright picture in 8 bits, of `size` (height, width; None: its own), and its mask of that size.

    `alpha`: what is transparent is the mask, of a picture that comes without one. Raises UserError.
    """
    if mask is not None and mask.size != picture.size:
        raise UserError(
            f"the mask is {mask.width} x {mask.height} pixels and the picture {picture.width} x {picture.height}; "
            "make one of the size of the other"
        )
    picture = sized(picture, size)
    cut, transparent = canvas.cut_out(picture) if alpha and mask is None else (None, None)
    if alpha and mask is None and transparent is None and not begin.extend:
        raise UserError("the picture has no transparent parts to draw; give a mask, or sides to extend it by")
    image = canvas.cut_out(pictures.rgb(picture))[0] if cut is None else cut
    area = transparent if mask is None else as_masks(sized(mask, size), image)
    if begin.enlarge != 1:
        image = canvas.resized(image, enlarged((image.shape[2], image.shape[3]), begin.enlarge)).clamp(-1, 1)
    side = model.config.image_size
    return canvas.make(
        image,
        area,
        extend=begin.extend or (0, 0, 0, 0),
        feather=begin.feather,
        only_masked=begin.only_masked,
        size=(side, side),
    )


def paired(one: Image.Image, two: Image.Image, size: tuple[int, int], shares: Sequence[float]) -> Pair:
    """Two upright pictures in 8 bits, both at a height and width."""
    return Pair(torch.cat([to_tensor(pictures.rgb(sized(each, size)))[None] for each in (one, two)]), shares)


def sized(picture: Image.Image, size: tuple[int | None, int | None]) -> Image.Image:
    """The picture at a height and width, its middle where the proportions differ; one side alone keeps them."""
    height, width = size_of(picture.size, size)
    if picture.size == (width, height):
        return picture
    if picture.mode not in ("RGB", "L"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def size_of(own: tuple[int, int], asked: tuple[int | None, int | None]) -> tuple[int, int]:
    """Height and width that a picture of `own` width and height is drawn at. `asked`: height and width, or None.

    Raises UserError for a size, by one side and the picture's proportions, that is too large.
    """
    (wide, tall), (height, width) = own, asked
    if height is None and width is None:
        return tall, wide
    if height is None:
        height = max(1, round((width or wide) * tall / wide))
    width = width or max(1, round(height * wide / tall))
    if max(height, width) > MAX_SIDE or height * width > pictures.MAX_PIXELS:
        raise UserError(
            f"the picture would be drawn at {width} x {height} pixels; choose a smaller --width or --height"
        )
    return height, width


def notices(model: Model, begin: Beginning, made: Canvas) -> tuple[str, ...]:
    """What a user should know of how a canvas is drawn."""
    (height, width), side = made.size, model.config.image_size
    found = made.start(begin.strength, 1, _window(model, begin)).notices(model)
    if begin.window is None and max(height, width) > FAR * side:
        found += (
            f"the picture is drawn at {width} x {height} pixels, and the model was trained at {side}; choose a smaller "
            "--width, or --window for one that is to be enlarged",
        )
    return found
