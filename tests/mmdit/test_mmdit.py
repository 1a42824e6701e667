"""The transformer by itself: what it is told, what it may be asked for, and what does not change its answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm.conditioning.condition import Condition, cat
from ldm.config import MMDiTConfig
from ldm.errors import UserError
from ldm.mmdit import MMDiT
from ldm.mmdit.mmdit import position_table

TWO = MMDiTConfig(
    in_channels=4, out_channels=4, width=32, depth=3, heads=2, context_width=12, vector_width=6, grid=16, side=8
)
ONE = replace(TWO, streams=1, vector_width=0, classes=3)
CLASSES = replace(ONE, context_width=0)


def made(config: MMDiTConfig, seed: int = 0) -> MMDiT:
    """A network in float64 whose zero layers are random: a new one predicts zero."""
    torch.manual_seed(seed)
    network = MMDiT(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.double().eval()


def told(config: MMDiTConfig, rows: int = 2, length: int = 5) -> Condition:
    torch.manual_seed(1)
    return Condition(
        context=torch.randn(rows, length, config.context_width).double() if config.context_width else None,
        vector=torch.randn(rows, config.vector_width).double() if config.vector_width else None,
        label=torch.arange(rows) if config.classes else None,
    )


@pytest.mark.parametrize("config", [TWO, replace(TWO, second_attention=2, qk_norm=True), ONE, CLASSES])
def test_one_row_is_the_same_alone_and_in_a_batch_and_what_is_prepared_is_what_is_told(config: MMDiTConfig) -> None:
    network, condition = made(config), told(config)
    x, t = torch.randn(2, 4, 12, 8).double(), torch.tensor([10.0, 700.0])
    both = network(x, t, condition)
    assert both.shape == x.shape and both.dtype == torch.float64 and both.std() > 0.01
    torch.testing.assert_close(network(x[1:], t[1:], condition[1:]), both[1:])
    torch.testing.assert_close(network(x, t, network.prepare(condition)), both)


@pytest.mark.parametrize("config", [TWO, ONE])
def test_places_of_the_context_that_are_masked_change_nothing(config: MMDiTConfig) -> None:
    network, short, long = made(config), told(config, 1, 3), told(config, 1, 7)
    x, t = torch.randn(1, 4, 8, 8).double(), torch.tensor([300.0])
    padded = cat([short, long])
    assert padded.mask is not None
    torch.testing.assert_close(network(x, t, padded[:1]), network(x, t, short))
    assert not torch.allclose(network(x, t, long), network(x, t, short), atol=1e-3)


@pytest.mark.parametrize("config", [TWO, CLASSES])
def test_a_new_network_predicts_zero_and_its_first_gradient_is_not(config: MMDiTConfig) -> None:
    network = MMDiT(config)
    condition = told(config)
    condition = Condition(**{name: p.float() if p.is_floating_point() else p for name, p in condition.parts().items()})
    x = torch.randn(2, 4, 8, 8)
    out = network(x, torch.tensor([10.0, 700.0]), condition)
    assert not out.any()
    (out - x).square().mean().backward()
    assert network.out.weight.grad is not None and network.out.weight.grad.abs().sum() > 0


def test_checkpointed_gradients_are_the_same() -> None:
    network, condition = made(TWO).train(), told(TWO)
    x, t = torch.randn(2, 4, 8, 8).double(), torch.tensor([10.0, 700.0])
    found = []
    for network.gradient_checkpointing in (False, True):
        network.zero_grad()
        network(x, t, condition).square().mean().backward()
        found.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 50
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_positions_are_cut_from_the_middle_and_those_of_the_trained_side_span_sixteen() -> None:
    network = made(TWO)
    whole = network.positions.reshape(16, 16, 32)
    torch.testing.assert_close(network._cut(4, 6).reshape(4, 6, 32), whole[6:10, 5:11].reshape(4, 6, 32))
    table = position_table(16, 8, 32).reshape(16, 16, 32)
    assert table[4, 4, :8].abs().max() == 0  # the middle picture's first patch is at 0: sin 0
    assert float(table[0, 5, 0]) == pytest.approx(float(torch.tensor(2.0).sin()))  # one to the right: 16 / 8
    assert float(table[5, 0, 16]) == pytest.approx(float(torch.tensor(2.0).sin()))  # rows stand behind columns
    assert torch.equal(position_table(8, 8, 32).reshape(8, 8, 32), table[4:12, 4:12])


def test_a_shift_of_what_is_seen_moves_the_answer_only_by_its_positions() -> None:
    """Without positions a transformer does not know where a patch is: rolling the input rolls the output."""
    network = made(TWO)
    network.positions.zero_()
    x, t, condition = torch.randn(1, 4, 8, 8).double(), torch.tensor([300.0]), told(TWO, 1)
    rolled = network(x.roll((2, 4), (2, 3)), t, condition)
    torch.testing.assert_close(rolled, network(x, t, condition).roll((2, 4), (2, 3)))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"heads": 3}, "multiple of the heads"),
        ({"streams": 3}, "choose 2"),
        ({"side": 17}, "choose a grid"),
        ({"second_attention": 4}, "counts the first blocks"),
        ({"second_attention": 1, "streams": 1}, "needs network.streams=2"),
    ],
)
def test_settings_that_name_no_network_are_refused(wrong: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MMDiT(replace(TWO, **wrong))


def test_pictures_beyond_the_table_and_of_half_patches_are_refused() -> None:
    network, condition, t = made(TWO), told(TWO, 1), torch.tensor([300.0])
    with pytest.raises(UserError, match="16 x 16 at most"):
        network(torch.zeros(1, 4, 8, 34), t, condition)
    with pytest.raises(UserError, match="whole patches"):
        network(torch.zeros(1, 4, 8, 7), t, condition)
    with pytest.raises(ValueError, match="vector is missing"):
        network(torch.zeros(1, 4, 8, 8), t, Condition(context=condition.context))
