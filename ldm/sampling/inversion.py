"""From a latent back to the noise that it comes from: the probability flow walked up the grid.

Up the grid noise and data exchange their roles. With y = x / sigma and the level 1 / sigma, x = x0 + sigma n reads
y = n + (1 / sigma) x0: what was noise is the data, and its denoiser is eps = (x - D) / sigma. The flow is the same
flow, so each deterministic sampler walks it up as it is, with its own order; euler's step is then DDIM's inverse,
x + (sigma_next - sigma) eps (Song et al. 2021, appendix F; Dhariwal & Nichol 2021).

What comes down again is not quite what went up. Two remedies:

    refinement  the latent that is sent up is moved by what its way up and down misses, x <- x + (latent - down(up(x))).
                With a method of order p, k refinements leave a round trip of order p (k + 1) where the steps are small
                enough. At large guidance they are not.
    edict       two states that take turns (Wallace et al. 2023): each step is solved for its beginning exactly, so the
                round trip is exact to float64, at any guidance; its noise is less like noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.jobs.catalogue import check_levels
from ldm.sampling.step import Noise, Sampler, Step, level, solver_state, trajectory

FIRST = 6
"""Evaluations of the first step, from level 0. On the shipped model one leaves ten times the error of six."""

MIXING = 0.93
"""Of EDICT's two states, as in its paper: nearer to 1 they drift apart."""


def rise(sampler: Sampler, denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> Iterator[Step]:
    """The grid (N + 1,) from its last level up to its first by a deterministic sampler, from `x` (B, C, h, w) there.

    N steps, each with sigma < sigma_next. From level 0, where the flow has no slope, the first step is Euler's solved
    for its beginning, D(x, sigma_next) = x0, by fixed-point iterations x <- x + (x0 - D).
    Raises UserError for a sampler that asks for noise, and an invalid grid.
    """
    levels = check_levels(map(float, sigmas))[::-1]
    for _ in sampler(lambda x, sigma: torch.zeros_like(x), x[:1], sigmas[:2], _no_noise):
        pass  # whether it draws noise is seen on the way down, where each sampler is at home
    x, done = solver_state(x), 0
    if levels[0] == 0:
        latent, done = x, 1
        x0 = denoiser(x, level(levels[1]))
        for _ in range(FIRST - 1):
            x = x + (latent - x0)
            x0 = denoiser(x, level(levels[1]))
        x = x + (latent - x0)
        yield Step(0, len(levels) - 1, 0.0, levels[1], x, x0)
    if len(levels) - done < 2:
        return

    def eps(y: Tensor, inverse: Tensor) -> Tensor:
        now = per_picture(inverse, y)
        return y - now * denoiser(y / now, 1 / inverse)

    inverses = torch.tensor([1 / sigma for sigma in levels[done:]], dtype=torch.float64)
    for step in sampler(eps, x / levels[done], inverses, _no_noise):
        sigma, sigma_next = levels[done : done + 2]
        x0, x = x - sigma * step.x0, sigma_next * step.x
        yield Step(done, len(levels) - 1, sigma, sigma_next, x, x0)
        done += 1


def invert(sampler: Sampler, denoiser: Denoiser, x: Tensor, sigmas: Tensor, refinements: int = 1) -> Tensor:
    """The state (B, C, h, w) at the grid's first level that `sampler` brings down to `x` at its last, about.

    (1 + 2 k) N steps for k refinements. Raises UserError as `rise`.
    """
    sent = x = solver_state(x)
    for _ in range(refinements):
        up = _last(rise(sampler, denoiser, sent, sigmas))
        sent = sent + (x - _last(sampler(denoiser, up, sigmas, _no_noise)))
    return _last(rise(sampler, denoiser, sent, sigmas))


def edict(second: Tensor | None = None) -> Sampler:
    """EDICT's way down (Wallace et al. 2023, equations 13 and 14), in x: Euler's steps of two states that see each
    other's eps, and are mixed. `second` is the other state's start; without one both begin from the same.

    2 N evaluations in N steps. Not in SAMPLERS: it is no way to draw from noise, but to come back from `edict_up`.
    """

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        other, turn = solver_state(x if second is None else second), 0

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            nonlocal other, turn
            a, b = x, other
            if turn % 2:  # they take turns in going first
                a, b = b, a
            x0 = denoiser(b, level(sigma))
            a = a + (sigma_next / sigma - 1) * (b - x0)
            b = b + (sigma_next / sigma - 1) * _noise_in_early(denoiser, a, sigma, sigma_next)
            a = MIXING * a + (1 - MIXING) * b
            b = MIXING * b + (1 - MIXING) * a
            x, other = (b, a) if turn % 2 else (a, b)
            turn += 1
            return x, x0

        return trajectory(x, sigmas, advance)

    return sample


def edict_up(denoiser: Denoiser, x: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The two states at the grid's first level that `edict` brings down to `x` (B, C, h, w) at its last, exactly.

    `edict(second)(denoiser, first, sigmas, noise)` is the way back. The denoiser has to give the same again for the
    same, and is asked for as many pictures at once. Raises UserError for an invalid grid.
    """
    levels = check_levels(map(float, sigmas))
    a = b = solver_state(x)
    for index, (sigma, sigma_next) in reversed(list(enumerate(pairwise(levels)))):
        if index % 2:
            a, b = b, a
        b = (b - (1 - MIXING) * a) / MIXING
        a = (a - (1 - MIXING) * b) / MIXING
        b = b - (sigma_next / sigma - 1) * _noise_in_early(denoiser, a, sigma, sigma_next)
        a = a - (sigma_next / sigma - 1) * (b - denoiser(b, level(sigma)))
        if index % 2:
            a, b = b, a
    return a, b


def _noise_in_early(denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """sigma eps of a state that is at `sigma_next` already, taken for one at `sigma`: at that level's variance.

    So it is in the paper, whose states have unit variance at every level.
    """
    x = x * (math.hypot(1, sigma) / math.hypot(1, sigma_next))
    return x - denoiser(x, level(sigma))


def _last(steps: Iterator[Step]) -> Tensor:
    *_, step = steps
    return step.x


def _no_noise(sigma: float, sigma_next: float) -> NoReturn:
    raise UserError(
        "this sampler draws noise on its way, so there is no one way back; invert by a deterministic one, such as "
        "dpmpp_2m, heun, unipc, or ddim with eta 0"
    )
