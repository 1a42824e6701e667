"""A whole model, small, that every foreign format can hold, with random numbers in every tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ldm.checkpoints.native import part_names
from ldm.checkpoints.networks import skeleton
from ldm.config import (
    AutoencoderConfig,
    EncoderConfig,
    MMDiTConfig,
    ModelConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
)

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

_READ = {"layer": "penultimate", "final_norm": False}
_FIRST = TextConfig(width=64, heads=1, layers=3, embed_dim=0, quick_gelu=True, padding="eot", cleaning="plain", **_READ)
_SECOND = TextConfig(width=64, heads=1, layers=3, embed_dim=64, **_READ)  # of bigG's kind, in OpenCLIP's names
assert isinstance(SMALL.unet, UNetConfig) and SMALL.autoencoder is not None
_XL_UNET = replace(
    SMALL.unet,
    attention_levels=(0, 1),
    depths=(1, 2),
    transformer_depth=2,
    context_width=128,
    vector_width=64 + 6 * 16,
)
SMALL_XL = replace(
    SMALL,
    autoencoder=replace(SMALL.autoencoder, scale=(0.13025,)),
    text=_FIRST,
    text_2=_SECOND,
    unet=_XL_UNET,
    parameterization="eps",
    encoder=EncoderConfig(pooled=True, sizes=16, empty="zeros"),
)
SMALL_COSXL = replace(SMALL_XL, parameterization="v", schedule=ScheduleConfig("edm", sigma_max=120.0))
SMALL_REFINER = replace(
    SMALL_XL,
    text=_SECOND,
    text_2=None,
    unet=replace(_XL_UNET, context_width=64, vector_width=64 + 5 * 16),
    encoder=EncoderConfig(pooled=True, sizes=16, score=True),
)
SMALL_3 = ModelConfig(
    autoencoder=AutoencoderConfig(
        channels=128,
        multipliers=(1, 1),
        blocks=1,
        latent_channels=16,
        latent_convs=False,
        shift=(0.0609,),
        scale=(1.5305,),
    ),
    text=replace(_FIRST, embed_dim=64),
    text_2=replace(_SECOND, cleaning="plain"),
    unet=MMDiTConfig(width=64, depth=2, heads=1, context_width=128, vector_width=128, grid=12, side=8),
    schedule=ScheduleConfig("flow", shift=3.0),
    parameterization="flow",
    image_size=16,
    encoder=EncoderConfig(pooled=True, width=128, t5_tokens=77),
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
