"""Up the grid on laws whose flow is known: the order of the way up, of the round trip, and what is exact."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.sampling import SAMPLERS, Sampler, ddim, dpm_2, dpmpp_2m, euler, heun, make_grid, ode, plms, unipc
from ldm.sampling.inversion import FIRST, edict, edict_up, invert, rise

from .affine import geometric
from .closed_forms import three_clusters, three_dimensional
from .test_orders import gaussian_flow

DATA = three_dimensional()
LOW, HIGH = 0.03, 14.6
METHODS: dict[str, tuple[Sampler, float]] = {
    "ddim": (ddim(), 0.9),
    "euler": (euler(), 0.9),
    "heun": (heun(), 1.8),
    "dpm_2": (dpm_2(), 1.8),
    "dpmpp_2m": (dpmpp_2m(), 1.8),
    "plms": (plms(), 1.8),
    "unipc": (unipc(), 2.6),
}


def points(sigma: float = LOW) -> Tensor:
    """(8, 1, 1, 3) of the data, noised to `sigma`."""
    generator = torch.Generator().manual_seed(2)
    values, vectors = torch.linalg.eigh(DATA.covariance + sigma**2 * torch.eye(3, dtype=torch.float64))
    normals = torch.randn(8, 1, 1, 3, generator=generator, dtype=torch.float64)
    return DATA.mean + normals @ (vectors @ torch.diag(values.sqrt())).T


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def last(steps) -> Tensor:
    *_, step = steps
    return step.x


def order(errors: list[float], doublings: int) -> float:
    return math.log2(errors[0] / errors[-1]) / doublings


@pytest.mark.parametrize("name", METHODS)
def test_the_way_up_has_the_samplers_order(name: str) -> None:
    """Against the flow in closed form, from 0.03 to sigma_max. Relative to sigma: there the noise has unit variance."""
    sampler, least = METHODS[name]
    wanted = gaussian_flow(DATA, points(), LOW, HIGH)
    counts = (24, 48, 96)
    found = [last(rise(sampler, DATA.denoiser, points(), geometric(HIGH, LOW, n))) for n in counts]
    errors = [error(x, wanted) / HIGH for x in found]
    assert order(errors, 2) >= least and errors[-1] < 0.02, errors


def test_an_adaptive_way_up_is_the_flow_to_its_tolerance() -> None:
    """One point at a time: the laws' denoiser takes one level."""
    up = last(rise(ode(1e-9, 1e-9), DATA.denoiser, points()[:1], geometric(HIGH, LOW, 3)))
    assert error(up, gaussian_flow(DATA, points()[:1], LOW, HIGH)) < 1e-6


@pytest.mark.parametrize(("name", "refinements", "least"), [
    ("ddim", 0, 0.9), ("ddim", 1, 1.8), ("ddim", 2, 2.7), ("ddim", 3, 3.6),
    ("heun", 0, 1.8), ("heun", 1, 3.6), ("dpmpp_2m", 0, 1.8), ("dpmpp_2m", 1, 3.4), ("unipc", 0, 2.6),
])  # fmt: skip
def test_refinements_raise_the_round_trips_order(name: str, refinements: int, least: float) -> None:
    """Order p (k + 1), p the method's."""
    sampler, errors = METHODS[name][0], []
    for steps in (40, 80, 160):
        sigmas = geometric(HIGH, LOW, steps)
        up = invert(sampler, DATA.denoiser, points(), sigmas, refinements)
        errors.append(error(last(sampler(DATA.denoiser, up, sigmas, pytest.fail)), points()))  # type: ignore[arg-type]
    assert order(errors, 2) >= least, errors


def test_a_step_of_eulers_is_ddims_inverse() -> None:
    """x + (sigma_next - sigma) eps(x, sigma); from 0 the state whose step down is Euler's to x, nearly."""
    x, sigmas = points(0.0), torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)
    first, second = rise(ddim(), DATA.denoiser, x, sigmas)
    gains = torch.linalg.eigvalsh(DATA.gain(1.0))  # each iteration leaves 1 - gain of what is missed
    missed = DATA.denoiser(first.x, sigmas[1]) - x
    most = float((1 - gains[0]) ** FIRST) * (DATA.denoiser(x, sigmas[1]) - x).norm()
    assert 0 < missed.norm() <= most * 1.01
    eps = first.x - DATA.denoiser(first.x, sigmas[1])
    torch.testing.assert_close(second.x, first.x + 2 * eps, rtol=0, atol=1e-14)
    torch.testing.assert_close(second.x0, DATA.denoiser(first.x, sigmas[1]), rtol=0, atol=1e-14)
    assert [(s.index, s.total, s.sigma, s.sigma_next) for s in (first, second)] == [(0, 2, 0, 1), (1, 2, 1, 3)]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_two_states_come_back_exactly(steps: int) -> None:
    """On a law whose denoiser is nonlinear, magnified as by guidance, where nothing else comes back."""
    data = three_clusters()
    x = data.draw(16, torch.Generator().manual_seed(1)).reshape(16, 1, 1, 2)

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        mean = data.means.mean(dim=0)
        return mean + 3 * (data.denoiser(x, sigma) - mean)

    sigmas = make_grid(make_schedule(ScheduleConfig()), steps)
    first, second = edict_up(guided, x, sigmas)
    assert error(last(edict(second)(guided, first, sigmas, pytest.fail)), x) < 1e-11  # type: ignore[arg-type]
    if steps > 1:
        assert error(last(edict()(guided, first, sigmas, pytest.fail)), x) > 1e-4, "the second state belongs to it"  # type: ignore[arg-type]
        refined = invert(ddim(), guided, x, sigmas, 3)
        assert error(last(ddim()(guided, refined, sigmas, pytest.fail)), x) > 1e-2  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_two_states_are_those_of_the_paper(steps: int) -> None:
    """Equations 13 and 14 in z = alpha x, written out with alpha_bar, the first step's order."""
    p, sigmas = 0.93, torch.tensor([5.0, 2.0, 0.7, 0.2], dtype=torch.float64)[: steps + 1]
    x, y = points(5.0), points(5.0) + 0.1
    walked = list(edict(y)(DATA.denoiser, x, sigmas, pytest.fail))  # type: ignore[arg-type]

    def eps(z: Tensor, s: Tensor) -> Tensor:
        x = z * (1 + s**2).sqrt()
        return (x - DATA.denoiser(x, s)) / s

    z, w = (state / (1 + sigmas[0] ** 2).sqrt() for state in (x, y))
    for index in range(steps):
        s, r = sigmas[index : index + 2]
        now, then = 1 / (1 + s**2), 1 / (1 + r**2)
        scale = (then / now).sqrt()
        b = (1 - then).sqrt() - (then * (1 - now) / now).sqrt()
        if index % 2:
            z, w = w, z
        z = scale * z + b * eps(w, s)
        w = scale * w + b * eps(z, s)
        z = p * z + (1 - p) * w
        w = p * w + (1 - p) * z
        if index % 2:
            z, w = w, z
        torch.testing.assert_close(walked[index].x, z * (1 + r**2).sqrt(), rtol=0, atol=1e-12)


STOCHASTIC = ["euler_a", "dpmpp_2m_sde", "dpmpp_sde", "dpmpp_3m_sde", "lcm", "langevin", "pc"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samplers_that_draw_noise_are_refused(name: str) -> None:
    factory = SAMPLERS[name]
    with pytest.raises(UserError, match="draws noise on its way"):
        invert(factory(), DATA.denoiser, points(), geometric(HIGH, LOW, 4))
    with pytest.raises(UserError, match="draws noise on its way"):
        invert(ddim(0.5), DATA.denoiser, points(), geometric(HIGH, LOW, 4))


def test_a_grid_that_does_not_go_down_is_refused() -> None:
    for levels in ([1.0], [1.0, 2.0], [1.0, math.nan]):
        sigmas = torch.tensor(levels, dtype=torch.float64)
        with pytest.raises(UserError, match="grid"):
            list(rise(ddim(), DATA.denoiser, points(), sigmas))
        with pytest.raises(UserError, match="grid"):
            edict_up(DATA.denoiser, points(), sigmas)
