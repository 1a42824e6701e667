"""How likely a model finds captioned pictures: what `scripts/evaluate.py likelihood` reports.

A latent model is asked for the density of the autoencoder's latents, sampled from its posterior as in training; a pixel
model (identity codec) for the picture's own 8-bit levels. All of it is conditional on the captions, without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion import Denoiser, LearnedVariance
from ldm.diffusion.likelihood import (
    BitsPerDim,
    Bound,
    bound,
    density_bits,
    draw_probes,
    draw_uniform,
    flow_log_density,
    space_of,
)
from ldm.errors import UserError
from ldm.generate import branches_of
from ldm.jobs import Ask
from ldm.sampling import NoiseStream, make_grid
from ldm.sampling.step import solver_state

if TYPE_CHECKING:
    from ldm.model import Model

PROBES, STEPS = 1_000_003, 2_000_003  # added to a picture's seed, so that these draws are not those of its noise


@dataclass(frozen=True, eq=False)
class Flow:
    """`bits` (B,) of the probability flow, and the `evaluations` (B,) that each picture took."""

    bits: BitsPerDim
    evaluations: Tensor


@torch.no_grad()
def flow(
    model: Model,
    image: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    probes: int = 1,
    tolerance: float = 1e-4,
) -> Flow:
    """The exact likelihood of `image` (B, 3, H, W) in [-1, 1], up to Hutchinson's estimate with so many `probes`.

    Each picture is integrated by itself, from the schedule's first level to its last, and depends on its seed alone. A
    pixel model is given pictures dequantised with their own uniform noise. Raises UserError.
    """
    noise = NoiseStream(seeds, _shape(model, image), model.device)
    x0, space = _encode(model, image, noise), space_of(model.codec)
    if space.name == "pixels":
        uniform = draw_uniform([seed + STEPS for seed in seeds], x0[0].numel()).reshape(x0.shape).to(x0)
        x0 = x0 + (2 * uniform - 1) / 255 * space.scale.to(x0)
    schedule = model.law.schedule
    found = flow_log_density(
        [_denoiser(model, [caption])[0] for caption in captions],
        x0,
        schedule.sigma_min,
        schedule.sigma_max,
        float(schedule.start_scale(schedule.sigmas[-1])),
        draw_probes([seed + PROBES for seed in seeds], x0.shape[1:], probes),
        rtol=tolerance,
        atol=tolerance,
    )
    return Flow(density_bits(found.log_density, x0[0].numel(), space), found.evaluations)


@torch.no_grad()
def chain(
    model: Model,
    image: Tensor,
    captions: Sequence[str],
    seeds: Sequence[int],
    variance: str = "posterior",
    strata: int = 50,
    draws: int = 2,
) -> Bound:
    """The variational bound of `image` (B, 3, H, W) in [-1, 1] on all trained levels, term by term.

    `variance`: posterior, beta, or learned, of a model that has it. `strata` and `draws` are those of
    `likelihood.bound`; 0 strata evaluate every step. The decoder of a pixel model is that of 8-bit levels. Raises
    UserError.
    """
    noise = NoiseStream(seeds, _shape(model, image), model.device)
    x0, space = _encode(model, image, noise), space_of(model.codec)
    denoiser, learned = _denoiser(model, captions)
    if variance == "learned" and learned is None:
        raise UserError("this model learned no variance; choose posterior or beta")
    return bound(
        denoiser,
        x0,
        make_grid(model.law.schedule, model.law.schedule.steps),
        model.law.schedule,
        lambda: noise(0.0, 0.0),
        variance=learned.fraction if variance == "learned" and learned is not None else variance,
        decoder="levels" if space.name == "pixels" else "density",
        space=space,
        uniform=draw_uniform([seed + STEPS for seed in seeds], strata, draws) if strata else None,
        draws=draws,
    )


def _shape(model: Model, image: Tensor) -> tuple[int, int, int]:
    return model.codec.latent_shape(image.shape[2], image.shape[3])


def _encode(model: Model, image: Tensor, noise: NoiseStream) -> Tensor:
    return solver_state(model.codec.encode(image.to(model.device), noise.initial()))


def _denoiser(model: Model, captions: Sequence[str]) -> tuple[Denoiser, LearnedVariance | None]:
    """The conditional model, and the same again if it has a learned variance."""
    branches = branches_of(model, [[Ask(caption) for caption in captions]])
    return lambda x, sigma: branches(x, sigma, 1)[0], branches if isinstance(branches, LearnedVariance) else None
