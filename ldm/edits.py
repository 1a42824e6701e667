"""To look into what a model draws, and to draw a picture again with other words: methods of LatentDiffusion.

No torch until they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from ldm.errors import UserError
from ldm.given import begin_of, named, plan_of, settings_of
from ldm.helpers import helpers_of
from ldm.jobs import Settings
from ldm.jobs.request import Labels
from ldm.model import Model
from ldm.notices import tell

if TYPE_CHECKING:
    from ldm.given import Grid
    from ldm.inputs import Picture
    from ldm.inverted import Inverted
    from ldm.sampling import Sampler
    from ldm.unet.maps import Maps

INVERSION = Settings(sampler="dpmpp_2m", cfg=1.0)


def invert(
    model: Model,
    image: Picture | Sequence[Picture],
    prompt: str | Sequence[str] = "",
    *,
    label: Labels = None,
    negative: str | Sequence[str] = "",
    strength: float = 1.0,
    refinements: int = 1,
    exact: bool = False,
    cfg: float | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    grid: Grid | None = None,
    batch_size: int = 4,
    settings: Settings = INVERSION,
) -> Inverted:
    """What `image`, told `prompt`, is drawn from: a `start` for `txt2img` and `sample`, by this or another prompt.
    Images and prompts are those of `img2img`, `strength` says up to which level of noise.

    `sampler`: any that draws no noise on its way; it and `grid` may be values, as those of `txt2img`, which the start
    brings along as it does the settings. `refinements`: how often what the way up and down misses is sent
    up too, two more walks each. `exact`: by EDICT, whose way back meets the picture's latent to rounding at any
    cfg, in twice the evaluations and with a sampler of its own. Raises UserError.
    """
    from ldm import inverting, start
    from ldm.backends.sparing import visiting

    picture, requests = begin_of(image, None, prompt, negative, label, 0, None, None, None)
    assert isinstance(picture, start.Picture)  # no latents were given
    if exact and sampler is not None:
        raise UserError("an exact inversion has a sampler of its own; leave the sampler out, or exact")
    settings = named(settings_of(settings), cfg, steps, sampler, grid)
    values = {"sampler": sampler if callable(sampler) else None, "grid": grid if callable(grid) else None}
    plan, picture = plan_of(settings, **values), replace(picture, strength=strength)
    helpers = helpers_of(model, plan)
    tell(model, requests, plan, helpers, picture.notices(model))
    with visiting(model, model.unet, model.codec.autoencoder):
        found = inverting.invert(model, requests, plan, settings, helpers, picture, refinements, exact, batch_size)
    return replace(found, **values)


@contextmanager
def attention_maps(model: Model, size: int = 32) -> Iterator[Maps]:
    """`with model.attention_maps() as maps:` keeps what the U-Net looks at of the prompt, in all that is drawn
    inside, batch after batch, by picture, layer, evaluation and token, in layers of at most `size` x `size` positions.
    No bit of a picture changes. Raises UserError for a network without cross-attention.
    """
    from ldm.unet import maps

    with maps.attention_maps(model.unet, model.text, size) as found:
        onlookers = model.kept.setdefault("onlookers", [])
        onlookers.append(found.begin)
        try:
            yield found
        finally:
            onlookers.remove(found.begin)


def prompt_to_prompt(
    model: Model,
    source: str,
    target: str,
    weights: Mapping[str, float] | None = None,
    cross: float = 0.8,
    itself: float = 0.4,
) -> AbstractContextManager[None]:
    """`with model.prompt_to_prompt(source, target):` draws [source, target], in one batch and from one seed, so
    that the second is the first one with other words (ldm/unet/prompt_to_prompt.py has the arguments). UserError.
    """
    from ldm.unet import prompt_to_prompt as room
    from ldm.unet.looking import part_of
    from ldm.unet.unet import Prepared, UNet

    told = None
    if model.text is not None and isinstance(model.unet, UNet):  # other networks are refused
        context = model.encoder.texts([source, target]).context
        assert context is not None  # there is a text tower
        told = part_of(Prepared(model.unet.project_context(context)), 2)
    return room.prompt_to_prompt(model.unet, model.text, source, target, weights, cross, itself, told)
