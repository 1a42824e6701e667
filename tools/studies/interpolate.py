"""Coarse-to-fine mixing of two pictures in noisy latents (Ho et al. 2020, figures 8 and 9).

Both pictures are noised to a level, mixed there, and brought back. The higher the level, the less of the two is left
and the more the model makes up: from a cross-fade to new pictures. Each picture has its own noise, the same in each
row, and that of the way back is the same for all w. Where the paper mixes the noisy states, (1 - w) x_a + w x_b, the
mixture has less noise than its level (0.71 of it at w = 1/2); here the noises are mixed along the arc between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm import generate
from ldm.api import LatentDiffusion
from ldm.errors import UserError
from ldm.image_io import grid, save_png
from ldm.jobs import Request, Settings
from ldm.judge.pictures import read_pictures
from ldm.mixture import Mixture
from ldm.sampling import make_grid

WEIGHTS = 9  # of the second picture, from 0 to 1


def mix(model: LatentDiffusion, pair: Tensor, prompt: str, steps: int, level: int, seed: int = 0) -> Tensor:
    """`pair` (2, 3, H, W) noised through `level` of `steps` levels, mixed and denoised: (WEIGHTS, 3, H, W).

    Level 0 mixes the latents themselves.
    """
    shares = [place / (WEIGHTS - 1) for place in range(WEIGHTS)]
    sigmas = tuple(make_grid(model.law.schedule, steps, "trailing")[steps - max(level, 1) :].tolist())
    plan = Settings(sampler="ddpm", cfg=1, steps=max(level, 1), sigmas=sigmas).plan()
    requests = [Request(prompt, seed=seed, variation=(seed + 1, share)) for share in shares]
    start = Mixture(pair, shares, float(level > 0))
    *_, last = generate.sample(model, requests, plan, start=start)
    return generate.decode(model, last).cpu()


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
