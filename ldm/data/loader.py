"""Captioned pictures, batch by batch: `Loader` for training (endless), `validation_batches` for held-out shards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.config import DataConfig
from ldm.data import samples, transforms
from ldm.data.feed import Feed, Fetched, in_order
from ldm.data.shards import Record, open_set

Decoded = tuple[Tensor, str]  # picture (3, H, W) float32 in [-1, 1], caption
Decode = Callable[[Record, random.Random], Decoded]


@dataclass(frozen=True)
class Batch:
    """`image` float32 (B, 3, H, W) in [-1, 1]; caption, key and epoch of each row."""

    image: Tensor
    caption: list[str]
    key: list[str]
    epoch: list[int]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class PictureDecode:
    """Record -> (picture tensor, caption) by the settings of `config`; what `Loader` does unless told otherwise."""

    config: DataConfig

    def __call__(self, record: Record, rng: random.Random) -> Decoded:
        sample = samples.decode(record, self.config.caption, rng)
        return (
            transforms.prepare(sample.picture, self.config.size, self.config.crop, self.config.flip, rng),
            sample.caption,
        )


@dataclass(frozen=True)
class _Pictures:
    """How decoded pictures become a Batch."""

    decode: Decode

    def collate(self, samples: Sequence[Fetched[Decoded]]) -> Batch:
        return Batch(
            torch.stack([sample.item[0] for sample in samples]),
            [sample.item[1] for sample in samples],
            [sample.key for sample in samples],
            [sample.epoch for sample in samples],
        )

    def join(self, parts: Sequence[Batch]) -> Batch:
        if len(parts) == 1:
            return parts[0]
        return Batch(
            torch.cat([part.image for part in parts]),
            [text for part in parts for text in part.caption],
            [key for part in parts for key in part.key],
            [epoch for part in parts for epoch in part.epoch],
        )


class Loader(Feed[Decoded, Batch]):
    """Endless batches of `config.shards`, global_batch / world rows on each process.

    `decode` turns a shard's record into (picture (3, H, W) in [-1, 1], caption), drawing what is random from the rng
    it is given; it must pickle and raise BadSample for what it cannot use. Raises UserError for settings that cannot
    work and when there is no sample to use.
    """

    def __init__(
        self,
        config: DataConfig,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        decode: Decode | None = None,
    ) -> None:
        _check(config)
        data = open_set(config.shards, "data.shards", samples.fault, config.where)
        super().__init__(data, config, global_batch, rank, world, seed, _Pictures(decode or PictureDecode(config)))


def validation_batches(config: DataConfig, batch_size: int, decode: Decode | None = None) -> Iterator[Batch]:
    """One pass over `config.validation` in its own order, center crop, no flip, the .txt caption; no batches if empty.

    What cannot be used is skipped; the last batch may be smaller. `config.where` applies here too.
    """
    if not config.validation.strip():
        return
    config = replace(config, crop="center", flip=False, caption="txt")
    _check(config)
    data = open_set(config.validation, "data.validation", samples.fault, config.where)
    yield from in_order(data, _Pictures(decode or PictureDecode(config)), batch_size)


def _check(config: DataConfig) -> None:
    transforms.check(config.size, config.crop)
    samples.check_caption(config.caption)
