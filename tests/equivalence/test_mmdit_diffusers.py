"""The transformer against diffusers' SD3Transformer2DModel, of random weights; and the published ones' names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.checkpoints.mmdit import (
    config_of_shapes,
    diffusers_names,
    halves_in_order,
    original_names,
    read_config,
    write_config,
)
from ldm.checkpoints.state import Translated
from ldm.conditioning.condition import Condition
from ldm.config import MMDiTConfig
from ldm.mmdit import MMDiT

from . import stable_diffusion as sd

diffusers = sd.peers()

SMALL = MMDiTConfig(
    in_channels=4, out_channels=4, width=32, depth=3, heads=2, context_width=24, vector_width=12, grid=12, side=8
)
MEDIUM = MMDiTConfig()
LARGE_35 = MMDiTConfig(width=2432, depth=38, heads=38, qk_norm=True)
MEDIUM_35 = MMDiTConfig(qk_norm=True, second_attention=13, grid=384)
VALUES = {"3 medium": 2_084_951_104, "3.5 medium": 2_469_663_936, "3.5 large": 8_146_280_768}


def held(state: dict[str, torch.Tensor]) -> Any:
    """A state dict as a file's tensors."""

    class Held(dict[str, torch.Tensor]):
        def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
            return self[name].dtype, tuple(self[name].shape)

    return Held(state)


def theirs_of(config: MMDiTConfig, side: int = 16):
    plain = {key: value for key, value in write_config(config, side).items() if not key.startswith("_")}
    return diffusers.SD3Transformer2DModel(**plain)


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, qk_norm=True, second_attention=2)])
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_the_same_weights_give_the_same_answer(config: MMDiTConfig, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    theirs = theirs_of(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    theirs.double()
    source = halves_in_order(held(theirs.state_dict()))
    ours = MMDiT(read_config(dict(theirs.config), "config.json")).double().eval()
    shapes = {key: tuple(value.shape) for key, value in ours.state_dict().items()}
    ours.load_state_dict(dict(Translated(source, diffusers_names(shapes), shapes, "the transformer", list(source))))
    x, t = torch.randn(2, 4, *size).double(), torch.tensor([3.0, 812.5])
    told = Condition(torch.randn(2, 7, 24).double(), vector=torch.randn(2, 12).double())
    with torch.no_grad():
        expected = theirs(x, told.context, told.vector, t).sample
        found = ours(x, t, told)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "config"), [("3 medium", MEDIUM), ("3.5 medium", MEDIUM_35), ("3.5 large", LARGE_35)])
def test_the_published_ones_have_the_names_and_shapes_of_diffusers_and_are_told_by_them(
    name: str, config: MMDiTConfig
) -> None:
    with torch.device("meta"):
        ours, theirs = MMDiT(config), theirs_of(config, 128)
    state = ours.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    Translated(
        halves_in_order(held(theirs.state_dict())), diffusers_names(shapes), shapes, "it", list(theirs.state_dict())
    )
    assert sum(value.numel() for value in state.values()) == VALUES[name]
    names = original_names(shapes)
    assert config_of_shapes({theirs: shapes[key] for key, (theirs,) in names.items()}) == config
    assert read_config(write_config(config, 128), "config.json") == config
