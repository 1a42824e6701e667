"""The variational bound of DDPM, term by term (Ho et al. 2020, equation 5), in x = x0 + sigma n.

The chain is a grid of levels, those that a sampler walks: from the noisiest, s_0, to 0. In nats,

    -ln p(x0) <=  KL(q(x_0 | x0) || start)                             the prior, start = N(0, start_scale(s_0)^2)
                + sum_i E KL(q(x_{i+1} | x_i, x0) || p(x_{i+1} | x_i))    each step but the last
                - E ln p(x0 | x_last)                                  the decoder, which is the last step

Both Gaussians of a step from s to r have the posterior's mean, around x0 and around D (see ldm/sampling/ddpm.py):

    q = N(x0 + (r/s)^2 (x - x0), r^2 (1 - r^2/s^2)),       p = N(D + (r/s)^2 (x - D), v)

so that, per dimension, with w = r^2 (1 - r^2/s^2),

    KL = (w / v - 1 - ln(w / v) + (1 - r^2/s^2)^2 (x0 - D)^2 / v) / 2.

A KL does not change when both laws are scaled, so it is the chain's own although the chain is written z = alpha x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.learned_variance import Fraction, mixed
from ldm.diffusion.likelihood.bits import LATENT, BitsPerDim, Space
from ldm.diffusion.likelihood.decoder import density_nats, pixel_level_nats
from ldm.diffusion.parameterization import per_picture
from ldm.diffusion.schedule import Schedule, step_deviations
from ldm.errors import UserError

Variance = str | Tensor | Fraction
"""posterior, beta, a variance for each step of the grid (N,), or a learned fraction between the first two."""


@dataclass(frozen=True, eq=False)
class Bound:
    """Every term, in bits per dimension of `space`, one row for each of B pictures; float64 on the CPU.

    `steps` (B, K): those of the grid in order, or, where only some were drawn, each stratum's share of the sum.
    `edges` (K + 1,): column k stands for the steps edges[k] up to, not including, edges[k + 1].
    `error` (B,): the standard error of the total that is due to the draws; nan if there was one draw alone.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    edges: Tensor
    error: Tensor
    space: str

    @property
    def total(self) -> BitsPerDim:
        return BitsPerDim(self.prior + self.steps.sum(1) + self.decoder, self.space)


def bound(
    denoiser: Denoiser,
    x0: Tensor,
    sigmas: Tensor,
    schedule: Schedule,
    noise: Callable[[], Tensor],
    *,
    variance: Variance = "posterior",
    decoder: str = "density",
    space: Space = LATENT,
    uniform: Tensor | None = None,
    draws: int = 1,
) -> Bound:
    """The bound of the chain on the grid `sigmas` for the pictures `x0` (B, C, h, w), computed in x0's dtype.

    Args:
        sigmas: (N + 1,) decreasing to 0, as `make_grid` gives it; all trained levels are the model's own bound.
        schedule: gives the start law, and the alpha of beta.
        noise: gives new unit normals (B, C, h, w) at each call, each picture's from its own generator.
        variance: of p. beta is the forward step's, v = (s^2 - r^2) alpha(s)^2 / alpha(r)^2. The posterior's is 0 in
            the last step, where that of the step before stands in, as in Nichol & Dhariwal 2021. A learned fraction f
            gives ln v = ((1 + f) ln beta + (1 - f) ln posterior) / 2 (their equation 15) and is called right after the
            denoiser, with the same tensors. A tensor (N,) is v itself, from s = sigmas[i] to sigmas[i + 1].
        decoder: density, or levels for 8-bit pixels (the space must be pixels).
        uniform: (B, K, draws) in [0, 1), each picture's from its own generator: K strata of steps are looked at,
            instead of all N - 1, each with `draws` steps drawn uniformly from it. They are as even in ln sigma as
            whole steps allow, for there the terms are most alike. The sum keeps its expectation.
        draws: how often each step (without `uniform`), and the decoder, is evaluated with new noise.

    Costs (K + 1) * draws evaluations. Raises UserError for a grid that does not end in 0, an unknown variance or
    decoder, and levels of a space that has none.
    """
    _check(sigmas, decoder, space)
    sigmas = sigmas.double().cpu()
    table = _Table.of(variance, sigmas, schedule)
    last = len(sigmas) - 2
    edges = list(range(last + 1))
    if uniform is not None:
        strata, draws = uniform.shape[1:]
        edges = _edges(sigmas, strata)

    def term(index: Tensor) -> Tensor:
        """(B,) nats per dimension of the step `index`, () or (B,), with new noise."""
        sigma, sigma_next = sigmas[index], sigmas[index + 1]
        x = x0 + per_picture(sigma, x0) * noise().to(x0)
        denoised = denoiser(x, sigma)
        v = table.variance(index, x, sigma)
        if int(index.max()) < last:
            return step_nats(x0, denoised, sigma, sigma_next, v).flatten(1).mean(1)
        nats = density_nats(x0, denoised, v) if decoder == "density" else pixel_level_nats(x0, denoised, v, space)
        return nats.flatten(1).mean(1)

    columns, spread = [], torch.zeros(len(x0), dtype=torch.float64)
    for stratum in range(len(edges) - 1):
        first, size = edges[stratum], edges[stratum + 1] - edges[stratum]
        values = []
        for draw in range(draws):
            index = torch.tensor(first)
            if size > 1 and uniform is not None:
                index = first + (uniform[:, stratum, draw].cpu().double() * size).long().clamp(max=size - 1)
            values.append(term(index))
        mean, variance_of_mean = _summary(values)
        columns.append(size * mean)
        spread = spread + size**2 * variance_of_mean
    decoded, variance_of_mean = _summary([term(torch.tensor(last)) for _ in range(draws)])
    offset = space.offset * math.log(2) if decoder == "density" else 0.0

    def bits(nats: Tensor) -> Tensor:
        return nats / math.log(2)

    steps = torch.stack(columns, dim=1) if columns else torch.zeros(len(x0), 0, dtype=torch.float64)
    prior = prior_nats(x0, float(sigmas[0]), float(schedule.start_scale(sigmas[0]))).flatten(1).mean(1).double().cpu()
    error = bits((spread + variance_of_mean).sqrt())
    return Bound(bits(prior), bits(steps), bits(decoded + offset), torch.tensor(edges), error, space.name)


def prior_nats(x0: Tensor, sigma: float, start: float) -> Tensor:
    """KL(N(x0, sigma^2) || N(0, start^2)), value by value."""
    ratio = (sigma / start) ** 2
    return 0.5 * ((x0 / start).square() + (ratio - 1 - math.log(ratio)))


def step_nats(x0: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, variance: Tensor) -> Tensor:
    """The KL of the step from `sigma` to `sigma_next` > 0, () or (B,), value by value; `variance` broadcasts to x0."""
    sigma, sigma_next = sigma.cpu().double(), sigma_next.cpu().double()
    shrink = 1 - (sigma_next / sigma) ** 2
    ratio = per_picture(sigma_next**2 * shrink, x0) / variance
    return 0.5 * (ratio - 1 - ratio.log() + per_picture(shrink, x0) ** 2 * (x0 - denoised).square() / variance)


def optimal_variance(sigmas: Tensor, error: Tensor) -> Tensor:
    """(N,) the v of each step that makes the bound smallest among all that are one number (Bao et al. 2022).

    `error` (N,): E (x0 - D)^2 per dimension at sigmas[:-1]. v = w + (1 - r^2/s^2)^2 error, which is error at the last.
    """
    s, r = sigmas[:-1].double(), sigmas[1:].double()
    shrink = 1 - (r / s) ** 2
    return r**2 * shrink + shrink**2 * error


def draw_uniform(seeds: Sequence[int], strata: int, draws: int = 1) -> Tensor:
    """(B, strata, draws) float64 in [0, 1), row i from its own generator, seeds[i]: what `bound` takes."""
    rows = [
        torch.rand(strata, draws, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class _Table:
    """The variances of a grid's N steps: `low` and `high` (N,), and where between them."""

    low: Tensor
    high: Tensor
    fraction: Fraction | None

    @classmethod
    def of(cls, variance: Variance, sigmas: Tensor, schedule: Schedule) -> _Table:
        s, r = sigmas[:-1], sigmas[1:]
        if isinstance(variance, Tensor):
            if variance.shape != s.shape or not bool((variance > 0).all()):
                raise UserError(f"the bound takes one positive variance for each of the grid's {len(s)} steps")
            return cls(variance.double().cpu(), variance.double().cpu(), None)
        posterior, beta = (deviation**2 for deviation in step_deviations(schedule.alpha, s, r))
        # The step before is in x at level r; alpha turns it into the z of the chain, as the papers' code has it.
        posterior[-1] = posterior[-2] * schedule.alpha(r[-2]) ** 2 if len(s) > 1 else beta[-1]
        if not isinstance(variance, str):
            return cls(posterior, beta, variance)
        if variance not in ("posterior", "beta"):
            raise UserError(f"the bound's variance is '{variance}'; choose posterior or beta")
        table = posterior if variance == "posterior" else beta
        return cls(table, table, None)

    def variance(self, index: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """v of the steps `index`, () or (B,), broadcastable to `x`."""
        if self.fraction is None:
            return per_picture(self.low[index], x)
        return mixed(self.fraction(x, sigma).to(x), self.low[index].log(), self.high[index].log()).exp()


def _edges(sigmas: Tensor, strata: int) -> list[int]:
    """(strata + 1,) from 0 to N - 1, strictly increasing and as even in ln sigma as that allows."""
    last = len(sigmas) - 2
    if not 1 <= strata <= last:
        raise UserError(f"{strata} strata were asked for; the grid has {last} steps before its last")
    levels = -sigmas[: last + 1].log()
    wanted = torch.linspace(float(levels[0]), float(levels[-1]), strata + 1, dtype=torch.float64)
    edges = torch.searchsorted(levels, wanted).clamp(max=last).tolist()
    for k in range(1, strata + 1):
        edges[k] = max(edges[k], edges[k - 1] + 1)
    edges[0], edges[-1] = 0, last
    for k in range(strata - 1, 0, -1):
        edges[k] = min(edges[k], edges[k + 1] - 1)
    return edges


def _summary(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of some draws (B,), and that mean's variance, nan for one draw; float64 on the CPU."""
    drawn = torch.stack(values).double().cpu()
    if len(values) == 1:
        return drawn[0], torch.full_like(drawn[0], math.nan)
    return drawn.mean(0), drawn.var(0) / len(values)


def _check(sigmas: Tensor, decoder: str, space: Space) -> None:
    if len(sigmas) < 2 or float(sigmas[-1]) != 0:
        raise UserError("the bound needs a grid that ends at sigma 0; choose trailing or linspace spacing")
    if decoder not in ("density", "levels"):
        raise UserError(f"the decoder is '{decoder}'; choose density or levels")
    if decoder == "levels" and space.name != "pixels":
        raise UserError("8-bit levels are for pixel models; choose density, the decoder of latents")
