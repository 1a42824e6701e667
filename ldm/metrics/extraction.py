"""Features of a source, computed once: pieces of 512 pictures, each a file, shared out among processes and kept.

The folder of a source's features is named by all that they depend on: the pictures' contents, their size, the space
and its weights. So those of the real side are there already when the next model is measured, and a run that was
stopped goes on. Nothing is held in memory but what a figure asks for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import atomic_write_bytes
from ldm.metrics.crew import Crew
from ldm.metrics.features import FeatureSpace
from ldm.metrics.moments import Moments
from ldm.metrics.sources import RESIZE, Source

logger = logging.getLogger(__name__)

PIECE = 512  # pictures in a file
CACHE = Path.home() / ".cache" / "ldm" / "features"


@dataclass(frozen=True, eq=False)
class Features:
    """Those of a source in one space, in the order of its items, less what did not decode."""

    space: FeatureSpace
    paths: tuple[Path, ...]
    rows: tuple[int, ...]  # numbers of the items that decoded

    def __len__(self) -> int:
        return len(self.rows)

    def pieces(self) -> Iterator[Tensor]:
        """(N_i, width + logits)"""
        return (load_file(path)["features"] for path in self.paths)

    def moments(self) -> Moments:
        """Mean and covariance, in memory that does not grow with the count."""
        found = Moments.empty(self.space.width)
        for piece in self.pieces():
            found.update(piece[:, : self.space.width])
        return found

    def all(self) -> Tensor:
        """(N, width) float32"""
        return self._columns(0, self.space.width)

    def logits(self) -> Tensor:
        """(N, logits) float32"""
        return self._columns(self.space.width, self.space.width + self.space.logits)

    def _columns(self, first: int, end: int) -> Tensor:
        found, row = torch.empty(len(self), end - first), 0
        for piece in self.pieces():
            found[row : row + len(piece)] = piece[:, first:end]
            row += len(piece)
        return found


def extract(
    source: Source,
    size: int,
    space: FeatureSpace,
    cache: Path,
    crew: Crew,
    batch_size: int | None = None,
    bar: bool = False,
) -> Features:
    """Features of the pictures of `source`, brought to `size` pixels first; what is in `cache` is not made again.

    `batch_size`: of the network; None is the space's choice. What does not decode is left out. Raises UserError if that
    is everything.
    """
    what = [source.digest, size, RESIZE, space.name, space.hash, space.resize]
    folder = cache / f"{space.name}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"
    paths = tuple(folder / f"{piece:05d}.safetensors" for piece in range(-(-len(source) // PIECE)))
    for piece in tqdm(
        list(crew.mine(len(paths))), f"features [{space.name}]", unit="piece", disable=not (bar and crew.main)
    ):
        if not paths[piece].exists():
            rows, images = source.images(piece * PIECE, (piece + 1) * PIECE, size)
            made = space(torch.stack(images), batch_size) if images else torch.empty(0, space.width + space.logits)
            tensors = {"features": made, "rows": torch.tensor(rows, dtype=torch.long)}
            atomic_write_bytes(paths[piece], save(tensors))
    crew.wait()
    try:
        rows = tuple(int(row) for path in paths for row in load_file(path)["rows"])
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"the features kept in {folder} are damaged ({error}); remove that folder") from error
    if not rows:
        raise UserError(f"none of the {len(source)} pictures of {source.name} can be decoded")
    if crew.main and len(rows) < len(source):
        logger.warning("%d of the %d pictures of %s do not decode", len(source) - len(rows), len(source), source.name)
    return Features(space, paths, rows)
