"""Pictures of a model, drawn to be measured: a folder of PNGs that several processes fill and that can be gone on with.

Picture i has the caption i and the label i (in turn) and the seed `seed + i`, and is drawn in the batch of the pictures
[k batch_size, (k + 1) batch_size) that it belongs to, always whole: so it is the same bits however many pictures are
asked for and however many processes draw them.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from ldm import generate
from ldm.errors import UserError
from ldm.files import Taken, atomic_write_text, read_text
from ldm.helpers import Helpers, open_helpers
from ldm.image_io import save_png
from ldm.jobs import Plan, Request, Settings
from ldm.jobs.catalogue import own_grid
from ldm.metrics.crew import Crew
from ldm.metrics.sources import Source, of_files
from ldm.model import Model
from ldm.provenance import surroundings
from ldm.ranges import MAX_SEED

ALWAYS = ("cfg", "steps", "sampler", "spacing", "options")


@dataclass(frozen=True)
class Drawing:
    """What is drawn: `count` pictures of `captions`, or of `labels`, or of both in turn, under `settings`."""

    captions: tuple[str, ...]
    settings: Settings
    count: int
    seed: int = 0
    batch_size: int = 16
    captions_from: str = ""  # what the captions were read from, as the user named it; nothing depends on it
    labels: tuple[str, ...] = ()  # of a model with classes

    def check(self) -> Drawing:
        """The same; raises UserError for pictures that cannot be drawn."""
        if self.count < 1 or self.batch_size < 1:
            raise UserError(f"{self.count} pictures in batches of {self.batch_size} were asked for; choose 1 or more")
        if not 0 <= self.seed <= MAX_SEED - self.count:
            raise UserError(f"the first seed is {self.seed}; choose it between 0 and {MAX_SEED - self.count}")
        self.settings.check()
        return self

    def plan(self, model: Model) -> Plan:
        """Of the settings, and of what they leave to the model."""
        return self.settings.of(model.config.drawing).plan()

    def requests(self, first: int, count: int) -> list[Request]:
        """Pictures first to first + count."""
        texts, labels = self.captions or ("",), self.labels or (None,)
        return [
            Request(texts[i % len(texts)], seed=self.seed + i, label=labels[i % len(labels)])
            for i in range(first, first + count)
        ]

    def protocol(self, model: Model) -> dict[str, Any]:
        """All that the pictures depend on, but for the model, which is what is measured."""
        settings, usual = asdict(self.settings.of(model.config.drawing).check()), asdict(Settings())
        settings["spacing"] = settings["spacing"] or own_grid(settings["sampler"], model.law.schedule.is_flow)
        side = model.config.image_size
        made_on = surroundings(model)
        return {
            **{name: settings[name] for name in ALWAYS},
            # Of the others those that say something, so that a setting added later makes no old drawing another.
            **{name: value for name, value in settings.items() if name not in ALWAYS and value != usual[name]},
            "width": settings["width"] or side,
            "height": settings["height"] or side,
            "captions": len(self.captions),
            "captions_hash": hashlib.sha256(json.dumps(self.captions).encode()).hexdigest(),
            **({"labels": list(self.labels)} if self.labels else {}),
            "first_seed": self.seed,
            "batch_size": self.batch_size,
            "device": made_on["device"],
            "precision": made_on["precision"],
        }


def draw(model: Model, drawing: Drawing, folder: Path, crew: Crew, bar: bool = False) -> Source:
    """Draw what is missing in `folder`; all its `drawing.count` pictures.

    Raises UserError if the folder holds pictures that were drawn otherwise, and for what cannot be drawn.
    """
    drawing.check()
    for label in drawing.labels:
        model.encoder.number(label)  # UserError for one that it does not know
    if crew.main:
        settle(folder / "drawing.json", {"model": model.hash, **drawing.protocol(model)})
    crew.wait()
    helpers = open_helpers(model, drawing.plan(model))
    starts = range(0, drawing.count, drawing.batch_size)
    for piece in tqdm(list(crew.mine(len(starts))), unit="batch", disable=not (bar and crew.main), leave=False):
        first = starts[piece]
        wanted = range(first, min(first + drawing.batch_size, drawing.count))
        if all(_path(folder, i).exists() for i in wanted) and (first or (folder / "cost.json").exists()):
            continue
        images, rows = _batch(model, drawing, first, helpers)
        for i in wanted:
            save_png(images[i - first], _path(folder, i))  # without settings inside: equal pictures are equal files
        if first == 0:
            cost = {"evaluations": rows / drawing.batch_size}
            atomic_write_text(folder / "cost.json", json.dumps(cost) + "\n")
    crew.wait()
    numbers = range(drawing.count)
    captions = [request.prompt for request in drawing.requests(0, drawing.count)]
    return of_files(str(folder), [_path(folder, i) for i in numbers], captions)


def evaluations(folder: Path) -> float:
    """Rows that the U-Net was given for a picture, counted in the first batch: guidance counts twice.

    Raises UserError if the file that tells is damaged.
    """
    path = folder / "cost.json"
    try:
        return float(json.loads(read_text(path))["evaluations"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged; remove it, and the first batch will be drawn again") from error


def settle(path: Path, document: dict[str, Any]) -> None:
    """Write `document` to `path`, or see that it is what stands there; raises UserError if it is not, or is damaged."""
    wanted = json.loads(json.dumps(document))
    if not path.exists():
        with suppress(Taken):  # by another process, which may be about to draw otherwise
            atomic_write_text(path, json.dumps(wanted, indent=1) + "\n", new=True)
            return
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}), so it is unknown how these pictures were made; remove them"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} does not say how its pictures were made; choose another folder")
    other = sorted(name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name))
    if other:
        raise UserError(f"{path.parent} has pictures made with another {' and '.join(other)}; choose another folder")


def _batch(model: Model, drawing: Drawing, first: int, helpers: Helpers) -> tuple[Tensor, int]:
    rows = 0

    def count(network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal rows
        rows += len(inputs[0])

    hook = model.unet.register_forward_hook(count)
    try:
        requests = drawing.requests(first, drawing.batch_size)
        return generate.draw(model, requests, drawing.plan(model), helpers, drawing.batch_size), rows
    finally:
        hook.remove()


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number // 1000:04d}" / f"{number:07d}.png"
