"""The stochastic samplers' limits and options; what holds for all samplers is in test_samplers.py."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import Denoiser, make_schedule
from ldm.errors import UserError
from ldm.sampling import (
    BrownianPath,
    NoiseStream,
    Sampler,
    ddim,
    ddpm,
    dpm_2,
    dpm_2_a,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s_a,
    dpmpp_3m_sde,
    dpmpp_sde,
    euler,
    euler_a,
    euler_maruyama,
    heun,
    make_grid,
    restart,
    start,
)
from ldm.sampling.ddim import largest_eta
from ldm.sampling.dpm_sde import phi, square
from ldm.sampling.step import flow

SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (2, 3, 3)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Nonlinear, mixes a picture's values."""
    return torch.tanh(x.roll(1, dims=-1) / (1 + sigma**2).sqrt() + x.mean(dim=(1, 2, 3), keepdim=True))


def run(sampler: Sampler, steps: int = 12, spacing: str = "trailing", kind: type = NoiseStream) -> Tensor:
    sigmas, noise = make_grid(SCHEDULE, steps, spacing), kind([5, 6], SHAPE)
    for step in sampler(denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise):
        last = step.x
    return last


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
def test_without_noise_each_is_its_ode_sampler(spacing: str) -> None:
    assert_same(run(euler_a(0.0), spacing=spacing), run(euler(), spacing=spacing))
    assert_same(run(ddim(0.0), spacing=spacing), run(euler(), spacing=spacing))
    assert_same(run(dpmpp_2m_sde(0.0), spacing=spacing), run(dpmpp_2m(), spacing=spacing))
    sigmas = make_grid(SCHEDULE, 12, spacing)
    x = start(NoiseStream([5, 6], SHAPE).initial(), SCHEDULE, sigmas)
    for sigma, sigma_next in pairwise(sigmas):  # DPM-Solver++ (2S) at the middle
        x0 = denoiser(x, sigma)
        if sigma_next > 0:
            middle = (sigma * sigma_next).sqrt()
            x0 = denoiser(flow(x, x0, float(sigma), float(middle)), middle)
        x = flow(x, x0, float(sigma), float(sigma_next))
    assert_same(run(dpmpp_sde(0.0), spacing=spacing), x)
    assert_same(run(dpmpp_2s_a(0.0), spacing=spacing), x)
    assert_same(run(dpm_2_a(0.0), spacing=spacing), run(dpm_2(), spacing=spacing))
    assert_same(run(restart(0), spacing=spacing), run(heun(), spacing=spacing))


def test_the_ancestral_ones_are_k_diffusions() -> None:
    """Their steps written out: to sigma_down by the midpoint in log sigma of the slope, or of D, then noise."""
    sigmas = make_grid(SCHEDULE, 12, "trailing")
    for sampler, of_slope in ((dpm_2_a(0.8, 1.1), True), (dpmpp_2s_a(0.8, 1.1), False)):
        noise = NoiseStream([5, 6], SHAPE)
        x = start(noise.initial(), SCHEDULE, sigmas)
        for s, r in pairwise(sigmas.tolist()):
            up = min(r, 0.8 * math.sqrt(r**2 * (s**2 - r**2) / s**2))
            down = math.sqrt(r**2 - up**2)
            d = (x - denoiser(x, torch.tensor(s))) / s
            if down == 0:
                x = x + (down - s) * d
                continue
            middle = math.exp((math.log(s) + math.log(down)) / 2)
            ahead = x + (middle - s) * d
            x0 = denoiser(ahead, torch.tensor(middle))
            x = x + (down - s) * (ahead - x0) / middle if of_slope else down / s * x + (1 - down / s) * x0
            x = x + 1.1 * up * noise(s, r).double()
        torch.testing.assert_close(run(sampler), x, rtol=0, atol=1e-6)


def test_restart_walks_the_levels_between_again() -> None:
    """Xu et al. 2023, algorithm 1, with Heun's steps written out: from 0.5 up to 2 and down again, twice."""
    sigmas = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0], dtype=torch.float64)
    noise = NoiseStream([5, 6], SHAPE)
    x = start(noise.initial(), SCHEDULE, sigmas)

    def walked(x: Tensor, levels: list[float]) -> Tensor:
        for s, r in pairwise(levels):
            d = (x - denoiser(x, torch.tensor(s))) / s
            ahead = x + (r - s) * d
            x = ahead if r == 0 else x + (r - s) * (d + (ahead - denoiser(ahead, torch.tensor(r))) / r) / 2
        return x

    expected = walked(x, [9.0, 4.0, 2.0, 1.0, 0.5])
    for _ in range(2):
        expected = walked(expected + math.sqrt(4 - 0.25) * noise(2.0, 0.5).double(), [2.0, 1.0, 0.5])
    expected = walked(expected, [0.5, 0.2, 0.0])
    noise = NoiseStream([5, 6], SHAPE)
    *_, last = restart(2, 0.3, 2.0)(denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise)
    torch.testing.assert_close(last.x, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factory", [ddim, euler_a, dpm_2_a, dpmpp_2s_a, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde])
def test_small_eta_tends_to_the_ode(factory) -> None:
    """The noise's deviation goes as eta, or as its square root where eta multiplies the variance."""
    exact = run(factory(0.0), kind=BrownianPath)
    far, near = (float((run(factory(eta), kind=BrownianPath) - exact).norm()) for eta in (1e-2, 1e-6))
    assert near < far / 50 and near < 1e-2


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "karras"])
def test_euler_ancestral_is_ddim(eta: float, spacing: str) -> None:
    assert_same(run(euler_a(eta), spacing=spacing), run(ddim(eta), spacing=spacing))


def test_euler_ancestral_draws_everything_anew_where_ddim_refuses() -> None:
    """Beyond the grid's largest eta no noise is kept in the step that bounds it, as in multistep consistency."""
    sigmas = torch.tensor([9.0, 2.0], dtype=torch.float64)
    x, n = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    (step,) = euler_a(1.5 * largest_eta(sigmas))(denoiser, x, sigmas, lambda *_: n)
    assert_same(step.x, denoiser(x, sigmas[0]) + 2 * n)


def test_the_first_steps_are_those_of_lower_order() -> None:
    """3M's first is DDPM's, its second the exact line of 2M; 2M's first is DDPM's too."""
    sigmas = make_grid(SCHEDULE, 12, "karras")[:3]
    noise = [NoiseStream([1], SHAPE) for _ in range(3)]
    x = start(noise[0].initial(), SCHEDULE, sigmas)
    three, two = (
        [step.x for step in sampler(denoiser, x, sigmas, stream)]
        for sampler, stream in ((dpmpp_3m_sde(), noise[0]), (dpmpp_2m_sde(solver="heun"), noise[1]))
    )
    (first, _) = ddpm()(denoiser, x, sigmas, noise[2])
    assert_same(three[0], first.x)
    assert_same(three[1], two[1])


@pytest.mark.parametrize("z", [1e-8, 1e-3, 9.99e-3, 1.001e-2, 0.3, 2.0, 40.0])
def test_the_weights_are_the_integrals(z: float) -> None:
    """z times the integral of e^(-z (1 - u)) u^k, k = 1 and 2, by Simpson's rule."""
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    simpson = torch.ones_like(u)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    for power, weight in ((1, phi), (2, square)):
        values = (-z * (1 - u)).exp() * u**power
        assert weight(z) == pytest.approx(z * float((simpson * values).sum()) / 12000, rel=1e-8)


@pytest.mark.parametrize("factory", [euler_a, dpm_2_a, dpmpp_2s_a, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde])
def test_s_noise_scales_the_noise_alone(factory) -> None:
    """One step is affine in it, and without noise it is the same step with the noise left out."""
    sigmas = torch.tensor([9.0, 2.0], dtype=torch.float64)
    x, n = torch.randn(2, 1, *SHAPE, dtype=torch.float64)

    def constant(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.full_like(x, 0.3)

    ends = {}
    for s_noise in (0.0, 1.0, 1.5):
        (step,) = factory(s_noise=s_noise)(constant, x, sigmas, lambda *_: n)
        ends[s_noise] = step.x
    assert_same(ends[1.5] - ends[0.0], 1.5 * (ends[1.0] - ends[0.0]))
    assert_same(ends[1.0] - ends[0.0], 2 * math.sqrt(1 - 4 / 81) * n)


class Recorded:
    """A v between -1 and 1 that checks whose evaluation it follows."""

    def __init__(self, v: Tensor) -> None:
        self.v, self.last = v, (None, None)

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.last = (x, sigma)
        return denoiser(x, sigma)

    def fraction(self, x: Tensor, sigma: Tensor) -> Tensor:
        assert x is self.last[0] and sigma is self.last[1], "the very same tensors, right after the denoiser"
        return self.v.expand_as(x)


def test_learned_variance_lies_between_the_two() -> None:
    """v = -1 is the posterior's, 1 beta, and 0 the geometric mean, each value by itself."""
    sigmas = torch.tensor([9.0, 2.0], dtype=torch.float64)
    x, n = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    v = torch.tensor([-1.0, 1.0, 0.0])
    recorded = Recorded(v)

    def after(sampler: Sampler, noise: Tensor, denoise: Denoiser = denoiser) -> Tensor:
        (step,) = sampler(denoise, x, sigmas, lambda *_: noise)
        return step.x

    learned = after(ddpm("learned", fraction=recorded.fraction), n, recorded.denoiser)
    low, high, mean = after(ddpm(), n), after(ddpm("beta"), n), after(ddpm(), 0 * n)
    assert_same(learned[..., 0], low[..., 0])
    assert_same(learned[..., 1], high[..., 1])
    torch.testing.assert_close(
        (learned - mean)[..., 2].square(), ((low - mean) * (high - mean))[..., 2], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", ["vp", "ve", "flow", "linear"])
def test_the_beta_variance_of_other_laws(kind: str) -> None:
    """The variance of z at the step's end that the forward law adds from there to its beginning, in closed form."""
    schedule = make_schedule(ScheduleConfig(kind=kind))
    s, r = 2.5, 0.8
    forward = {
        "vp": 1 - (1 + r**2) / (1 + s**2),
        "linear": 1 - (1 + r**2) / (1 + s**2),
        "ve": s**2 - r**2,
        "flow": (s / (1 + s)) ** 2 - (r / (1 + r) * (1 + r) / (1 + s)) ** 2,  # (t n)^2, less the kept share's
    }[kind]
    x, n = torch.zeros(1, *SHAPE, dtype=torch.float64), torch.ones(1, *SHAPE, dtype=torch.float64)
    sigmas = torch.tensor([s, r], dtype=torch.float64)
    (step,) = ddpm("beta", schedule)(lambda x, sigma: torch.zeros_like(x), x, sigmas, lambda *_: n)
    z = step.x * schedule.alpha(sigmas[1])
    torch.testing.assert_close(z.square(), forward * n, rtol=1e-9, atol=0)


def test_euler_maruyama_is_the_textbooks_step_on_the_continuous_vp_law() -> None:
    """dz = (beta z / 2 + beta score) dt + sqrt(beta) dw backwards, beta(t) linear from 0.1 to 20, written out."""
    schedule = make_schedule(ScheduleConfig(kind="vp"))
    t, t_next = 0.6, 0.55
    beta = 0.1 + 19.9 * t
    alpha, alpha_next = (math.exp(-19.9 * time**2 / 4 - 0.1 * time / 2) for time in (t, t_next))
    sigmas = torch.tensor([math.sqrt(a**-2 - 1) for a in (alpha, alpha_next)], dtype=torch.float64)
    x, n = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    (step,) = euler_maruyama(schedule)(denoiser, x, sigmas, lambda *_: n)
    z = alpha * x
    score = (alpha * denoiser(x, sigmas[0]) - z) / (1 - alpha**2)
    expected = z + (beta * z / 2 + beta * score) * (t - t_next) + math.sqrt(beta * (t - t_next)) * n
    torch.testing.assert_close(alpha_next * step.x, expected, rtol=0, atol=1e-6)


def test_euler_maruyama_keeps_to_its_laws_time() -> None:
    for levels in ([5.0, 0.01, 0.0], [0.5, 0.001], [0.02, 0.01], [15.0, 5.0]):
        sigmas = torch.tensor(levels, dtype=torch.float64)
        with pytest.raises(UserError, match="time spans"):
            list(euler_maruyama(SCHEDULE)(denoiser, torch.zeros(1, *SHAPE), sigmas, NoiseStream([0], SHAPE)))
    (step,) = euler_maruyama(SCHEDULE)(
        denoiser, torch.zeros(1, *SHAPE), torch.tensor([0.01, 0.0], dtype=torch.float64), NoiseStream([0], SHAPE)
    )
    assert bool((step.x == step.x0).all()), "a lone step to 0 walks no time"


@pytest.mark.parametrize("config", [ScheduleConfig(zero_terminal_snr=True), ScheduleConfig(kind="flow")])
def test_euler_maruyama_leaves_pure_noise_by_ddpms_step(config: ScheduleConfig) -> None:
    """Where the drift is infinite, however short the step."""
    schedule = make_schedule(config)
    for first in (schedule.sigma_max / 2, 50.0):
        sigmas = torch.tensor([schedule.sigma_max, first], dtype=torch.float64)
        x, n = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
        (step,) = euler_maruyama(schedule)(denoiser, schedule.sigma_max * x, sigmas, lambda *_, n=n: n)
        (same,) = ddpm()(denoiser, schedule.sigma_max * x, sigmas, lambda *_, n=n: n)
        assert torch.equal(step.x, same.x)


def test_nonsense_is_refused() -> None:
    for factory in (euler_a, dpm_2_a, dpmpp_2s_a, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_sde):
        for options in ({"eta": -0.1}, {"eta": math.nan}, {"eta": math.inf}, {"s_noise": -1.0}, {"s_noise": math.inf}):
            with pytest.raises(UserError, match=next(iter(options))):
                factory(**options)
    with pytest.raises(UserError, match="-1 times"):
        restart(-1)
    for low, high in ((2.0, 2.0), (0.0, 1.0), (math.nan, 2.0)):
        with pytest.raises(UserError, match="0 < low < high"):
            restart(low=low, high=high)
    with pytest.raises(UserError, match="midpoint, heun"):
        dpmpp_2m_sde(solver="euler")
    with pytest.raises(UserError, match="posterior, beta, learned"):
        ddpm("optimal")
    with pytest.raises(UserError, match="predicts none"):
        ddpm("learned")
