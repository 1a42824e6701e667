"""Langevin dynamics on the score of each level, (D(x, sigma) - x) / sigma^2: alone, annealed, or after a predictor."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.errors import UserError
from ldm.sampling.noise import BrownianPath
from ldm.sampling.step import Noise, Sampler, Step, flow, leaps, level, trajectory


def langevin(moves: int = 10, step_size: float = 0.1) -> Sampler:
    """Annealed Langevin dynamics (Song & Ermon 2019, algorithm 1): `moves` moves at each level of the grid.

    The state enters a level as it left the one before; the first level is where it starts, and gets no moves. Only a
    leap (step.py) leaves more noise than the moves could take off, so Euler's step along the flow goes before them
    there. With h = `step_size` a move at level r is

        x <- x + h r^2 score + sqrt(2 h) r n = x + h (D - x) + sqrt(2 h) r n,

    so h is half of Song and Ermon's epsilon over the square of their last level. The moves are not corrected by an
    accept-reject step: where the score is that of pure noise they settle at the variance r^2 / (1 - h / 2), not r^2.
    The step to 0 gives D, one evaluation; every other takes `moves`, and one more in a leap. `Step.x0` is the last one
    made. Raises UserError for no moves, for h outside (0, 2), where the chain has no stationary law, and, when called,
    for the noise of a Brownian path.
    """
    if moves < 1:
        raise UserError(f"langevin was given {moves} moves a level; choose 1 or more")
    if not 0 < step_size < 2:
        raise UserError(f"the step_size of langevin is {step_size:g}; choose one between 0 and 2, well below 1")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        check_noise(noise)

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            if sigma_next == 0:
                x0 = denoiser(x, level(sigma))
                return x0, x0
            x0 = x  # until the first move, and there is one
            if leaps(sigma, sigma_next):
                x = flow(x, denoiser(x, level(sigma)), sigma, sigma_next)
            for _ in range(moves):
                x0 = denoiser(x, level(sigma_next))
                score, n = (x0 - x) / sigma_next**2, noise(sigma, sigma_next).to(x)
                x = move(x, score, step_size * sigma_next**2, n)
            return x, x0

        return trajectory(x, sigmas, advance)

    return sample


def pc(snr: float = 0.16, moves: int = 1) -> Sampler:
    """Predictor-corrector sampling (Song et al. 2021, "Score-based generative modeling", algorithms 2 and 4).

    Predictor: the reverse diffusion step of the variance-exploding law, which x = x0 + sigma n follows whatever the
    model's own one, x + (s^2 - r^2) score(x, s) + sqrt(s^2 - r^2) n. That is far more noise than the level r has where
    r is far below s, so in a leap (step.py) it is the posterior's, r / s times as much, and the step DDPM's own.
    Corrector: `moves` Langevin moves at r, of step

        epsilon = 2 (snr |n| / |score|)^2,

    where each picture has its own norms, so that none changes another. (The paper's code averages them over the batch.)
    An epsilon so chosen depends on chance: of d values a picture, the moves settle at about 1 + snr^2 + 4 / d times the
    level's variance. So it is made for pictures, not for a few dimensions. `snr` = 0, or no moves, leaves the predictor
    alone. The step to 0 gives D, one evaluation; every other takes 1 + `moves`.
    `Step.x0` is the last one made. Raises UserError for negative or infinite options, and, when called, for the noise
    of a Brownian path.
    """
    if not 0 <= snr < math.inf:
        raise UserError(f"the snr of pc is {snr:g}; choose 0 or more, as 0.16")
    if moves < 0:
        raise UserError(f"pc was given {moves} moves a level; choose 0 or more")

    def sample(denoiser: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        check_noise(noise)

        def advance(x: Tensor, sigma: float, sigma_next: float) -> tuple[Tensor, Tensor]:
            x0 = denoiser(x, level(sigma))
            if sigma_next == 0:
                return x0, x0
            difference = sigma**2 - sigma_next**2
            add = math.sqrt(difference) * (sigma_next / sigma if leaps(sigma, sigma_next) else 1.0)
            x = x + (difference / sigma**2) * (x0 - x) + add * noise(sigma, sigma_next).to(x)
            for _ in range(moves):
                x0 = denoiser(x, level(sigma_next))
                score, n = (x0 - x) / sigma_next**2, noise(sigma, sigma_next).to(x)
                x = move(x, score, 2 * (snr * norms(n) / norms(score)) ** 2, n)
            return x, x0

        return trajectory(x, sigmas, advance)

    return sample


def check_noise(noise: Noise) -> None:
    """Raise UserError for a Brownian path: it has one normal for an interval, and moves at a level need one each."""
    if isinstance(noise, BrownianPath):
        raise UserError(
            "Langevin moves at one level need fresh noise each; give them a NoiseStream, not a BrownianPath"
        )


def move(x: Tensor, score: Tensor, epsilon: Tensor | float, n: Tensor) -> Tensor:
    """x + epsilon score + sqrt(2 epsilon) n: Euler-Maruyama on Langevin's equation, `epsilon` a number or (B, 1, 1, 1).

    On N(0, 1) the chain's own stationary variance is 1 / (1 - epsilon / 2).
    """
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device)
    return x + epsilon * score + (2 * epsilon).sqrt() * n


def norms(x: Tensor) -> Tensor:
    """(B, 1, 1, 1): the Euclidean norm of each picture of (B, C, h, w)."""
    return x.flatten(1).norm(dim=1).reshape(-1, *(1,) * (x.ndim - 1))
