"""The U-Net's parts: residual block, spatial transformer, down- and upsampling. Features are (B, C, h, w).

In channels_last memory features are already (B, h, w, C), so the transformer reads and writes them without a copy.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.unet.attention import ContextKV, CrossAttention, SelfAttention

M = TypeVar("M", bound=nn.Module)


class GroupNorm(nn.GroupNorm):
    """Group normalization; 32 groups where they divide the channels, else the most that do."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(next(g for g in range(32, 0, -1) if channels % g == 0), channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu" and input.element_size() < 4:
            # There torch's half-precision kernel for channels_last takes two to three times as long as the float32 one.
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(input.float(), self.num_groups, weight, bias, self.eps).to(input.dtype)
        return super().forward(input)


def zeroed(module: M) -> M:
    """`module` with its parameters zero: the last layer of a residual branch, so that each begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """(B, in, h, w), activated embedding (B, E) -> (B, out, h, w).

    The embedding enters between the two convolutions: added, or (`scale_shift`) as y <- y (1 + scale) + shift after
    the second normalization (Dhariwal and Nichol 2021, section 3).
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_width: int, scale_shift: bool, dropout: float):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm_in = GroupNorm(in_channels)
        self.conv_in = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_width, out_channels * (2 if scale_shift else 1))
        self.norm_out = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv_in(F.silu(self.norm_in(x)))
        told = self.embedding(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            y = self.norm_out(y) * (1 + scale) + shift
        else:
            y = self.norm_out(y + told)
        return self.shortcut(x) + self.conv_out(self.dropout(F.silu(y)))


class FeedForward(nn.Module):
    """GEGLU: (B, Q, W) -> (B, Q, W) through 4 W, as x * gelu(gate) with the exact gelu (Shazeer 2020)."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.linear_in = nn.Linear(width, 8 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(self.dropout(x * F.gelu(gate)))


class TransformerBlock(nn.Module):
    """(B, Q, W) -> (B, Q, W): self-attention, cross-attention where there is a context, feed-forward."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float):
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, heads)
        self.norm_cross = nn.LayerNorm(width) if context_width else None
        self.cross_attention = CrossAttention(width, context_width, heads) if context_width else None
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, x: Tensor, context: ContextKV | None) -> Tensor:
        x = x + self.self_attention(self.norm_self(x))
        if self.cross_attention is not None and self.norm_cross is not None and context is not None:
            x = x + self.cross_attention(self.norm_cross(x), context)
        return x + self.feed_forward(self.norm_feed_forward(x))


class SpatialTransformer(nn.Module):
    """(B, C, h, w) -> (B, C, h, w): `depth` transformer blocks over the h w positions (Rombach et al. 2022, B.1).

    The projections in and out are 1x1 convolutions (SD v1) or the same thing as linear layers (SD v2).
    """

    def __init__(self, channels: int, depth: int, heads: int, context_width: int, linear: bool, dropout: float):
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(channels, eps=1e-6)
        self.project_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, context_width, dropout) for _ in range(depth))
        self.project_out = zeroed(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, context: ContextKV | None) -> Tensor:
        h = x.shape[-2]
        y = self.norm(x)
        if not self.linear:
            y = self.project_in(y)
        y = rearrange(y, "b c h w -> b (h w) c")
        if self.linear:
            y = self.project_in(y)
        for block in self.blocks:
            y = block(y, context)
        if self.linear:
            y = self.project_out(y)
        y = rearrange(y, "b (h w) c -> b c h w", h=h)
        return x + (y if self.linear else self.project_out(y))


class Downsample(nn.Module):
    """(B, C, h, w) -> (B, C, ceil(h / 2), ceil(w / 2)): a convolution of stride 2, padded on all sides."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, *size): nearest neighbour, then a convolution.

    The size is asked for because a level of odd size comes down to the same size as the even one above it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
