"""A whole model, small, that every foreign format can hold, with random numbers in every tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoints.native import part_names
from ldm.checkpoints.networks import skeleton
from ldm.config import AutoencoderConfig, ModelConfig, ScheduleConfig, TextConfig, UNetConfig

SMALL = ModelConfig(
    autoencoder=AutoencoderConfig(channels=128, multipliers=(1, 1), blocks=1),
    text=TextConfig(width=64, heads=1, layers=3, embed_dim=64, layer="penultimate"),
    unet=UNetConfig(
        channels=64,
        multipliers=(1, 2),
        blocks=1,
        attention_levels=(0,),
        heads=0,
        head_width=64,
        context_width=64,
        linear_projection=True,
    ),
    schedule=ScheduleConfig(),
    parameterization="v",
    image_size=16,
)


def random_states(config: ModelConfig, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors: around 1 for the scales of norms, around 0 and narrower the wider for all others."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[str, dict[str, Tensor]] = {}
    for name in part_names(config):
        states[name] = {}
        for key, value in skeleton(name, config, "").state_dict().items():
            fan = value[0].numel() if value.ndim > 1 else 100
            made = torch.randn(value.shape, generator=generator) * fan**-0.5
            scale = value.ndim == 1 and key.endswith("weight")
            states[name][key] = made + 1 if scale else made
    return states


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
