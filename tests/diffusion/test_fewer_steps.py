"""What a student is taught: targets on a Gaussian's flow, whose ends are known, and the curricula of consistency."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion import Denoiser
from ldm.diffusion.fewer_steps import (
    Advance,
    ddim_step,
    heun_step,
    huber_width,
    improved_index,
    improved_levels,
    merged,
    pseudo_huber,
)
from ldm.diffusion.parameterization import per_picture

MEAN, DEVIATION = 0.7, 0.5


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """The Gaussian's denoiser."""
    return MEAN + per_picture(gain(sigma), x) * (x - MEAN)


def gain(sigma: Tensor) -> Tensor:
    return DEVIATION**2 / (DEVIATION**2 + sigma**2)


def at(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """Where its flow through x at s is at r: distances from the mean go as the deviation of the noisy data."""
    return MEAN + per_picture(((DEVIATION**2 + r**2) / (DEVIATION**2 + s**2)).sqrt(), x) * (x - MEAN)


def levels(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.full((4,), value, dtype=torch.float64) for value in values)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5


@pytest.mark.parametrize("last", [1.0, 0.0])
def test_a_halving_is_the_closed_form_and_lands_where_two_steps_do(x: Tensor, last: float) -> None:
    """Two steps of DDIM shrink the distance from the mean by g(s, m) g(m, r), g(s, r) = k + (1 - k) r / s; one step of
    a denoiser with the factor K by K + (1 - K) r / s. So K = (g g - r / s) / (1 - r / s)."""
    s, m, r = levels(8.0, 3.0, last)

    def g(s: Tensor, r: Tensor) -> Tensor:
        return gain(s) + (1 - gain(s)) * r / s

    factor = (g(s, m) * g(m, r) - r / s) / (1 - r / s)
    target = merged(denoise, x, [s, m, r])
    torch.testing.assert_close(target, MEAN + per_picture(factor, x) * (x - MEAN), rtol=1e-12, atol=1e-12)
    one = ddim_step(lambda *_: target, x, s, r)
    torch.testing.assert_close(one, ddim_step(denoise, ddim_step(denoise, x, s, m), m, r), rtol=1e-12, atol=1e-12)
    assert float((target - denoise(x, s)).abs().mean()) > 0.01  # another one than the teacher's word


def test_the_last_word_of_a_step_to_zero_is_exact_however_small_the_levels(x: Tensor) -> None:
    """0 / 0 in the formula of alphas and sigmas (Salimans and Ho 2022, appendix G); in float32, bit for bit."""
    x = x.float()
    for high, low in ((80.0, 2e-3), (3e-4, 1e-4), (1e6, 10.0)):
        s, m, r = (level.float() for level in levels(high, low, 0.0))
        assert torch.equal(merged(denoise, x * high, [s, m, r]), denoise(ddim_step(denoise, x * high, s, m), m))


def test_a_single_step_merged_is_the_teachers_word(x: Tensor) -> None:
    """Guidance is distilled so, before any halving (Meng et al. 2023, section 3.1)."""
    s, r = levels(3.0, 0.7)
    torch.testing.assert_close(merged(denoise, x, [s, r]), denoise(x, s), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 4, 1024])
def test_it_is_the_target_of_the_paper_from_pure_noise_to_the_picture(steps: int) -> None:
    """Salimans and Ho 2022, algorithm 2, on their cosine law with v: alpha = cos(pi t / 2), sigma = sin(pi t / 2), t
    from 1, where nothing of the picture is left, to 0. A network that predicts v = alpha eps - sigma x says x = alpha z
    - sigma v at t = 1 too; our level is cut at 1e8 there."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps, 0, -max(1, steps // 4)):
        times = [torch.tensor([(i - k / 2) / steps], dtype=torch.float64) for k in range(3)]
        (a, s), (a1, s1), (a2, s2) = (((t * math.pi / 2).cos(), (t * math.pi / 2).sin()) for t in times)
        z = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=generator)

        def says(z: Tensor, a: Tensor, s: Tensor) -> Tensor:
            """The Gaussian's E[x | z], by its v."""
            share = a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2)
            v = (z - a * (MEAN + share * (z - a * MEAN))) / s * a - s * (MEAN + share * (z - a * MEAN))
            return a * z - s * v

        first = says(z, a, s)
        middle = a1 * first + s1 / s * (z - a * first)
        second = says(middle, a1, s1)
        end = a2 * second + s2 / s1 * (middle - a1 * second)
        wanted = second if i == 1 else (end - s2 / s * z) / (a2 - s2 / s * a)
        ours = [torch.clamp(up / down, max=1e8) for down, up in ((a, s), (a1, s1), (a2, s2))]
        ours[-1] = torch.zeros_like(a) if i == 1 else ours[-1]
        # z / alpha, of the law that is cut there: z is what it says, not x
        found = merged(denoise, z * (1 + ours[0] ** 2).sqrt().view(1, 1, 1, 1), ours)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_halvings_of_halvings_compose(x: Tensor) -> None:
    """A student of 2 steps, taught by one of 4 that was taught by 8: its step lands where eight of the first do."""
    grid = [torch.full((4,), 10 * 0.6**i, dtype=torch.float64) for i in range(9)]

    def student(halvings: int) -> Denoiser:
        """What one that was halved so often says at the levels that it knows."""
        width = 2**halvings

        def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
            i = next(i for i, each in enumerate(grid) if torch.equal(each, sigma))
            return merged(student(halvings - 1), x, grid[i : i + width + 1 : width // 2])

        return denoiser if halvings else denoise

    by_one = ddim_step(student(3), x, grid[0], grid[8])
    by_eight = x
    for s, r in pairwise(grid):
        by_eight = ddim_step(denoise, by_eight, s, r)
    torch.testing.assert_close(by_one, by_eight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("advance", "order"), [(ddim_step, 1), (heun_step, 2)])
def test_the_teachers_steps_are_of_their_order(x: Tensor, advance: Advance, order: int) -> None:
    """The error over a fixed stretch of the flow falls by 2 ** order where the steps are halved."""
    errors = []
    for steps in (32, 64):
        grid, state = torch.linspace(2.0, 0.5, steps + 1, dtype=torch.float64), x
        for s, r in pairwise(grid):
            state = advance(denoise, state, s.expand(4), r.expand(4))
        errors.append(float((state - at(x, *levels(2.0, 0.5))).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_a_step_to_zero_is_eulers_in_both(x: Tensor) -> None:
    s, r = levels(0.5, 0.0)
    for advance in (ddim_step, heun_step):
        torch.testing.assert_close(advance(denoise, x, s, r), denoise(x, s), rtol=1e-12, atol=1e-12)


def test_the_flows_end_is_the_fixed_point_of_consistency(x: Tensor) -> None:
    """f(x, s) = at(x, s, 0) says at s what it says at r of the point one small step of the teacher further down."""
    s, r = levels(2.0, 1.98)
    zero = torch.zeros_like(s)
    error = {
        advance: float((at(x, s, zero) - at(advance(denoise, x, s, r), r, zero)).abs().max())
        for advance in (ddim_step, heun_step)
    }
    assert error[heun_step] < 1e-5 < error[ddim_step] < 1e-3


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_away() -> None:
    error = torch.tensor([[3e-4, 4e-4], [300.0, 400.0]], dtype=torch.float64)
    near, far = pseudo_huber(error, 0.1)
    assert float(near) == pytest.approx(25e-8 / 0.2, rel=1e-4) and float(far) == pytest.approx(500 - 0.1, rel=1e-6)
    assert huber_width(3 * 32 * 32) == pytest.approx(0.00054 * 3072**0.5)


def test_the_curriculum_doubles_at_equal_distances() -> None:
    """Song and Dhariwal 2023: s0 = 10, s1 = 1280, so seven doublings in eight equal parts of the run."""
    counts = [improved_levels(k / 800) for k in range(800)]
    assert [counts.count(10 * 2**i) for i in range(8)] == [100] * 8 and improved_levels(1.0) == 1280
    assert [improved_levels(k / 4, 2, 4) for k in range(5)] == [2, 2, 4, 4, 4]


def test_levels_of_consistency_training_are_drawn_by_a_normal_law_of_ln_sigma() -> None:
    sigmas = torch.tensor([80.0, 10.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    drawn = improved_index((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000, sigmas)
    below = [0.5 * (1 + math.erf((math.log(s) + 1.1) / (2 * math.sqrt(2)))) if s else 0.0 for s in sigmas.tolist()]
    share = [above - under for above, under in pairwise(below)]
    counted = [float((drawn == i).double().mean()) for i in range(4)]
    assert counted == pytest.approx([each / sum(share) for each in share], abs=2e-5)
