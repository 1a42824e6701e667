"""Coarse-to-fine mixing of two pictures in noisy latents (Ho et al. 2020, figures 8 and 9).

Both pictures are noised to a level, mixed there, and brought back. The higher the level, the less of the two is left
and the more the model makes up: from a cross-fade to new pictures. Each picture has its own noise, the same in each
row, and that of the way back is the same for all w. Where the paper mixes the noisy states, (1 - w) x_a + w x_b, the
mixture has less noise than its level (0.71 of it at w = 1/2); here the mixed noise is brought back to its deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm import generate
from ldm.api import LatentDiffusion
from ldm.diffusion import precondition
from ldm.errors import UserError
from ldm.image_io import grid, save_png
from ldm.jobs import Ask
from ldm.judge.pictures import read_pictures
from ldm.sampling import BrownianPath, ddpm, finish, make_grid

WEIGHTS = 9  # of the second picture, from 0 to 1


@torch.no_grad()
def mix(model: LatentDiffusion, pair: Tensor, prompt: str, steps: int, level: int, seed: int = 0) -> Tensor:
    """`pair` (2, 3, H, W) noised through `level` of `steps` levels, mixed and denoised: (WEIGHTS, 3, H, W).

    Level 0 mixes the latents themselves.
    """
    latents = model.codec.encode(pair.to(model.device)).double()
    weights = torch.linspace(0, 1, WEIGHTS, dtype=torch.float64).reshape(-1, 1, 1, 1).to(model.device)
    shape = (latents.shape[1], latents.shape[2], latents.shape[3])
    sigmas = make_grid(model.law.schedule, steps, "trailing")[steps - level :]
    own = BrownianPath([seed, seed + 1], shape, model.device).initial()
    mixed = (1 - weights) * latents[:1] + weights * latents[1:]
    if level == 0:
        return model.codec.decode(mixed.float()).cpu()
    noise = ((1 - weights) * own[:1] + weights * own[1:]) / torch.hypot(1 - weights, weights)
    x = mixed + float(sigmas[0]) * noise
    told = model.unet.prepare(generate.conditions(model, [Ask(prompt)] * WEIGHTS))
    denoiser = precondition(lambda x, t: model.unet(x, t, told), model.law)
    for step in ddpm()(denoiser, x, sigmas, BrownianPath([seed + 2] * WEIGHTS, shape, model.device)):
        x = step.x
    return model.codec.decode(finish(x, model.law.schedule, sigmas[-1:])).cpu()


def run(model: LatentDiffusion, pair: Tensor, prompt: str, folder: Path, quick: bool) -> None:
    """Write a grid, a row for each level from none to all: the first picture, its mixtures, the second."""
    steps = 8 if quick else 200
    rows = []
    for eighth in (0, 4, 8) if quick else range(9):
        mixed = mix(model, pair, prompt, steps, eighth * steps // 8)
        rows.append(torch.cat([pair[:1], mixed, pair[1:]]))
        print(f"level {eighth * steps // 8} of {steps}", flush=True)
    save_png(grid(torch.cat(rows), columns=WEIGHTS + 2), folder / "interpolate.png", {})
    print(f"wrote interpolate.png (a row for each level, coarse at the bottom) into {folder}")


def read_pair(shards: str, concepts: Sequence[str], style: str, size: int) -> Tensor:
    """(2, 3, size, size): the pictures of two concepts in one style. Raises UserError if one is not there."""
    pictures = read_pictures(shards, {"name": list(concepts), "style": [style]}, size)
    found = [pictures.of([concept], [style]) for concept in concepts]
    for concept, of in zip(concepts, found, strict=True):
        if not len(of):
            raise UserError(f"{shards} has no picture of '{concept}' in the style '{style}'; name others")
    return torch.cat([of.image[:1] for of in found])
