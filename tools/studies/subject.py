"""What the studies look at: a model, the prompts it is asked, and the real pictures that its own are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ldm
from ldm.config import DiffusionTraining
from ldm.config import load as load_config
from ldm.jobs import Request
from ldm.metrics.distances import frechet, kernel
from ldm.metrics.features import FeatureSpace, make_space
from ldm.metrics.pictures import read_pictures
from ldm.model import LatentDiffusion
from ldm.options import parse_where


@dataclass(frozen=True, eq=False)
class Subject:
    """A model beside the real pictures whose captions it is asked for."""

    model: LatentDiffusion
    space: FeatureSpace
    captions: tuple[str, ...]
    reference: Tensor  # (N, D): features of the real pictures
    floor: Tensor  # (N, D): the same after the autoencoder, which no sampler can do better than

    def distances(self, features: Tensor, subset: int) -> dict[str, float]:
        """Of features (N, D) from the reference: the Frechet distance, the kernel distance and its deviation."""
        mean, deviation = kernel(features, self.reference, size=subset)
        return {"frechet": frechet(features, self.reference), "kernel": mean, "kernel_deviation": deviation}


def requests(captions: Sequence[str], first: int, count: int) -> list[Request]:
    """Pictures `first` to `first + count`: picture i has the caption i, in turn, and the seed i."""
    return [Request(captions[i % len(captions)], seed=i) for i in range(first, first + count)]


def where_of(recipe: str, words: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """What the model was trained on: `words` of the form field=value, or else data.where of the training recipe."""
    return parse_where(words) if words else load_config(DiffusionTraining, recipe).data.where


def make_subject(
    model: str,
    shards: str,
    where: Mapping[str, Sequence[str]],
    precision: str,
    most: int | None = None,
    space: str = "efficientnet-lite0",
) -> Subject:
    """With all the real pictures, or the first `most`. Raises UserError for a model or shards that cannot be read."""
    loaded, found = ldm.load(model, precision=precision), make_space(space)
    codec, device = loaded.codec, loaded.device
    real = read_pictures(shards, where, loaded.config.image_size)
    image = real.image[:most]
    with torch.no_grad():
        decoded = [codec.decode(codec.encode(part.to(device))).cpu() for part in image.split(32)]
    return Subject(loaded, found, real.caption, found(image), found(torch.cat(decoded)))
