"""Cached latents and contexts: shards of posterior moments and text features, with the fingerprint of their makers.

A set is a folder of shards and a `latents.json`. A sample is `SHARD/KEY.safetensors`, named by the shard and the key
of its picture, with

    moments          (2C, h, w)   mean and log-variance of the posterior, unscaled
    moments_flipped  (2C, h, w)   of the mirrored picture, in sets made with it
    context          (K, L, D)    float16, one for each of the sample's K different captions, the .txt's first
    variants         (V,) int64   which of the K its json's `captions` are

and `SHARD/KEY.json`, the source's json with the K captions as `contexts`. Posteriors are kept, not draws from them, so
each epoch still draws its own latent; flip and caption are drawn by the numbers that `Loader` would draw for the
picture's shard and key, and so are noise and levels: a run on cached latents sees what the same run on pictures sees.

`latents.json` names the networks and the picture transform that made the set. `LatentLoader` refuses a set made by
others than the caller's: latents of last week's autoencoder train without an error and sample as noise.
"""

from __future__ import annotations

import glob
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm.checkpoints import native
from ldm.config import DataConfig
from ldm.data import samples, transforms
from ldm.data.feed import Feed, Fetched
from ldm.data.shards import BadSample, Members, Record, ShardSet, expand, open_set
from ldm.errors import UserError
from ldm.files import read_text

FORMAT = "ldm-latents-2"
MANIFEST = "latents.json"


def latent_fingerprint(autoencoder: str, text: str, data: DataConfig) -> dict[str, str]:
    """What cached latents depend on: weights, how the text tower is read, and the picture transform.

    `autoencoder` and `text` are checkpoints; empty means the identity codec, and no text. The codec's shift and scale
    are not part of it, since moments are kept unscaled.
    """
    made = {"autoencoder": "identity", "text": "none", "pictures": f"{data.size} pixels, center crop"}
    if autoencoder and "autoencoder" in native.part_names(native.read_config(autoencoder)):
        made["autoencoder"] = native.fingerprint(native.read_part(autoencoder, "autoencoder"))
    if text:
        settings = native.read_config(text).text
        if settings is None:
            raise UserError(f"{text} has no text tower; name a checkpoint that train_clip.py wrote")
        weights = native.fingerprint(native.read_part(text, "text"))
        made["text"] = f"{weights} {json.dumps(asdict(settings), sort_keys=True)}"
    return made


@dataclass(frozen=True)
class LatentBatch:
    """`moments` float32 (B, 2C, h, w), unscaled; `context` float32 (B, L, D); each row's key and epoch as in Batch."""

    moments: Tensor
    context: Tensor
    key: list[str]
    epoch: list[int]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class _Latents:
    """How cached latents are read: which of them, drawn by the numbers that the pictures' own path draws."""

    caption: str
    flip: bool

    def decode(self, record: Record, rng: random.Random) -> tuple[Tensor, Tensor]:
        try:
            tensors = load(record.fields["safetensors"])
            moments, contexts, variants = tensors["moments"], tensors["context"], tensors["variants"]
        except (SafetensorError, KeyError) as error:
            raise BadSample("the latents do not parse") from error
        caption, _, mirror = rng.random(), rng.random(), rng.random()
        chosen = 0
        if self.caption == "variants" and len(variants):
            chosen = int(variants[int(caption * len(variants))])
        if self.flip and mirror < 0.5:
            moments = tensors["moments_flipped"]
        return moments.float(), contexts[chosen].float()

    def collate(self, samples: Sequence[Fetched[tuple[Tensor, Tensor]]]) -> LatentBatch:
        return LatentBatch(
            torch.stack([sample.item[0] for sample in samples]),
            torch.stack([sample.item[1] for sample in samples]),
            [sample.key for sample in samples],
            [sample.epoch for sample in samples],
        )

    def join(self, parts: Sequence[LatentBatch]) -> LatentBatch:
        if len(parts) == 1:
            return parts[0]
        return LatentBatch(
            torch.cat([part.moments for part in parts]),
            torch.cat([part.context for part in parts]),
            [key for part in parts for key in part.key],
            [epoch for part in parts for epoch in part.epoch],
        )


class LatentLoader(Feed[tuple[Tensor, Tensor], LatentBatch]):
    """Endless batches of cached latents; `config.shards` names the folder of a set, or shards in it.

    `expected` is the caller's `latent_fingerprint`. Raises UserError for a set that others made, one that is not
    complete or damaged, and settings it cannot serve (random crops; flips when it has none).
    """

    def __init__(
        self, config: DataConfig, global_batch: int, rank: int, world: int, seed: int, expected: Mapping[str, str]
    ) -> None:
        transforms.check(config.size, config.crop)
        samples.check_caption(config.caption)
        check_plain(config)
        if config.crop != "center":
            raise UserError(f"cached latents are of center crops, data.crop is '{config.crop}'; set data.crop=center")
        if os.path.isdir(config.shards):
            config = replace(config, shards=os.path.join(glob.escape(config.shards), "*.tar"))
        count = _check_sets(expand(config.shards, "latents"), config, expected)
        data = replace(open_set(config.shards, "latents", _fault, config.where, config), keys_are_addresses=True)
        _check_count(data, count)
        super().__init__(data, config, global_batch, rank, world, seed, _Latents(config.caption, config.flip))


def check_plain(config: DataConfig) -> None:
    """Raises UserError for settings that cached latents cannot serve."""
    if config.mixture or config.buckets:
        raise UserError(
            f"cached latents are squares of one set; leave out data.{'mixture' if config.mixture else 'buckets'}, or "
            "train without latents"
        )


def _fault(members: Members) -> str | None:
    return None if members.get("safetensors", (0, 0))[1] else "no latents"


def _check_sets(shards: Sequence[Path], config: DataConfig, expected: Mapping[str, str]) -> int:
    """Check the manifests of the sets that `shards` belong to; returns how many samples the shards should have."""
    count = 0
    for folder in dict.fromkeys(path.parent for path in shards):
        manifest = read_manifest(folder)
        made = manifest["fingerprint"]
        stale = [name for name in {**expected, **made} if expected.get(name) != made.get(name)]
        if stale:
            raise UserError(
                f"the latents in {folder} are stale: they were made with another {' and another '.join(stale)}; "
                "make them again with tools/precompute_latents.py"
            )
        if not manifest["complete"]:
            raise UserError(f"the latents in {folder} are not complete; run tools/precompute_latents.py to its end")
        if config.flip and not manifest["flipped"]:
            raise UserError(f"the latents in {folder} have no flipped copies; set data.flip=false or make them again")
        names = {path.name for path in shards if path.parent == folder}
        known = {shard["name"]: shard["samples"] for shard in manifest["shards"]}
        if not names <= known.keys():
            raise UserError(f"{folder}/{MANIFEST} does not know {', '.join(sorted(names - known.keys()))}; remove them")
        count += sum(known[name] for name in names)
    return count


def _check_count(data: ShardSet, count: int) -> None:
    found = len(data) + data.filtered + sum(data.left_out.values())
    if found != count:
        raise UserError(f"the latent shards hold {found} samples where {MANIFEST} counts {count}; make them again")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `latents.json` says; raises UserError if it is not there or cannot be read."""
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder} has no {MANIFEST}, so it is no set of latents; make one with precompute_latents.py")
    try:
        manifest = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} does not parse ({error}); make the latents again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT}; make the latents again")
    return manifest
