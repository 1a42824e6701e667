"""The bound and the flow as one uses them: what is drawn, what depends on what, what is printed, what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.config import AutoencoderConfig, ScheduleConfig
from ldm.diffusion import make_schedule
from ldm.diffusion.learned_variance import variance_bound
from ldm.diffusion.likelihood import (
    LATENT,
    PIXELS,
    BitsPerDim,
    Space,
    bound,
    density_bits,
    draw_probes,
    draw_uniform,
    flow_log_density,
    space_of,
)
from ldm.diffusion.likelihood.bound import Variance
from ldm.diffusion.likelihood.decoder import level_nats
from ldm.errors import UserError
from ldm.sampling import NoiseStream, make_grid

SCHEDULE = make_schedule(ScheduleConfig(kind="linear", steps=12, beta_start=0.01, beta_end=0.5))
GRID = make_grid(SCHEDULE, 12)
SHAPE = (2, 3, 1)


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Nothing optimal: something that is not linear, mixes a picture's values and takes sigma () or (B,)."""
    level = sigma.reshape(-1, 1, 1, 1).to(x)
    return torch.tanh(x + 0.3 * x.roll(1, dims=2)) / (1 + level)


def pictures(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(9)).double()


def fixed_noise(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(10)).double()


# ---------------------------------------------------------------- the decoder


@pytest.mark.parametrize("deviation", [0.001, 0.01, 0.3, 4.0])
@pytest.mark.parametrize("mean", [-1.3, -0.2, 0.9999])
def test_levels_are_the_integral_of_the_gaussian_over_them(mean: float, deviation: float) -> None:
    """Of the inner levels near the mean by quadrature; all 256 sum to 1, so the open ends are right too."""
    levels = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1
    nats = level_nats(levels, levels.new_tensor(mean), levels.new_tensor(deviation**2))
    assert bool(nats.isfinite().all())
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-12)
    centre = int(np.clip(round((mean + 1) * 127.5), 1, 254))
    for k in {1, max(centre - 3, 1), centre, min(centre + 2, 254), 254}:
        low, high = float(levels[k]) - 1 / 255, float(levels[k]) + 1 / 255
        mass, _ = quad(
            lambda u: math.exp(-(((u - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi)),
            low, high, epsabs=0, epsrel=1e-10, points=[mean] if low < mean < high else None,
        )  # fmt: skip
        if mass > 1e-280:
            assert float(nats[k]) == pytest.approx(-math.log(mass), rel=1e-8)


def test_wide_gaussians_give_a_density_times_the_width() -> None:
    """Where a level is narrow beside the deviation both decoders are one, 127.5 levels in a unit: offset and all."""
    x0 = (pictures(3).clamp(-0.9, 0.9) * 127.5 + 127.5).round() / 127.5 - 1
    n, wide = fixed_noise(3), torch.full((12,), 4.0)
    for space in (PIXELS, Space("pixels", torch.tensor([[[0.2]], [[-0.1]]]), torch.tensor([[[2.0]], [[3.0]]]))):
        x = (x0 - space.shift) * space.scale
        found = [
            bound(denoiser, x, GRID, SCHEDULE, lambda: n, variance=wide, decoder=decoder, space=space).total.value
            for decoder in ("density", "levels")
        ]
        torch.testing.assert_close(*found, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- the bound


def test_the_bounds_learned_variance_lies_between_the_two() -> None:
    x0, n = pictures(3), fixed_noise(3)

    def total(variance: Variance) -> Tensor:
        return bound(denoiser, x0, GRID, SCHEDULE, lambda: n, variance=variance).total.value

    for end, name in ((-1.0, "posterior"), (1.0, "beta")):
        torch.testing.assert_close(total(lambda x, sigma, end=end: torch.full_like(x, end)), total(name))
    between = bound(denoiser, x0, GRID, SCHEDULE, lambda: n, variance=lambda x, sigma: torch.zeros_like(x))
    s, r = GRID[:-1], GRID[1:]
    v = ((r**2 * (1 - r**2 / s**2)) * (s**2 - r**2) * (1 + r**2) / (1 + s**2)).sqrt()
    stand_in = r[-2] ** 2 * (1 - r[-2] ** 2 / s[-2] ** 2) / (1 + r[-2] ** 2)  # the step before's, in z
    v[-1] = (stand_in * s[-1] ** 2 / (1 + s[-1] ** 2)).sqrt()
    explicit = bound(denoiser, x0, GRID, SCHEDULE, lambda: n, variance=v)
    torch.testing.assert_close(between.total.value, explicit.total.value)


def test_the_terms_are_those_that_train_the_variance() -> None:
    """variance_bound, written for training from the chain's table, gives T times each L_t, the decoder's included."""
    x0, n = pictures(2), fixed_noise(2)
    v = torch.tanh(fixed_noise(2).flip(0))
    found = bound(denoiser, x0, GRID, SCHEDULE, lambda: n, variance=lambda x, sigma: v)
    for index in range(12):
        sigma = GRID[index].expand(2)
        error = denoiser(x0 + GRID[index] * n, GRID[index]) - x0
        bits = variance_bound(v, error, sigma, SCHEDULE) / (12 * math.log(2))
        term = found.steps[:, index] if index < 11 else found.decoder
        torch.testing.assert_close(term, bits)


def test_the_fraction_is_asked_right_after_the_denoiser_with_the_same_tensors() -> None:
    asked: list[tuple[str, int, int]] = []

    def spy(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(("denoiser", id(x), id(sigma)))
        return denoiser(x, sigma)

    def fraction(x: Tensor, sigma: Tensor) -> Tensor:
        assert asked[-1] == ("denoiser", id(x), id(sigma))
        asked.append(("fraction", 0, 0))
        return torch.zeros_like(x)

    bound(spy, pictures(2), GRID, SCHEDULE, lambda: fixed_noise(2), variance=fraction)
    assert [name for name, *_ in asked] == ["denoiser", "fraction"] * 12


def test_strata_have_the_expectation_of_the_whole_sum() -> None:
    """Over every step that a stratum can draw: with the noise held fixed the mean is the sum of all terms exactly."""
    x0, n = pictures(1), fixed_noise(1)
    whole = bound(denoiser, x0, GRID, SCHEDULE, lambda: n)
    sizes = [5, 5, 1]  # of the 11 steps before the last; ln sigma goes from 1.89 by 0.53 and 0.10 to -1.34 and -2.30
    columns = torch.zeros(3, dtype=torch.float64)
    for place in range(5):
        uniform = torch.full((1, 3, 1), (place + 0.5) / 5, dtype=torch.float64)
        part = bound(denoiser, x0, GRID, SCHEDULE, lambda: n, uniform=uniform)
        assert part.edges.tolist() == [0, 5, 10, 11]
        columns += part.steps[0] / 5
    sums = torch.stack([piece.sum() for piece in whole.steps[0].split(sizes)])
    torch.testing.assert_close(columns, sums)


def test_the_error_is_that_of_the_draws() -> None:
    """400 times the same picture with noise and steps of its own: the spread of the totals is the error they state."""
    count = 400
    x0 = pictures(1).expand(count, *SHAPE)
    stream = NoiseStream(range(count), SHAPE, dtype=torch.float64)
    for uniform in (None, draw_uniform(range(count), 4, 4)):
        found = bound(denoiser, x0, GRID, SCHEDULE, lambda: stream(0, 0), uniform=uniform, draws=4)
        stated = float(found.error.square().mean().sqrt())
        assert stated == pytest.approx(float(found.total.value.std()), rel=0.15)
    assert bool(bound(denoiser, x0[:2], GRID, SCHEDULE, lambda: fixed_noise(2)).error.isnan().all())


def test_a_picture_has_the_same_bound_alone() -> None:
    x0 = pictures(3)

    def found(rows: slice) -> Tensor:
        seeds = range(3)[rows]
        stream = NoiseStream(seeds, SHAPE, dtype=torch.float64)
        uniform = draw_uniform(seeds, 3, 2)
        return bound(denoiser, x0[rows], GRID, SCHEDULE, lambda: stream(0, 0), uniform=uniform).total.value

    torch.testing.assert_close(found(slice(1, 2)), found(slice(0, 3))[1:2], rtol=0, atol=1e-12)


def test_what_the_bound_refuses() -> None:
    x0, n = pictures(1), fixed_noise(1)
    for changes, complaint in (
        ({"sigmas": make_grid(SCHEDULE, 5, "leading")}, "ends at sigma 0"),
        ({"variance": "betta"}, "choose posterior or beta"),
        ({"variance": torch.ones(3)}, "12 steps"),
        ({"decoder": "bins"}, "choose density or levels"),
        ({"decoder": "levels"}, "pixel model"),
        ({"uniform": torch.zeros(1, 20, 1)}, "20 strata"),
    ):
        sigmas = changes.pop("sigmas", GRID)
        with pytest.raises(UserError, match=complaint):
            bound(denoiser, x0, sigmas, SCHEDULE, lambda: n, **changes)


# ---------------------------------------------------------------- the flow


def test_no_picture_changes_another_by_a_single_bit() -> None:
    """Not even its number of steps, beside one that is ten times as far out."""
    x = pictures(3) * torch.tensor([1.0, 10.0, 1.0]).reshape(3, 1, 1, 1)
    probes = draw_probes([4, 5, 6], SHAPE, 2)
    together = flow_log_density(denoiser, x, 0.1, 5.0, 5.1, probes)
    for i in range(3):
        alone = flow_log_density(denoiser, x[i : i + 1], 0.1, 5.0, 5.1, probes[i : i + 1])
        assert torch.equal(alone.log_density, together.log_density[i : i + 1])
        assert torch.equal(alone.evaluations, together.evaluations[i : i + 1])
    assert len(set(together.evaluations.tolist())) > 1


def test_the_flow_under_no_grad_with_a_network_of_its_own_for_each() -> None:
    """And another solver with a thousandth of the tolerance agrees."""
    layer = torch.nn.Linear(6, 6).double()

    def through(scale: float):
        return lambda x, sigma: scale * torch.tanh(layer(x.flatten(1))).reshape(x.shape) / (1 + sigma)

    x = pictures(2)
    with torch.no_grad():
        each = flow_log_density([through(1.0), through(0.5)], x, 0.1, 5.0, 5.1)
        fine = flow_log_density([through(1.0), through(0.5)], x, 0.1, 5.0, 5.1, rtol=1e-8, atol=1e-8, solver="dopri8")
        second = flow_log_density(through(0.5), x[1:], 0.1, 5.0, 5.1)
    assert torch.equal(each.log_density[1:], second.log_density)
    torch.testing.assert_close(each.log_density, fine.log_density, rtol=2e-4, atol=0)
    assert layer.weight.grad is None


def test_what_the_flow_refuses() -> None:
    x = pictures(2)
    for words, complaint in (
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max"),
        ({"sigma_min": 9.0}, "0 < sigma_min < sigma_max"),
        ({"solver": "euler"}, "choose one of dopri5"),
        ({"rtol": 0.0}, "tolerances"),
        ({"denoiser": [denoiser]}, "1 denoisers for 2 pictures"),
        ({"denoiser": lambda x, sigma: x * math.nan}, "could not be solved"),
    ):
        given = {"denoiser": denoiser, "sigma_min": 0.1, **words}
        with pytest.raises(UserError, match=complaint):
            flow_log_density(x=x, sigma_max=5.0, start=5.1, **given)
    with pytest.raises(UserError, match="rademacher or gaussian"):
        draw_probes([0], (1,), kind="uniform")
    with pytest.raises(UserError, match="at least 1"):
        draw_probes([0], (1,), count=0)


def test_probes_are_each_pictures_own() -> None:
    assert torch.equal(draw_probes([7, 8], SHAPE, 3)[1], draw_probes([8], SHAPE, 3)[0])
    assert bool((draw_probes([7], SHAPE, 3).abs() == 1).all())


# ---------------------------------------------------------------- the unit


def test_bits_name_their_space() -> None:
    value = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert str(BitsPerDim(value, "pixels")) == "2.0000 bits/dim[pixels]"
    assert BitsPerDim(value, "latent").error == pytest.approx(1.0)
    assert math.isnan(BitsPerDim(value[:1], "latent").error)


def test_a_uniform_density_over_all_levels_takes_eight_bits() -> None:
    """On [-1, 1] and half a level beyond: 256 levels wide. The codec's scale changes the density and not the bits."""
    width = 256 / 127.5
    for scale in (1.0, 0.25):
        space = Space("pixels", torch.zeros(()).double(), torch.tensor(scale).double())
        log_density = torch.tensor([-5 * math.log(width * scale)], dtype=torch.float64)
        assert density_bits(log_density, 5, space).mean == pytest.approx(8, abs=1e-12)
    assert density_bits(torch.tensor([-5 * math.log(2.0)]), 5).mean == pytest.approx(1, abs=1e-6)


def test_the_space_is_that_of_the_codec() -> None:
    identity = Codec(None, AutoencoderConfig(kind="identity", latent_channels=3, shift=(0.5,), scale=(2.0,)))
    space = space_of(identity)
    assert space.name == "pixels"
    image = torch.rand(1, 3, 2, 2) * 2 - 1
    torch.testing.assert_close(identity.encode(image), ((image - space.shift) * space.scale).float())
    assert space_of(SimpleNamespace(autoencoder=object())) is LATENT  # type: ignore[arg-type]
