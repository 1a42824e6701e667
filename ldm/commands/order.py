"""What was given -> what is to be drawn: the batches, each with the picture that it begins with. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm import jobs, provenance
from ldm.commands import files
from ldm.commands.words import REPRODUCIBLE, beginning_of, flag, requests_of, settings_of
from ldm.errors import UserError
from ldm.jobs import Beginning, Request, Settings, grammar
from ldm.jobs.values import real
from ldm.provenance import Recipe


@dataclass(frozen=True)
class Batch:
    """What is drawn at once: the requests, the picture that they begin with, and the pictures' names where it has
    named them (else they are numbered)."""

    requests: Sequence[Request]
    init: Path | None = None
    names: Sequence[str] = ()
    other: Path | None = None  # a second picture, and how far each request lies towards it
    shares: Sequence[float] = ()


@dataclass(frozen=True)
class Order:
    """All that is to be drawn, and how."""

    batches: Sequence[Batch]
    settings: Settings
    begin: Beginning = Beginning()
    mask: Path | None = None
    alpha: bool = False  # without a mask, what is transparent is drawn
    recipe: Recipe | None = None
    depth: Path | None = None

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch.requests]


def ordered(
    given: Mapping[str, Any], usual: Beginning = Beginning(), alpha: bool = False, needed: bool = True
) -> Order:
    """What was given of a command that begins with pictures (where "init" is given) or without.

    `usual`: the command's defaults; `alpha`: whether what is transparent is a mask; `needed`: whether a prompt is.
    Raises UserError.
    """
    if "reproduce" in given:
        return _again(given)
    settings, begin = settings_of(given), beginning_of(given, usual)
    size = given.get("batch_size", 4)
    if "init" not in given:
        return Order([Batch(some) for some in jobs.batches(requests_of(given, needed), size)], settings, begin)
    paths = files.inits(given["init"])
    one = len(paths) == 1 and not Path(given["init"][0]).is_dir()
    wanted = [requests_of(given if needed else {**words_within(path, given), **given}, needed) for path in paths]
    named = [[] if one else each for each in files.names(paths, len(wanted[0]))]
    batches = [
        Batch(some, path, names[i * size : i * size + len(some)])
        for path, requests, names in zip(paths, wanted, named, strict=True)
        for i, some in enumerate(jobs.batches(requests, size))
    ]
    mask, depth = (Path(given[name]) if name in given else None for name in ("mask", "depth"))
    for path in filter(None, (mask, depth)):
        files.check(path)
    return Order(batches, settings, begin, mask, alpha, depth=depth)


def words_within(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt inside a picture that was drawn here, where none is given; else nothing."""
    if {"prompt", "label", "from_file"} & set(given):
        return {}
    try:
        request = provenance.read(path).request
    except UserError:
        return {}
    label = {} if request.label is None else {"label": [str(request.label)]}
    return {"prompt": [request.prompt], "negative": request.negative, **label}


def varied(given: Mapping[str, Any], amount: float) -> Order:
    """Pictures near to that of one seed: their noise lies the share `amount` of the way to that of the seeds after it.

    Raises UserError."""
    if "reproduce" in given or "init" in given:
        raise ValueError("seeds are varied where there is no picture")
    requests, size = requests_of(given), given.get("batch_size", 4)
    first = given.get("seed", requests[0].seed)
    near = [dataclasses.replace(r, seed=first, variation=(r.seed + 1, amount)).check() for r in requests]
    return Order([Batch(some) for some in jobs.batches(near, size)], settings_of(given))


def between(given: Mapping[str, Any], usual: Beginning, frames: int) -> Order:
    """`frames` pictures on the way from the first prompt, seed or picture to the last, both ends included.

    Of each there may be one, which then stays, or as many as of the others that are more than one. Pictures are mixed
    where they are noised to the level of the strength, each with a seed's noise of its own. Raises UserError.
    """
    if "reproduce" in given:
        return _again(given)
    paths = files.inits(given.get("init", []))
    prompts = given.get("prompt", [""] if paths else [])
    if not prompts:
        raise UserError("say what to draw: --prompt TEXT, twice or more for the way from one to the other")
    if any(len(grammar.clauses(prompt)) > 1 for prompt in prompts):
        raise UserError("there is no way between prompts that are joined by AND; give them without")
    if len(given.get("label", ())) > 1:
        raise UserError("there is no way between labels; give one --label, which stays")
    seeds = given.get("seeds", [0])
    counts = {"prompts": len(prompts), "seeds": len(seeds), "pictures": len(paths)}
    stops = max(counts.values())
    if stops < 2:
        raise UserError("there is no way between one and itself; give two of --prompt, --seeds or --init")
    if any(count not in (0, 1, stops) for count in counts.values()) or len(paths) == 1:
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        raise UserError(f"{said} were given; give as many of each, or one that stays (of pictures two or more)")
    if frames < 2:
        raise UserError(f"{frames} frames were asked for; choose 2 or more")
    if len(seeds) == 1 and paths:
        seeds = [seeds[0] + i for i in range(stops)]
    prompts, seeds = (list(each) * (stops if len(each) == 1 else 1) for each in (prompts, seeds))
    if not paths and len({*zip(prompts, seeds, strict=True)}) == 1:
        raise UserError("there is no way between one and itself; give another prompt, seed or picture")
    ways: list[list[tuple[Request, float]]] = [[] for _ in range(stops - 1)]
    for frame in range(frames):
        place = frame * (stops - 1) / (frames - 1)
        way = min(int(place), stops - 2)
        share = place - way
        toward = (prompts[way + 1], share) if prompts[way + 1] != prompts[way] else None
        variation = (seeds[way + 1], share) if seeds[way + 1] != seeds[way] else None
        label = given["label"][0] if "label" in given else None
        request = Request(prompts[way], given.get("negative", ""), seeds[way], label, toward, variation).check()
        ways[way].append((request, share))
    batches, size = [], given.get("batch_size", 4)
    for way, some in enumerate(ways):
        for i, requests in enumerate(jobs.batches([request for request, _ in some], size)):
            shares = [share for _, share in some[i * size : (i + 1) * size]]
            batches.append(Batch(requests, paths[way], (), paths[way + 1], shares) if paths else Batch(requests))
    return Order(batches, settings_of(given), beginning_of(given, usual) if paths else Beginning())


def _again(given: Mapping[str, Any]) -> Order:
    """What makes the picture of --reproduce again."""
    recipe = provenance.read(given["reproduce"])
    named = {name for name in ("guide_model", "refiner") if getattr(recipe.settings, name)}  # where the same lie here
    taken = sorted(set(given) - REPRODUCIBLE - named)
    if taken:
        raise UserError(f"{flag(taken[0])} does not go with --reproduce, which reads it in the file")
    provenance.refuse_to_fetch(recipe, given)
    others = {name: given.get(name, getattr(recipe.settings, name)) for name in ("guide_model", "refiner")}
    settings = dataclasses.replace(recipe.settings, **others)
    began = recipe.inputs.get("init")
    if began is None and {"init", "mask", "depth"} & set(given):
        raise UserError(f"{given['reproduce']} was drawn of a prompt alone; leave --init, --mask and --depth out")
    if ("depth" in recipe.inputs) != ("depth" in given):
        name = recipe.inputs.get("depth", {}).get("name")
        what = f"with the depth map {name}; give it as" if name else "without a depth map; leave out"
        raise UserError(f"{given['reproduce']} was drawn {what} --depth")
    if began is not None and "init" not in given:
        raise UserError(
            f"{given['reproduce']} began with the picture {began.get('name')}; give it to img2img as --init"
        )
    paths = files.inits(given.get("init", []))
    other = recipe.inputs.get("other")
    count = len(paths)
    if count != (0 if began is None else 1 if other is None else 2):
        raise UserError(
            f"{given['reproduce']} began with {1 if other is None else 2} pictures, and --init names {len(paths)}"
        )
    mask, depth = (Path(given[name]) if name in given else None for name in ("mask", "depth"))
    alpha = "mask" in recipe.inputs and "alpha" in recipe.inputs["mask"]
    batch = Batch(recipe.batch, paths[0] if paths else None)
    if other is not None:
        share = float(real(other.get("share"), "the share of the second picture"))
        if not 0 <= share <= 1:
            raise UserError(f"{given['reproduce']} has a share of {share:g} of its second picture: that cannot be")
        shares = [share] * len(recipe.batch)
        batch = Batch(recipe.batch, paths[0], (), paths[1], shares)
    return Order([batch], settings, recipe.begin, mask, alpha, recipe, depth)
