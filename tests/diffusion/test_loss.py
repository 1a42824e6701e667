"""Loss identities: each weight is one function of sigma, and known from the papers on each network's own output.

The bounds are compared with KL divergences of the chain as the papers write it, by torch.distributions.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.config import DiffusionLossConfig, DiffusionTraining, ScheduleConfig, load
from ldm.diffusion import (
    PARAMETERIZATIONS,
    Law,
    Schedule,
    check,
    check_loss,
    diffusion_loss,
    draw_levels,
    make_parameterization,
    make_schedule,
    weight,
)
from ldm.errors import UserError

NAMES = sorted(PARAMETERIZATIONS)
WEIGHTS = ["uniform", "snr", "min_snr", "edm"]
SCHEDULE = make_schedule(ScheduleConfig())
RECIPES = sorted((Path(__file__).parents[2] / "configs" / "diffusion").glob("*.yaml"))
SIGMA = torch.tensor([0.03, 0.4, 1.0, 3.7, 14.6], dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x0, n and some network's output, (5, 2, 3, 4) each."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 5, 2, 3, 4, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


def on_output(name: str, weight_name: str, gamma: float = 5.0) -> Tensor:
    """w c_out^2: the factor of |F - F*|^2."""
    parameterization = PARAMETERIZATIONS[name]
    config = DiffusionLossConfig(weight=weight_name, min_snr_gamma=gamma)
    return weight(config, Law(SCHEDULE, parameterization), SIGMA) * parameterization.c_out(SIGMA) ** 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight_name", WEIGHTS)
def test_the_loss_on_outputs_is_the_loss_on_x0(name: str, weight_name: str) -> None:
    """w c_out^2 |F - F*|^2 = w |D - x0|^2."""
    x0, n, output = batch()
    config, parameterization = DiffusionLossConfig(weight=weight_name), PARAMETERIZATIONS[name]
    x = x0 + SIGMA.reshape(-1, 1, 1, 1) * n
    direct = (parameterization.denoised(output, x, SIGMA) - x0).square().mean(dim=(1, 2, 3))
    direct = weight(config, Law(SCHEDULE, parameterization), SIGMA) * direct
    found = diffusion_loss(output, x0, n, SIGMA, config, Law(SCHEDULE, parameterization))
    assert found.shape == (5,)
    torch.testing.assert_close(found, direct, rtol=1e-9, atol=0)


def test_uniform_is_plain_on_the_networks_own_target() -> None:
    x0, n, output = batch()
    for name in NAMES:
        torch.testing.assert_close(on_output(name, "uniform"), torch.ones(5, dtype=torch.float64))
    eps = diffusion_loss(output, x0, n, SIGMA, DiffusionLossConfig(), Law(SCHEDULE, PARAMETERIZATIONS["eps"]))
    torch.testing.assert_close(eps, (output - n).square().mean(dim=(1, 2, 3)))


def test_the_weights_of_x0_are_those_of_the_papers() -> None:
    uniform = DiffusionLossConfig()
    torch.testing.assert_close(weight(uniform, Law(SCHEDULE, PARAMETERIZATIONS["eps"]), SIGMA), 1 / SIGMA**2)
    torch.testing.assert_close(weight(uniform, Law(SCHEDULE, PARAMETERIZATIONS["v"]), SIGMA), 1 + 1 / SIGMA**2)
    torch.testing.assert_close(weight(uniform, Law(SCHEDULE, PARAMETERIZATIONS["x0"]), SIGMA), torch.ones_like(SIGMA))
    torch.testing.assert_close(weight(uniform, Law(SCHEDULE, PARAMETERIZATIONS["flow"]), SIGMA), (1 + 1 / SIGMA) ** 2)
    torch.testing.assert_close(weight(uniform, Law(SCHEDULE, PARAMETERIZATIONS["score"]), SIGMA), SIGMA**-4)


@pytest.mark.parametrize("d", [0.5, 1.0, 2.3])
def test_the_edm_weight_is_the_papers_lambda(d: float) -> None:
    """Karras et al. 2022, table 1; on edm's own output it is 1, and with unit data it is uniform v."""
    config = DiffusionLossConfig(weight="edm")
    for name in NAMES:
        found = weight(config, Law(SCHEDULE, make_parameterization(name, d)), SIGMA)
        torch.testing.assert_close(found, (SIGMA**2 + d**2) / (SIGMA * d) ** 2, rtol=1e-14, atol=0)
    own = make_parameterization("edm", d)
    torch.testing.assert_close(
        weight(config, Law(SCHEDULE, own), SIGMA) * own.c_out(SIGMA) ** 2, torch.ones_like(SIGMA)
    )
    if d == 1:
        uniform_v = weight(DiffusionLossConfig(), Law(SCHEDULE, PARAMETERIZATIONS["v"]), SIGMA)
        torch.testing.assert_close(weight(config, Law(SCHEDULE, own), SIGMA), uniform_v, rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_elbo_weight_is_the_chains_divergence(kind: str) -> None:
    """Ho et al. 2020, equations 5 to 8, in z: KL of the posteriors with x0 and with D in its place, and the decoder."""
    steps, error = 12, 0.37
    schedule = make_schedule(ScheduleConfig(kind=kind, steps=steps, beta_start=0.01, beta_end=0.4))
    bar = schedule.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    betas = 1 - bar / before
    # their equation 7: the posterior's mean has the factor sqrt(bar_prev) beta / (1 - bar) on x0
    means = before.sqrt() * betas / (1 - bar) * error
    deviations = (betas * (1 - before) / (1 - bar)).sqrt()
    deviations[0] = betas[0].sqrt()
    expected = kl_divergence(Normal(means, deviations), Normal(torch.zeros_like(means), deviations))
    found = weight(DiffusionLossConfig(weight="elbo"), Law(schedule, PARAMETERIZATIONS["eps"]), schedule.sigmas)
    torch.testing.assert_close(found * error**2 / steps, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["vp", "ve", "flow"])
def test_the_elbo_weight_in_continuous_time_is_the_limit_of_chains(kind: str) -> None:
    """On the same law cut into T steps of equal time: the difference falls as 1 / T."""
    law = make_schedule(ScheduleConfig(kind=kind))
    config, x0 = DiffusionLossConfig(weight="elbo"), PARAMETERIZATIONS["x0"]
    differences = []
    for steps in (2000, 4000):
        chain = Schedule(law.sigma(torch.linspace(law.t_min, law.t_max, steps + 1, dtype=torch.float64)))
        some = chain.sigmas[[steps // 4, steps // 2, 3 * steps // 4]]
        limit = weight(config, Law(law, x0), some) * (steps + 1) / steps  # its levels are the ends of `steps` intervals
        differences.append(float((weight(config, Law(chain, x0), some) / limit - 1).abs().max()))
    assert differences[0] < 0.01
    assert differences[0] / differences[1] == pytest.approx(2, rel=0.02)


def test_where_the_level_is_geometric_in_time_the_bound_is_the_simple_loss() -> None:
    law = make_schedule(ScheduleConfig(kind="ve"))
    found = weight(DiffusionLossConfig(weight="elbo"), Law(law, PARAMETERIZATIONS["eps"]), SIGMA) * SIGMA**2
    torch.testing.assert_close(found, torch.full_like(SIGMA, math.log(80 / 0.002)))


COMBINATIONS = [
    (kind, name, weight_name, levels)
    for kind in ["linear", "scaled_linear", "cosine", "sigmoid", "zero", "vp", "ve", "flow"]
    for name in NAMES
    for weight_name in [*WEIGHTS, "elbo"]
    for levels in ["uniform", "lognormal", "logit_normal"]
]


def test_every_combination_is_refused_with_a_reason_or_has_a_finite_loss_and_gradient() -> None:
    """In float32, at both ends of the level draw and between; the input has about unit variance where data have."""
    refused = 0
    x0, n, output = (each.float() for each in batch())
    for kind, name, weight_name, levels in COMBINATIONS:
        config = DiffusionLossConfig(weight=weight_name, levels=levels)
        settings = ScheduleConfig(zero_terminal_snr=True) if kind == "zero" else ScheduleConfig(kind=kind)
        schedule, parameterization = make_schedule(settings), make_parameterization(name)
        try:
            check(schedule, parameterization)
            check_loss(config)
        except UserError:
            refused += 1
            ends_in_noise = kind in ("zero", "flow") and name in ("eps", "score")
            assert ends_in_noise or (weight_name == "elbo" and levels != "uniform")
            continue
        sigma = draw_levels(config, schedule, torch.tensor([0.0, 0.1, 0.5, 0.9, 1 - 2**-53]))
        x_in, t = Law(schedule, parameterization).input(x0 + sigma.float().reshape(-1, 1, 1, 1) * n, sigma)
        guess = output.clone().requires_grad_(True)
        loss = diffusion_loss(guess, x0, n, sigma, config, Law(schedule, parameterization))
        loss.sum().backward()
        assert guess.grad is not None
        found = (x_in, t, loss, guess.grad)
        assert all(bool(each.isfinite().all()) for each in found), (kind, name, weight_name, levels)
        assert bool((guess.grad.flatten(1).abs().amax(1) > 0).all()), (kind, name, weight_name, levels)
        if kind != "ve" or name == "edm":
            assert float(x_in.abs().max()) < 5
    assert refused == 2 * 2 * 15 + 6 * 6 * 2 + 2 * 4 * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": "elbo", "levels": "lognormal"}, "loss.weight elbo .* set loss.levels=uniform"),
        ({"weight": "min-snr"}, "loss.weight is 'min-snr'; choose one of uniform, snr, min_snr"),
        ({"levels": "logit-normal"}, "loss.levels is 'logit-normal'; choose one of uniform"),
        ({"level_mean": -1.2}, "belong to a normal draw, and loss.levels is 'uniform'"),
        ({"offset_noise": -0.1}, "loss.offset_noise must be at least 0, not -0.1"),
        ({"input_perturbation": -1.0}, "loss.input_perturbation must be at least 0, not -1"),
        ({"variance_bound": -1.0}, "loss.variance_bound must be at least 0, not -1"),
        ({"level_std": 0.0}, "loss.level_std must be above 0, not 0"),
        ({"min_snr_gamma": 0.0}, "loss.min_snr_gamma must be above 0, not 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, float | str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_loss(DiffusionLossConfig(**change))  # type: ignore[arg-type]


def test_a_learned_variance_needs_every_level_equally_often() -> None:
    check_loss(DiffusionLossConfig(), learned_variance=True)
    with pytest.raises(UserError, match=r"learned_variance .* set loss.levels=uniform"):
        check_loss(DiffusionLossConfig(levels="logit_normal"), learned_variance=True)


@pytest.mark.parametrize("weight_name", ["snr", "min_snr", "edm"])
def test_snr_weights_do_not_know_the_parameterization(weight_name: str) -> None:
    config = DiffusionLossConfig(weight=weight_name)
    weights = [weight(config, Law(SCHEDULE, PARAMETERIZATIONS[name]), SIGMA) for name in NAMES]
    assert all(bool((each == weights[0]).all()) for each in weights)


def test_snr_is_uniform_eps() -> None:
    """And sigma^2 |s + n / sigma|^2 for scores, the weight of Song & Ermon 2019."""
    torch.testing.assert_close(on_output("eps", "snr"), torch.ones_like(SIGMA))
    torch.testing.assert_close(on_output("score", "snr"), SIGMA**2)


@given(gamma=st.floats(0.01, 1000))
@settings(deadline=None)
def test_min_snr_on_each_output(gamma: float) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, g) / SNR for eps, min(SNR, g) / (SNR + 1) for v, min(SNR, g) for x0."""
    snr = SIGMA**-2
    cut = snr.clamp(max=gamma)
    torch.testing.assert_close(on_output("eps", "min_snr", gamma), cut / snr)
    torch.testing.assert_close(on_output("v", "min_snr", gamma), cut / (snr + 1))
    torch.testing.assert_close(on_output("x0", "min_snr", gamma), cut)


def test_half_precision_outputs_are_compared_in_float32() -> None:
    x0, n, output = (each.float() for each in batch())
    law = Law(SCHEDULE, PARAMETERIZATIONS["v"])
    found = diffusion_loss(output.bfloat16(), x0, n, SIGMA, DiffusionLossConfig(), law)
    assert found.dtype == torch.float32
    expected = diffusion_loss(output.bfloat16().float(), x0, n, SIGMA, DiffusionLossConfig(), law)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_gradient_reaches_the_output_only_through_the_error() -> None:
    x0, n, output = batch()
    output.requires_grad_(True)
    config, parameterization = DiffusionLossConfig(weight="min_snr"), PARAMETERIZATIONS["v"]
    diffusion_loss(output, x0, n, SIGMA, config, Law(SCHEDULE, parameterization)).sum().backward()
    factor = on_output("v", "min_snr").reshape(-1, 1, 1, 1) / output[0].numel()
    expected = 2 * factor * (output.detach() - parameterization.target(x0, n, SIGMA))
    torch.testing.assert_close(output.grad, expected)


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(UserError, match="uniform, snr, min_snr, truncated, edm, elbo"):
        weight(DiffusionLossConfig(weight="p2"), Law(SCHEDULE, PARAMETERIZATIONS["v"]), SIGMA)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_combination_that_makes_sense(recipe: Path) -> None:
    config = load(DiffusionTraining, recipe)
    if config.init:  # the law is that of the model which it begins with
        assert not config.parameterization
        return
    parameterization = make_parameterization(config.parameterization, config.sigma_data)
    check(make_schedule(config.schedule), parameterization, config.learned_variance)
    check_loss(config.loss, config.learned_variance)
    assert config.model.out_channels == config.model.in_channels * (2 if config.learned_variance else 1)
