"""The walk of the commands that draw: what was ordered -> pictures with their settings inside."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import image_io, provenance
from ldm.commands.opening import Opener, is_there, told
from ldm.commands.order import Order
from ldm.commands.words import adapters_of
from ldm.errors import UserError
from ldm.find import find
from ldm.helpers import Helpers, check_paths, open_helpers
from ldm.jobs import Plan, Request, catalogue
from ldm.model import CheckpointNotice

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.api import LatentDiffusion
    from ldm.metrics.crew import Crew
    from ldm.sampling import Step

Drawn = tuple["Tensor", Request, Path]
"""A picture (3, H, W), what it is of, and its file."""

After = Callable[["LatentDiffusion", Order, Sequence[Drawn], Path], None]
"""(model, order, pictures, folder): what is to be done when all are drawn."""


def draw(given: Mapping[str, Any], order: Order, after: After | None = None) -> None:
    """Draw what was ordered into --out. What can be wrong without a model is told before torch is imported.

    `after`: what is made of all of the pictures; a sheet, where that was asked for.
    """
    recipe = order.recipe
    folder = Path(given.get("out", "outputs"))
    name, vae = (
        given.get("model", recipe.model if recipe else "icons"),
        given.get("vae", recipe.vae if recipe else None),
    )
    for model in filter(None, (name, vae)):
        find(model)
    plan = order.settings.plan()
    check_paths(plan)
    adapters = recipe.adapters if recipe else adapters_of(given)
    image_io.check_folder(folder)

    import ldm
    from ldm.checkpoints.opening import parse_settings
    from ldm.metrics.crew import muster

    crew = muster()
    before = recipe.made_on if recipe else {}
    warnings.simplefilter("ignore", CheckpointNotice)  # said below, as all that is worth a warning
    model = ldm.load(
        name,
        given.get("device", before.get("device", "auto")),
        given.get("precision", before.get("precision", "auto")),
        vae=vae,
        attention=given.get("attention", before.get("attention", "sdpa")),
        backend=given.get("backend", before.get("backend", "torch") if recipe else "auto"),
        low_memory=given.get("low_memory", before.get("low_memory") is True),
        settings=parse_settings(given["set"]) if "set" in given else recipe.model_settings if recipe else {},
    )
    if adapters:
        from ldm.adapters import use

        model = use.apply(model, adapters)
    order = replace(order, settings=order.settings.of(model.config.drawing))
    plan = order.settings.plan()
    helpers = open_helpers(model, plan)
    if crew.main:
        told(_notices(model, order, plan, helpers))
    _draw(model, order, plan, helpers, folder, crew, after or sheet_wanted(given))


def _notices(model: LatentDiffusion, order: Order, plan: Plan, helpers: Helpers) -> list[str]:
    from ldm import generate

    found = [*model.notices, *helpers.notices, *order.settings.without_effect(order.requests)]
    for reader in (model, *helpers.readers):
        found += generate.prompt_notices(reader, order.requests, plan.weighted)
    if order.recipe is not None:
        found += provenance.differences(order.recipe, model, helpers.hashes)
    return found


def _draw(
    model: LatentDiffusion, order: Order, plan: Plan, helpers: Helpers, folder: Path, crew: Crew, after: After | None
) -> None:
    from tqdm import tqdm

    from ldm import redraw

    if after is not None and crew.world > 1:
        raise UserError("sheets and films are written by one process; leave them out, or the launcher")
    steps = 1 if order.begin.strength == 0 else plan.steps
    steps = plan.steps + steps if order.batches[0].init is None and order.begin.enlarge > 1 else steps
    mine = list(crew.mine(len(order.batches)))
    first = image_io.next_number(folder)
    crew.wait()  # until all have seen the same folder
    drawn: list[Drawn] = []
    open_one = Opener(model, order)
    with tqdm(
        total=len(mine) * steps, unit="step", disable=not sys.stderr.isatty() or not crew.main, leave=False
    ) as bar:

        def watch(walk: Iterator[Step]) -> Step:
            for step in walk:
                bar.update()
                if step.index + 1 == step.total:
                    return step
            raise AssertionError("a sampler yields as many steps as it says")

        for number in mine:
            batch = order.batches[number]
            settings, made, inputs = open_one(batch)
            rows = range(len(batch.requests)) if order.recipe is None else [order.recipe.place]
            records = {
                i: provenance.record(model, settings, batch.requests, i, helpers.hashes, order.begin, inputs[i])
                for i in rows
            }
            paths = {i: folder / batch.names[i] for i in rows if batch.names}
            there = {i for i, path in paths.items() if is_there(path, records[i])}
            for i in sorted(there):
                bar.write(f"{paths[i]}  is there already", file=sys.stdout)
            if paths and len(there) == len(paths):
                bar.update(steps)
                continue
            images = redraw.drawn(model, batch.requests, plan, order.begin, made, helpers, watch)
            for i in rows:
                place = first + sum(len(each.requests) for each in order.batches[:number]) + i
                if i in there:
                    continue
                record = provenance.with_size(records[i], images[i])
                if i in paths:
                    image_io.save_png(images[i], paths[i], record)
                path = paths.get(i) or image_io.save_numbered(
                    images[i], folder, record, first=place if crew.world > 1 else None
                )
                bar.write(f"{path}  seed {batch.requests[i].seed}", file=sys.stdout)
                sys.stdout.flush()
                if after is not None:
                    drawn.append((images[i], batch.requests[i], path))
    crew.wait()
    if after is not None and drawn:
        after(model, order, drawn, folder)


def sheet_wanted(given: Mapping[str, Any]) -> After | None:
    """Writes all pictures on one sheet, with labels or without, where that is asked for."""
    if not {"grid", "grid_labels"} & set(given):
        return None

    def sheet(model: LatentDiffusion, order: Order, drawn: Sequence[Drawn], folder: Path) -> None:
        import torch

        pictures, requests, paths = zip(*drawn, strict=True)
        if len({image.shape for image in pictures}) > 1:
            told(["the pictures are of several sizes, so there is no sheet of them"])
            return
        record = provenance.record_sheet(model, order.settings, requests)
        labels = [request.title for request in requests] if "grid_labels" in given else None
        whole = image_io.grid(torch.stack(pictures), labels=labels)
        print(image_io.save_numbered(whole, folder, record, "grid-", first=number_of(paths[0])))

    return sheet


def number_of(path: Path) -> int:
    """The number of a numbered picture; 0 of another."""
    return int(path.stem) if path.stem.isdecimal() else 0


def listed_samplers(given: Mapping[str, Any]) -> bool:
    """Whether --list-samplers was given, which is then done."""
    if given.get("list_samplers", False):
        print(catalogue.listing())
    return given.get("list_samplers", False)
