"""Limits and invariances that hold for every sampler of `SAMPLERS`; their laws are in tests/laws."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.diffusion.parameterization import per_picture
from ldm.errors import UserError
from ldm.jobs.catalogue import ADAPTIVE
from ldm.sampling import (
    SAMPLERS,
    NoiseStream,
    Sampler,
    Step,
    ddim,
    ddpm,
    finish,
    heun,
    make_grid,
    ode,
    start,
    unipc,
)
from ldm.sampling.ddim import largest_eta
from ldm.sampling.step import LEAP

SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (2, 3, 3)


def bound(name: str) -> Sampler:
    """The sampler of that name with its default options, and what it is defined by: a schedule, another denoiser."""
    factory, given = SAMPLERS[name], {"schedule": SCHEDULE, "unguided": unguided}
    asked = inspect.signature(factory).parameters.items()
    return factory(**{name: given[name] for name, one in asked if one.default is inspect.Parameter.empty})


def unguided(x: Tensor, sigma: Tensor) -> Tensor:
    return 0.5 * denoiser(x, sigma)


BOUND = {
    **{name: bound(name) for name in SAMPLERS},
    "ddim eta 0.7": ddim(0.7),
    "ddpm beta": ddpm("beta"),
    "heun churn": heun(s_churn=5, s_tmin=0.1, s_tmax=10, s_noise=1.01),
    "unipc 1": unipc(1),
    "unipc bh1": unipc(2, "bh1"),
    "unipc 3": unipc(3),
}

Count = Callable[[int, bool, int], int]
ONE_A_STEP: Count = lambda steps, to_zero, leaps: steps  # noqa: E731
TWO_A_STEP: Count = lambda steps, to_zero, leaps: 2 * steps - to_zero  # noqa: E731
OTHER_COUNTS: dict[str, Count] = {
    "heun": TWO_A_STEP,
    "dpm_2": TWO_A_STEP,
    "dpm_2_a": TWO_A_STEP,
    "dpmpp_2s_a": TWO_A_STEP,
    "dpmpp_sde": TWO_A_STEP,
    "pc": TWO_A_STEP,
    "plms": lambda steps, to_zero, leaps: steps + 1 - (to_zero and steps == 1),
    "restart": lambda steps, to_zero, leaps: 2 * steps - to_zero,  # and what it walks again, tested by itself
    "langevin": lambda steps, to_zero, leaps: 10 * (steps - to_zero) + to_zero + leaps,
}
"""Evaluations of a grid's steps, the last one to 0 or not, as each sampler's docstring has them; otherwise one a step.
`ode` and `dpm_adaptive` are adaptive, and tested by themselves."""


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Nonlinear, mixes a picture's values, keeps pictures apart. `sigma` () or (B,)."""
    level = per_picture(sigma, x)
    return torch.tanh(x.roll(1, dims=-1) / (1 + level**2).sqrt() + x.mean(dim=(1, 2, 3), keepdim=True))


def run(sampler: Sampler, seeds: list[int], steps: int = 12, spacing: str = "trailing") -> Tensor:
    sigmas, noise = make_grid(SCHEDULE, steps, spacing), NoiseStream(seeds, SHAPE)
    *_, last = sampler(denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise)
    return last.x


@pytest.mark.parametrize("name", BOUND)
@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras", "logsnr"])
def test_steps_asked_are_steps_run(name: str, steps: int, spacing: str) -> None:
    calls: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma.max()))
        return denoiser(x, sigma)

    sigmas, noise = make_grid(SCHEDULE, steps, spacing), NoiseStream([0, 1], SHAPE)
    walked = list(BOUND[name](counted, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise))
    assert [step.index for step in walked] == list(range(steps)) and {step.total for step in walked} == {steps}
    assert [step.sigma for step in walked] == sigmas[:-1].tolist()
    assert [step.sigma_next for step in walked] == sigmas[1:].tolist()
    for step in walked:
        assert step.x.dtype == torch.float64 and step.x.shape == step.x0.shape == (2, *SHAPE)
        assert bool(step.x.isfinite().all())
    to_zero = bool(sigmas[-1] == 0)
    if name in ("ode", "dpm_adaptive"):
        assert name != "ode" or len(calls) >= 8 * (steps - to_zero) + to_zero
        assert len(calls) == 1 or float(sigmas[-2 if to_zero else -1]) * (1 - 1e-9) < min(calls), "never beyond the end"
    else:
        count = OTHER_COUNTS.get(name.split()[0], ONE_A_STEP)
        leaps = sum(sigma > LEAP * sigma_next > 0 for sigma, sigma_next in pairwise(sigmas.tolist()))
        again = [sigma for sigma in sigmas.tolist() if name == "restart" and 0.1 <= sigma <= 2.0]
        assert len(calls) == count(steps, to_zero, leaps) + 2 * max(0, len(again) - 1)
        if count is ONE_A_STEP:
            assert calls == sigmas[:-1].tolist()


@pytest.mark.parametrize("name", BOUND)
def test_the_step_to_zero_gives_x0(name: str) -> None:
    """From the largest level at once, and as the last of a few steps; lms alone goes to 0 along its polynomial."""
    sigmas = torch.tensor([14.6, 0.0], dtype=torch.float64)
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    if "churn" not in name:
        (step,) = BOUND[name](denoiser, x, sigmas, pytest.fail)  # type: ignore[arg-type]
        assert torch.equal(step.x, step.x0) and torch.equal(step.x0, denoiser(x, sigmas[0]))
    *_, last = BOUND[name](denoiser, x, torch.tensor([9.0, 3.0, 1.0, 0.4, 0.0]), lambda *_: torch.ones_like(x))
    assert torch.equal(last.x, last.x0) != (name == "lms")


@pytest.mark.parametrize("name", BOUND)
def test_a_picture_does_not_depend_on_its_batch(name: str) -> None:
    """Bit for bit where only the other pictures differ; to rounding where the batch's size does."""
    together = run(BOUND[name], [5, 6, 7])
    assert torch.equal(run(BOUND[name], [100, 6, 101])[1], together[1])
    for row, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(together[row : row + 1], run(BOUND[name], [seed]), rtol=0, atol=1e-12)
    torch.testing.assert_close(run(BOUND[name], [7, 5]), together[[2, 0]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", BOUND)
def test_nothing_that_is_passed_in_is_changed(name: str) -> None:
    x, sigmas = torch.randn(2, *SHAPE, dtype=torch.float64), make_grid(SCHEDULE, 5)
    normals = torch.randn(2, *SHAPE, dtype=torch.float64)
    kept = x.clone(), sigmas.clone(), normals.clone()
    steps = list(BOUND[name](denoiser, x, sigmas, lambda *_: normals))
    assert torch.equal(x, kept[0]) and torch.equal(sigmas, kept[1]) and torch.equal(normals, kept[2])
    assert len({step.x.data_ptr() for step in steps}) == 5, "each step is a record of its own"


@pytest.mark.parametrize("name", BOUND)
def test_trajectories_of_one_sampler_are_apart(name: str) -> None:
    """What a sampler remembers belongs to the trajectory: two of them, advanced in turn, do not notice each other."""
    sigmas = make_grid(SCHEDULE, 6)

    def begin(seed: int) -> Iterator[Step]:
        noise = NoiseStream([seed], SHAPE)
        return BOUND[name](denoiser, start(noise.initial(), SCHEDULE, sigmas), sigmas, noise)

    alone = [step.x for step in begin(1)]
    in_turn = [first.x for first, _ in zip(begin(1), begin(2), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(alone, in_turn, strict=True))


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm_2", "ode"])
def test_a_trajectory_taken_up_later_goes_on_as_it_was(name: str) -> None:
    """Those that remember nothing: the tail of a grid, from the state the whole grid had there."""
    sigmas = make_grid(SCHEDULE, 10, "karras")
    x = torch.randn(1, *SHAPE, dtype=torch.float64) * SCHEDULE.sigma_max
    whole = list(BOUND[name](denoiser, x, sigmas, pytest.fail))  # type: ignore[arg-type]
    rest = list(BOUND[name](denoiser, whole[3].x, sigmas[4:], pytest.fail))  # type: ignore[arg-type]
    assert len(rest) == 6
    assert all(torch.equal(a.x, b.x) for a, b in zip(rest, whole[4:], strict=True))


@pytest.mark.parametrize(
    "name",
    [
        *("ddim", "euler", "heun", "dpm_2", "dpmpp_2m", "plms", "unipc", "ode", "lms", "deis", "res_multistep"),
        *("dpm_fast", "dpm_adaptive"),
    ],
)
def test_the_deterministic_ones_ask_for_no_noise(name: str) -> None:
    sigmas, noise = make_grid(SCHEDULE, 12), NoiseStream([3], SHAPE)
    x = start(noise.initial(), SCHEDULE, sigmas)
    first, second = (list(bound(name)(denoiser, x, sigmas, pytest.fail)) for _ in range(2))  # type: ignore[arg-type]
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", sorted(BOUND.keys() - set(ADAPTIVE)))
def test_a_state_stays_on_its_device(name: str) -> None:
    """One that, as a GPU does, refuses to compute with tensors of the CPU. (The adaptive ask for numbers of it.)"""
    noise, sigmas = NoiseStream([1, 2], SHAPE, torch.device("meta")), make_grid(SCHEDULE, 3)
    x = start(noise.initial(), SCHEDULE, sigmas)
    assert all(step.x.device == step.x0.device == x.device for step in BOUND[name](denoiser, x, sigmas, noise))


def test_euler_is_ddim_without_noise() -> None:
    assert torch.equal(run(bound("euler"), [3]), run(ddim(), [3]))


def test_eta_one_on_the_full_grid_is_ddpm() -> None:
    assert torch.equal(make_grid(SCHEDULE, 1000, "leading"), make_grid(SCHEDULE, 1000, "trailing"))
    torch.testing.assert_close(run(ddim(1.0), [4, 5], 1000), run(ddpm("posterior"), [4, 5], 1000), rtol=0, atol=1e-9)


def test_small_eta_tends_to_the_deterministic_path() -> None:
    exact = run(ddim(0.0), [3])
    far, near = ((run(ddim(eta), [3]) - exact).norm() for eta in (1e-2, 1e-4))
    assert near < far / 50 and near < 1e-3


LEVELS_OF_TEN = make_grid(SCHEDULE, 10, "karras").tolist()


@pytest.mark.parametrize(
    "options",
    [
        (0.0, 0.0, math.inf, 1.0),
        (40.0, 0.05, 50.0, 1.003),
        (3.0, 0.0, 2.0, 1.0),
        (3.0, LEVELS_OF_TEN[6], LEVELS_OF_TEN[3], 1.0),  # both ends belong to the interval
    ],
)
def test_heun_is_algorithm_2_of_edm(options: tuple[float, float, float, float]) -> None:
    """Karras et al. 2022, written line by line, on their grid for these options."""
    churn, low, high, s_noise = options
    t, noise = torch.tensor(LEVELS_OF_TEN, dtype=torch.float64), NoiseStream([1], SHAPE)
    x = noise.initial().double() * t[0]
    for i in range(10):
        gamma = min(churn / 10, math.sqrt(2) - 1) if low <= t[i] <= high else 0
        t_hat = t[i] + gamma * t[i]
        if gamma:
            x = x + (t_hat**2 - t[i] ** 2).sqrt() * s_noise * noise(0, 0).double()
        d = (x - denoiser(x, t_hat)) / t_hat
        ahead = x + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_ahead = (ahead - denoiser(ahead, t[i + 1])) / t[i + 1]
            ahead = x + (t[i + 1] - t_hat) * (d / 2 + d_ahead / 2)
        x = ahead
    noise = NoiseStream([1], SHAPE)
    *_, last = heun(*options)(denoiser, noise.initial().double() * t[0], t, noise)
    torch.testing.assert_close(last.x, x, rtol=0, atol=1e-12)


def test_ode_is_what_small_steps_tend_to() -> None:
    """Any grid gives the same state at its end, to the tolerance."""
    fine = run(bound("unipc"), [3, 4], 1000, "logsnr")
    for steps in (1, 7):
        torch.testing.assert_close(run(ode(1e-8, 1e-8), [3, 4], steps, "logsnr"), fine, rtol=0, atol=1e-6)


def test_ode_tells_what_stops_it() -> None:
    sigmas, x = torch.tensor([14.6, 1.0]), torch.ones(2, *SHAPE)

    def one_is_nan(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(sigma.reshape(-1, 1, 1, 1) < 5, math.nan, 0.0) * x

    with pytest.raises(UserError, match=r"between sigma 14\.6 and 1 .*not finite"):
        list(ode()(one_is_nan, x, sigmas, pytest.fail))  # type: ignore[arg-type]

    def broken(x: Tensor, sigma: Tensor) -> Tensor:
        raise MemoryError("of the device")

    with pytest.raises(MemoryError, match="of the device"):
        list(ode()(broken, x, sigmas, pytest.fail))  # type: ignore[arg-type]


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
    with pytest.raises(UserError, match=r"at most \d") as refusal:
        run(ddim(largest * 1.01), [0], steps, spacing)
    named = float(str(refusal.value).split("at most ")[1].split(";")[0])
    assert largest - 1e-4 < named <= largest and run(ddim(named), [0], steps, spacing).isfinite().all()


def test_nonsense_is_refused() -> None:
    for eta in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match="eta"):
            ddim(eta)
    with pytest.raises(UserError, match=r"choose .*posterior"):
        ddpm("unknown")
    with pytest.raises(UserError, match="s_churn"):
        heun(s_churn=-1)
    with pytest.raises(UserError, match="s_noise of heun is infinite"):
        heun(s_noise=math.inf)
    with pytest.raises(UserError, match="s_tmin <= s_tmax"):
        heun(s_tmin=2, s_tmax=1)
    with pytest.raises(UserError, match="order of unipc is 4"):
        unipc(4)
    with pytest.raises(UserError, match="bh1 or bh2"):
        unipc(2, "bh3")
    for tolerance in (0.0, -1e-5, math.nan):
        with pytest.raises(UserError, match="rtol of ode"):
            ode(rtol=tolerance)
    assert largest_eta(torch.tensor([14.6, 0.0])) == math.inf


@pytest.mark.parametrize("name", BOUND)
def test_a_grid_that_does_not_go_down_is_refused(name: str) -> None:
    x, noise = torch.zeros(1, *SHAPE), NoiseStream([0], SHAPE)
    for levels in (
        [1.0, 2.0, 0.0],
        [2.0, 2.0, 0.0],
        [2.0, 0.0, 1.0],
        [2.0, math.nan],
        [math.inf, 1.0],
        [-1.0, 0.0],
        [1.0],
    ):
        with pytest.raises(UserError, match="grid"):
            list(BOUND[name](lambda x, sigma: x, x, torch.tensor(levels, dtype=torch.float64), noise))
