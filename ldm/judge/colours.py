"""Whether a picture has the background that its prompt names, by the mean colour of its border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.plain import read_yaml_text

UNASKED = "white"  # the background of pictures whose captions name none
FRAME = 32  # the border is one of so many parts of a side wide

Colours = Mapping[str, tuple[int, int, int]]


def read_colours(path: str | Path) -> Colours:
    """The named colours of a YAML file, as `red: [220, 38, 38]`. Raises UserError."""
    import yaml

    found = yaml.safe_load(read_yaml_text(path))
    if not isinstance(found, dict) or not all(_is_colour(name, value) for name, value in found.items()):
        raise UserError(f"{path} must name colours by red, green and blue from 0 to 255, as: red: [220, 38, 38]")
    if len(found.keys() - {UNASKED}) < 1 or len(found) < 2:
        raise UserError(f"{path} must name two colours at least, between which a border can be judged")
    return {name: (value[0], value[1], value[2]) for name, value in found.items()}


def _is_colour(name: object, value: object) -> bool:
    numbers = value if isinstance(value, list) else []
    return isinstance(name, str) and len(numbers) == 3 and all(type(n) is int and 0 <= n <= 255 for n in numbers)


def on_background(colour: str) -> str:
    """The end of a phrase: " on an orange background"."""
    return f" on {'an' if colour[:1] in 'aeiou' else 'a'} {colour} background"


def border(image: Tensor) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1] -> the mean colour of their outermost pixels (N, 3), from 0 to 255."""
    height, width = image.shape[-2:]
    down, across = max(1, height // FRAME), max(1, width // FRAME)
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[down : height - down, across : width - across] = True
    return (image[:, :, ~inside].double().mean(-1) + 1) * 127.5


def colour_ranks(image: Tensor, named: Sequence[str], colours: Colours) -> Tensor:
    """(N,): how many of `colours` are nearer to each picture's border than the one named; a tie counts against it."""
    values = torch.tensor(list(colours.values()), dtype=torch.float64)
    distance = (border(image).unsqueeze(1) - values).square().sum(-1)
    places = {name: place for place, name in enumerate(colours)}
    own = torch.tensor([places[name] for name in named], dtype=torch.long)
    nearer = distance <= distance.gather(1, own.unsqueeze(1))
    return nearer.sum(1) - 1
