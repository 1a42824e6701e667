"""The transformer's parts: what one stream does in a block, and the block in which two streams look at each other.

Shapes are written with these letters:
    B batch    L tokens of a stream    W width    H heads    D = W / H, width of a head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.unet.attention import Attend, attention
from ldm.unet.blocks import zeroed

EPS = 1e-6  # of all normalizations


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift: x (B, L, W), the others (B, 1, W) (Peebles and Xie 2023, section 3.2)."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Projections(nn.Module):
    """What an attention has of one stream: tokens -> queries, keys, values, and back.

    `norm`: RMSNorm on each head's queries and keys (Esser et al. 2024, section 5.3.2). Without `out` nothing
    comes back.
    """

    def __init__(self, width: int, heads: int, norm: bool, out: bool = True):
        super().__init__()
        self.heads = heads
        self.attends: Attend = attention
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS) if norm else nn.Identity()
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS) if norm else nn.Identity()
        self.out = nn.Linear(width, width) if out else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, W) -> three of (B, H, L, D)."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, h=self.heads).unbind()
        return self.norm_q(q), self.norm_k(k), v

    def back(self, attended: Tensor) -> Tensor:
        """(B, H, L, D) -> (B, L, W)"""
        return self.out(rearrange(attended, "b h l d -> b l (h d)"))


class Stream(nn.Module):
    """One stream's own weights in a block: x + gate attention, then x + gate MLP, each on modulated tokens.

    `second`: another attention beside the first, of this stream's tokens alone (Stable Diffusion 3.5 medium). `ends`:
    the last block of the context, of which only keys and values are used.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, second: bool = False, ends: bool = False):
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, width * (2 if ends else 9 if second else 6)))
        self.attention = Projections(width, heads, qk_norm, out=not ends)
        self.second = Projections(width, heads, qk_norm) if second else None
        self.mlp = (
            None if ends else nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        )

    def parts(self, c: Tensor) -> tuple[Tensor, ...]:
        """c (B, W) -> (B, 1, W) each: shift, scale (then gate; those of the MLP; those of the second attention)."""
        return self.modulation(c)[:, None].chunk(self.modulation.out_features // c.shape[-1], dim=-1)

    def close(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """x (B, L, W) after the block, of what its queries found (B, H, L, D)."""
        assert self.mlp is not None
        found = parts[2] * self.attention.back(attended)
        if self.second is not None:
            q, k, v = self.second(modulated(x, *parts[6:8]))
            found = found + parts[8] * self.second.back(self.second.attends(q, k, v, None))
        x = x + found
        return x + parts[5] * self.mlp(modulated(x, *parts[3:5]))


class Block(nn.Module):
    """Image tokens (B, L, W) and context tokens (B, M, W) -> the same, after one attention over both.

    Without a stream of its own the context is not there, or stands among the image's tokens.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, second: bool, context: bool, last: bool):
        super().__init__()
        self.image = Stream(width, heads, qk_norm, second=second)
        self.context = Stream(width, heads, qk_norm, ends=last) if context else None

    def forward(
        self, x: Tensor, context: Tensor | None, c: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`c` (B, W): what modulates; `mask` (B, M + L) bool, the context's first: which tokens are looked at."""
        parts = self.image.parts(c)
        q, k, v = self.image.attention(modulated(x, *parts[:2]))
        if self.context is None or context is None:
            return self.image.close(x, self.image.attention.attends(q, k, v, mask), parts), context
        own = self.context.parts(c)
        of_context = self.context.attention(modulated(context, *own[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_context, (q, k, v), strict=True))
        attended = self.image.attention.attends(q, k, v, mask)
        length = context.shape[1]
        x = self.image.close(x, attended[:, :, length:], parts)
        if self.context.mlp is None:
            return x, None
        return x, self.context.close(context, attended[:, :, :length], own)
