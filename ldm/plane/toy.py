"""The plane: distributions to draw points from, and networks so small that they learn one in seconds on a CPU.

Everything else is the product's own. A point is a picture of one pixel and two channels, (B, 2, 1, 1), so the losses,
schedules and samplers take it as they take latents:

    network = train_denoiser(DISTRIBUTIONS["two_moons"], law)
    denoiser = precondition(network, law)
    for step in heun()(denoiser, x, sigmas, noise): ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.diffusion import Law, diffusion_loss, draw_levels
from ldm.errors import UserError
from ldm.model_config import DiffusionLossConfig
from ldm.plane.energy import Chains, Energy, energy_score, likelihood_loss
from ldm.plane.score_matching import (
    Score,
    denoising_score_matching,
    implicit_score_matching,
    sliced_score_matching,
)

SHAPE = (2, 1, 1)  # of a point, for NoiseStream

Distribution = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> points (count, 2, 1, 1), float32, of mean 0 and about unit deviation in each coordinate."""


# ---------------------------------------------------------------- distributions


def mixture(count: int, generator: torch.Generator) -> Tensor:
    """Eight Gaussians of deviation 0.15 on a circle of radius 1.4."""
    angle = torch.randint(8, (count,), generator=generator) * (math.pi / 4)
    return _points(1.4 * angle.cos(), 1.4 * angle.sin(), 0.15, generator)


def two_moons(count: int, generator: torch.Generator) -> Tensor:
    """Two interlocking half circles, blurred by 0.07."""
    angle = math.pi * torch.rand(count, generator=generator)
    upper = torch.rand(count, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos()) - 0.5
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin()) - 0.25
    return _points(1.15 * x, 2.0 * y, 0.07, generator)


def spiral(count: int, generator: torch.Generator) -> Tensor:
    """One arm of a spiral, a turn and a half, evenly filled along its length, blurred by 0.05."""
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    return _points(0.22 * angle * angle.cos() + 0.1, 0.22 * angle * angle.sin() - 0.43, 0.05, generator)


def checkerboard(count: int, generator: torch.Generator) -> Tensor:
    """The eight black fields of a 4 x 4 board of side 3.4, each uniformly filled: a density with edges."""
    row = torch.randint(4, (count,), generator=generator)
    column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
    inside = torch.rand(2, count, generator=generator)
    return _points(0.85 * (column + inside[0] - 2), 0.85 * (row + inside[1] - 2), 0.0, generator)


def _points(x: Tensor, y: Tensor, blur: float, generator: torch.Generator) -> Tensor:
    points = torch.stack([x, y], dim=1).float()
    return (points + blur * torch.randn(points.shape, generator=generator)).reshape(-1, *SHAPE)


DISTRIBUTIONS: dict[str, Distribution] = {
    "mixture": mixture,
    "two_moons": two_moons,
    "spiral": spiral,
    "checkerboard": checkerboard,
}


# ---------------------------------------------------------------- the network


class ToyNetwork(nn.Module):
    """(x (B, 2, 1, 1), t (B,) or none) -> (B, out, 1, 1): three smooth layers on the point, and on waves of both.

    SiLU has the second derivatives that score matching takes of it. `t` is a schedule's time, about 0 to 1000. Weights
    begin at He's scale and the last layer at 0: from torch's own smaller ones the eight clusters are not learned in
    twice the steps.
    """

    of_point: Tensor
    of_time: Tensor

    def __init__(self, out: int = 2, width: int = 64, seed: int = 0, waves: tuple[float, ...] = (1.5, 3.0)) -> None:
        """`waves`: frequencies of the point's; none for what shall stay smooth, as an energy that chains walk on."""
        super().__init__()
        self.register_buffer("of_point", torch.tensor(waves), persistent=False)
        self.register_buffer("of_time", math.pi / 1000 * 2.0 ** torch.arange(6), persistent=False)
        widths = [2 + 2 * 2 * len(self.of_point) + 2 * len(self.of_time), width, width, width]
        with torch.random.fork_rng(devices=[]):  # layers draw weights at birth, from the global numbers
            hidden = [nn.Linear(a, b) for a, b in pairwise(widths)]
            self.out = nn.Linear(width, out)
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in hidden:
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        self.hidden = nn.ModuleList(hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        point = x.flatten(1).to(self.out.weight.dtype)
        time = point.new_zeros(len(x)) if t is None else t
        waves = [(point.unsqueeze(2) * self.of_point).flatten(1), time.unsqueeze(1) * self.of_time]
        h = torch.cat([point, *(wave for phase in waves for wave in (phase.cos(), phase.sin()))], dim=1)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h)[..., None, None]


# ---------------------------------------------------------------- learning


def train_denoiser(
    data: Distribution,
    law: Law,
    config: DiffusionLossConfig | None = None,
    steps: int = 1500,
    batch: int = 256,
    seed: int = 0,
) -> ToyNetwork:
    """A network trained by `diffusion_loss`; `precondition` makes it a denoiser."""
    config = config or DiffusionLossConfig()
    network = ToyNetwork(seed=seed)

    def loss(generator: torch.Generator) -> Tensor:
        x0, n = data(batch, generator), torch.randn(batch, *SHAPE, generator=generator)
        # One level from each of `batch` equal shares of probability: a loss of less variance for the same cost.
        uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        sigma = draw_levels(config, law.schedule, uniform)
        x = x0 + sigma.to(x0.dtype).reshape(-1, 1, 1, 1) * n
        output = network(*law.input(x, sigma))
        return diffusion_loss(output, x0, n, sigma, config, law).mean()

    return _fit(network, loss, steps, seed)


def train_score(
    data: Distribution, objective: str, sigma: float, steps: int = 1000, batch: int = 256, seed: int = 0
) -> tuple[Score, ToyNetwork]:
    """The score of `data` with noise of deviation `sigma` on it, and its network.

    `objective`: denoising, implicit or sliced, of ldm/plane/score_matching.py. The last two see noisy points alone.
    Raises UserError for another objective.
    """
    network = ToyNetwork(seed=seed)

    def score(x: Tensor) -> Tensor:
        return network(x).to(x.dtype)

    def loss(generator: torch.Generator) -> Tensor:
        x0, n = data(batch, generator), torch.randn(batch, *SHAPE, generator=generator)
        if objective == "denoising":
            return sigma**2 * denoising_score_matching(score, x0, n, torch.tensor(sigma)).mean()
        x = x0 + sigma * n
        if objective == "implicit":
            return sigma**2 * implicit_score_matching(score, x).mean()
        probes = torch.randn(batch, 1, *SHAPE, generator=generator)
        return sigma**2 * sliced_score_matching(score, x, probes).mean()

    if objective not in ("denoising", "implicit", "sliced"):
        raise UserError(f"the objective is '{objective}'; choose denoising, implicit or sliced")
    return score, _fit(network, loss, steps, seed)


def train_energy(
    data: Distribution,
    steps: int = 400,
    batch: int = 256,
    walk: int = 10,
    step: float = 0.01,
    blur: float = 0.15,
    seed: int = 0,
) -> tuple[Energy, Chains]:
    """An energy learned by likelihood from `data` with noise of deviation `blur`, and the persistent chains it took.

    `batch` points and as many chains, which start as N(0, 2^2) and walk so many Langevin steps of size `step` at each
    step of training. The network's energy stands on that of N(0, 2^2), so that it belongs to a law from the beginning.
    A chain is stable where curvature times `step` is less than 2: `blur` keeps the law's curvature below 1 / blur^2.
    """
    network = ToyNetwork(out=1, seed=seed, waves=())

    def energy(x: Tensor) -> Tensor:
        return network(x).flatten().to(x.dtype) + x.square().flatten(1).sum(1) / 8

    start = 2 * torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed + 1))
    chains = Chains(start, step, seed + 2, renewal=0.02)

    def loss(generator: torch.Generator) -> Tensor:
        x = data(batch, generator) + blur * torch.randn(batch, *SHAPE, generator=generator)
        return likelihood_loss(energy, x, chains.advance(energy_score(energy), walk))

    _fit(network, loss, steps, seed, rate=1e-3)
    return energy, chains


def _fit(
    network: ToyNetwork, loss: Callable[[torch.Generator], Tensor], steps: int, seed: int, rate: float = 3e-3
) -> ToyNetwork:
    """`network` after so many steps of Adam on `loss`, its rate falling to 0; its parameters then take no gradient."""
    generator = torch.Generator("cpu").manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate, betas=(0.9, 0.99))
    for index in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - index / steps)
        optimizer.zero_grad()
        loss(generator).backward()
        optimizer.step()
    return network.requires_grad_(False).eval()
