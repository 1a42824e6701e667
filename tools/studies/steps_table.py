"""The DDIM paper's table (Song et al. 2021, table 1): quality against eta and the number of steps."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

import ldm
from ldm import errors
from ldm.errors import UserError
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.generate import txt2img
from ldm.image_io import grid, save_png
from ldm.jobs import Settings
from ldm.metrics.features import FeatureSpace, make_space
from ldm.model import LatentDiffusion
from studies.plot import figure
from studies.subject import Subject, requests


@dataclass(frozen=True)
class Protocol:
    """What the figures depend on; a folder of results belongs to one."""

    model: str
    hash: str
    shards: str
    where: dict[str, list[str]]
    precision: str
    space: str = "efficientnet-lite0"
    cfg: float = 1.0
    spacing: str = "trailing"
    etas: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)
    steps: tuple[int, ...] = (10, 20, 50, 100, 1000)
    pictures: int = 1000  # a cell
    pictures_of_long: int = 200  # a cell of LONG steps or more
    batch: int = 40
    subset: int = 100  # of the kernel distance

    def count(self, steps: int) -> int:
        return self.pictures_of_long if steps >= LONG else self.pictures


def quick(protocol: Protocol) -> Protocol:
    """The same on a few pictures: what it prints says little."""
    return replace(protocol, etas=(0.0, 1.0), steps=(4, 12), pictures=16, pictures_of_long=16, batch=16, subset=16)


LONG = 500
SHOWN = 8  # pictures of each cell that are kept to be looked at


@dataclass(frozen=True)
class Unit:
    """One batch of one cell."""

    eta: float
    steps: int
    first: int
    count: int

    def path(self, folder: Path) -> Path:
        return folder / f"eta{self.eta:g}-steps{self.steps}" / f"{self.first:05d}.safetensors"


def units(protocol: Protocol) -> Iterator[Unit]:
    """Few steps first, and the etas in turn: a table that is not finished yet is a table of fewer pictures."""
    for steps in protocol.steps:
        for first in range(0, protocol.count(steps), protocol.batch):
            for eta in protocol.etas:
                yield Unit(eta, steps, first, min(protocol.batch, protocol.count(steps) - first))


def run(protocol: Protocol, subject: Subject, folder: Path, processes: int) -> None:
    """Draw what is missing in `folder`, then print the table of what is there and write it beside a plot and a grid.

    It may be stopped at any time and goes on where it was. Raises UserError if `folder` holds another protocol's.
    """
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
        _work(protocol, subject.model, subject.space, subject.captions, folder, missing)
    report(protocol, subject, folder)


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
        _work(protocol, model, make_space(protocol.space), captions, folder, todo)

    errors.run(work)


def _work(
    protocol: Protocol,
    model: LatentDiffusion,
    space: FeatureSpace,
    captions: Sequence[str],
    folder: Path,
    todo: list[Unit],
) -> None:
    for unit in tqdm(todo, unit="batch"):
        settings = Settings(protocol.cfg, unit.steps, "ddim", protocol.spacing, unit.eta)
        images = txt2img(model, requests(captions, unit.first, unit.count), settings, unit.count)
        _save(
            unit.path(folder),
            {"features": space(images), "images": images[:SHOWN].clone(memory_format=torch.contiguous_format)},
        )


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    atomic_write_bytes(path, save(tensors))


def report(protocol: Protocol, subject: Subject, folder: Path) -> dict[str, dict[str, float]]:
    """Print, plot and write what is in `folder`; figures by cell, and the floor that the autoencoder sets."""
    floor = {"pictures": len(subject.floor), **subject.distances(subject.floor, protocol.subset)}
    figures = {"autoencoder alone": floor}
    shown: dict[tuple[float, int], Tensor] = {}
    for eta, steps in product(protocol.etas, protocol.steps):
        found = [load_file(unit.path(folder)) for unit in units(protocol)
                 if (unit.eta, unit.steps) == (eta, steps) and unit.path(folder).exists()]  # fmt: skip
        features = torch.cat([part["features"] for part in found]) if found else torch.empty(0, subject.space.width)
        if len(features) >= protocol.subset:
            figures[cell(eta, steps)] = {"pictures": len(features), **subject.distances(features, protocol.subset)}
            shown[eta, steps] = found[0]["images"]
    for name, what in (("kernel", "KD x 1000"), ("frechet", "FD")):
        print(f"\n{what}[{protocol.space}] from {len(subject.reference)} real pictures, cfg {protocol.cfg:g}, "
              f"{protocol.spacing} grid (pictures drawn)")  # fmt: skip
        print(table(protocol, figures, name))
    document = {"figures": figures, "protocol": {**asdict(protocol), "reference": len(subject.reference)}}
    atomic_write_text(folder / "table.json", json.dumps(document, indent=1) + "\n")
    if shown:
        draw_plot(protocol, figures, folder / "table.png")
        rows = [shown[eta, steps] for steps in protocol.steps for eta in protocol.etas if (eta, steps) in shown]
        save_png(grid(torch.cat(rows), columns=SHOWN), folder / "grid.png", {})
        print(f"\nwrote table.json, table.png and grid.png (a row for each cell, steps by steps) into {folder}")
    return figures


def cell(eta: float, steps: int) -> str:
    return f"eta {eta:g}, {steps} steps"


def table(protocol: Protocol, figures: dict[str, dict[str, float]], name: str) -> str:
    """A Markdown table, a row for each eta, of the distance called `name`."""
    scale, digits = (1000, 1) if name == "kernel" else (1, 1)

    def show(row: dict[str, float] | None) -> str:
        return "-" if row is None else f"{row[name] * scale:.{digits}f} ({row['pictures']:.0f})"

    lines = [["eta", *(f"{steps} steps" for steps in protocol.steps)], ["---"] * (len(protocol.steps) + 1)]
    lines += [[f"{eta:g}", *(show(figures.get(cell(eta, steps))) for steps in protocol.steps)] for eta in protocol.etas]
    floor = f"autoencoder alone: {show(figures['autoencoder alone'])}"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{floor}"


def draw_plot(protocol: Protocol, figures: dict[str, dict[str, float]], path: Path) -> None:
    with figure(path, "steps", f"kernel distance x 1000 [{protocol.space}]") as axes:
        for eta in protocol.etas:
            cells = [(steps, figures[cell(eta, steps)]) for steps in protocol.steps if cell(eta, steps) in figures]
            axes.plot([s for s, _ in cells], [1000 * row["kernel"] for _, row in cells], "o-", label=f"eta {eta:g}")
        floor = 1000 * figures["autoencoder alone"]["kernel"]
        axes.axhline(floor, color="gray", linestyle=":", label="autoencoder alone")
        axes.set_xscale("log")
        axes.legend()
