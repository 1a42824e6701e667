"""Tables of pictures: each cell is one way to draw, and its pictures are compared with the real ones as a set.

A batch of a cell is a file of its own, so a study that was stopped goes on where it was, and may be drawn by several
processes. Picture i of every cell has the caption i (in turn) and the seed i.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

import ldm
from ldm import errors
from ldm.errors import UserError
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.generate import draw as draw_pictures
from ldm.jobs import Settings
from ldm.metrics.features import FeatureSpace, make_space
from ldm.model import LatentDiffusion
from studies.subject import Subject, requests

SHOWN = 8  # pictures of each cell that are kept to be looked at


@dataclass(frozen=True)
class Cell:
    """`count` pictures drawn under `settings`."""

    name: str
    settings: Settings
    count: int


@dataclass(frozen=True)
class Protocol:
    """What the figures depend on; a folder of results belongs to one."""

    model: str
    hash: str
    shards: str
    where: dict[str, list[str]]
    precision: str
    cells: tuple[Cell, ...]
    batch: int = 40
    subset: int = 100  # of the kernel distance
    space: str = "efficientnet-lite0"


@dataclass(frozen=True)
class Unit:
    """One batch of one cell."""

    cell: Cell
    first: int
    count: int

    def path(self, folder: Path) -> Path:
        return folder / self.cell.name / f"{self.first:05d}.safetensors"


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is there of a cell: features (N, D), the first pictures, evaluations of the network for each picture."""

    features: Tensor
    images: Tensor
    evaluations: float


def units(protocol: Protocol) -> list[Unit]:
    """Few steps first, and cells of as many steps in turn: an unfinished table is a table of fewer pictures."""
    made = [
        Unit(cell, first, min(protocol.batch, cell.count - first))
        for cell in protocol.cells
        for first in range(0, cell.count, protocol.batch)
    ]
    return sorted(made, key=lambda unit: (unit.cell.settings.steps, unit.first))


def draw(protocol: Protocol, subject: Subject, folder: Path, processes: int) -> None:
    """Draw what is missing in `folder`. Raises UserError if it holds another protocol's results."""
    _settle(protocol, folder)
    missing = [unit for unit in units(protocol) if not unit.path(folder).exists()]
    if missing and processes > 1:
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // processes)
        parts = [(protocol, subject.captions, folder, missing[i::processes], threads) for i in range(processes)]
        workers = [context.Process(target=_work_alone, args=part) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise UserError(f"a process that drew pictures ended early; call again to go on from {folder}")
    elif missing:
        _work(subject.model, subject.space, subject.captions, folder, missing)


def collect(protocol: Protocol, folder: Path) -> Iterator[tuple[Cell, Drawn]]:
    """The cells of which enough is there to be compared, in the protocol's order."""
    for cell in protocol.cells:
        paths = [unit.path(folder) for unit in units(protocol) if unit.cell == cell and unit.path(folder).exists()]
        features, images, evaluations = [], [], 0.0
        for path in paths:
            with safe_open(path, "pt") as file:
                features.append(file.get_tensor("features"))
                images.append(file.get_tensor("images"))
                evaluations = float((file.metadata() or {}).get("evaluations", "nan"))
        if sum(map(len, features)) >= protocol.subset:
            yield cell, Drawn(torch.cat(features), images[0], evaluations)


def figures(protocol: Protocol, subject: Subject, folder: Path) -> dict[str, dict[str, float]]:
    """Each cell's distances from the real pictures, and as "autoencoder alone" those of the decoded real ones.

    They are written into `folder` too, with the protocol.
    """
    found = {"autoencoder alone": {"pictures": len(subject.floor), **subject.distances(subject.floor, protocol.subset)}}
    for cell, drawn in collect(protocol, folder):
        counts = {"pictures": len(drawn.features), "evaluations": drawn.evaluations}
        found[cell.name] = {**counts, **subject.distances(drawn.features, protocol.subset)}
    document = {"figures": found, "protocol": {**asdict(protocol), "real pictures": len(subject.reference)}}
    atomic_write_text(folder / "figures.json", json.dumps(document, indent=1) + "\n")
    return found


def _settle(protocol: Protocol, folder: Path) -> None:
    path, wanted = folder / "protocol.json", json.loads(json.dumps(asdict(protocol)))
    if not path.exists():
        atomic_write_text(path, json.dumps(wanted, indent=1) + "\n")
        return
    found = json.loads(path.read_text("utf-8"))
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        raise UserError(f"{folder} holds results of another {' and '.join(other)}; give another --output")


def _work_alone(protocol: Protocol, captions: Sequence[str], folder: Path, todo: list[Unit], threads: int) -> None:
    def work() -> None:
        torch.set_num_threads(threads)
        model = ldm.load(protocol.model, precision=protocol.precision)
        _work(model, make_space(protocol.space), captions, folder, todo)

    errors.run(work)


def _work(model: LatentDiffusion, space: FeatureSpace, captions: Sequence[str], folder: Path, todo: list[Unit]) -> None:
    rows = 0

    def count(network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal rows
        rows += len(inputs[0])

    hook = model.unet.register_forward_hook(count)
    for unit in tqdm(todo, unit="batch"):
        rows = 0
        images = draw_pictures(model, requests(captions, unit.first, unit.count), unit.cell.settings, unit.count)
        tensors = {"features": space(images), "images": images[:SHOWN].clone(memory_format=torch.contiguous_format)}
        atomic_write_bytes(unit.path(folder), save(tensors, {"evaluations": str(rows / unit.count)}))
    hook.remove()
