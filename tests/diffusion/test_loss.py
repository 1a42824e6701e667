"""Loss identities: each weight is one function of sigma, and known from the papers on each network's own output."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.config import DiffusionLossConfig
from ldm.diffusion import PARAMETERIZATIONS, diffusion_loss, weight
from ldm.errors import UserError

NAMES = sorted(PARAMETERIZATIONS)
WEIGHTS = ["uniform", "snr", "min_snr"]
SIGMA = torch.tensor([0.03, 0.4, 1.0, 3.7, 14.6], dtype=torch.float64)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """x0, n and some network's output, (5, 2, 3, 4) each."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 5, 2, 3, 4, generator=generator, dtype=torch.float64))  # type: ignore[return-value]


def on_output(name: str, weight_name: str, gamma: float = 5.0) -> Tensor:
    """w c_out^2: the factor of |F - F*|^2."""
    parameterization = PARAMETERIZATIONS[name]
    config = DiffusionLossConfig(weight=weight_name, min_snr_gamma=gamma)
    return weight(config, parameterization, SIGMA) * parameterization.c_out(SIGMA) ** 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight_name", WEIGHTS)
def test_the_loss_on_outputs_is_the_loss_on_x0(name: str, weight_name: str) -> None:
    """w c_out^2 |F - F*|^2 = w |D - x0|^2."""
    x0, n, output = batch()
    config, parameterization = DiffusionLossConfig(weight=weight_name), PARAMETERIZATIONS[name]
    x = x0 + SIGMA.reshape(-1, 1, 1, 1) * n
    direct = (parameterization.denoised(output, x, SIGMA) - x0).square().mean(dim=(1, 2, 3))
    direct = weight(config, parameterization, SIGMA) * direct
    found = diffusion_loss(output, x0, n, SIGMA, config, parameterization)
    assert found.shape == (5,)
    torch.testing.assert_close(found, direct, rtol=1e-9, atol=0)


def test_uniform_is_plain_on_the_networks_own_target() -> None:
    x0, n, output = batch()
    for name in NAMES:
        torch.testing.assert_close(on_output(name, "uniform"), torch.ones(5, dtype=torch.float64))
    eps = diffusion_loss(output, x0, n, SIGMA, DiffusionLossConfig(), PARAMETERIZATIONS["eps"])
    torch.testing.assert_close(eps, (output - n).square().mean(dim=(1, 2, 3)))


def test_the_weights_of_x0_are_those_of_the_papers() -> None:
    uniform = DiffusionLossConfig()
    torch.testing.assert_close(weight(uniform, PARAMETERIZATIONS["eps"], SIGMA), 1 / SIGMA**2)
    torch.testing.assert_close(weight(uniform, PARAMETERIZATIONS["v"], SIGMA), 1 + 1 / SIGMA**2)
    torch.testing.assert_close(weight(uniform, PARAMETERIZATIONS["x0"], SIGMA), torch.ones_like(SIGMA))


@pytest.mark.parametrize("weight_name", ["snr", "min_snr"])
def test_snr_weights_do_not_know_the_parameterization(weight_name: str) -> None:
    config = DiffusionLossConfig(weight=weight_name)
    weights = [weight(config, PARAMETERIZATIONS[name], SIGMA) for name in NAMES]
    assert all(bool((each == weights[0]).all()) for each in weights)


def test_snr_is_uniform_eps() -> None:
    torch.testing.assert_close(on_output("eps", "snr"), torch.ones_like(SIGMA))


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
    parameterization = PARAMETERIZATIONS["v"]
    found = diffusion_loss(output.bfloat16(), x0, n, SIGMA, DiffusionLossConfig(), parameterization)
    assert found.dtype == torch.float32
    expected = diffusion_loss(output.bfloat16().float(), x0, n, SIGMA, DiffusionLossConfig(), parameterization)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_gradient_reaches_the_output_only_through_the_error() -> None:
    x0, n, output = batch()
    output.requires_grad_(True)
    config, parameterization = DiffusionLossConfig(weight="min_snr"), PARAMETERIZATIONS["v"]
    diffusion_loss(output, x0, n, SIGMA, config, parameterization).sum().backward()
    factor = on_output("v", "min_snr").reshape(-1, 1, 1, 1) / output[0].numel()
    expected = 2 * factor * (output.detach() - parameterization.target(x0, n, SIGMA))
    torch.testing.assert_close(output.grad, expected)


def test_an_unknown_weight_is_refused() -> None:
    with pytest.raises(UserError, match="uniform, snr, min_snr"):
        weight(DiffusionLossConfig(weight="p2"), PARAMETERIZATIONS["v"], SIGMA)
