"""On Gaussian data a sampler is an affine map of its start and its noise, so its output law is exact, not drawn.

The map is read off the sampler with unit vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.sampling import Noise, Sampler

from .closed_forms import Gaussian


def output_law(
    sampler: Sampler, data: Gaussian, sigmas: Tensor, mean: Tensor, covariance: Tensor, kind: str = "path"
) -> Gaussian:
    """The law of the sampler's last state, started from N(mean, covariance), by feeding it unit vectors.

    One batch: row 0 is the origin, then a row for each coordinate of the start and of each independent noise. `kind`:
    the noise is one Brownian path in log sigma, so that what is asked over overlapping intervals belongs together
    (path), or each one is independent (stream).
    """
    d = len(data.mean)
    asked: list[tuple[float, float]] = []
    origin = torch.zeros(1, 1, 1, d, dtype=torch.float64)

    def recorded(sigma: float, sigma_next: float) -> Tensor:
        asked.append((sigma, sigma_next))
        return origin

    for _ in sampler(data.denoiser, origin, sigmas, recorded):
        pass
    points = sorted({level for interval in asked for level in interval}, reverse=True)
    count = len(asked) if kind == "stream" else max(len(points) - 1, 0)
    rows = 1 + d + count * d
    unit = torch.eye(rows, dtype=torch.float64)[:, 1:]  # row 0 is 0
    noises = unit[:, d:].reshape(rows, count, d)
    noise = _stream(noises) if kind == "stream" else _path(noises, points)

    for step in sampler(data.denoiser, unit[:, :d].reshape(rows, 1, 1, d), sigmas, noise):
        last = step.x.reshape(rows, d)
    columns = (last[1:] - last[0]).T
    of_start, of_noise = columns[:, :d], columns[:, d:]
    return Gaussian(last[0] + of_start @ mean, of_start @ covariance @ of_start.T + of_noise @ of_noise.T)


def _stream(noises: Tensor) -> Noise:
    calls = iter(range(noises.shape[1]))
    return lambda sigma, sigma_next: noises[:, next(calls)].reshape(len(noises), 1, 1, -1)


def _path(noises: Tensor, points: Sequence[float]) -> Noise:
    """An interval's normalised increment, of independent ones between neighbouring `points`."""
    lengths = torch.tensor([math.log(high / low) for high, low in pairwise(points)], dtype=torch.float64)
    index = {level: i for i, level in enumerate(points)}

    def noise(sigma: float, sigma_next: float) -> Tensor:
        spanned = slice(index[sigma], index[sigma_next])
        shares = (lengths[spanned] / lengths[spanned].sum()).sqrt()
        return torch.einsum("rnd, n -> rd", noises[:, spanned], shares).reshape(len(noises), 1, 1, -1)

    return noise


def noised(data: Gaussian, sigma: float) -> Gaussian:
    """The law of x = x0 + sigma n."""
    return Gaussian(data.mean, data.covariance + sigma**2 * torch.eye(len(data.mean), dtype=torch.float64))


def geometric(highest: float, lowest: float, steps: int) -> Tensor:
    """(steps + 1,) from `highest` to `lowest`, both exact."""
    sigmas = torch.linspace(math.log(highest), math.log(lowest), steps + 1, dtype=torch.float64).exp()
    sigmas[0], sigmas[-1] = highest, lowest
    return sigmas


def slopes(errors: Sequence[float]) -> list[float]:
    """The order between each two of errors whose steps are halved."""
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
