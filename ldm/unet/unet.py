"""The U-Net (Ronneberger et al. 2015; Ho et al. 2020; Rombach et al. 2022): noisy latent, t, context -> prediction.

    x -> conv_in -> down[0] -> down[1] ... -> middle -> ... up -> norm_out, conv_out
                       |__________|_________ skips __________|

A level is `blocks` stages (`blocks + 1` on the way up) and a change of size; a stage is a residual block and, where the
level has attention, a spatial transformer. Each stage and each downsampling leaves a skip, which the way up
concatenates in reverse order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm import ranges
from ldm.conditioning.condition import Condition
from ldm.errors import UserError
from ldm.model_config import UNetConfig
from ldm.unet.attention import ContextKV, CrossAttention, SelfAttention, attend_by, check_backend
from ldm.unet.blocks import Downsample, GroupNorm, ResidualBlock, SpatialTransformer, Upsample, zeroed
from ldm.unet.embedding import FEATURES, EmbeddingMLP, guidance_features


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a U-Net makes of a Condition once for a trajectory; a part that the network has not is None."""

    kv: ContextKV | None = None
    embedding: Tensor | None = None  # (B, 4 channels): of vector and label, beside that of t
    planes: Tensor | None = None  # (B, C, h, w), concatenated to x
    guidance: Tensor | None = None  # (B, channels): beside the features of t, before their MLP


class UNet(nn.Module):
    """F(x, t, context), whatever it was trained to predict; `config` says its shape.

    A new network predicts zero: the last layer is zero, and so is the last of each residual branch.

    Attributes:
        gradient_checkpointing: in training, recompute each stage's activations in the backward pass: less memory, about
            a third more time, the same gradients.
        attention_backend: what `set_attention_backend` chose last.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        check(config)
        self.config = config
        self.gradient_checkpointing = False
        self.attention_backend = "sdpa"

        embedding_width = 4 * config.channels
        self.time_features = FEATURES[config.time_embedding](config.channels)
        self.time_embedding = EmbeddingMLP(config.channels, embedding_width)
        self.class_embedding = nn.Embedding(config.classes + 1, embedding_width) if config.classes else None
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.weight, std=0.02)
        self.vector_embedding = EmbeddingMLP(config.vector_width, embedding_width) if config.vector_width else None
        self.guidance_embedding = None  # what is told nothing at first is the network that it was
        if config.guidance_width:
            self.guidance_embedding = zeroed(nn.Linear(config.guidance_width, config.channels, bias=False))

        widths = [config.channels * multiplier for multiplier in config.multipliers]
        last, depths = len(widths) - 1, level_depths(config)
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1)
        width, skips = config.channels, [config.channels]
        self.down = nn.ModuleList()
        for level in range(last + 1):
            stages = []
            for _ in range(config.blocks):
                stages.append(Stage(config, width, widths[level], depths.get(level, 0)))
                width = widths[level]
                skips.append(width)
            self.down.append(Level(stages, Downsample(width) if level < last else None))
            if level < last:
                skips.append(width)

        depth = config.transformer_depth if _middle_attends(config) else 0
        self.middle = nn.ModuleList([Stage(config, width, width, depth), Stage(config, width, width, 0)])

        self.up = nn.ModuleList()  # in the order of use, the coarsest first
        for level in reversed(range(last + 1)):
            stages = []
            for _ in range(config.blocks + 1):
                stages.append(Stage(config, width + skips.pop(), widths[level], depths.get(level, 0)))
                width = widths[level]
            self.up.append(Level(stages, Upsample(width) if level > 0 else None))
        self.norm_out = GroupNorm(width)
        self.conv_out = zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))

        for number, layer in enumerate(self._cross_attentions()):
            layer.layer = number

    @property
    def dtype(self) -> torch.dtype:
        """The precision it computes in: that of its parameters."""
        return self.conv_in.weight.dtype

    def set_attention_backend(self, backend: str) -> None:
        """Use "sdpa" (the default) or "xformers" in every layer; UserError if it does not work here."""
        check_backend(backend)
        for module in self.modules():
            if isinstance(module, SelfAttention | CrossAttention):
                width = module.query.out_features // module.heads
                module.attends = attend_by(backend, width, self.dtype)
        self.attention_backend = backend

    def prepare(self, told: Condition | None) -> Prepared:
        """What of `told` does not depend on x and t; `forward` takes it in its place, so a trajectory computes it once.

        Raises ValueError: a part that this configuration needs is missing, or one that it cannot use is there.
        """
        config, parts = self.config, {} if told is None else told.parts()
        wanted = {"context": config.context_width, "vector": config.vector_width, "label": config.classes}
        wanted["guidance"] = config.guidance_width
        for name, size in wanted.items():
            if (name in parts and parts[name].numel() > 0) != (size > 0):
                there = "missing" if size else "given"
                raise ValueError(f"{name} is {there}, and the configuration has it of size {size}")
        kv = self.project_context(parts["context"], parts.get("mask")) if config.context_width else None
        embedding = None
        if self.vector_embedding is not None:
            embedding = self.vector_embedding(parts["vector"].to(self.dtype))
        if self.class_embedding is not None:
            of_label = self.class_embedding(parts["label"])
            embedding = of_label if embedding is None else embedding + of_label
        guidance = None
        if self.guidance_embedding is not None:
            features = guidance_features(parts["guidance"], config.guidance_width)
            guidance = self.guidance_embedding(features.to(self.dtype))
        return Prepared(kv, embedding, parts.get("planes"), guidance)

    def project_context(self, context: Tensor, mask: Tensor | None = None) -> ContextKV:
        """context (B, L, context_width) -> the keys and values of every cross-attention layer."""
        if context.ndim != 3 or context.shape[-1] != self.config.context_width:
            raise ValueError(f"context is {tuple(context.shape)}, not (B, L, {self.config.context_width})")
        context = context.to(self.dtype)
        return ContextKV(tuple(layer.project(context) for layer in self._cross_attentions()), mask)

    def forward(self, x: Tensor, t: Tensor, told: Condition | Prepared | Tensor | None = None) -> Tensor:
        """One evaluation, in the parameters' precision.

        Args:
            x: (B, C, h, w), of any h and w: the noisy latent; with the planes it has `in_channels`.
            t: (B,) in [0, steps), need not be whole.
            told: a Condition with context (B, L, context_width), vector (B, vector_width), label (B,) in [0, classes],
                where `classes` itself is the null class, guidance (B,) and planes, each where the configuration has it;
                or what `prepare` made of one. A tensor is a context alone; None is for networks that are told nothing.

        Returns:
            (B, out_channels, h, w) in float32 (float64 if the parameters are).

        Raises:
            ValueError: as `prepare`.
        """
        if not isinstance(told, Prepared):
            told = self.prepare(Condition(told) if isinstance(told, Tensor) else told)
        kv = told.kv
        features = self.time_features(t).to(self.dtype)
        embedding = self.time_embedding(features if told.guidance is None else features + told.guidance)
        if told.embedding is not None:
            embedding = embedding + told.embedding
        embedding = F.silu(embedding)  # each residual block begins with it: once for all
        if told.planes is not None:
            x = torch.cat([x, told.planes.to(x)], dim=1)

        h = self.conv_in(x.to(self.dtype))
        skips = [h]
        for level in _levels(self.down):
            for stage in level.stages:
                h = self._run(stage, h, embedding, kv)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h)
                skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, embedding, kv)
        for level in _levels(self.up):
            for stage in level.stages:
                h = self._run(stage, h, embedding, kv, skips.pop())
            if level.resample is not None:
                h = level.resample(h, skips[-1].shape[-2:])
        out = self.conv_out(F.silu(self.norm_out(h)))
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _run(
        self, stage: nn.Module, h: Tensor, embedding: Tensor, kv: ContextKV | None, skip: Tensor | None = None
    ) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(stage, h, embedding, kv, skip, use_reentrant=False)  # type: ignore[return-value]
        return stage(h, embedding, kv, skip)

    def _cross_attentions(self) -> Iterator[CrossAttention]:
        return (module for module in self.modules() if isinstance(module, CrossAttention))


class Level(nn.Module):
    """What happens at one size of the features; `UNet.forward` walks through it, since it holds the skips."""

    def __init__(self, stages: list[Stage], resample: Downsample | Upsample | None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample


def _levels(levels: nn.ModuleList) -> Iterable[Level]:
    return cast("Iterable[Level]", levels)


class Stage(nn.Module):
    """A residual block and, if `depth` is not 0, a spatial transformer of so many blocks.

    The skip is concatenated in here, so that gradient checkpointing does not keep the concatenation.
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, depth: int):
        super().__init__()
        self.residual = ResidualBlock(
            in_channels, out_channels, 4 * config.channels, config.time_injection == "scale_shift", config.dropout
        )
        self.transformer = None
        if depth:
            self.transformer = SpatialTransformer(
                out_channels,
                depth,
                config.heads or out_channels // config.head_width,
                config.context_width,
                config.linear_projection,
                config.dropout,
            )

    def forward(self, x: Tensor, embedding: Tensor, kv: ContextKV | None, skip: Tensor | None = None) -> Tensor:
        h = self.residual(x if skip is None else torch.cat([x, skip], dim=1), embedding)
        return h if self.transformer is None else self.transformer(h, kv)


def check(config: UNetConfig, name: str = "unet") -> None:
    """Raise UserError for a configuration that names no network; `name` is that of the settings in the message."""
    ranges.check(config, prefix=f"{name}.")
    if config.time_embedding not in FEATURES:
        raise UserError(f"{name}.time_embedding is '{config.time_embedding}'; choose one of {', '.join(FEATURES)}")
    if config.time_injection not in ("add", "scale_shift"):
        raise UserError(f"{name}.time_injection is '{config.time_injection}'; choose add or scale_shift")
    if config.channels % 2:
        raise UserError(f"{name}.channels is {config.channels}; choose an even number (half are cosines, half sines)")
    if config.guidance_width % 2:
        raise UserError(f"{name}.guidance_width is {config.guidance_width}; choose an even number, such as 256, or 0")
    last = len(config.multipliers) - 1
    for level in config.attention_levels:
        if level > last:
            raise UserError(f"{name}.attention_levels has {level}; there are levels 0 to {last}")
    if len(config.depths) not in (0, len(config.attention_levels)):
        raise UserError(
            f"{name}.depths has {len(config.depths)} numbers for {len(config.attention_levels)} levels in "
            f"{name}.attention_levels; give one for each, or leave out depths"
        )
    attends = {*config.attention_levels, *([last] if _middle_attends(config) else [])}
    if attends and bool(config.heads) == bool(config.head_width):
        raise UserError(
            f"{name}.heads is {config.heads} and {name}.head_width {config.head_width}; set one of the two, and leave "
            "the other at 0"
        )
    divided, divisor = ("heads", config.heads) if config.heads else ("head_width", config.head_width)
    for width in (config.channels * config.multipliers[level] for level in sorted(attends)):
        if width % divisor:
            raise UserError(
                f"{name}.{divided} {divisor} does not divide the width {width} of a level; choose a divisor of it"
            )


def level_depths(config: UNetConfig) -> dict[int, int]:
    """Level -> blocks in each of its transformers, for those levels that have any."""
    depths = config.depths or (config.transformer_depth,) * len(config.attention_levels)
    return dict(zip(config.attention_levels, depths, strict=True))


def _middle_attends(config: UNetConfig) -> bool:
    return bool(config.context_width or config.attention_levels)
