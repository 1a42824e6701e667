"""Making sets of cached latents (latents.py): the pictures that go in, the shards that come out, whole or in parts."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.config import DataConfig
from ldm.data import samples, transforms
from ldm.data.feed import in_order
from ldm.data.latents import FORMAT, MANIFEST, check_plain, read_manifest
from ldm.data.shards import Record, open_set
from ldm.data.writing import write_shard
from ldm.errors import UserError
from ldm.files import atomic_write_text

# ---------------------------------------------------------------- pictures in


@dataclass(frozen=True)
class SourceBatch:
    """Pictures to be encoded: `image` float32 (B, 3, H, W) in [-1, 1], center crop; the rest is a list of B."""

    image: Tensor
    captions: list[list[str]]  # the K different captions of each, the .txt's first
    variants: list[list[int]]  # which of them the json's `captions` are
    key: list[str]  # with the shard's name, "train-0003/00017"
    meta: list[dict[str, Any]]
    number: list[int]  # in the set
    size: Tensor  # int64 (B, 2), of the picture in its shard
    crop: Tensor  # int64 (B, 2, 2), of the picture and of its mirror image


class LatentSources:
    """The pictures of `config.shards` in the shards' own order, with all their captions; the empty one alone where
    `config.caption` is "none"."""

    def __init__(self, config: DataConfig) -> None:
        transforms.check(config.size, config.crop)
        check_plain(config)
        self._config = config
        self._data = open_set(config.shards, "data.shards", samples.fault_of(config.caption), config.where, config)
        self.fingerprint = self._data.fingerprint

    def __len__(self) -> int:
        return len(self._data)

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[SourceBatch]:
        """From sample number `start` to before `stop` (the end); what cannot be used is logged and left out."""
        return in_order(
            self._data, _SourceDecode(self._config.size, self._config.caption), SourceBatch, batch_size, start, stop
        )


@dataclass(frozen=True)
class _Source:
    """A row of SourceBatch."""

    image: Tensor
    captions: list[str]
    variants: list[int]
    meta: dict[str, Any]
    size: tuple[int, int]
    crop: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class _SourceDecode:
    size: int
    caption: str

    def __call__(self, record: Record, rng: random.Random) -> _Source:
        sample = samples.decode(record, "none" if self.caption == "none" else "txt", rng)
        made = transforms.prepare(sample.picture, self.size, "center", False, rng)
        given = [] if self.caption == "none" else samples.caption_variants(sample.meta)
        captions = list(dict.fromkeys([sample.caption, *given]))
        variants = [captions.index(text) for text in given]
        return _Source(made.image, captions, variants, sample.meta, made.size, (made.crop, made.crop_other_way))


# ---------------------------------------------------------------- latents out


class LatentWriter:
    """Fills a folder with latent shards; call `add` in the order of `LatentSources.batches`, then `finish`.

    Each shard appears whole, then the manifest names it. A writer on a folder that an earlier one left unfinished goes
    on after its last whole shard: begin the batches at `start`, which is `first` on a new folder. Raises UserError when
    the folder holds latents of other networks, another precision or other pictures.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Mapping[str, str],
        source: str,
        flipped: bool,
        per_shard: int = 1024,
        first: int = 0,
        precision: str = "fp32",
    ) -> None:
        self._folder, self._per_shard, self._first = Path(folder), per_shard, first
        head = {"format": FORMAT, "fingerprint": dict(fingerprint), "source": source, "flipped": flipped}
        head["precision"] = precision  # of the networks
        self._manifest: dict[str, Any] = {**head, "per_shard": per_shard, "complete": False, "shards": []}
        if (self._folder / MANIFEST).exists():
            found = read_manifest(self._folder)
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

    def add(
        self,
        batch: SourceBatch,
        moments: Tensor,
        flipped: Tensor | None,
        contexts: Sequence[Tensor],
        pooled: Sequence[Tensor] = (),
    ) -> None:
        """Take a batch: moments (B, 2C, h, w), those of the mirrored pictures, and for each sample (K, L, D) and, where
        the network is told it, (K, E).

        Moments are stored in the type they come in (float16 or float32), what is made of captions in float16.
        """
        if (flipped is not None) != self._manifest["flipped"]:
            raise ValueError("the writer was made for latents " + ("with" if flipped is None else "without") + " flips")
        for i, key in enumerate(batch.key):
            if key in self._waiting:
                self._write()  # a tar may not hold it twice
            tensors = {
                "moments": moments[i].cpu().contiguous(),
                "context": contexts[i].to("cpu", torch.float16).contiguous(),
                "variants": torch.tensor(batch.variants[i], dtype=torch.int64),
                "size": batch.size[i].contiguous(),
                "crop": batch.crop[i].contiguous(),
            }
            if pooled:
                tensors["pooled"] = pooled[i].to("cpu", torch.float16).contiguous()
            if flipped is not None:
                tensors["moments_flipped"] = flipped[i].cpu().contiguous()
            meta = json.dumps({**batch.meta[i], "contexts": batch.captions[i]}, ensure_ascii=False)
            self._waiting[key] = {"safetensors": save(tensors), "json": meta.encode()}
            self._next = batch.number[i] + 1
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
    if (Path(folder) / MANIFEST).exists() and not read_manifest(Path(folder))["complete"]:
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
    manifests = [read_manifest(each) for each in folders]
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
