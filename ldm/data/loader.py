"""Captioned pictures, batch by batch: `Loader` for training (endless), `validation_batches` for held-out shards."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.config import DataConfig
from ldm.data import samples, transforms
from ldm.data.buckets import assign, bucket_sizes
from ldm.data.feed import Decoder, Feed, in_order
from ldm.data.shards import Record, check_quarantine, open_data, open_set
from ldm.errors import UserError


@dataclass(frozen=True)
class Decoded:
    """A sample's picture and caption, before it is in a batch; the rest as in Batch."""

    image: Tensor  # (3, H, W) float32 in [-1, 1]
    caption: str
    size: tuple[int, int]
    crop: tuple[int, int]
    label: str | None = None
    depth: Tensor = torch.empty(0)
    score: float | None = None


Decode = Decoder[Decoded]


@dataclass(frozen=True)
class Batch:
    """`image` float32 (B, 3, H, W) in [-1, 1]; caption, key ("train-0003/00017") and epoch of each row.

    `label`, `score`: what the samples' json says in the fields `data.label` and `data.score`; None where none is named.

    `size` int64 (B, 2) is the height and width of the pictures as they lie in the shards, `crop` int64 (B, 2) the top
    and left of what is seen of them, in pixels after the resize: what Podell et al. 2023 condition on. `depth` float32
    (B, 1, H, W) in [-1, 1]: the depth maps, (B, 0, H, W) where `data.depth` names no member.
    """

    image: Tensor
    caption: list[str]
    key: list[str]
    epoch: list[int]
    size: Tensor
    crop: Tensor
    label: list[str | None]
    depth: Tensor
    score: list[float | None]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class PictureDecode:
    """Record -> picture tensor and caption by the settings of `config`; what `Loader` does unless told otherwise."""

    config: DataConfig
    labels: Collection[str] = ()  # as samples.label's `known`

    def __call__(self, record: Record, rng: random.Random) -> Decoded:
        sample = samples.decode(record, self.config.caption, rng)
        size = record.bucket or self.config.size
        depth = samples.decode_depth(record, self.config.depth)
        made = transforms.prepare(sample.picture, size, self.config.crop, self.config.flip, rng, depth)
        label = samples.label(sample.meta, self.config.label, self.labels)
        score = samples.score(sample.meta, self.config.score)
        return Decoded(made.image, sample.caption, made.size, made.crop, label, made.depth, score)


class Loader(Feed[Decoded, Batch]):
    """Endless batches of `config.shards`, global_batch / world rows on each process.

    `decode` turns a shard's record into a picture and a caption, drawing what is random from the rng it is given; it
    must pickle, raise BadSample for what it cannot use, and heed `record.bucket`. With `config.buckets` a batch's
    pictures are all of one bucket's height and width, the same on all processes. Raises UserError for settings that
    cannot work and when there is no sample to use.
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
        data, buckets = open_data(config, samples.fault_of(config.caption)), None
        if config.buckets:
            data, buckets = assign(data, bucket_sizes(config.size, config.buckets, config.bucket_aspect), global_batch)
            check_quarantine(data.quarantine, len(data.shards) + len(data.quarantine), config.bad_limit)
        decode = decode or PictureDecode(config)
        super().__init__(data, config, global_batch, rank, world, seed, decode, Batch, buckets)


def validation_batches(config: DataConfig, batch_size: int, labels: Collection[str] = ()) -> Iterator[Batch]:
    """One pass over `config.validation` in its own order, center crop, no flip, the .txt caption; no batches if empty.

    What cannot be used is skipped, samples of other than `labels` too, if there are any; the last batch may be smaller.
    `config.where` applies here too.
    """
    if not config.validation.strip():
        return
    config = replace(config, crop="center", flip=False, caption="none" if config.caption == "none" else "txt")
    _check(config)
    data = open_set(config.validation, "data.validation", samples.fault_of(config.caption), config.where, config)
    yield from in_order(data, PictureDecode(config, labels), Batch, batch_size)


def _check(config: DataConfig) -> None:
    transforms.check(config.size, config.crop)
    samples.check_caption(config.caption)
    if config.buckets < 0 or not 0 <= config.bad_limit <= 1:
        raise UserError(
            f"data.buckets={config.buckets} must be at least 0 and data.bad_limit={config.bad_limit:g} from 0 to 1"
        )
