"""A network bound to several conditionings: one batch or one after another, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.conditioning.condition import Condition
from ldm.config import ScheduleConfig
from ldm.diffusion import PARAMETERIZATIONS, Law, bind, make_schedule, precondition

SCHEDULE = make_schedule(ScheduleConfig())
TOLD = [Condition(vector=torch.randn(2, 3, generator=torch.Generator().manual_seed(k))) for k in range(3)]


class Counted:
    """A toy network of (z, t, vector); remembers the batch sizes it ran on and what was prepared."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.prepared: list[int] = []

    def __call__(self, z: Tensor, t: Tensor, told: Tensor) -> Tensor:
        assert len(z) == len(t) == len(told)
        self.batches.append(len(z))
        return torch.tanh(z * told.sum(dim=1).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000)

    def prepare(self, told: Condition) -> Tensor:
        self.prepared.append(len(told) // 2)
        assert told.vector is not None
        return told.vector


@pytest.mark.parametrize("name", ["eps", "v", "x0"])
def test_each_branch_is_its_own_denoiser(name: str) -> None:
    network, parameterization = Counted(), PARAMETERIZATIONS[name]
    x = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    sigma = torch.tensor([0.7, 3.0], dtype=torch.float64)
    branches = bind(network, TOLD, Law(SCHEDULE, parameterization))
    found = branches(x, sigma)
    assert found.shape == (3, 2, 4, 5, 3) and found.dtype == torch.float64
    for k, told in enumerate(TOLD):

        def alone(z: Tensor, t: Tensor, told: Tensor = network.prepare(told)) -> Tensor:
            return Counted()(z, t, told)

        torch.testing.assert_close(found[k], precondition(alone, Law(SCHEDULE, parameterization))(x, sigma))
    assert network.batches == [6]


def test_fewer_branches_cost_less_and_preparing_is_done_once() -> None:
    network = Counted()
    branches = bind(network, TOLD, Law(SCHEDULE, PARAMETERIZATIONS["eps"]))
    x, sigma = torch.ones(2, 4, 5, 3), torch.tensor(1.0)
    for _ in range(3):
        two, one = branches(x, sigma, 2), branches(x, sigma, 1)
        assert two.shape[0] == 2 and one.shape[0] == 1
        torch.testing.assert_close(two[0], one[0])
    assert sum(network.batches) == 3 * (4 + 2)
    assert network.prepared == [2, 1]
