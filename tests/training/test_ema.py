"""The moving average against its recursion written out, and that nothing is left of it in the live weights."""

import pytest
import torch
from torch import nn

from ldm.training.ema import EMA


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("statistic", torch.tensor(10.0))
        self.register_buffer("count", torch.tensor(7))


def test_the_recursion():
    module = Scalar()
    ema = EMA(module, 0.5)
    weight, statistic = 1.0, 10.0
    for n in range(1, 21):
        with torch.no_grad():
            module.weight += n
            module.statistic -= 0.5 * n
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        weight = decay * weight + (1 - decay) * module.weight.item()
        statistic = decay * statistic + (1 - decay) * module.statistic.item()
    assert float(ema.average["weight"]) == pytest.approx(weight, rel=1e-6)
    assert float(ema.average["statistic"]) == pytest.approx(statistic, rel=1e-6)
    assert "count" not in ema.average  # whole numbers have no average


def test_a_short_run_forgets_its_initialisation():
    """With a decay of 0.9999 and no warm-up, 100 steps would leave 99 % of the initial weights."""
    module = Scalar()
    ema = EMA(module, 0.9999)
    with torch.no_grad():
        module.weight.zero_()
    for _ in range(100):
        ema.update()
    # The product of (1 + n) / (10 + n) over n = 1 ... N is 10! N! (N + 1) / (N + 10)!, about 10! / N ** 9.
    assert 0 <= float(ema.average["weight"]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_applied_puts_the_average_in_place_and_the_live_weights_back_bit_for_bit(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).to(dtype)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1 / 3
    ema.update()
    live = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    parameters = [id(parameter) for parameter in module.parameters()]
    with ema.applied():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(tensor, ema.average[name].to(dtype))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, live[name])
    assert [id(parameter) for parameter in module.parameters()] == parameters  # the optimizer still knows them


def test_applied_restores_when_its_block_fails():
    module = Scalar()
    ema = EMA(module, 0.5)
    with torch.no_grad():
        module.weight += 1
    with pytest.raises(RuntimeError), ema.applied():
        assert module.weight.item() == 1
        raise RuntimeError
    assert module.weight.item() == 2


def test_a_saved_average_goes_on():
    def moved(ema: EMA, module: Scalar, times: int) -> EMA:
        for _ in range(times):
            with torch.no_grad():
                module.weight += 1
            ema.update()
        return ema

    module = Scalar()
    whole = moved(EMA(module, 0.9), module, 6)
    module = Scalar()
    half = moved(EMA(module, 0.9), module, 3)
    rest = EMA(Scalar(), 0.9)
    rest.load_state_dict(half.state_dict())
    rest.module = module
    moved(rest, module, 3)
    assert rest.updates == 6 and torch.equal(rest.average["weight"], whole.average["weight"])
