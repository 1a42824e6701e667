"""Cached latents and contexts: shards of posterior moments and text features, with the fingerprint of their makers.

A set is a folder of shards and a `latents.json`. A sample is `SHARD/KEY.safetensors`, named by the shard and the key
of its picture, with

    moments          (2C, h, w)   mean and log-variance of the posterior, unscaled
    moments_flipped  (2C, h, w)   of the mirrored picture, in sets made with it
    context          (K, L, D)    float16, one for each of the sample's K different captions, the .txt's first
    pooled           (K, E)       float16, in sets made for a network that is told it: the same of the whole captions
    variants         (V,) int64   which of the K its json's `captions` are
    size             (2,) int64   height and width of the picture in its shard
    crop             (2, 2) int64 top and left of what is seen of it, and of its mirror image; as in loader.Batch

and `SHARD/KEY.json`, the source's json with the K captions as `contexts`. Posteriors are kept, not draws from them, so
each epoch still draws its own latent; flip and caption are drawn by the numbers that `Loader` would draw for the
picture's shard and key, and so are noise and levels: a run on cached latents sees what the same run on pictures sees.

`latents.json` names the networks, the picture transform and the shards of pictures that made the set. `LatentLoader`
refuses a set made of others than the caller's: latents of last week's autoencoder train without an error and sample as
noise. It also says in what precision the networks ran, which is told and not refused: on the fly it would be float32.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ldm.checkpoints import native
from ldm.checkpoints.record import Checkpoint
from ldm.config import DataConfig, to_dict
from ldm.data import samples, transforms
from ldm.data.cache import Store
from ldm.data.feed import Feed
from ldm.data.fetch import Unreachable
from ldm.data.shards import BadSample, Members, Record, ShardSet, name_of, open_set
from ldm.data.sources import PIPE, base_name, expand_sources, is_file
from ldm.errors import UserError, explain_os_error
from ldm.model_config import EncoderConfig

FORMAT = "ldm-latents-2"
MANIFEST = "latents.json"
SHARDS = "set of pictures"  # the part of a fingerprint that names them

logger = logging.getLogger(__name__)


def latent_fingerprint(
    autoencoder: Checkpoint | None,
    text: Checkpoint | None,
    data: DataConfig,
    encoder: EncoderConfig = EncoderConfig(),
) -> dict[str, str]:
    """What cached latents depend on: weights, how text towers are read, picture transform, and shards of pictures.

    Weights count as the numbers they are used as: a run that began with half precision leaves full, and its latents
    serve the next one too. `autoencoder` and `text` are where these networks lie; None is the identity codec, and no
    text. The codec's shift and scale are not part of it, since moments are kept unscaled. The shards are known by their
    names and, where they are files, their sizes; they are left out where `data.shards` is empty or names nothing that
    is there, as on a machine that has the latents alone. Raises UserError for a text tower or an autoencoder that is
    not there.
    """
    made = {"autoencoder": "identity", "text": "none", "pictures": f"{data.size} pixels, center crop"}
    if autoencoder is not None and "autoencoder" in autoencoder.parts:
        made["autoencoder"] = native.fingerprint(autoencoder.state("autoencoder"), stored=False)
    if text is not None:
        for name in (*text.config.readers,) or ("text",):
            weights, plain = native.fingerprint(text.state(name), stored=False), to_dict(text.config.readers[name])
            if plain.get("final_norm"):
                del plain["final_norm"]  # as caches have it that were written before there was that setting
            made[name] = f"{weights} {json.dumps(plain, sort_keys=True)}"
        if "t5" in made:
            made["t5"] += f", {encoder.t5_tokens} tokens"
        if encoder.pooled or encoder.empty != "encoded":
            made["encoder"] = f"pooled {encoder.pooled}, empty text {encoder.empty}"
    if data.shards.strip():
        try:
            made[SHARDS] = _shards_print(expand_sources(data.shards, allow_pipe=data.allow_pipe))
        except UserError as error:
            logger.warning("whether latents are of these pictures cannot be told: %s", error)
    return made


def _shards_print(sources: Sequence[str]) -> str:
    named: Counter[str] = Counter()
    known = [[name_of(source, named), os.path.getsize(source) if is_file(source) else None] for source in sources]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


@dataclass(frozen=True)
class LatentBatch:
    """`moments` float32 (B, 2C, h, w), unscaled; `context` float32 (B, L, D); `pooled` float32 (B, E), E = 0 where the
    set has none; the rest as in loader.Batch."""

    moments: Tensor
    context: Tensor
    pooled: Tensor
    key: list[str]
    epoch: list[int]
    size: Tensor
    crop: Tensor
    label: list[str | None]
    score: list[float | None]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class _Latent:
    moments: Tensor
    context: Tensor
    pooled: Tensor
    size: Tensor
    crop: Tensor
    label: str | None
    score: float | None


@dataclass(frozen=True)
class _LatentDecode:
    """How cached latents are read: which of them, drawn by the numbers that the pictures' own path draws."""

    caption: str
    flip: bool
    label: str
    labels: Collection[str]
    score: str

    def __call__(self, record: Record, rng: random.Random) -> _Latent:
        caption, _, mirror = rng.random(), rng.random(), rng.random()
        flipped = self.flip and mirror < 0.5
        try:
            tensors = load(record.fields["safetensors"])
            moments, contexts = tensors["moments_flipped" if flipped else "moments"], tensors["context"]
            variants, size, crops = tensors["variants"], tensors["size"], tensors["crop"]
            chosen = 0
            if self.caption == "variants" and len(variants):
                chosen = int(variants[int(caption * len(variants))])
            context = contexts[chosen].float()
            pooled = tensors["pooled"][chosen].float() if "pooled" in tensors else torch.empty(0)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise BadSample("the latents do not parse") from error
        if (moments.ndim, context.ndim, pooled.ndim, size.shape, crops.shape) != (3, 2, 1, (2,), (2, 2)):
            raise BadSample("the latents are not of their shapes")
        meta = samples.read_meta(record)
        label, score = samples.label(meta, self.label, self.labels), samples.score(meta, self.score)
        return _Latent(moments.float(), context, pooled, size, crops[int(flipped)], label, score)


class LatentLoader(Feed[_Latent, LatentBatch]):
    """Endless batches of cached latents; `config.shards` names the folder of a set, or shards in it.

    Both may be wherever shards of pictures may be (sources.py), commands excepted.

    `expected` is the caller's `latent_fingerprint`, `labels` those that its network knows. Raises
    UserError for a set that others made, one that is not complete or damaged, and settings it cannot serve (random
    crops; flips when it has none).
    """

    def __init__(
        self,
        config: DataConfig,
        global_batch: int,
        rank: int,
        world: int,
        seed: int,
        expected: Mapping[str, str],
        labels: Collection[str] = (),
    ) -> None:
        transforms.check(config.size, config.crop)
        samples.check_caption(config.caption)
        check_plain(config)
        if config.crop != "center":
            raise UserError(f"cached latents are of center crops, data.crop is '{config.crop}'; set data.crop=center")
        if os.path.isdir(config.shards):
            config = replace(config, shards=os.path.join(glob.escape(config.shards), "*.tar"))
        elif _is_remote_folder(config.shards):
            folder = config.shards.strip().rstrip("/")
            names = [shard["name"] for shard in read_manifest(folder, Store.of(config))["shards"]]
            config = replace(config, shards="\n".join(f"{folder}/{name}" for name in names))
        sources = expand_sources(config.shards, "latents", config.allow_pipe)
        counts = _check_sets(sources, config, expected)
        data = replace(open_set(config.shards, "latents", _fault, config.where, config), keys_are_addresses=True)
        lost = {shard.source for shard in data.quarantine.values()}
        _check_count(data, sum(count for source, count in zip(sources, counts, strict=True) if source not in lost))
        decode = _LatentDecode(config.caption, config.flip, config.label, labels, config.score)
        super().__init__(data, config, global_batch, rank, world, seed, decode, LatentBatch)


def check_plain(config: DataConfig) -> None:
    """Raises UserError for settings that cached latents cannot serve."""
    if config.mixture or config.buckets:
        raise UserError(
            f"cached latents are squares of one set; leave out data.{'mixture' if config.mixture else 'buckets'}, or "
            "train without latents"
        )


def _fault(members: Members) -> str | None:
    return None if members.get("safetensors", (0, 0))[1] else "no latents"


def _is_remote_folder(shards: str) -> bool:
    plain = shards.strip()
    return not is_file(plain) and not plain.startswith(PIPE) and not re.search(r"[\s?{*]|\.tar$", plain)


def _check_sets(sources: Sequence[str], config: DataConfig, expected: Mapping[str, str]) -> list[int]:
    """Check the manifests of the sets that shards belong to; returns how many samples each shard should have."""
    store, made_of = Store.of(config), {}
    for folder, query in dict.fromkeys(map(_folder, sources)):
        manifest = read_manifest(folder, store, query)
        made = manifest["fingerprint"]
        names = [name for name in {**expected, **made} if name != SHARDS or {name} <= expected.keys() & made.keys()]
        stale = [name for name in names if expected.get(name) != made.get(name)]
        if stale:
            raise UserError(
                f"the latents in {folder} are stale: they were made with another {' and another '.join(stale)}; "
                "make them again with tools/precompute_latents.py"
            )
        if not manifest["complete"]:
            raise UserError(f"the latents in {folder} are not complete; run tools/precompute_latents.py to its end")
        if config.flip and not manifest["flipped"]:
            raise UserError(f"the latents in {folder} have no flipped copies; set data.flip=false or make them again")
        if manifest["precision"] != "fp32":
            logger.warning(
                "the latents in %s were encoded in %s, so losses differ a little from those of pictures encoded on "
                "the fly, in fp32", folder, manifest["precision"],
            )  # fmt: skip
        made_of[folder, query] = {shard["name"]: shard["samples"] for shard in manifest["shards"]}
    known = [made_of[_folder(source)].get(base_name(source)) for source in sources]
    unknown = sorted(source for source, count in zip(sources, known, strict=True) if count is None)
    if unknown:
        raise UserError(
            f"{_folder(unknown[0])[0]}/{MANIFEST} does not know {', '.join(map(base_name, unknown))}; remove them"
        )
    return [count for count in known if count is not None]


def _folder(source: str) -> tuple[str, str]:
    """Where a shard lies, and what its address has after a question mark."""
    if source.startswith(PIPE):
        raise UserError(f"latents cannot come from a command ('{source}'), which has no {MANIFEST} beside it")
    url, mark, query = (source, "", "") if is_file(source) else source.partition("?")
    return os.path.dirname(url) or ".", mark + query


def _check_count(data: ShardSet, count: int) -> None:
    found = len(data) + data.filtered + sum(data.left_out.values())
    if found != count:
        raise UserError(f"the latent shards hold {found} samples where {MANIFEST} counts {count}; make them again")


def read_manifest(folder: str | Path, store: Store | None = None, query: str = "") -> dict[str, Any]:
    """What `latents.json` says; raises UserError if it is not there or cannot be read."""
    path = f"{folder}/{MANIFEST}"
    try:
        content = (store or Store.of(DataConfig())).read(path + query)
    except (FileNotFoundError, Unreachable) as error:
        why = f" ({error})" if isinstance(error, Unreachable) else ""
        raise UserError(
            f"{folder} has no {MANIFEST}{why}, so it is no set of latents; make one with precompute_latents.py"
        ) from error
    except OSError as error:
        raise explain_os_error(error, f"reading {path}") from error
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} does not parse ({error}); make the latents again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT}; make the latents again")
    return manifest
