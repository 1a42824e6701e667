"""Batch -> (x0, Condition): the latents of a step's pictures, and what the network is told of them.

Latents and contexts come from pictures and captions on the fly, or from the shards of tools/precompute_latents.py.
Some rows are told nothing, which is what guidance subtracts. An inpainting network is also given a mask, drawn anew for
each sample and step, and the latent of the picture without what lies under it (Rombach et al. 2022, section 4.5); a
depth network the sample's depth map, at the latent's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ldm.autoencoder.codec import Codec
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.conditioning.condition import Condition, drop
from ldm.conditioning.encoder import Encoder, Texts
from ldm.conditioning.planes import depth_plane, inpainting_planes
from ldm.data.latents import LatentBatch
from ldm.data.loader import Batch
from ldm.jobs import Ask
from ldm.training.draws import Draws

WHOLE = 0.25  # share of the masks that cover all of the picture: as if there were none
RECTANGLES = 4  # of the other masks, at most
SIDES = (0.125, 0.625)  # shares of the picture's that a rectangle's may be


@dataclass(frozen=True, eq=False)
class Inputs:
    """What makes a network's inputs of batches, on `device`.

    `size` is the pictures' side in pixels. `captions` stand in place of the samples' own, one drawn for each sample.
    """

    codec: Codec
    encoder: Encoder
    size: int
    device: torch.device
    captions: tuple[str, ...] = ()
    takes: str = ""  # "mask" (and masked picture), "depth": planes that the network takes; no cached latents then
    guidance: tuple[float, float] | None = None  # of a network that is told its scale: from where to where it is drawn

    def __call__(
        self,
        batch: Batch | LatentBatch,
        draws: Draws,
        dropout: float = 0.0,
        of_towers: float = 0.0,
        words: Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor | None]] | None = None,
    ) -> tuple[Tensor, Condition]:
        """Latents (B, C, h, w) sampled from their posteriors, and conditions.

        `dropout` is the share of rows that are told neither text nor label, `of_towers` that in which zeros stand for
        what a text tower says, drawn for each tower by itself (Podell et al. 2023's code; Esser et al. 2024). `words`,
        tokens (B, L) of each tower -> context and pooled text, stands in for the encoder's where a word is trained.
        """
        asks = self._asks(batch, draws)
        if words is None:
            texts = self._texts(batch, asks)
        else:
            texts = Texts(*words(self.encoder.tokens([ask.text for ask in asks])))
        if of_towers:
            rows = {name: draws.uniform(f"dropout of {name}") >= of_towers for name in self.encoder.towers}
            texts = self.encoder.without(texts, rows)
        told = self.encoder.of_texts(asks, texts).to(self.device)
        if dropout:
            keep = draws.uniform("caption dropout") >= dropout
            told = drop(told, self.encoder.null(asks, self._empty), keep)
        if self.takes:
            told = dataclasses.replace(told, planes=self._planes(batch, draws))
        if self.guidance is not None:
            low, high = self.guidance
            scale = low + (high - low) * draws.uniform("guidance")
            told = dataclasses.replace(told, guidance=scale.float().to(self.device))  # not each device has float64
        return self._latent(batch, draws), told

    def untold(self, batch: Batch | LatentBatch, told: Condition, draws: Draws) -> Condition:
        """What guidance subtracts of `told`: neither text nor label, all else as it is."""
        null = self.encoder.null(self._asks(batch, draws), self._empty).to(self.device)
        return Condition(**{**told.parts(), **null.parts()})

    @torch.no_grad()
    def _latent(self, batch: Batch | LatentBatch, draws: Draws) -> Tensor:
        if isinstance(batch, LatentBatch):
            noise = draws.normal("posterior", self.codec.latent_shape(self.size, self.size))
            posterior = DiagonalGaussian.from_moments(batch.moments.to(self.device))
            return self.codec.to_latent(posterior.sample(noise))
        height, width = batch.image.shape[2:]  # of its bucket, where pictures have buckets
        noise = draws.normal("posterior", self.codec.latent_shape(height, width))
        return self.codec.encode(batch.image.to(self.device), noise)

    @torch.no_grad()
    def _texts(self, batch: Batch | LatentBatch, asks: list[Ask]) -> Texts:
        if isinstance(batch, LatentBatch):
            if not self.encoder.towers:
                return Texts()
            pooled = batch.pooled.to(self.device) if self.encoder.pooled_width else None
            return Texts(batch.context.to(self.device), pooled)
        return self.encoder.texts([ask.text for ask in asks])

    @cached_property
    def _empty(self) -> Texts:
        with torch.no_grad():
            return self.encoder.texts([""])

    @torch.no_grad()
    def _planes(self, batch: Batch | LatentBatch, draws: Draws) -> Tensor:
        assert isinstance(batch, Batch)  # the other kind is refused at the start
        if self.takes == "depth":
            depth = batch.depth.to(self.device)
            return depth_plane(depth, self.codec.latent_shape(*depth.shape[2:])[1:])
        image = batch.image.to(self.device)
        return inpainting_planes(self.codec, image, draw_masks(draws, *image.shape[2:]).to(image))

    def _asks(self, batch: Batch | LatentBatch, draws: Draws) -> list[Ask]:
        """What each sample shows, as somebody would ask for it; the text of cached latents is encoded already."""
        captions, target = [""] * len(batch), (self.size, self.size)
        if isinstance(batch, Batch):
            captions, target = batch.caption, (batch.image.shape[2], batch.image.shape[3])
        if self.captions:
            captions = [self.captions[int(u * len(self.captions))] for u in draws.uniform("template").tolist()]
        rows = zip(captions, batch.label, batch.size.tolist(), batch.crop.tolist(), batch.score, strict=True)
        return [Ask(text, label, tuple(size), tuple(crop), target, score) for text, label, size, crop, score in rows]


def draw_masks(draws: Draws, height: int, width: int) -> Tensor:
    """(B, 1, height, width) of 0 and 1, 1 where the picture is hidden, on the CPU.

    A quarter of them is 1 everywhere; the others are 1 in one to four rectangles, whose sides are an eighth to five
    eighths of the picture's and which lie anywhere in it.
    """
    rows = draws.uniform("mask", (2 + 4 * RECTANGLES,)).tolist()
    masks = torch.zeros(len(rows), 1, height, width)
    for mask, (whole, count, *places) in zip(masks, rows, strict=True):
        if whole < WHOLE:
            mask.fill_(1)
            continue
        for i in range(1 + int(count * RECTANGLES)):
            down, top, across, left = places[4 * i : 4 * i + 4]
            rows_, columns = _span(height, down, top), _span(width, across, left)
            mask[:, rows_, columns] = 1
    return masks


def _span(side: int, size: float, place: float) -> slice:
    """A stretch of a side of so many pixels, by two uniform numbers."""
    least, most = SIDES
    length = max(1, round(side * (least + size * (most - least))))
    start = int(place * (side - length + 1))
    return slice(start, start + length)
