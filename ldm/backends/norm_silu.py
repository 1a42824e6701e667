"""Group normalization and SiLU as one, in Triton: the features are read twice and written once.

Torch normalizes, writes, reads, activates and writes, and adds a residual block's embedding in a pass of its own. Here
the first kernel takes mean and squared deviations of pieces of each group, the second joins them (Chan et al. 1979),
normalizes and activates; both add the embedding as they read. The sums are in float32. For inference alone.

This module needs Triton, so whoever imports it has a GPU, or Triton's interpreter.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
import triton  # pyright: ignore[reportMissingImports] (it comes with torch for CUDA)
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from ldm.unet.blocks import ResidualBlock

M = TypeVar("M", bound=nn.Module)
BLOCK = 4096  # numbers of a group that one program reads
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fused(network: M) -> M:
    """`network`, itself, with its residual blocks so computed where that works here; as it is where it does not."""
    for block in network.modules():
        weight = next(block.parameters(), None)
        if type(block) is ResidualBlock and weight is not None and available(weight.device.type, weight.dtype):
            block.__class__ = FusedResidualBlock
    return network


class FusedResidualBlock(ResidualBlock):
    """A plain one with another forward, for inference."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or self.scale_shift or x.dtype != self.norm_in.weight.dtype:
            return super().forward(x, embedding)
        y = self.conv_in(norm_silu(x, self.norm_in))
        y = norm_silu(y, self.norm_out, self.embedding(embedding))
        return self.shortcut(x) + self.conv_out(self.dropout(y))


@cache
def available(device: str, dtype: torch.dtype) -> bool:
    """Whether the kernels work here and give what torch gives, in both orders of memory: tried once."""
    if dtype not in DTYPES:
        return False
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            norm = nn.GroupNorm(4, 12).to(device, dtype)
            nn.init.normal_(norm.weight)
            x, add = (
                torch.randn(2, 12, 37, 41, device=device, dtype=dtype) * 3 + 1,
                torch.randn(2, 12).to(device, dtype),
            )
            wanted = F.silu(norm.float()((x + add[:, :, None, None]).float()))
            norm = norm.to(dtype)
            for order in (torch.contiguous_format, torch.channels_last):
                found = norm_silu(x.contiguous(memory_format=order), norm, add)
                error = (found.float() - wanted).abs().max() / wanted.abs().max()
                if not error < 4 * torch.finfo(dtype).eps ** 0.9:
                    return False
    except Exception:  # what a compiler, a driver or a device that it does not know may raise is without end
        return False
    return True


def norm_silu(x: Tensor, norm: nn.GroupNorm, add: Tensor | None = None) -> Tensor:
    """silu(norm(x + add)) of x (B, C, h, w) and add (B, C), in x's dtype and order of memory."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    count, channels = x.shape[:2]
    size = x[0].numel() // norm.num_groups
    chunks = triton.cdiv(size, BLOCK)
    moments = torch.empty(count * norm.num_groups * chunks, 2, device=x.device, dtype=torch.float32)
    out = torch.empty_like(x)
    add = x if add is None else add.contiguous()
    shape = channels, x[0, 0].numel(), norm.num_groups, chunks
    ways: dict[str, Any] = {"LAST": last, "ADDS": add is not x, "BLOCK": BLOCK}
    grid = (count * norm.num_groups, chunks)
    kernels: tuple[Any, Any] = _moments, _apply
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton starts kernels on the current one
        kernels[0][grid](x, add, moments, *shape, **ways)
        ways["CHUNKS"] = triton.next_power_of_2(chunks)
        kernels[1][grid](x, add, moments, norm.weight, norm.bias, out, norm.eps, *shape, **ways)
    return out


@triton.jit
def _read(x, add, channels, pixels, groups, LAST: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's numbers in float32, which of them there are, their channels, and where they lie."""
    picture, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    width = channels // groups
    each = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = each < width * pixels
    if LAST:
        channel, pixel = group * width + each % width, each // width
        place = pixel * channels + channel
    else:
        channel, pixel = group * width + each // pixels, each % pixels
        place = channel * pixels + pixel
    place += picture.to(tl.int64) * channels * pixels
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(add + picture * channels + channel, mask=inside, other=0.0).to(tl.float32)
    return value, inside, channel, place


@triton.jit
def _moments(
    x, add, out, channels, pixels, groups, chunks, LAST: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """(B G chunks, 2): the mean of each piece of a group, and the sum of squared deviations from it."""
    value, inside, _, _ = _read(x, add, channels, pixels, groups, LAST, ADDS, BLOCK)
    count = tl.minimum(channels // groups * pixels - tl.program_id(1) * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    off = tl.where(inside, value - mean, 0.0)
    place = out + (tl.program_id(0) * chunks + tl.program_id(1)) * 2
    tl.store(place, mean)
    tl.store(place + 1, tl.sum(off * off, 0))


@triton.jit
def _apply(
    x,
    add,
    moments,
    weight,
    bias,
    out,
    eps,
    channels,
    pixels,
    groups,
    chunks,
    LAST: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    value, inside, channel, place = _read(x, add, channels, pixels, groups, LAST, ADDS, BLOCK)
    size = channels // groups * pixels
    piece = tl.arange(0, CHUNKS)
    there = piece < chunks
    counts = tl.where(there, tl.minimum(size - piece * BLOCK, BLOCK), 0).to(tl.float32)
    first = moments + (tl.program_id(0) * chunks + piece) * 2
    means = tl.load(first, mask=there, other=0.0)
    squares = tl.load(first + 1, mask=there, other=0.0)
    mean = tl.sum(counts * means, 0) / size
    variance = (tl.sum(squares, 0) + tl.sum(counts * (means - mean) * (means - mean), 0)) / size
    scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    y = (value - mean) * tl.rsqrt(variance + eps) * scale + shift
    tl.store(out + place, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=inside)
