"""Layers trained by oneDNN's products have torch's values and gradients, and are torch's wherever it is asked."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from training.toys import LOOP, ToyStage
from unet.small import inputs, small_unet

from ldm.backends import packed
from ldm.backends.trained import TrainedLinear, trained
from ldm.training.members import Members
from ldm.training.processes import make_accelerator

works = pytest.mark.skipif(not packed.available(torch.float32), reason="oneDNN's layers do not work on this machine")


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST", 1)


def pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias)
    return trained(copy.deepcopy(layer)), layer


def gradients(layer: nn.Linear, x: Tensor, loss: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(loss(y), [x, *layer.parameters()])]


@works
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 5, 24), (2, 3, 5, 24), (0, 24)])
def test_values_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool):
    ours, theirs = pair(bias)
    x = torch.randn(shape)
    for loss in (lambda y: y.square().sum(), lambda y: y.sum(), lambda y: y.transpose(0, -1)[..., ::2].square().sum()):
        for found, wanted in zip(gradients(ours, x, loss), gradients(theirs, x, loss), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@works
def test_an_input_in_another_order_of_memory():
    ours, theirs = pair()
    x = torch.randn(2, 24, 3, 4).permute(0, 2, 3, 1)
    for found, wanted in zip(*(gradients(layer, x, torch.sum) for layer in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@works
def test_a_gradient_can_be_differentiated_once_more():
    found = []
    for layer in pair():
        torch.manual_seed(1)
        x = torch.randn(3, 24, requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, layer.weight]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@works
def test_what_is_frozen_gets_no_gradient():
    ours, _ = pair()
    ours.weight.requires_grad_(False)
    x = torch.randn(3, 24)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is not None
    with torch.no_grad():
        assert not ours(x).requires_grad


@works
def test_autocast_other_precisions_and_compilation_are_torchs_own():
    ours, theirs = pair()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == torch.bfloat16
    assert torch.equal(torch.compile(ours, backend="eager", fullgraph=True)(x), linear(x, ours.weight, ours.bias))
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))


@works
def test_copies_pickles_and_state_dicts_are_those_of_the_layer():
    ours, theirs = pair()
    for made in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert isinstance(made, TrainedLinear) and torch.equal(made.weight, theirs.weight)
    plain = nn.Linear(24, 40)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain.weight, theirs.weight)


@works
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_of_a_unet_is_the_same(checkpointed: bool):
    ours, theirs = trained(small_unet()), small_unet()
    for network in (ours, theirs):
        network.train().gradient_checkpointing = checkpointed
        network(*inputs()).square().mean().backward()
    assert sum(isinstance(layer, TrainedLinear) for layer in ours.modules()) > 20
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6, msg=name)
    packed.packed(ours.eval().requires_grad_(False))  # drawn with: its convolutions are packed
    with torch.no_grad():
        ours(*inputs())
    assert any(parameter.is_mkldnn for parameter in ours.parameters())


@works
def test_a_run_on_a_cpu_trains_them(tmp_path: Path):
    members = Members(ToyStage().players, LOOP, make_accelerator(LOOP, tmp_path))
    assert any(isinstance(layer, TrainedLinear) for network in members.networks.values() for layer in network.modules())


def test_where_the_products_do_not_work_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packed, "available", lambda dtype: False)
    assert type(trained(nn.Linear(24, 40))) is nn.Linear
