"""The U-Net against diffusers', an independent implementation, on random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.checkpoints.diffusers import unet_names
from ldm.conditioning.condition import Condition
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import UNetConfig
from ldm.unet import UNet

from .small import randomize, relative

CONFIG = UNetConfig(channels=32, multipliers=(1, 2, 2), attention_levels=(0, 1), heads=4, context_width=12)


def peer(config: UNetConfig, **options: Any) -> Any:
    declare_missing_operators()  # its models import transformers, which imports torchvision
    diffusers = pytest.importorskip("diffusers")
    levels = range(len(config.multipliers))
    kinds = ["CrossAttn" if level in config.attention_levels else "" for level in levels]
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=tuple(widths),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        layers_per_block=config.blocks,
        transformer_layers_per_block=config.transformer_depth,
        # its name notwithstanding, this is the number of heads
        attention_head_dim=config.heads or tuple(width // config.head_width for width in widths),
        cross_attention_dim=config.context_width,
        use_linear_projection=config.linear_projection,
        resnet_time_scale_shift="scale_shift" if config.time_injection == "scale_shift" else "default",
        num_class_embeds=config.classes + 1 if config.classes else None,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({}, (16, 8)),
        ({}, (17, 13)),
        ({"linear_projection": True, "heads": 0, "head_width": 16, "in_channels": 9}, (8, 8)),
        ({"time_injection": "scale_shift", "transformer_depth": 2, "classes": 5}, (8, 8)),
    ],
    ids=["v1", "v1-odd", "v2-inpainting", "scale-shift-classes"],
)
def test_equals_diffusers(change: dict, size: tuple[int, int]):
    config = replace(CONFIG, **change)
    other = peer(config).double().eval()
    unet = randomize(UNet(config)).double().eval()
    state = unet.state_dict()
    weights = {name: state[ours] for ours, (name,) in unet_names(state).items()}
    assert weights.keys() == other.state_dict().keys()
    other.load_state_dict(weights)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, *size, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 7, config.context_width, generator=generator, dtype=torch.float64)
    t = torch.tensor([3.25, 981.0])
    classes = torch.tensor([1, 5]) if config.classes else None
    with torch.no_grad():
        out = unet(x, t, Condition(context, label=classes))
        expected = other(x, t, context, class_labels=classes).sample
    assert out.dtype == torch.float64
    assert relative(out, expected) < 1e-9
