"""A U-Net small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.unet import UNet

M = TypeVar("M", bound=nn.Module)
SMALL = UNetConfig(
    channels=32, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=0, head_width=16, context_width=12
)


def randomize(module: M, seed: int = 0) -> M:
    """Every parameter moved away from its start: a new U-Net predicts zero, and would agree with anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module


def inputs(batch: int = 2, channels: int = 4, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and context."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, height, width, generator=generator)
    t = 999 * torch.rand(batch, generator=generator)
    return x, t, torch.randn(batch, 5, 12, generator=generator)


def relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|"""
    return ((a - b).abs().max() / b.abs().max()).item()


def small_unet(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return randomize(UNet(replace(SMALL, **changes))).eval()
