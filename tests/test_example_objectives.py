"""The objectives of the examples do what their papers say."""

from __future__ import annotations

import importlib.util
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.diffusion import make_law, precondition
from ldm.metrics.distances import kernel
from ldm.model_config import ScheduleConfig
from ldm.plane.toy import SHAPE, ToyNetwork, two_moons
from ldm.sampling import ddim, make_grid
from ldm.training.draws import Draws
from ldm.training.objectives import Nets

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cold, confusion, mmd = example("cold"), example("confusion"), example("mmd")


# ---------------------------------------------------------------- cold diffusion


def test_nothing_is_degraded_at_0_and_ever_more_up_to_1() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, degrade in cold.WAYS.items():
        torch.testing.assert_close(degrade(x, torch.tensor(0.0)), x, atol=1e-5, rtol=1e-5)
        deviations = [degrade(x, torch.tensor(s)).std((2, 3)).mean() for s in (0.0, 0.2, 0.4, 0.7, 1.0)]
        assert all(a > b for a, b in pairwise(deviations)), name


def test_pictures_are_degraded_on_whatever_device_they_are_trained() -> None:
    seen: list[str] = []

    def student(x: torch.Tensor, t: torch.Tensor, told: object) -> torch.Tensor:
        seen.extend([x.device.type, t.device.type])
        return x

    draws = Draws(0, 0, [str(i) for i in range(9)])
    assert {int(3 * number) for number in draws.uniform("kind")} == {0, 1, 2}
    loss, _ = cold.cold(Nets(student), torch.zeros(9, 3, 16, 16, device="meta"), None, draws)
    assert [*seen, loss.device.type] == ["meta"] * 3


def test_algorithm_2_is_right_whatever_the_network_says_where_degradation_is_linear() -> None:
    """Bansal et al. 2022, section 3.3: with D(x, s) = x + s e the restoration cancels, and algorithm 1 keeps its
    error."""
    torch.manual_seed(0)
    x0, e = torch.randn(2, 3, 4, 4), torch.randn(3, 4, 4)
    wrong = torch.randn(2, 3, 4, 4)
    levels = torch.linspace(1, 0, 9)
    walk = partial(cold.restored, lambda x, s: wrong, lambda x, s: x + s * e, x0 + e, levels)
    torch.testing.assert_close(walk(), x0)
    torch.testing.assert_close(walk(improved=False), wrong)


def test_both_algorithms_end_at_a_perfect_restoration() -> None:
    x0 = cold.shapes(3, seed=2)
    for degrade in cold.WAYS.values():
        for improved in (False, True):
            levels = torch.linspace(0.8, 0, 5)
            found = cold.restored(lambda x, s: x0, degrade, degrade(x0, levels[0]), levels, improved)
            torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- intervals


def test_the_pinball_loss_is_least_at_the_quantile() -> None:
    truth = torch.randn(20001, generator=torch.Generator().manual_seed(0)).double()
    bounds = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for share in (0.05, 0.5, 0.95):
        losses = torch.stack([confusion.pinball(truth - bound, share).mean() for bound in bounds])
        assert abs(float(bounds[losses.argmin()]) - float(truth.quantile(share))) < 0.02


def test_the_calibration_fails_no_more_often_than_it_says() -> None:
    """Pictures of 8 values whose upper bound is 1 while values go up to (1 - u)^-1/4: at the factor f the true risk is
    f^-4, so that what is right is known. 150 calibrations of 100 pictures each may be wrong in a tenth."""
    generator, factors = torch.Generator().manual_seed(0), torch.linspace(1, 3, 81).tolist()
    found = []
    for _ in range(150):
        common = torch.rand(100, 1, generator=generator)  # values of one picture hang together, as pixels do
        own = torch.rand(100, 8, generator=generator)
        truth = (1 - torch.where(torch.rand(100, 1, generator=generator) < 0.5, common, own)) ** -0.25
        found.append(confusion.calibrated(truth, torch.zeros(100, 8), torch.ones(100, 8), factors))
    risks = torch.tensor(found, dtype=torch.float64) ** -4.0
    assert float((risks > confusion.ALPHA).double().mean()) <= confusion.DELTA
    assert 0.3 * confusion.ALPHA < float(risks.median()) < confusion.ALPHA  # and it is not merely careful


def test_nothing_is_promised_where_no_factor_is_enough() -> None:
    outside = torch.full((50, 4), 9.0)
    assert confusion.calibrated(outside, torch.zeros(50, 4), torch.ones(50, 4), [1.0, 2.0]) == float("inf")


@pytest.mark.slow
def test_the_intervals_hold_what_they_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine tenths of held-out values lie between the calibrated bounds, which are not simply wide."""
    confusion.main(str(tmp_path / "picture.png"), steps=150)
    shares = [float(share) / 100 for share in re.findall(r": ([\d.]+)% of 1000 held-out", capsys.readouterr().out)]
    assert len(shares) == 2 and 0.9 <= shares[1] < 0.97


# ---------------------------------------------------------------- MMD


def test_the_mmd_is_the_kernel_distance() -> None:
    a, b = (torch.randn(40, 6, generator=torch.Generator().manual_seed(seed)) + seed for seed in (0, 1))
    assert float(mmd.mmd(a, b)) == pytest.approx(kernel(a, b, subsets=1, size=40)[0], rel=1e-4)


def test_the_chain_is_ddim_s() -> None:
    law = make_law(ScheduleConfig(), "v")
    network = ToyNetwork(seed=1)
    torch.nn.init.normal_(network.out.weight)
    n = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = mmd.chain(lambda x, t, told: network(x, t), law, None, n)
    sigmas = make_grid(law.schedule, mmd.STEPS, mmd.GRID)
    x = n.double() * float(law.schedule.start_scale(sigmas[0]))
    *_, last = ddim()(precondition(network, law), x, sigmas, lambda s, r: torch.zeros_like(n))
    torch.testing.assert_close(found, last.x.float(), atol=1e-4, rtol=1e-4)
    assert found.requires_grad


def test_in_the_plane_four_steps_come_nearer_to_the_data() -> None:
    """From a network that says nothing yet: the chain is taught as a whole, by its ends alone."""
    law, network = make_law(ScheduleConfig(), "v"), ToyNetwork(seed=0)
    student = lambda x, t, told: network(x, t)  # noqa: E731
    of_model = mmd.finetune(lambda model, x: x.flatten(1))
    objective = of_model(type("Only", (), {"law": law}))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def distance() -> float:
        with torch.no_grad():
            drawn = mmd.chain(student, law, None, torch.randn(2000, *SHAPE, generator=torch.Generator().manual_seed(9)))
        return float(mmd.mmd(drawn.flatten(1), two_moons(2000, torch.Generator().manual_seed(8)).flatten(1)))

    before, each = distance(), torch.empty(0)
    for step in range(60):
        x0 = two_moons(128, generator)
        each, _ = objective(Nets(student), x0, None, Draws(0, step, [str(i) for i in range(128)]))
        optimizer.zero_grad()
        each.mean().backward()
        optimizer.step()
    assert each.shape == (128,) and distance() < 0.1 * before
