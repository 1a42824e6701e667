"""Real pictures of named concepts, read out of shards: what classifiers learn from and prototypes are made of."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.samples import decode, fault
from ldm.data.shards import BadSample, ShardReader, Tally, open_set
from ldm.data.transforms import square, to_tensor
from ldm.errors import UserError
from ldm.plain import read_yaml_text


@dataclass(frozen=True)
class Pictures:
    """Pictures with the `name` (the concept) and `style` of their json, in the order of the shards."""

    image: Tensor  # (N, 3, size, size) in [-1, 1]
    name: tuple[str, ...]
    style: tuple[str, ...]
    caption: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.name)

    def of(self, names: Sequence[str], styles: Sequence[str]) -> Pictures:
        """The pictures whose concept and style are among these."""
        kept = [
            i for i, (name, style) in enumerate(zip(self.name, self.style, strict=True))
            if name in set(names) and style in set(styles)
        ]  # fmt: skip
        name, style, caption = (tuple(column[i] for i in kept) for column in (self.name, self.style, self.caption))
        return Pictures(self.image[kept], name, style, caption)

    def labels(self, names: Sequence[str]) -> Tensor:
        """(N,) long: the place of each picture's concept in `names`."""
        place = {name: i for i, name in enumerate(names)}
        return torch.tensor([place[name] for name in self.name], dtype=torch.long)


def read_pictures(shards: str, where: Mapping[str, Sequence[str]], size: int) -> Pictures:
    """All pictures of `shards` that `where` lets through and that carry a name and a style, at `size` pixels.

    What does not decode is counted, logged and left out. Raises UserError when nothing is left.
    """
    found = open_set(shards, "--shards", fault, where)
    tally = Tally()
    rows: list[tuple[Tensor, str, str, str]] = []
    with ShardReader(found.shards) as reader:
        for shard, index in enumerate(found.shards):
            for number, key in enumerate(index.keys):
                try:
                    sample = decode(reader.read(shard, number), "txt", random.Random(0))
                except BadSample as error:
                    tally.note(str(error), key, str(index.path))
                    continue
                if not {"name", "style"} <= sample.meta.keys():
                    tally.note("no name or style in its json", key, str(index.path))
                    continue
                image = to_tensor(square(sample.picture, size))
                rows.append((image, str(sample.meta["name"]), str(sample.meta["style"]), sample.caption))
    if not rows:
        raise UserError(f"no sample of {shards} can be used ({tally}); each needs a name and a style in its json")
    images, names, styles, captions = zip(*rows, strict=True)
    return Pictures(torch.stack(images), names, styles, captions)


def read_concepts(path: str | Path) -> tuple[str, ...]:
    """The concept names of a YAML file: a list of different words. Raises UserError."""
    import yaml

    names = yaml.safe_load(read_yaml_text(path))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} must be a list of concept names, one on each line, as: - red heart")
    if len(set(names)) != len(names):
        raise UserError(f"{path} names a concept twice; remove one of the two")
    return tuple(names)
