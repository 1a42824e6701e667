"""The same network, start and noise through diffusers' schedulers, compared after every step.

Ours is compared as z = alpha x. DDPM, DDIM and PNDM carry z themselves; given the same float64 table of alpha_bar they
agree to 1e-9 (measured: 4e-14), and with their own table, cumulated in float32, to 2e-5 (measured: 1.1e-5). The
others convert to float32 on the way, and agree to `FLOAT32` (measured: 1.5e-5). Euler, Heun and DPM-Solver-2 carry x.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import PARAMETERIZATIONS, Law, Schedule, make_schedule, precondition
from ldm.sampling import (
    NoiseStream,
    Sampler,
    ddim,
    ddpm,
    deis,
    dpm_2,
    dpmpp_2m,
    euler,
    heun,
    lms,
    make_grid,
    plms,
    start,
    unipc,
)

diffusers = pytest.importorskip("diffusers", reason="a peer to compare with, extra `peers`")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")

PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
SCHEDULE = make_schedule(ScheduleConfig())
SHAPE = (4, 6, 5)
SEEDS = [11, 12]
STEPS = 20
FLOAT32 = 1e-4


def network(z: Tensor, t: Tensor) -> Tensor:
    """A smooth nonlinear F(z, t), float32."""
    phase = t.reshape(-1, 1, 1, 1) / 300
    return torch.tanh(0.8 * z.roll(1, dims=-1) + 0.3 * z.roll(1, dims=1) + torch.sin(phase)) + 0.2 * z


def ours(sampler: Sampler, schedule: Schedule, name: str, sigmas: Tensor) -> list[Tensor]:
    """alpha x after each step."""
    noise = NoiseStream(SEEDS, SHAPE)
    denoise = precondition(network, Law(schedule, PARAMETERIZATIONS[name]))
    steps = sampler(denoise, start(noise.initial(), schedule, sigmas), sigmas, noise)
    return [step.x / math.hypot(1, step.sigma_next) for step in steps]


def theirs(scheduler: Any, times: Tensor, eta: float | None = None) -> list[Tensor]:
    """z after each of the scheduler's steps, with the network at `times`; `eta` for DDIM."""
    noise = NoiseStream(SEEDS, SHAPE)
    z, states = noise.initial().double(), []
    for index, time in zip(scheduler.timesteps, times, strict=True):
        output = network(z.float(), time.float().expand(len(z))).double()
        options = {"eta": eta, "variance_noise": noise(0, 0).double()} if eta else {}
        z = scheduler.step(output, index, z, **options).prev_sample
        states.append(z)
    return states


def theirs_in_x(scheduler: Any, schedule: Schedule, sigmas: Tensor, calls: int) -> list[Tensor]:
    """The same for the schedulers that carry x and scale the network's input, of `calls` evaluations a step.

    The step to 0 has one.
    """
    x, states = start(NoiseStream(SEEDS, SHAPE).initial(), schedule, sigmas), []
    for index, time in enumerate(scheduler.timesteps):
        z = scheduler.scale_model_input(x, time)
        x = scheduler.step(network(z.float(), time.float().expand(len(z))).double(), time, x).prev_sample
        if index % calls == calls - 1 or index == len(scheduler.timesteps) - 1:
            states.append(x / math.hypot(1, float(sigmas[len(states) + 1])))
    return states


def scheduler_of(kind: str, schedule: Schedule, name: str, **options: Any) -> Any:
    """Theirs, on our table of alpha_bar."""
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        options["clip_sample"] = False
    scheduler = getattr(diffusers, kind)(
        num_train_timesteps=schedule.steps, prediction_type=PREDICTION[name], **options
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod.clone()
    if options.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero", [False, True])
def test_the_schedules_agree(kind: str, zero: bool) -> None:
    """To what float32 leaves of a cumulated product of 1000 factors."""
    schedule = make_schedule(ScheduleConfig(kind=kind, zero_terminal_snr=zero))
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=KINDS[kind], beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero
    )
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 30, 64, 333, 1000])
def test_the_grids_agree(spacing: str, steps: int) -> None:
    """Exceptions, on purpose: one step of linspace starts at the last level (theirs at t = 0), and 1000 steps of
    leading with offset 1 would need level 1000, which does not exist."""
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing=spacing, steps_offset=int(spacing == "leading" and steps < SCHEDULE.steps)
    )
    scheduler.set_timesteps(steps)
    times = SCHEDULE.t(make_grid(SCHEDULE, steps, spacing)[:-1]).round().long()
    expected = torch.tensor([999]) if spacing == "linspace" and steps == 1 else scheduler.timesteps
    assert torch.equal(times, expected)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", ["ours", "their own"])
def test_ddim(name: str, eta: float, spacing: str, table: str) -> None:
    """Leading with offset 1 and set_alpha_to_one false is the original DDIM (CompVis)."""
    leading = spacing == "leading"
    options = {"timestep_spacing": spacing, "steps_offset": int(leading), "set_alpha_to_one": not leading}
    if table == "ours":
        scheduler = scheduler_of("DDIMScheduler", SCHEDULE, name, **options)
    else:
        scheduler = diffusers.DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=PREDICTION[name],
            clip_sample=False,
            **options,
        )
    scheduler.set_timesteps(STEPS)
    found = ours(ddim(eta), SCHEDULE, name, make_grid(SCHEDULE, STEPS, spacing))
    assert_same(found, theirs(scheduler, scheduler.timesteps, eta), 1e-9 if table == "ours" else 2e-5)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_linspace(name: str, eta: float) -> None:
    """Their DDIM steps from t to t - T // N whatever the grid, so on linspace it does not land on its own next level.

    So they are given the chain of the grid's levels alone, walked in full, and the network the times of those levels.
    """
    sigmas = make_grid(SCHEDULE, STEPS, "linspace")
    scheduler = scheduler_of("DDIMScheduler", Schedule(sigmas[:-1].flip(0)), name)
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, SCHEDULE.t(sigmas[:-1]), eta)
    assert_same(ours(ddim(eta), SCHEDULE, name, sigmas), expected)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm(name: str, variance: str, spacing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two differences in the last step. Leading ends at the smallest trained level here, theirs is walked there by
    giving it that level as one more. And theirs adds noise in the step to 0 unless it begins at t = 0, as on linspace
    but not on trailing, where the last step is left out.
    """
    noise = NoiseStream(SEEDS, SHAPE)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **options: noise(0, 0).double()
    )
    sigmas = make_grid(SCHEDULE, STEPS, spacing)
    kind = {"posterior": "fixed_small", "beta": "fixed_large"}[variance]
    scheduler = scheduler_of("DDPMScheduler", SCHEDULE, name, variance_type=kind)
    levels = sigmas if spacing == "leading" else sigmas[:-1]
    scheduler.set_timesteps(timesteps=SCHEDULE.t(levels).round().long().tolist())
    expected = theirs(scheduler, scheduler.timesteps)
    found = ours(ddpm(variance), SCHEDULE, name, sigmas)
    if spacing == "trailing":
        found = found[:-1]
    assert_same(found, expected[: len(found)])


@pytest.mark.parametrize("name", ["v", "x0"])
def test_ddim_from_pure_noise(name: str) -> None:
    """Zero terminal SNR: they start at alpha = 0, we at the documented cut, alpha = 1e-6, and agree to that."""
    schedule = make_schedule(ScheduleConfig(zero_terminal_snr=True))
    scheduler = scheduler_of("DDIMScheduler", schedule, name, timestep_spacing="trailing")
    scheduler.alphas_cumprod[-1] = 0
    scheduler.set_timesteps(STEPS)
    found = ours(ddim(), schedule, name, make_grid(schedule, STEPS, "trailing"))
    assert_same(found, theirs(scheduler, scheduler.timesteps), 1e-5)


# ---------------------------------------------------------------- other deterministic samplers

GRID_OPTIONS: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
}


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("spacing", GRID_OPTIONS)
@pytest.mark.parametrize("kind", ["Euler", "Heun", "KDPM2"])
def test_one_step_methods(kind: str, spacing: str, name: str) -> None:
    """KDPM2 rounds the network's time on Karras' levels (but not between them) and knows no x0: given ours, and left
    out."""
    if kind == "KDPM2" and name == "x0":
        return
    sampler, calls = {"Euler": (euler(), 1), "Heun": (heun(), 2), "KDPM2": (dpm_2(), 2)}[kind]
    sigmas = make_grid(SCHEDULE, STEPS, spacing)
    scheduler = scheduler_of(f"{kind}DiscreteScheduler", SCHEDULE, name, **GRID_OPTIONS[spacing])
    scheduler.set_timesteps(STEPS)
    if kind == "KDPM2":
        scheduler.timesteps[::2] = SCHEDULE.t(sigmas[:-1])
    assert_same(ours(sampler, SCHEDULE, name, sigmas), theirs_in_x(scheduler, SCHEDULE, sigmas, calls), FLOAT32)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("spacing", GRID_OPTIONS)
@pytest.mark.parametrize("steps", [5, 20])
def test_dpmpp_2m(steps: int, spacing: str, name: str) -> None:
    """They round the network's time on Karras' levels, and on any formula's; ours is the level's own."""
    sigmas = make_grid(SCHEDULE, steps, spacing)
    scheduler = scheduler_of("DPMSolverMultistepScheduler", SCHEDULE, name, **GRID_OPTIONS[spacing])
    scheduler.set_timesteps(steps)
    expected = theirs(scheduler, SCHEDULE.t(sigmas[:-1]))
    assert_same(ours(dpmpp_2m(), SCHEDULE, name, sigmas), expected, FLOAT32)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("spacing", GRID_OPTIONS)
@pytest.mark.parametrize("order", [2, 4])
def test_lms(order: int, spacing: str, name: str) -> None:
    """To 0 too. They take their integrals to 1e-4, and round the network's time on levels of formulas: given ours."""
    sigmas = make_grid(SCHEDULE, STEPS, spacing)
    scheduler = scheduler_of("LMSDiscreteScheduler", SCHEDULE, name, **GRID_OPTIONS[spacing])
    scheduler.set_timesteps(STEPS)
    times, x, expected = SCHEDULE.t(sigmas[:-1]), start(NoiseStream(SEEDS, SHAPE).initial(), SCHEDULE, sigmas), []
    for place, (time, index) in enumerate(zip(times, scheduler.timesteps, strict=True)):
        z = scheduler.scale_model_input(x, index)
        x = scheduler.step(network(z.float(), time.float().expand(len(z))).double(), index, x, order=order).prev_sample
        expected.append(x / math.hypot(1, float(sigmas[place + 1])))
    assert_same(ours(lms(order), SCHEDULE, name, sigmas), expected, FLOAT32)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("spacing", GRID_OPTIONS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int, spacing: str, name: str) -> None:
    """Theirs ends at the smallest trained level, on these grids in one step more than is seen here."""
    sigmas = make_grid(SCHEDULE, STEPS, spacing)[:-1]
    options = {"solver_order": order, "lower_order_final": False, **GRID_OPTIONS[spacing]}
    scheduler = scheduler_of("DEISMultistepScheduler", SCHEDULE, name, **options)
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, SCHEDULE.t(sigmas))[:-1]
    assert_same(ours(deis(order), SCHEDULE, name, sigmas), expected, FLOAT32)


@pytest.mark.parametrize("name", PREDICTION)
@pytest.mark.parametrize("spacing", GRID_OPTIONS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order: int, variant: str, spacing: str, name: str) -> None:
    """Their bh1 multiplies an infinite B(h) by nothing in the step to 0, and ends in NaN; ours ends in D."""
    sigmas = make_grid(SCHEDULE, STEPS, spacing)
    options = {"solver_order": order, "solver_type": variant, **GRID_OPTIONS[spacing]}
    scheduler = scheduler_of("UniPCMultistepScheduler", SCHEDULE, name, **options)
    scheduler.set_timesteps(STEPS)
    found, expected = ours(unipc(order, variant), SCHEDULE, name, sigmas), theirs(scheduler, SCHEDULE.t(sigmas[:-1]))
    if variant == "bh1":
        assert bool(expected[-1].isnan().all()) and bool(found[-1].isfinite().all())
        found, expected = found[:-1], expected[:-1]
    assert_same(found, expected, FLOAT32)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("table", ["ours", "their own"])
def test_plms(spacing: str, table: str) -> None:
    """Leading with offset 1 and set_alpha_to_one false is the original PLMS (CompVis), with its N + 1 evaluations.

    Two differences. Their step to 0 (trailing) extrapolates the slope as the others do; ours is D, so it is left out.
    And for a v-network they extrapolate v, of several states and levels, and make eps of that with the last state; ours
    extrapolates eps whatever the network predicts, so only eps is compared.
    """
    leading = spacing == "leading"
    options = {
        "timestep_spacing": spacing,
        "steps_offset": int(leading),
        "set_alpha_to_one": not leading,
        "skip_prk_steps": True,
    }
    if table == "ours":
        scheduler = scheduler_of("PNDMScheduler", SCHEDULE, "eps", **options)
    else:
        scheduler = diffusers.PNDMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", **options
        )
    scheduler.set_timesteps(STEPS)
    expected = theirs(scheduler, scheduler.timesteps)
    del expected[0]  # the first of the two evaluations of the first step
    found = ours(plms(), SCHEDULE, "eps", make_grid(SCHEDULE, STEPS, spacing))
    if not leading:
        del expected[-1], found[-1]
    assert_same(found, expected, 1e-9 if table == "ours" else 2e-5)


@pytest.mark.parametrize("steps", [7, 20, 30])
def test_the_grids_that_are_their_samplers_own(steps: int) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    times = SCHEDULE.t(make_grid(SCHEDULE, steps, "dpm_leading")[:-1]).round().long()
    assert torch.equal(times, scheduler.timesteps)
    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(steps)
    times = SCHEDULE.t(make_grid(SCHEDULE, steps, "lcm")[:-1]).round().long()
    assert torch.equal(times, scheduler.timesteps)
    scheduler = diffusers.DPMSolverMultistepScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    times = SCHEDULE.t(make_grid(SCHEDULE, steps, "sgm_uniform")[:-1])
    assert float((times - scheduler.timesteps).abs().max()) <= 0.5, "theirs is rounded"


def test_the_grids_of_formulas_agree() -> None:
    """In sigma. Their third, even in lambda, has N levels and then 0: it is our exponential, not our logsnr."""
    for spacing in ("karras", "exponential"):
        scheduler = scheduler_of("EulerDiscreteScheduler", SCHEDULE, "eps", **GRID_OPTIONS[spacing])
        scheduler.set_timesteps(STEPS)
        torch.testing.assert_close(scheduler.sigmas.double(), make_grid(SCHEDULE, STEPS, spacing), rtol=1e-5, atol=0)
    scheduler = scheduler_of("DPMSolverMultistepScheduler", SCHEDULE, "eps", use_lu_lambdas=True)
    scheduler.set_timesteps(STEPS)
    expected = make_grid(SCHEDULE, STEPS, "exponential")
    torch.testing.assert_close(scheduler.sigmas.double(), expected, rtol=1e-5, atol=0)
