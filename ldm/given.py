"""What a caller gives -> requests and a plan: names where there are names, values in their places.

No torch until a value is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError
from ldm.jobs import Plan, Request, Settings, catalogue, of_prompts
from ldm.jobs.request import Labels
from ldm.jobs.values import real, reals, whole
from ldm.model_config import DrawingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.conditioning.condition import Condition
    from ldm.diffusion import Branches, Denoiser
    from ldm.diffusion.schedule import Schedule
    from ldm.inverted import Inverted
    from ldm.sampling import Sampler
    from ldm.start import Draws, Latents, Picture

    Prompts = str | Sequence[str] | Condition
    Guide = Callable[[Branches], Denoiser]
    Grid = str | Iterable[float] | Tensor | Callable[[Schedule, int], Tensor]
    Noise = Tensor | Callable[..., Draws]
    Network = Callable[..., Tensor]


GUIDING = ("cfg", "cfg_rescale", "cfg_interval", "perp_negative", "guide_model")


def requests_of(
    prompt: Prompts,
    negative: Prompts = "",
    seed: int | Iterable[int] = 0,
    n: int = 1,
    label: Labels = None,
    noise: Noise | None = None,
) -> list[Request]:
    """As `of_prompts`, where a Condition of one row, or of one for each, may stand for prompts, or for negative ones.

    `noise`: (B, C, h, w) unit normals, one for each picture, that the seeds' first ones give way to. Raises UserError.
    """
    given, others = _condition(prompt), _condition(negative)
    texts: Any = prompt if given is None else [""] * len(given)
    negatives: Any = negative if others is None else ""
    made = of_prompts(texts, negatives, seed, n, label)
    kinds = len(made) // n
    for what, rows, wanted in (("prompt", given, kinds), ("negative prompt", others, kinds)):
        if rows is not None and len(rows) not in (1, wanted):
            raise UserError(f"the {what} is a condition of {len(rows)} rows for {wanted} prompts; give one for each")
    normals = None if noise is None or callable(noise) else noise
    if normals is not None and (
        getattr(normals, "ndim", 0) != 4 or len(normals) != len(made) or not hasattr(normals, "isfinite")
    ):
        what = f"of {tuple(normals.shape)}" if hasattr(normals, "shape") else f"{normals!r:.60}"
        raise UserError(f"the noise for {len(made)} pictures is {what}; give a tensor (B, C, h, w), or a class")
    return [
        replace(
            request,
            told=_row(given, i // n),
            told_not=_row(others, i // n),
            noise=None if normals is None else normals[i],
        )
        for i, request in enumerate(made)
    ]


def begin_of(
    image: Any,
    latents: Tensor | None,
    prompt: Prompts,
    negative: Prompts,
    label: Labels,
    seed: int | Iterable[int],
    noise: Noise | None,
    mask: Any,
    depth: Any,
    n: int = 1,
) -> tuple[Picture | Latents, list[Request]]:
    """What img2img begins from and what is asked of it: one prompt serves all pictures, one picture all prompts; `n`
    times each.

    Raises UserError, also unless there is a picture or there are latents.
    """
    from ldm import start
    from ldm.inputs import as_depths, as_images, as_masks

    if (image is None) == (latents is None):
        raise UserError("img2img begins from a picture, or from latents; give one of the two")
    images = as_images(image) if latents is None else start.Latents(latents).latents
    prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
    given = _condition(prompt)
    served = len(images) if given and len(given) == 1 else 1  # by one condition
    requests = requests_of(prompts, negative, seed, served * whole(n, "n"), label, noise)
    if len(images) == 1:
        images = images.expand(len(requests) // n, -1, -1, -1)
    if latents is not None:
        if mask is not None or depth is not None:
            raise UserError("a mask and a depth map are of a picture; give the picture in the latents' place")
        begin: Picture | Latents = start.Latents(images)
    else:
        masks = None if mask is None else as_masks(mask, images)
        begin = start.Picture(images, mask=masks, depth=None if depth is None else as_depths(depth, len(images)))
    if n == 1:  # that there are as many of both is asked by the start itself
        return begin, requests
    if len(images) * n != len(requests):
        raise UserError(
            f"{len(images)} pictures to begin from were given for {len(requests) // n} prompts; give as many of both, "
            "or one of either"
        )
    return begin.rows([i // n for i in range(len(requests))]), requests


def start_of(
    start: Inverted | None,
    latents: Tensor | None,
    count: int,
    sampler: str | Sampler | None = None,
    noise: Noise | None = None,
) -> Inverted | Latents | None:
    """What txt2img begins from in place of noise alone, if anything. Raises UserError for both, and for a noise or a
    sampler that the start stands in the place of."""
    from ldm import inverted
    from ldm.start import Latents

    if latents is None:
        begin = inverted.begin_of(start, count)
        if begin is not None and noise is not None and not callable(noise):
            raise UserError("a start and a noise were given, and the start is what noise would be; leave one out")
        if begin is not None and begin.second is not None and sampler is not None:
            raise UserError("the start is of an exact inversion, which has a sampler of its own; leave the sampler out")
        return begin
    if start is not None:
        raise UserError("a start and latents were given; begin from one of the two")
    return Latents(latents)


def settings_of(given: Settings | None, start: Inverted | None = None) -> Settings:
    """Those of the start where none are given. Raises UserError for what are none."""
    settings = given if given is not None else Settings() if start is None else start.settings
    if not isinstance(settings, Settings):
        raise UserError(f"settings is {settings!r:.60}; give a ldm.jobs.Settings, or leave it out")
    return settings


def plan_of(
    settings: Settings | None,
    cfg: float | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    grid: Grid | None = None,
    guide: Guide | None = None,
    noise: Noise | None = None,
    network: Network | None = None,
    drawing: DrawingConfig = DrawingConfig(),
    start: Inverted | None = None,
) -> Plan:
    """The plan of settings, or of the start where none are given, with what goes before them, by name or as a value,
    and what they leave to the model as it is meant to be drawn, `drawing`. Raises UserError, also where a setting is
    given that only what has a name would look at."""
    for name, value in (("guide", guide), ("network", network)):
        if value is not None and not callable(value):
            raise UserError(f"the {name} is {value!r:.60}, which cannot be called; see the docstring of txt2img")
    chosen, said = settings_of(settings, start), ["cfg"] if cfg is not None else []
    if settings is not None:
        said += [name for name in GUIDING if getattr(settings, name) != getattr(Settings(), name)]
    if guide is not None and said:
        raise UserError(f"{said[0]} is of a guidance with a name, and a guide is given, which has its own; say one")
    if settings is None and start is not None:
        sampler = start.sampler if sampler is None else sampler
        grid = start.grid if grid is None else grid
    plan = named(chosen, cfg, steps, sampler, grid).of(drawing).plan()
    values = {"sampler": sampler, "spacing": grid, "guide": guide, "noise": noise, "network": network}
    return replace(plan, **{name: value for name, value in values.items() if callable(value)})


def named(
    settings: Settings, cfg: float | None, steps: int | None, sampler: str | Sampler | None, grid: Grid | None
) -> Settings:
    """`settings` with what goes before them of what has a name there, or numbers. Raises UserError, as `plan_of`."""
    if callable(sampler) and (settings.options or settings.eta is not None):
        raise UserError("options and eta are of a sampler with a name; bind those of your own in it")
    if isinstance(grid, str):
        settings = replace(settings, spacing=grid)
    elif grid is not None and not callable(grid):
        settings = replace(settings, sigmas=tuple(catalogue.check_levels(reals(grid, "the grid"))))
    elif grid is not None and settings.sigmas:
        raise UserError("sigmas are written out in the settings, and a grid is given; say one")
    return settings.but(cfg, steps, None if callable(sampler) else sampler)


def numbers(given: float | Iterable[float], count: int, what: str) -> list[float]:
    """One for each of `count` pictures: of a list, or the same for all. Raises UserError for another number."""
    if isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "shape", None) != ():
        found: list[Any] = list(given)
    else:
        found = [given] * count
    if len(found) != count:
        raise UserError(f"{len(found)} {what} were given for {count} pictures; give one for each, or one for all")
    for one in found:
        if not math.isfinite(real(one, f"one of the {what}")):
            raise UserError(f"one of the {what} is {one}; give finite numbers")
    return [real(one, what) for one in found]


def _condition(given: Any) -> Condition | None:
    from ldm.conditioning.condition import Condition

    return given if isinstance(given, Condition) else None


def _row(given: Condition | None, place: int) -> Condition | None:
    return None if given is None else given[place : place + 1] if len(given) > 1 else given[:1]
