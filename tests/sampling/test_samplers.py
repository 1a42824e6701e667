"""Limits and invariances of the samplers; their laws are in tests/laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.errors import UserError
from ldm.sampling import SAMPLERS, NoiseStream, Sampler, ddim, ddpm, finish, make_grid, start
from ldm.sampling.ddim import largest_eta

SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (2, 3, 3)
BOUND = {
    "ddim": ddim(),
    "ddim eta 0.7": ddim(0.7),
    "ddpm posterior": ddpm(),
    "ddpm beta": ddpm("beta"),
}


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Nonlinear, mixes a picture's values, keeps pictures apart."""
    return torch.tanh(x.roll(1, dims=-1) / (1 + sigma**2).sqrt() + x.mean(dim=(1, 2, 3), keepdim=True))


def run(sampler: Sampler, seeds: list[int], steps: int = 12, spacing: str = "trailing") -> Tensor:
    sigmas, noise = make_grid(SCHEDULE, steps, spacing), NoiseStream(seeds, SHAPE)
    for step in sampler(denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise):
        last = step.x
    return last


def test_every_name_makes_a_sampler() -> None:
    assert set(SAMPLERS) == {"ddim", "ddpm"}
    for factory in SAMPLERS.values():
        assert run(factory(), [0]).isfinite().all()


@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_steps_asked_are_steps_run(name: str, steps: int, spacing: str) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma))
        return denoiser(x, sigma)

    sigmas, noise = make_grid(SCHEDULE, steps, spacing), NoiseStream([0, 1], SHAPE)
    walked = list(BOUND[name](counted, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise))
    assert [step.index for step in walked] == list(range(steps)) and {step.total for step in walked} == {steps}
    assert calls == [step.sigma for step in walked] == sigmas[:-1].tolist()
    assert [step.sigma_next for step in walked] == sigmas[1:].tolist()
    assert all(step.x.dtype == torch.float64 and step.x.shape == (2, *SHAPE) for step in walked)


@pytest.mark.parametrize("name", BOUND)
def test_the_step_to_zero_gives_x0(name: str) -> None:
    """Also from the largest level, and without asking for noise."""
    sigmas = torch.tensor([14.6, 0.0], dtype=torch.float64)
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    (step,) = BOUND[name](denoiser, x, sigmas, pytest.fail)  # type: ignore[arg-type]
    assert torch.equal(step.x, step.x0) and torch.equal(step.x0, denoiser(x, sigmas[0]))


def test_eta_one_on_the_full_grid_is_ddpm() -> None:
    assert torch.equal(make_grid(SCHEDULE, 1000, "leading"), make_grid(SCHEDULE, 1000, "trailing"))
    torch.testing.assert_close(run(ddim(1.0), [4, 5], 1000), run(ddpm("posterior"), [4, 5], 1000), rtol=0, atol=1e-9)


def test_eta_zero_is_deterministic() -> None:
    sigmas, noise = make_grid(SCHEDULE, 12), NoiseStream([3], SHAPE)
    x = start(noise.initial(), SCHEDULE, sigmas)
    first, second = (list(ddim(0.0)(denoiser, x, sigmas, pytest.fail)) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))


def test_small_eta_tends_to_the_deterministic_path() -> None:
    exact = run(ddim(0.0), [3])
    far, near = ((run(ddim(eta), [3]) - exact).norm() for eta in (1e-2, 1e-4))
    assert near < far / 50 and near < 1e-3


@pytest.mark.parametrize("name", BOUND)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    together = run(BOUND[name], [5, 6, 7, 8])
    for row, seed in enumerate([5, 6, 7, 8]):
        torch.testing.assert_close(together[row : row + 1], run(BOUND[name], [seed]), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(BOUND[name], [8, 5]), together[[3, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOUND)
def test_nothing_that_is_passed_in_is_changed(name: str) -> None:
    x, sigmas = torch.randn(2, *SHAPE, dtype=torch.float64), make_grid(SCHEDULE, 5)
    normals = torch.randn(2, *SHAPE, dtype=torch.float64)
    kept = x.clone(), sigmas.clone(), normals.clone()
    steps = list(BOUND[name](denoiser, x, sigmas, lambda *_: normals))
    assert torch.equal(x, kept[0]) and torch.equal(sigmas, kept[1]) and torch.equal(normals, kept[2])
    assert len({step.x.data_ptr() for step in steps}) == 5, "each step is a record of its own"


def test_both_ends_are_unit_noise_and_the_chains_latent() -> None:
    sigmas = make_grid(SCHEDULE, 10, "leading")
    noise = NoiseStream([0], SHAPE).initial()
    x = start(noise, SCHEDULE, sigmas)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, noise.double() * math.hypot(1, float(sigmas[0])))
    latent = finish(x, SCHEDULE, sigmas)
    assert latent.dtype == torch.float32
    torch.testing.assert_close(latent.double(), x / math.hypot(1, SCHEDULE.sigma_min), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(finish(x, SCHEDULE, make_grid(SCHEDULE, 10)), x.float())


@pytest.mark.parametrize("steps", [5, 20, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_largest_eta_is_where_no_noise_is_left_to_keep(steps: int, spacing: str) -> None:
    """sigma_t <= sqrt(1 - alpha_bar_prev), with sigma_t written out from Song et al. 2021, equation 16."""
    sigmas = make_grid(SCHEDULE, steps, spacing)
    largest = largest_eta(sigmas)
    alphas_bar = 1 / (1 + sigmas**2)
    now, then = alphas_bar[:-1], alphas_bar[1:]
    unit = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    assert bool((largest * unit <= (1 - then).sqrt() * (1 + 1e-9)).all())
    assert bool((1.001 * largest * unit > (1 - then).sqrt()).any())
    assert run(ddim(largest), [0], steps, spacing).isfinite().all()
    with pytest.raises(UserError, match=f"at most {largest:.4f}"):
        run(ddim(largest * 1.01), [0], steps, spacing)


def test_nonsense_is_refused() -> None:
    for eta in (-0.1, math.nan):
        with pytest.raises(UserError, match="eta"):
            ddim(eta)
    with pytest.raises(UserError, match="posterior, beta"):
        ddpm("learned")
    assert largest_eta(torch.tensor([14.6, 0.0])) == math.inf
