"""The learning rate is a closed form of the step, and the one written."""

import math

import pytest
import torch
from torch import nn

from ldm.config import OptimizerConfig
from ldm.errors import UserError
from ldm.training.optim import build_optimizer, rate_at


def test_constant():
    config = OptimizerConfig(rate=3e-4)
    assert [rate_at(config, step, 10) for step in (0, 5, 9)] == [3e-4] * 3


def test_warm_up_is_linear_and_reaches_the_rate_at_its_last_step():
    config = OptimizerConfig(rate=1.0, warmup=4)
    assert [rate_at(config, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_from_the_rate_to_the_final_rate():
    config = OptimizerConfig(rate=2.0, warmup=10, law="cosine", final_rate=1.0)
    assert rate_at(config, 10, 110) == 2.0
    assert rate_at(config, 60, 110) == pytest.approx(1.5)
    assert rate_at(config, 110, 110) == pytest.approx(1.0)
    assert rate_at(config, 200, 110) == pytest.approx(1.0)
    for step in range(10, 110):
        assert rate_at(config, step, 110) == pytest.approx(1.5 + 0.5 * math.cos(math.pi * (step - 10) / 100))


def test_linear_falls_evenly_to_the_final_rate():
    config = OptimizerConfig(rate=2.0, warmup=10, law="linear", final_rate=1.0)
    assert [rate_at(config, step, 110) for step in (10, 35, 60, 110, 200)] == pytest.approx([2, 1.75, 1.5, 1, 1])


def test_a_run_of_warm_up_alone():
    assert rate_at(OptimizerConfig(rate=1.0, warmup=10, law="cosine"), 9, 10) == 1.0


def test_an_unknown_law_is_found_before_the_first_step_however_long_the_warm_up():
    with pytest.raises(UserError, match=r"optimizer.law must be one of constant, cosine, linear, not 'cosin'"):
        build_optimizer(nn.Linear(2, 2), OptimizerConfig(law="cosin", warmup=1000))


def test_decay_is_for_matrices_that_train():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    module[2].requires_grad_(False)
    optimizer = build_optimizer(module, OptimizerConfig(weight_decay=0.1, betas=(0.5, 0.6)))
    assert isinstance(optimizer, torch.optim.AdamW)
    by_decay = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert [p is module[0].weight for p in by_decay[0.1]] == [True]
    assert {id(p) for p in by_decay[0.0]} == {id(module[0].bias), id(module[1].weight), id(module[1].bias)}
    assert all(group["betas"] == (0.5, 0.6) for group in optimizer.param_groups)
