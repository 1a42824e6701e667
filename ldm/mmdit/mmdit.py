"""MMDiT (Esser et al. 2024, section 4): noisy latent, t, context -> prediction, by a transformer over patches.

    x -> patches + positions ---> block 1 -> block 2 -> ... -> modulated, linear -> patches -> F
    context -> linear ---------->    |          |
    t, vector, label -> c ---------- modulates both streams in each block

The context has weights of its own in each block (two streams), or none: then its tokens stand before the image's and
are treated as they are (`streams` 1), or there is no context and this is DiT (Peebles and Xie 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm import ranges
from ldm.conditioning.condition import Condition
from ldm.errors import UserError
from ldm.mmdit.blocks import Block, Projections, modulated
from ldm.model_config import MMDiTConfig
from ldm.unet.attention import attend_by, check_backend
from ldm.unet.blocks import zeroed
from ldm.unet.embedding import LONGEST_PERIOD, EmbeddingMLP, Sinusoid

FREQUENCIES = 256  # numbers that t is told in
UNIT_SIDE = 16  # patches whose positions are whole numbers: of 256 pixels, at 16 pixels a patch


@dataclass(frozen=True, eq=False)
class Prepared:
    """What an MMDiT makes of a Condition once for a trajectory; a part that the network has not is None."""

    context: Tensor | None = None  # (B, M, W)
    mask: Tensor | None = None  # (B, M) bool
    embedding: Tensor | None = None  # (B, W): of vector and label, beside that of t
    planes: Tensor | None = None  # (B, C, h, w), concatenated to x


class MMDiT(nn.Module):
    """F(x, t, context), whatever it was trained to predict; `config` says its shape.

    A new network predicts zero, and each of its blocks is the identity (adaLN-zero). Attributes as of `UNet`.
    """

    positions: Tensor  # (1, grid ** 2, W): part of the checkpoint, since published ones follow no single formula

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        check(config)
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend = "sdpa"
        width, patch = config.width, config.patch
        self.patches = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.register_buffer("positions", position_table(config.grid, config.side, width))
        self.time_features = Sinusoid(FREQUENCIES)
        self.time_embedding = EmbeddingMLP(FREQUENCIES, width)
        self.vector_embedding = EmbeddingMLP(config.vector_width, width) if config.vector_width else None
        self.class_embedding = nn.Embedding(config.classes + 1, width) if config.classes else None
        self.context_in = nn.Linear(config.context_width, width) if config.context_width else None
        two = config.streams == 2 and config.context_width > 0
        last = config.depth - 1
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.qk_norm, layer < config.second_attention, two, layer == last)
            for layer in range(config.depth)
        )
        self.modulation_out = zeroed(nn.Linear(width, 2 * width))
        self.out = zeroed(nn.Linear(width, patch**2 * config.out_channels))
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in: that of its parameters."""
        return self.patches.weight.dtype

    def set_attention_backend(self, backend: str) -> None:
        """Use "sdpa" (the default) or "xformers" in every layer; UserError if it does not work here."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, Projections):
                width = module.qkv.in_features // module.heads
                module.attends = attend_by(backend, width, self.dtype)
        self.attention_backend = backend

    def prepare(self, told: Condition | None) -> Prepared:
        """What of `told` does not depend on x and t; `forward` takes it in its place, so a trajectory computes it once.

        Raises ValueError: a part that this configuration needs is missing, or one that it cannot use is there.
        """
        config, parts = self.config, {} if told is None else told.parts()
        wanted = {"context": config.context_width, "vector": config.vector_width, "label": config.classes}
        for name, size in wanted.items():
            if (name in parts and parts[name].numel() > 0) != (size > 0):
                there = "missing" if size else "given"
                raise ValueError(f"{name} is {there}, and the configuration has it of size {size}")
        context = embedding = None
        if self.context_in is not None:
            context = self.context_in(parts["context"].to(self.dtype))
        if self.vector_embedding is not None:
            embedding = self.vector_embedding(parts["vector"].to(self.dtype))
        if self.class_embedding is not None:
            of_label = self.class_embedding(parts["label"])
            embedding = of_label if embedding is None else embedding + of_label
        return Prepared(context, parts.get("mask"), embedding, parts.get("planes"))

    def forward(self, x: Tensor, t: Tensor, told: Condition | Prepared | Tensor | None = None) -> Tensor:
        """One evaluation, in the parameters' precision.

        Args:
            x: (B, C, h, w): the noisy latent; with the planes it has `in_channels`. Sides are multiples of `patch`, of
                at most `grid` patches.
            t: (B,): 1000 times rectified flow's time, need not be whole.
            told: a Condition with context (B, M, context_width), vector (B, vector_width), label (B,) and planes, each
                where the configuration has it; or what `prepare` made of one. A tensor is a context alone.

        Returns:
            (B, out_channels, h, w) in float32 (float64 if the parameters are).

        Raises:
            ValueError: as `prepare`.
            UserError: a picture that is larger than the positions are known for, or is not of whole patches.
        """
        if not isinstance(told, Prepared):
            told = self.prepare(Condition(told) if isinstance(told, Tensor) else told)
        embedding = self.time_embedding(self.time_features(t).to(self.dtype))
        if told.embedding is not None:
            embedding = embedding + told.embedding
        c = F.silu(embedding)  # every modulation begins with it: once for all
        if told.planes is not None:
            x = torch.cat([x, told.planes.to(x)], dim=1)
        rows, columns = self._sides(x)
        tokens = rearrange(self.patches(x.to(self.dtype)), "b w r c -> b (r c) w")
        tokens = tokens + self._cut(rows, columns).to(tokens.dtype)

        context, mask = told.context, told.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), rows * columns)], dim=1)
        joined = 0
        if context is not None and self.config.streams == 1:
            joined = context.shape[1]
            tokens, context = torch.cat([context, tokens], dim=1), None
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                tokens, context = checkpoint(block, tokens, context, c, mask, use_reentrant=False)  # type: ignore[misc]
            else:
                tokens, context = block(tokens, context, c, mask)
        shift, scale = self.modulation_out(c)[:, None].chunk(2, dim=-1)
        out = self.out(modulated(tokens[:, joined:], shift, scale))
        p = self.config.patch
        out = rearrange(out, "b (r c) (p q k) -> b k (r p) (c q)", r=rows, p=p, q=p)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _sides(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        p, most = self.config.patch, self.config.grid
        (rows, more), (columns, beyond) = (divmod(side, p) for side in x.shape[-2:])
        if more or beyond:
            raise UserError(
                f"a latent of {x.shape[-2]} x {x.shape[-1]} is not made of whole patches of {p} x {p}; choose a width "
                f"and height that are {p} times those that the autoencoder takes"
            )
        if max(rows, columns) > most:
            raise UserError(
                f"the picture has {rows} x {columns} patches, and the network knows {most} x {most} at most"
            )
        return rows, columns

    def _cut(self, rows: int, columns: int) -> Tensor:
        """(1, rows columns, W): the positions in the middle of the table."""
        grid = self.config.grid
        top, left = (grid - rows) // 2, (grid - columns) // 2
        table = rearrange(self.positions, "one (r c) w -> one r c w", r=grid)
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


def position_table(grid: int, side: int, width: int) -> Tensor:
    """(1, grid ** 2, W), float32: [sin | cos] of the column, then of the row, of each patch of a square.

    The middle `side` patches are those of a picture at the trained size; they span 0 to 16 whatever that is, as those
    of 256 pixels did before training went on at it (Esser et al. 2024, section 5.3.2: (p - (h_max - s) / 2) 256 / S).
    """
    place = (torch.arange(grid, dtype=torch.float64) - (grid - side) // 2) * (UNIT_SIDE / side)
    index = torch.arange(width // 4, dtype=torch.float64)
    phase = place[:, None] * torch.exp(-math.log(LONGEST_PERIOD) / (width // 4) * index)
    waves = torch.cat([phase.sin(), phase.cos()], dim=1).float()  # (grid, W / 2)
    table = torch.cat([waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)], dim=2)
    return table.reshape(1, grid**2, width)


def check(config: MMDiTConfig, name: str = "network") -> None:
    """Raise UserError for a configuration that names no network; `name` is that of the settings in the message."""
    ranges.check(config, prefix=f"{name}.")
    if config.width % config.heads or config.width % 4:
        raise UserError(
            f"{name}.width is {config.width} and {name}.heads {config.heads}; choose a multiple of the heads and of 4"
        )
    if config.streams not in (1, 2):
        raise UserError(f"{name}.streams is {config.streams}; choose 2 (the context has weights of its own) or 1")
    if config.side > config.grid:
        raise UserError(
            f"{name}.side is {config.side} and {name}.grid {config.grid}; choose a grid of at least the side"
        )
    if config.second_attention > config.depth or (config.second_attention and config.streams == 1):
        raise UserError(
            f"{name}.second_attention is {config.second_attention}; it counts the first blocks, of {config.depth}, "
            f"that have one, and needs {name}.streams=2"
        )
