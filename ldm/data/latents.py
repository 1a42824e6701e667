"""Cached latents and contexts: shards of posterior moments and text features, with the fingerprint of their makers.

A set is a folder of shards and a `latents.json`. A sample is `KEY.safetensors` with

    moments          (2C, h, w)   mean and log-variance of the posterior, unscaled
    moments_flipped  (2C, h, w)   of the mirrored picture, in sets made with it
    context          (K, L, D)    float16, one for each of the sample's K different captions, the .txt's first
    variants         (V,) int64   which of the K its json's `captions` are

and `KEY.json`, the source's json with the K captions as `contexts`. Posteriors are kept, not draws from them, so each
epoch still draws its own latent; flip and caption are drawn by the numbers that `Loader` would draw, so a run on cached
latents sees what the same run on pictures sees.

`latents.json` names the networks and the picture transform that made the set. `LatentLoader` refuses a set made by
others than the caller's: latents of last week's autoencoder train without an error and sample as noise.
"""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ldm.checkpoints import native
from ldm.config import DataConfig
from ldm.data import samples, transforms
from ldm.data.feed import Feed, Fetched, in_order
from ldm.data.shards import BadSample, Members, Record, ShardSet, expand, open_set
from ldm.data.writing import write_shard
from ldm.errors import UserError
from ldm.files import atomic_write_text, read_text

FORMAT = "ldm-latents-1"
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


# ---------------------------------------------------------------- pictures in


@dataclass(frozen=True)
class SourceBatch:
    """Pictures to be encoded: `image` float32 (B, 3, H, W) in [-1, 1], center crop; the rest is a list of B."""

    image: Tensor
    captions: list[list[str]]  # the K different captions of each, the .txt's first
    variants: list[list[int]]  # which of them the json's `captions` are
    key: list[str]
    meta: list[dict[str, Any]]
    sample: list[int]  # numbers in the set


class LatentSources:
    """The pictures of `config.shards` in the shards' own order, with all their captions."""

    def __init__(self, config: DataConfig) -> None:
        transforms.check(config.size, config.crop)
        _check_plain(config)
        self._config = config
        self._data = open_set(config.shards, "data.shards", samples.fault, config.where, config)
        self.fingerprint = self._data.fingerprint

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[SourceBatch]:
        """From sample number `start` to before `stop` (the end); what cannot be used is logged and left out."""
        return in_order(self._data, _Sources(self._config.size), batch_size, start, stop)


@dataclass(frozen=True)
class _Sources:
    size: int

    def decode(self, record: Record, rng: random.Random) -> tuple[Tensor, list[str], list[int], dict[str, Any]]:
        sample = samples.decode(record, "txt", rng)
        image = transforms.prepare(sample.picture, self.size, "center", False, rng).image
        given = samples.caption_variants(sample.meta)
        captions = list(dict.fromkeys([sample.caption, *given]))
        return image, captions, [captions.index(text) for text in given], sample.meta

    def collate(self, samples: Sequence[Fetched[tuple[Tensor, list[str], list[int], dict[str, Any]]]]) -> SourceBatch:
        images, captions, variants, metas = zip(*(sample.item for sample in samples), strict=True)
        keys, numbers = [sample.key for sample in samples], [sample.number for sample in samples]
        return SourceBatch(torch.stack(images), list(captions), list(variants), keys, list(metas), numbers)


# ---------------------------------------------------------------- latents out


class LatentWriter:
    """Fills a folder with latent shards; call `add` in the order of `LatentSources.batches`, then `finish`.

    Each shard appears whole, then the manifest names it. A writer on a folder that an earlier one left unfinished goes
    on after its last whole shard: begin the batches at `start`, which is `first` on a new folder. Raises UserError when
    the folder holds latents of other networks or other pictures.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, str],
        source: str,
        flipped: bool,
        per_shard: int = 1024,
        first: int = 0,
    ) -> None:
        self._folder, self._per_shard, self._first = Path(folder), per_shard, first
        head = {"format": FORMAT, "fingerprint": dict(fingerprint), "source": source, "flipped": flipped}
        self._manifest: dict[str, Any] = {**head, "per_shard": per_shard, "complete": False, "shards": []}
        if (self._folder / MANIFEST).exists():
            found = _read_manifest(self._folder)
            differing = [name for name, value in {**head, "per_shard": per_shard}.items() if found.get(name) != value]
            if differing:
                raise UserError(
                    f"{folder} holds latents with another {' and '.join(differing)}; remove the folder or name another"
                )
            self._manifest = found
        self._waiting: dict[str, dict[str, bytes]] = {}
        self._next = self.start

    @property
    def start(self) -> int:
        """The first sample number that no finished shard covers."""
        return self._manifest["shards"][-1]["next"] if self._manifest["shards"] else self._first

    @property
    def complete(self) -> bool:
        return self._manifest["complete"]

    def add(self, batch: SourceBatch, moments: Tensor, flipped: Tensor | None, contexts: Sequence[Tensor]) -> None:
        """Take a batch: moments (B, 2C, h, w), those of the mirrored pictures, and for each sample (K, L, D).

        Moments are stored in the type they come in (float16 or float32), contexts in float16.
        """
        if (flipped is not None) != self._manifest["flipped"]:
            raise ValueError("the writer was made for latents " + ("with" if flipped is None else "without") + " flips")
        for i, key in enumerate(batch.key):
            if key in self._waiting:
                self._write()  # keys are unique within a source shard only: another one begins
            tensors = {
                "moments": moments[i].cpu().contiguous(),
                "context": contexts[i].to("cpu", torch.float16).contiguous(),
                "variants": torch.tensor(batch.variants[i], dtype=torch.int64),
            }
            if flipped is not None:
                tensors["moments_flipped"] = flipped[i].cpu().contiguous()
            meta = json.dumps({**batch.meta[i], "contexts": batch.captions[i]}, ensure_ascii=False)
            self._waiting[key] = {"safetensors": save(tensors), "json": meta.encode()}
            self._next = batch.sample[i] + 1
            if len(self._waiting) == self._per_shard:
                self._write()

    def finish(self) -> None:
        """Write what is left and declare the set complete."""
        if self._waiting:
            self._write()
        self._manifest["complete"] = True
        self._save_manifest()

    def _write(self) -> None:
        name = f"latents-{len(self._manifest['shards']):05d}.tar"
        count = write_shard(self._folder / name, self._waiting.items())
        self._manifest["shards"].append({"name": name, "samples": count, "next": self._next})
        self._save_manifest()
        self._waiting = {}

    def _save_manifest(self) -> None:
        atomic_write_text(self._folder / MANIFEST, json.dumps(self._manifest, indent=1) + "\n")


def part_folder(folder: str | Path, part: int, parts: int) -> Path:
    """Where one of several writers, each of an equal range of the samples, leaves its shards until all are done."""
    return Path(folder) / f".part-{part}-of-{parts}"


def check_parts(folder: str | Path, parts: int) -> None:
    """Raises UserError if an earlier run divided the work among another number of writers and did not finish."""
    begun = {path.name.rpartition("-")[2] for path in Path(folder).glob(".part-*-of-*")}
    if (Path(folder) / MANIFEST).exists() and not _read_manifest(Path(folder))["complete"]:
        begun.add("1")
    others = sorted(begun - {str(parts)})
    if others:
        raise UserError(
            f"{folder} holds what {others[0]} processes left unfinished; go on with --processes {others[0]}"
        )


def merge_parts(folder: str | Path, parts: int) -> int:
    """Make one set of what the writers of all parts finished; returns its samples.

    May be called again if it broke off.
    """
    folder = Path(folder)
    folders = [part_folder(folder, part, parts) for part in range(parts)]
    manifests = [_read_manifest(each) for each in folders]
    if not all(manifest["complete"] for manifest in manifests):
        raise UserError(f"the latents in {folder} are not complete; run tools/precompute_latents.py to its end")
    shards = []
    for each, manifest in zip(folders, manifests, strict=True):
        for shard in manifest["shards"]:
            name = f"latents-{len(shards):05d}.tar"
            if (each / shard["name"]).exists():
                os.replace(each / shard["name"], folder / name)
            shards.append({**shard, "name": name})
    whole = {**manifests[0], "shards": shards}
    atomic_write_text(folder / MANIFEST, json.dumps(whole, indent=1) + "\n")
    for each in folders:
        shutil.rmtree(each)
    return sum(shard["samples"] for shard in shards)


# ---------------------------------------------------------------- latents in


@dataclass(frozen=True)
class LatentBatch:
    """`moments` float32 (B, 2C, h, w), unscaled; `context` float32 (B, L, D); key and epoch of each row."""

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
        _check_plain(config)
        if config.crop != "center":
            raise UserError(f"cached latents are of center crops, data.crop is '{config.crop}'; set data.crop=center")
        if os.path.isdir(config.shards):
            config = replace(config, shards=os.path.join(glob.escape(config.shards), "*.tar"))
        count = _check_sets(expand(config.shards, "latents"), config, expected)
        data = open_set(config.shards, "latents", _fault, config.where)
        _check_count(data, count)
        super().__init__(data, config, global_batch, rank, world, seed, _Latents(config.caption, config.flip))


def _check_plain(config: DataConfig) -> None:
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
        manifest = _read_manifest(folder)
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


def _read_manifest(folder: Path) -> dict[str, Any]:
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
