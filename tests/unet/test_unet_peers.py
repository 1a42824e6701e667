"""The U-Net against diffusers', an independent implementation, on random weights."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import UNetConfig
from ldm.unet import UNet

from .small import randomize, relative

CONFIG = UNetConfig(channels=32, multipliers=(1, 2, 2), attention_levels=(0, 1), heads=4, context_width=12)

RENAMES = [  # ours -> theirs, applied in turn
    (r"^time_embedding\.linear_in", "time_embedding.linear_1"),
    (r"^time_embedding\.linear_out", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"^middle\.0\.residual", "mid_block.resnets.0"),
    (r"^middle\.0\.transformer", "mid_block.attentions.0"),
    (r"^middle\.1\.residual", "mid_block.resnets.1"),
    (r"^(down|up)\.(\d+)\.stages\.(\d+)\.residual", r"\1_blocks.\2.resnets.\3"),
    (r"^(down|up)\.(\d+)\.stages\.(\d+)\.transformer", r"\1_blocks.\2.attentions.\3"),
    (r"^(down|up)\.(\d+)\.resample", r"\1_blocks.\2.\1samplers.0"),
    (r"(resnets\.\d+)\.norm_in", r"\1.norm1"),
    (r"(resnets\.\d+)\.conv_in", r"\1.conv1"),
    (r"(resnets\.\d+)\.embedding", r"\1.time_emb_proj"),
    (r"(resnets\.\d+)\.norm_out", r"\1.norm2"),
    (r"(resnets\.\d+)\.conv_out", r"\1.conv2"),
    (r"(resnets\.\d+)\.shortcut", r"\1.conv_shortcut"),
    (r"\.project_(in|out)", r".proj_\1"),
    (r"(attentions\.\d+)\.blocks", r"\1.transformer_blocks"),
    (r"\.norm_self", ".norm1"),
    (r"\.norm_cross", ".norm2"),
    (r"\.norm_feed_forward", ".norm3"),
    (r"\.self_attention", ".attn1"),
    (r"\.cross_attention", ".attn2"),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"(attn\d)\.out\.", r"\1.to_out.0."),
    (r"\.feed_forward\.linear_in", ".ff.net.0.proj"),
    (r"\.feed_forward\.linear_out", ".ff.net.2"),
]


def theirs(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


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
    weights = {theirs(name): value for name, value in unet.state_dict().items()}
    assert weights.keys() == other.state_dict().keys()
    other.load_state_dict(weights)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, *size, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 7, config.context_width, generator=generator, dtype=torch.float64)
    t = torch.tensor([3.25, 981.0])
    classes = torch.tensor([1, 5]) if config.classes else None
    with torch.no_grad():
        out = unet(x, t, context, classes=classes)
        expected = other(x, t, context, class_labels=classes).sample
    assert out.dtype == torch.float64
    assert relative(out, expected) < 1e-9
