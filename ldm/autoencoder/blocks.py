"""The pieces of the autoencoder: residual blocks, self-attention, halving and doubling, encoder and decoder.

Shapes: B batch, C channels, H x W the feature map, L = H W. The architecture is that of Esser et al. 2021
("Taming transformers", VQGAN) as latent diffusion uses it (Rombach et al. 2022, appendix G).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import UserError

NORM_EPS = 1e-6


def group_norm(channels: int, groups: int = 0) -> nn.GroupNorm:
    """GroupNorm with `groups` groups (eps 1e-6); 0: as many as `usual_groups` says."""
    return nn.GroupNorm(groups or usual_groups(channels), channels, eps=NORM_EPS)


def usual_groups(channels: int) -> int:
    """At most 32 groups, each of at least four channels; 32 from 128 channels on.

    Narrow networks get fewer groups instead of smaller ones: a group of one channel (32 groups of 32 channels) would
    subtract each channel's mean over the picture, and a flat picture's colour could not reach the last convolution.
    """
    return math.gcd(32, max(channels // 4, 1))


def said_groups(widths: Sequence[int], groups: int) -> int:
    """What `norm_groups` has to say of an autoencoder whose norms have `groups` groups at all of these widths."""
    return 0 if {usual_groups(width) for width in widths} == {groups} else groups


def check_widths(widths: Sequence[int], name: str, groups: int = 0) -> None:
    """Raise UserError, naming the setting `name`, for layers whose channels `group_norm` cannot divide."""
    for width in widths:
        if width % (groups or usual_groups(width)):
            raise UserError(
                f"{name} makes a layer of {width} channels, which the {groups or usual_groups(width)} groups of its "
                f"norm do not divide; choose a multiple of {groups or 4}"
            )


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels, groups)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = group_norm(out_channels, groups)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.shortcut(x) + h


class AttentionBlock(nn.Module):
    """x + self-attention of all L positions, a single head as wide as the feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (_positions(project(h)) for project in (self.query, self.key, self.value))  # (B, 1, L, C)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))


def _positions(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 1, L, C)"""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)


class Halve(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2). Padding is on the right and below alone, as the trained models have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a convolution (no checkerboards)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, attention after each if asked for, then `resample` to the next level."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, attention: bool, resample: nn.Module, groups: int
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nn.ModuleList(ResBlock(a, b, groups) for a, b in itertools.pairwise(widths))
        self.attentions = nn.ModuleList(
            AttentionBlock(out_channels, groups) if attention else nn.Identity() for _ in range(blocks)
        )
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


class Middle(nn.Module):
    """The bottom: residual block, attention (optional), residual block."""

    def __init__(self, channels: int, attention: bool, groups: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups)
        self.attention = AttentionBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attention(self.block_1(x)))


class Encoder(nn.Module):
    """Picture (B, in_channels, H, W) -> (B, out_channels, H/f, W/f), f = patch * 2 ** (levels - 1).

    `widths` are the channels of the levels, finest first; `attention` says which levels have attention, `groups` how
    many each normalization has (see `group_norm`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        middle_attention: bool,
        patch: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(in_channels * patch**2, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        previous = widths[0]
        for index, width in enumerate(widths):
            last = index == len(widths) - 1
            resample = nn.Identity() if last else Halve(width)
            self.levels.append(Level(previous, width, blocks, attention[index], resample, groups))
            previous = width
        self.middle = Middle(previous, middle_attention, groups)
        self.norm_out = group_norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch)
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, in_channels, h, w) -> picture (B, out_channels, f h, f w). `widths` and `attention` as in the encoder.

    `levels` stand in the order in which they run, coarsest first, and have one block more than the encoder's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[bool],
        middle_attention: bool,
        patch: int,
        groups: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        previous = widths[-1]
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.middle = Middle(previous, middle_attention, groups)
        self.levels = nn.ModuleList()
        for index in reversed(range(len(widths))):
            width = widths[index]
            resample = nn.Identity() if index == 0 else Double(width)
            self.levels.append(Level(previous, width, blocks + 1, attention[index], resample, groups))
            previous = width
        self.norm_out = group_norm(previous, groups)
        self.conv_out = nn.Conv2d(previous, out_channels * patch**2, 3, padding=1)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The last convolution: the adaptive weight of the adversarial loss compares gradients on its weight."""
        return self.conv_out

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(x, self.patch) if self.patch > 1 else x
