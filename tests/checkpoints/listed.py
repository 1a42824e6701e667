"""Published lists of tensors, names and shapes alone, opened as if they were files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints import original, original_file
from ldm.checkpoints.record import Checkpoint
from ldm.checkpoints.state import Shape
from ldm.config import ScheduleConfig

FIXTURE = Path(__file__).parents[1] / "fixtures" / "state_dicts" / "stable_diffusion.json.gz"
LISTS: dict[str, dict[str, list[int]]] = json.loads(gzip.decompress(FIXTURE.read_bytes()))
SCHEDULE = original.tables(ScheduleConfig())


class Listed(Mapping[str, Tensor]):
    """A file of which only names and shapes are known, and a few tensors: the tables of its schedule."""

    def __init__(self, shapes: Mapping[str, list[int]], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]):
        self.shapes, self.metadata, self.tensors = shapes, dict(metadata), tensors
        self.path = Path("sd.ckpt")

    def form(self, name: str) -> tuple[torch.dtype, Shape]:
        return torch.float32, tuple(self.shapes[name])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def opened(
    shapes: Mapping[str, list[int]],
    weights: str = "auto",
    words: Mapping[str, str] | None = None,
    path: Path = Path("sd.ckpt"),
    decided: Collection[str] = (),
    tensors: Mapping[str, Tensor] = SCHEDULE,
) -> Checkpoint:
    """The checkpoint of these shapes, with `words` in its metadata, as if it lay at `path`."""
    listed = Listed(shapes, words or {}, tensors)
    return original_file.open_original(path, listed, weights, decided)  # type: ignore[arg-type]
