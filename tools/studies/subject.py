"""What the studies measure, and how: a model's pictures against the real ones whose captions it is asked for.

Each cell of a study is one way to draw; pictures and figures are those of scripts/evaluate.py, by the same code. All
cells have the same captions, in turn, and the seeds 0, 1, ...; what is in the folder already is not drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldm
from ldm.api import LatentDiffusion
from ldm.data.samples import decode_picture
from ldm.data.transforms import to_tensor
from ldm.image_io import grid, save_png
from ldm.jobs import Settings
from ldm.metrics.crew import Crew
from ldm.metrics.drawing import Drawing, settle
from ldm.metrics.figures import Measures
from ldm.metrics.generation import Against, evaluate_pictures
from ldm.metrics.sources import of_files, open_source, read_captions
from ldm.metrics.spaces import make_space
from ldm.metrics.sweep import Cell, measure, name_of

SPACE = "efficientnet-lite0"
BATCH = 20  # pictures that are drawn at once
SHOWN = 8  # pictures of each cell in the grids


@dataclass(frozen=True, eq=False)
class Subject:
    """A model beside real pictures, and where what is made of it lies."""

    model: LatentDiffusion
    captions: tuple[str, ...]
    against: Against
    folder: Path
    crew: Crew

    def cell(self, varied: Mapping[str, Any], settings: Settings, count: int) -> Cell:
        """`count` pictures under `settings`, of which `varied` is what the study varies."""
        return Cell(name_of(varied), dict(varied), Drawing(self.captions, settings, count, batch_size=BATCH))

    def measure(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """A row of the table for each cell, in the order given; drawn in the order of their steps, cheap ones first."""
        cheap = sorted(cells, key=lambda cell: cell.drawing.settings.steps or 0)
        rows = measure(self.model, cheap, self.against, self.folder, self.crew)
        return [rows[cheap.index(cell)] for cell in cells] if rows else []

    def autoencoder_alone(self) -> dict[str, float]:
        """The same figures of the real pictures encoded and decoded, which no way to draw can be better than."""
        real, folder, side = self.against.real, self.folder / "autoencoder", self.model.config.image_size
        if self.crew.main:
            settle(folder / "drawing.json", {"model": self.model.hash, "pictures": real.digest})
        self.crew.wait()
        paths = []
        for first in range(0, len(real), BATCH):
            numbers, images = real.images(first, first + BATCH, side)
            here = [folder / f"{number:07d}.png" for number in numbers]
            paths += here
            if self.crew.main and not all(path.exists() for path in here):
                with torch.no_grad():
                    decoded = self.model.codec.decode(
                        self.model.codec.encode(torch.stack(images).to(self.model.device))
                    )
                for path, image in zip(here, decoded, strict=True):
                    save_png(image, path)
        self.crew.wait()
        source = of_files(str(folder), paths, [""] * len(paths))
        return evaluate_pictures(source, side, self.against, self.crew)["figures"]

    def save_grid(self, cells: Sequence[Cell], name: str) -> None:
        """The first pictures of each cell, a row for each, as a PNG."""
        paths = [path for cell in cells for path in sorted((self.folder / cell.name).rglob("*.png"))[:SHOWN]]
        images: list[Tensor] = [to_tensor(decode_picture(path.read_bytes())) for path in paths]
        save_png(grid(torch.stack(images), columns=SHOWN), self.folder / name)


def make_subject(
    model: str,
    shards: str,
    where: Mapping[str, Sequence[str]],
    precision: str,
    folder: Path,
    crew: Crew,
    measures: Measures,
    most: int | None = None,
) -> Subject:
    """With all the real pictures, or the first `most`. Raises UserError for a model or shards that cannot be read."""
    loaded = ldm.load(model, precision=precision)
    real = open_source(shards, "--shards", where)
    real = replace(real, items=real.items[:most])
    space = make_space(SPACE, loaded.device.type)
    against = Against(real, None, [space], measures.check(), folder / "features")
    return Subject(loaded, read_captions(shards, where), against, folder, crew)
